"""Triton's interpreter, made to round as GPUs do."""

from __future__ import annotations

import numpy as np


def round_bfloat16_to_nearest(monkeypatch) -> None:
    """Until undone, float32 becomes bfloat16 by rounding to nearest even; the interpreter itself cuts bits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncate = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target_type):
        if source.dtype.scalar == tl.float32 and target_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(nearest_bfloat16(source.data), tl.bfloat16)
        return truncate(self, source, target_type)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, uint16; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
