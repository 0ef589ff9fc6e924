"""Every kernel compiles for the GPUs we mean, without spilling and within their shared memory. No GPU is needed.

Every tile that may be chosen is compiled for Hopper, the first one for Ampere. A family's calls stand in `tests/support/compile_FAMILY_cases.py`; a new family needs a row in `FAMILIES`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest
from support.compile_only import SHARED_LIMIT_BYTES, compiled_rows

from trtkit.kernels import dispatch

FAMILIES = ["matmul", "fused", "sampling", "paged", "ranking", "probe"]
COMPILED_WITH = {"decode": "paged", "prefill": "paged", "score": "paged", "compact": "paged", "fused_fp8": "fused"}
"""Families that share the cases of another name."""

SPILLING = """
import torch, triton, triton.language as tl

@triton.jit
def _too_much(x, SIZE: tl.constexpr):
    values = tl.load(x + tl.arange(0, SIZE))
    tl.store(x + tl.arange(0, SIZE), values / tl.sum(values, 0))

CASES = {"too much": lambda: _too_much[(1,)](torch.empty(16384), SIZE=16384, num_warps=1)}
"""

SERIAL = """
import torch
from trtkit.kernels import matmul_tiles, triton_matmul

def product():
    x, weight, scale = torch.empty(64, 4096).half(), torch.empty(4096, 4096, dtype=torch.int8), torch.empty(4096).half()
    tile = matmul_tiles.Tile(outputs=128, inputs=128, stages=3, warps=8, left=True)
    triton_matmul.fused_linear(x, weight, scale, None, torch.empty(64, 4096).half(), tile=tile)

CASES = {"serial": product}
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@cache
def rows_of(family):
    return compiled_rows([family])


def test_families_of_the_dispatch_are_all_compiled():
    assert {COMPILED_WITH.get(family, family) for family in dispatch.FAMILIES} <= set(FAMILIES)


def test_a_kernel_that_spills_is_seen(tmp_path):
    """What the other tests rely on: a kernel with more live numbers than registers reports its stack."""
    (tmp_path / "compile_spilling_cases.py").write_text(SPILLING, encoding="utf-8")
    rows = compiled_rows(["spilling"], [90], extra_path=tmp_path)
    assert rows[0].stack_bytes > 0 or rows[0].local_bytes > 0


def test_products_that_are_serialised_are_seen(tmp_path):
    """A tile that was on the list until ptxas was asked."""
    (tmp_path / "compile_serial_cases.py").write_text(SERIAL, encoding="utf-8")
    rows = compiled_rows(["serial"], [90], extra_path=tmp_path)
    assert "serialized" in rows[0].serialised


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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_kernel_multiplies_asynchronously_in_vain(family):
    """ptxas says (C7515 and its like) where it serialises wgmma; see `support.compile_only`."""
    serialised = [row for row in rows_of(family) if row.serialised]
    assert not serialised, [(row.case, row.kernel, row.constants, row.serialised) for row in serialised]
