"""The assembly that widens weights of 4 and 8 bits, run by an emulator of the few PTX instructions it uses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ptx_emulator

SOURCE = Path(__file__).parents[3] / "trtkit" / "kernels" / "triton_widen.py"


def assembly_of(function, number):
    """The `number`th assembly text of a function in the source; reading it needs no Triton."""
    body = SOURCE.read_text(encoding="utf-8").split(f"def {function}(")[1].split("@triton.jit")[0]
    return re.findall(r'"""\{(.*?)\}"""', body, flags=re.DOTALL)[number]


@pytest.mark.parametrize(("number", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
@pytest.mark.parametrize(("function", "source_type"), [("_from_int8", torch.int8), ("_from_fp8", torch.float8_e4m3fn)])
def test_every_byte_widens_exactly_in_every_place(function, source_type, number, dtype):
    codes = np.stack([np.roll(np.arange(256, dtype=np.uint8), shift) for shift in (0, 3, 77, 130)], axis=1)
    if source_type is torch.float8_e4m3fn:
        codes[codes % 128 == 127] = 0  # NaN, which no weight is
    after = ptx_emulator.run(assembly_of(function, number), {"$2": codes.view(np.uint32)[:, 0]})
    pairs = np.stack([after["$0"], after["$1"]], axis=1)
    found = torch.from_numpy(pairs.view(np.int16).copy()).view(dtype)
    expected = torch.from_numpy(codes).view(source_type)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("zero", [-16, -8, 0, 1, 7, 16])
@pytest.mark.parametrize(
    ("function", "dtype", "less"),
    [("_int4_to_fp16", torch.float16, (1032, 72)), ("_int4_to_bf16", torch.bfloat16, (136,))],
)
def test_every_pair_of_words_widens_exactly_less_its_zero_point(function, dtype, less, zero):
    """`less` is what `widen_int4` gives to subtract, with the zero point added to it."""
    words = np.stack([np.arange(1 << 16, dtype=np.uint16), np.roll(np.arange(1 << 16, dtype=np.uint16), 4321)], axis=1)
    inputs = {"$4": np.ascontiguousarray(words).view(np.uint32)[:, 0]}
    for index, offset in enumerate(less):
        pair = torch.tensor([-offset - zero] * 2).to(dtype)
        assert (pair == -offset - zero).all()
        inputs[f"${5 + index}"] = pair.view(torch.int16).numpy().view(np.uint32)
    after = ptx_emulator.run(assembly_of(function, 0), inputs)
    for fourth in range(4):
        found = torch.from_numpy(after[f"${fourth}"].view(np.int16).reshape(-1, 2).copy()).view(dtype)
        expected = torch.from_numpy((words >> (4 * fourth) & 0xF).astype(np.float32)) - 8 - zero
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0)


def test_offsets_that_the_assembly_needs_are_those_of_the_kernel():
    body = SOURCE.read_text(encoding="utf-8").split("def widen_int4(")[1].split("@triton.jit")[0]
    assert re.findall(r"_less\((\d+),", body) == ["1032", "72", "136"]
