"""Whole generations on tensors that hold no data: whatever looked at a value on the device would fail here.

Kernels are replaced by what gives their shapes; every tensor they are given must lie on the device too. Only the copy of
a step's tokens to the host is left out, and the host is told that each token is 5.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_models import make_hf, spec_of
from torch import Tensor

import trtkit.engine.device
from trtkit.engine.device import runner as runner_module
from trtkit.engine.device.eviction import DeviceEviction
from trtkit.engine.device.runner import DeviceRunner, InFlight
from trtkit.engine.device.staging import Layout, Passed, Staging
from trtkit.engine.device.verdicts import Verdicts
from trtkit.engine.dummy import dummy_weights
from trtkit.engine.loop import EmbeddedEngine
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits
from trtkit.spec.quant import quant_for

MODEL = spec_of(make_hf())


def _empty(out: Tensor | None, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or like.dtype) if out is None else out


def _fp8_rows(like: Tensor, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    rows = like.new_empty((tokens, width), dtype=torch.float8_e4m3fn)
    return rows, like.new_empty((tokens, 1), dtype=torch.float32)


SHAPES: dict[str, Callable[..., Any]] = {
    "linear": lambda x, w, *_, zero=None, out=None: _empty(out, x, x.shape[0], w.shape[0]),
    "fp8_linear": lambda x, w, *_, out=None: _empty(out, x, x.shape[0], w.shape[0]),
    "add_rms_norm": lambda _, residual, *__, out=None: _empty(out, residual, *residual.shape),
    "silu_mul": lambda x, out=None: _empty(out, x, x.shape[0], x.shape[1] // 2),
    "fp8_product": lambda x, _, w, __, ___, dtype, out=None: _empty(out, x, x.shape[0], w.shape[0], dtype=dtype),
    "add_rms_norm_fp8": lambda _, residual, *__: _fp8_rows(residual, *residual.shape),
    "silu_mul_fp8": lambda x: _fp8_rows(x, x.shape[0], x.shape[1] // 2),
    "embed": lambda ids, table, out=None: _empty(out, table, ids.shape[0], table.shape[1]),
    "rope_write": lambda *_, q_out, **__: q_out,
    "paged_decode_attention": lambda q, *_, out, **__: (out, _empty(None, q, *q.shape[:2], dtype=torch.float32)),
    "paged_prefill_attention": lambda q, *_, out, **__: (out, _empty(None, q, *q.shape[:2], dtype=torch.float32)),
    "greedy": lambda x, out=None, workspace=None: _empty(out, x, x.shape[0], dtype=torch.int32),
    "score_layers": lambda *_, out, **__: out,
    "compact_layers": lambda *_: None,
    "flag_bad_slots": lambda *_: None,
}


def _on_device(shape: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            parts = vars(value).values() if hasattr(value, "blocks_BM") else [value]
            assert all(part.is_meta for part in parts if isinstance(part, Tensor)), "a tensor on the host"
        return shape(*args, **kwargs)

    return call


@pytest.fixture
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [f"trtkit.engine.device.{m.name}" for m in pkgutil.iter_modules(trtkit.engine.device.__path__)]
    replaced = set()
    for name in [*modules, "trtkit.kernels.sampling"]:
        module = importlib.import_module(name)
        for kernel, shape in SHAPES.items():
            if inspect.isfunction(getattr(module, kernel, None)):
                monkeypatch.setattr(module, kernel, _on_device(shape))
                replaced.add(kernel)
    assert replaced == set(SHAPES), "a kernel goes by another name now"

    def send(self: Staging, layout: Layout, values: Any, into: Tensor | None = None) -> dict[str, Tensor]:
        host = np.zeros(layout.words, np.int32)
        for name, array in layout.arrays(host).items():
            array[...] = values[name]
        memory = torch.empty(layout.words, dtype=torch.int32, device="meta") if into is None else into
        return layout.tensors(memory)

    def answer(self: DeviceRunner, tokens_R: Tensor, wanted: list[int]) -> InFlight:
        assert tokens_R.is_meta
        return InFlight(tokens=torch.full((tokens_R.shape[0],), 5), wanted=wanted, arrived=Passed())

    monkeypatch.setattr(Staging, "send", send)
    monkeypatch.setattr(DeviceRunner, "_answer", answer)
    monkeypatch.setattr(Verdicts, "stage", lambda self: None)
    monkeypatch.setattr(runner_module, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(torch, "randn", lambda shape, *, generator, device: torch.empty(shape, device=device))
    monkeypatch.setattr(torch, "Generator", lambda device: torch._C.Generator())


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize(
    ("policy", "precision", "cache"),
    [
        ("full", "int8", DType.BF16),
        ("h2o:64", "int8", DType.FP8),
        ("h2o:budget=64,scorer=decay", "bf16", DType.BF16),
        ("snapkv:64", "fp8-rowwise", DType.BF16),
        ("window:64", "int8", DType.BF16),
        ("random:64", "int8", DType.BF16),
    ],
)
def test_nothing_a_step_does_looks_at_the_device(policy: str, precision: str, cache: DType) -> None:
    spec = parse_kv_policy(policy)

    def build(weights: Any, cache: Any, scheduler: Any) -> DeviceRunner:
        return DeviceRunner(weights, cache, scheduler.limits, DeviceEviction(spec, MODEL, scheduler))

    engine = EmbeddedEngine(
        dummy_weights(MODEL, quant_for(precision), device="meta"),
        Limits(max_batch_size=8, max_num_tokens=512, max_seq_len=256, tokens_per_block=16),
        200,
        kv_dtype=cache,
        kv_policy=spec,
        runner_factory=build,
        device="meta",
    )
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=(7,) * (20 + 100 * index),
            max_tokens=40,
            ignore_eos=True,
            sampling=Sampling(temperature=0.7 * (index % 2), seed=1),
        )
        for index in range(3)
    ]
    events = list(engine.generate(requests))
    assert not [event.error for event in events if event.error]
    assert [event.token_id for event in events] == [5] * len(events)
    assert len(events) == 40 + 40 + 36, "the longest prompt leaves room for 36"
    assert (engine.kv_stats().evictions > 0) == (policy != "full")
