"""Launching a step calls no operator that reads the device back or copies from ordinary host memory.

Kernels are opaque here: their twins may look at values, the Triton kernels that replace them on a GPU cannot.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
from support.device_engines import open_device
from support.engine_models import make_hf
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import trtkit.engine.device
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.speculation import SpeculationSpec

READS = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "is_nonzero", "equal", "masked_select", "unique_dim",
    "_unique2", "unique_consecutive", "lift_fresh", "repeat_interleave.Tensor", "allclose",
}  # fmt: skip
OPEN = {"sample_rows"}
"""Functions of `trtkit.kernels` whose twin does not wait either, so that falling back to it costs time alone."""


class Watching(TorchDispatchMode):
    """Notes operators that a GPU would have to finish for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.read: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.name()).removeprefix("aten::")
        self.seen.add(name.partition(".")[0])
        by_mask = name.startswith(("index.", "index_put")) and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if by_mask or name in READS or name.partition(".")[0] in READS:
            self.read.append(name)
        return func(*args, **(kwargs or {}))


def _opaque(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@pytest.fixture
def _opaque_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"trtkit.engine.device.{m.name}" for m in pkgutil.iter_modules(trtkit.engine.device.__path__)]
    hidden = 0
    for name in [*names, "trtkit.kv.ranking"]:
        module = importlib.import_module(name)
        for attribute, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__module__.startswith("trtkit.kernels.") and attribute not in OPEN:
                monkeypatch.setattr(module, attribute, _opaque(value))
                hidden += 1
    assert hidden > 10, "the kernels go by other names now"


def _watched(policy: str, sampling: Sampling, speculation: SpeculationSpec | None = None) -> Watching:
    """Everything that launches do while three prompts are read and answered."""
    watching = Watching()
    engine = open_device(make_hf(), policy=parse_kv_policy(policy), speculation=speculation)
    launch = engine._runner.launch

    def watched(step: Any) -> Any:
        with watching:
            return launch(step)

    engine._runner.launch = watched  # type: ignore[method-assign]
    requests = [
        Request(
            request_id=str(i), prompt_ids=(5 + i,) * (30 * i + 1), max_tokens=30, ignore_eos=True, sampling=sampling
        )
        for i in range(3)
    ]
    events = list(engine.generate(requests))
    assert not [event.error for event in events if event.error]
    assert len(events) == 90
    assert bool(engine.kv_stats().draft_tokens) is (speculation is not None)
    return watching


@pytest.mark.usefixtures("_opaque_kernels")
@pytest.mark.parametrize("policy", ["full", "window:20", "h2o:20", "snapkv:20", "random:20"])
def test_no_step_waits_for_the_device(policy: str) -> None:
    watching = _watched(policy, Sampling())
    assert not watching.read, sorted(set(watching.read))
    assert "index_copy_" in watching.seen, "nothing was watched"


@pytest.mark.usefixtures("_opaque_kernels")
def test_sampling_does_not_wait_either() -> None:
    watching = _watched("full", Sampling(temperature=1.0, top_k=7, top_p=0.8, seed=1))
    assert not watching.read, sorted(set(watching.read))
    assert "cumsum" in watching.seen


@pytest.mark.usefixtures("_opaque_kernels")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_checking_guesses_does_not_wait_before_the_step_is_collected(temperature: float) -> None:
    speculation = SpeculationSpec(max_draft_tokens=4, max_ngram=1, adaptive=False)
    watching = _watched("full", Sampling(temperature=temperature, seed=1), speculation)
    assert not watching.read, sorted(set(watching.read))
    assert "index_copy_" in watching.seen


def test_a_step_that_did_wait_would_be_noticed() -> None:
    watching = Watching()
    with watching:
        x = torch.arange(3.0)
        x[x > 1].sum().item()
        torch.tensor([1, 2])
    assert {"index.Tensor", "_local_scalar_dense", "lift_fresh"} <= set(watching.read)
