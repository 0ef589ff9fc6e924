"""The whole device path through its Triton kernels, without a GPU: run by the interpreter, or compiled and stopped.

Run as a script in a process of its own, for Triton decides about its interpreter when it is imported:
`python -m support.triton_engine KV_POLICY CACHE_TYPE WEIGHTS` compares tokens with the CPU engine's.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
from support.device_engines import device_runner
from support.engine_models import kv_bytes, limits, make_hf, quantised, spec_of, trtllm_tensors

from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.kv import parse_kv_policy

CHOOSING = ("matmul", "fused", "sampling", "paged", "ranking", "slots")
"""Modules of `trtkit.kernels` that choose between a kernel and its twin."""


def kernels_everywhere() -> None:
    """From now on CPU tensors go to the Triton kernels in this process."""
    for name in CHOOSING:
        module = importlib.import_module(f"trtkit.kernels.{name}")
        assert hasattr(module, "use_triton"), f"{name} chooses in some other way now"
        module.use_triton = lambda tensor, family="": True


def opened(policy: str, cache: str, weights: str, *, on_kernels: bool) -> EmbeddedEngine:
    """A tiny fp16 model, on the CPU engine or on the kernels."""
    hf = make_hf(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    spec, tensors = spec_of(hf), trtllm_tensors(hf)
    if weights == "int8":
        tensors = quantised(tensors)
    chosen = parse_kv_policy(policy)
    return open_tensors(
        spec,
        tensors,
        limits=limits(kv_memory_bytes=kv_bytes(spec, 128, 16), tokens_per_block=16),
        dtype=DType.FP16,
        kv_dtype=DType.parse(cache),
        kv_policy=chosen,
        runner_factory=device_runner(spec, chosen) if on_kernels else None,
    )


def requests() -> list[Request]:
    """A short, a middling and a long prompt; the first is sampled."""
    draw = np.random.default_rng(0)
    return [
        Request(
            request_id=str(index),
            prompt_ids=tuple(int(token) for token in draw.integers(3, 90, length)),
            max_tokens=count,
            ignore_eos=True,
            sampling=Sampling(temperature=0.4, top_k=3, seed=1) if index == 0 else Sampling(),
        )
        for index, (length, count) in enumerate([(5, 4), (40, 6), (90, 5)])
    ]


def tokens_of(engine: EmbeddedEngine) -> dict[str, list[Any]]:
    """What each request was told."""
    told: dict[str, list[Any]] = {}
    with engine:
        for event in engine.generate(requests()):
            told.setdefault(event.request_id, []).append(event.error or event.token_id)
    return told


def main(policy: str, cache: str, weights: str) -> None:
    """Exit status 0 where the kernels' tokens are the CPU engine's."""
    expected = tokens_of(opened(policy, cache, weights, on_kernels=False))
    kernels_everywhere()
    found = tokens_of(opened(policy, cache, weights, on_kernels=True))
    if found != expected:
        sys.exit(f"kernels: {found}\nCPU engine: {expected}")


if __name__ == "__main__":
    main(*sys.argv[1:])
