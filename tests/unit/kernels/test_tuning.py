"""Forgetting what the autotuner chose on work that was too small to tell."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from trtkit.kernels.tuning import forget_choices


def test_every_kernel_that_had_chosen_chooses_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("trtkit.kernels.triton_made_up")
    module.tuned = SimpleNamespace(configs=[1, 2], cache={("key",): 1})
    module.untouched = SimpleNamespace(configs=[1], cache={})
    module.plain = SimpleNamespace(cache={"compiled": 1})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = forget_choices()
    assert before >= 1
    assert module.tuned.cache == {}
    assert module.plain.cache == {"compiled": 1}, "what is compiled stays"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_our_autotuned_kernels_are_found() -> None:
    decode = importlib.import_module("trtkit.kernels.triton_decode")
    matmul = importlib.import_module("trtkit.kernels.triton_matmul")
    for kernel in (decode._decode, matmul._linear):
        kernel.cache["a key"] = kernel.configs[0]
    decode._tuned().add("a shape")
    assert forget_choices() >= 2
    assert not decode._tuned(), "decode attention would choose again on whatever comes first"
    assert not decode._decode.cache
    assert not matmul._linear.cache
