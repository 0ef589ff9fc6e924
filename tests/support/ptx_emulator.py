"""A few PTX instructions on 32-bit registers in numpy, enough to run the inline assembly of our kernels on a CPU.

Registers hold uint32 arrays. From the PTX manual: `prmt` picks four bytes of {b, a} by nibbles, `lop3` with 0xea is
(a & b) | c, `.f16x2` and `.bf16x2` work on both halves.
"""

from __future__ import annotations

import re

import numpy as np
import torch


def run(assembly: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every register after the last instruction; `inputs` are named as in the text, "$2" for example."""
    registers = dict(inputs)

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in re.sub(r"[{}]", "", assembly).split(";"):
        words = statement.split(None, 1)
        if not words or words[0] == ".reg":
            continue
        names = [name.strip() for name in words[1].split(",")]
        operation = _OPERATIONS[words[0]]
        registers[names[0]] = np.asarray(operation(*(value(name) for name in names[1:])), dtype=np.uint32)
    return registers


def _prmt(a, b, selector):
    both = (np.uint64(b) << np.uint64(32)) | np.asarray(a, dtype=np.uint64)
    picked = np.zeros_like(both)
    for place in range(4):
        nibble = (int(selector) >> (4 * place)) & 0xF
        assert nibble < 8, "replicating the sign is not emulated"
        picked |= ((both >> np.uint64(8 * nibble)) & np.uint64(0xFF)) << np.uint64(8 * place)
    return picked


def _lop3(a, b, c, table):
    assert int(table) == 0xEA, "only (a & b) | c is emulated"
    return (a & b) | c


def _halves(operation, dtype: torch.dtype):
    def apply(*operands):
        size = max(np.size(one) for one in operands)
        words = [np.broadcast_to(one, (size,)).copy().view(np.int16) for one in operands]
        result = operation(*(torch.from_numpy(one).view(dtype).double() for one in words)).to(dtype)
        return result.view(torch.int16).numpy().view(np.uint32)

    return apply


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "add.f16x2": _halves(lambda a, b: a + b, torch.float16),
    "sub.f16x2": _halves(lambda a, b: a - b, torch.float16),
    "mul.f16x2": _halves(lambda a, b: a * b, torch.float16),
    "fma.rn.f16x2": _halves(lambda a, b, c: a * b + c, torch.float16),
    "fma.rn.bf16x2": _halves(lambda a, b, c: a * b + c, torch.bfloat16),
}
