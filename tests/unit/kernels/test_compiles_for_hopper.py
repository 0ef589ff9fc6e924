"""Every kernel compiles for the GPUs we mean, without spilling and within their shared memory. No GPU is needed.

A family's calls stand in `tests/support/compile_FAMILY_cases.py`; a new family needs a row in `FAMILIES`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest
from support.compile_only import SHARED_LIMIT_BYTES, compiled_rows

FAMILIES = ["matmul"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@cache
def rows_of(family):
    return compiled_rows([family])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_for_both_architectures(family):
    assert {row.capability for row in rows_of(family)} == {80, 90}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_kernel_spills_registers(family):
    spilling = [row for row in rows_of(family) if row.local_bytes or row.stack_bytes]
    assert not spilling, [(row.case, row.kernel, row.capability, row.stack_bytes, row.constants) for row in spilling]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_fits_shared_memory(family):
    large = [row for row in rows_of(family) if row.shared_bytes > SHARED_LIMIT_BYTES[row.capability]]
    assert not large, [(row.case, row.kernel, row.capability, row.shared_bytes, row.constants) for row in large]
