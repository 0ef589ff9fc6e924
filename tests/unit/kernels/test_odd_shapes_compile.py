"""Shapes whose tiles are hard to fit still compile for the GPUs we mean, within their shared memory.

They may spill: nobody runs them for speed. A shape that did not fit would fail with Triton's error on the device.
"""

from __future__ import annotations

import importlib.util

import pytest
from support.compile_only import SHARED_LIMIT_BYTES, compiled_rows


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_odd_shapes_fit_the_shared_memory_of_both_architectures():
    rows = compiled_rows(["odd"])
    assert {row.capability for row in rows} == {80, 90}
    large = [row for row in rows if row.shared_bytes > SHARED_LIMIT_BYTES[row.capability]]
    assert not large, [(row.case, row.kernel, row.capability, row.shared_bytes, row.constants) for row in large]
