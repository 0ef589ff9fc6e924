"""The assembly that widens 8-bit weights, run by an emulator of the few PTX instructions it uses."""

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
