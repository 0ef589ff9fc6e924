"""A remote engine is the same engine: the embedded one's tokens, scores and refusals survive the process border."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.fake_engine import tiny_model

from trtkit.backends import open_engine
from trtkit.spec.bundle import Manifest, bundle_files, file_entry, write_manifest
from trtkit.spec.checkpoint import CONFIG_NAME, checkpoint_tensors, rank_file
from trtkit.spec.checkpoint_config import checkpoint_config
from trtkit.spec.engine import Engine, FinishReason, Request, Sampling, Scorer, ScoreRequest
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with seeded random weights."""
    path = tmp_path_factory.mktemp("builds") / "random.engine"
    (path / "checkpoint").mkdir(parents=True)
    model, quant = tiny_model(), quant_for("fp32")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        t.name: torch.ones(t.shape) if t.group == "norm" else torch.randn(t.shape, generator=generator) * 0.2
        for t in checkpoint_tensors(model, quant)
    }
    save_file(tensors, path / "checkpoint" / rank_file(0))
    (path / "checkpoint" / CONFIG_NAME).write_text(json.dumps(checkpoint_config(model, quant)))
    plan = BuildPlan(
        name="random",
        model=model,
        model_source="seed 0",
        gpu="cpu",
        quant=quant,
        limits=Limits(max_seq_len=96, max_batch_size=4, kv_memory_bytes=1 << 20, tokens_per_block=8),
    )
    files = {str(file.relative_to(path)): file_entry(file) for file in bundle_files(path)}
    write_manifest(
        path,
        Manifest(plan=plan, fidelity=KVFidelity.EXACT, versions={}, files=files, created_utc="2026-01-01T00:00:00Z"),
    )
    return path


@pytest.fixture(scope="module")
def local(bundle: Path) -> Iterator[Engine]:
    with open_engine(bundle) as engine:
        yield engine


@pytest.fixture(scope="module")
def remote(bundle: Path) -> Iterator[Engine]:
    with open_engine(bundle, isolated=True) as engine:
        yield engine


REQUESTS = [
    Request(request_id="greedy", prompt_ids=tuple(range(3, 40)), max_tokens=9, ignore_eos=True),
    Request(
        request_id="sampled",
        prompt_ids=(5, 6, 7),
        max_tokens=12,
        sampling=Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3),
        ignore_eos=True,
    ),
    Request(
        request_id="evicting",
        prompt_ids=tuple(range(60)),
        max_tokens=9,
        ignore_eos=True,
        kv=parse_kv_policy("window:32"),
    ),
    Request(request_id="too long", prompt_ids=tuple(range(100)), max_tokens=9),
]


def run(engine: Engine) -> dict[str, tuple[list[int], FinishReason, str | None]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in REQUESTS}
    ends: dict[str, tuple[FinishReason, str | None]] = {}
    for event in engine.generate(REQUESTS):
        if event.token_id is not None:
            tokens[event.request_id].append(event.token_id)
        if event.finish is not None:
            ends[event.request_id] = (event.finish, event.error)
    return {name: (tokens[name], *ends[name]) for name in tokens}


def test_tokens_ends_and_refusals_are_the_same(local: Engine, remote: Engine) -> None:
    ours = run(remote)
    assert ours == run(local)
    assert len(ours["greedy"][0]) == 9
    assert ours["too long"][1] is FinishReason.ERROR


def test_scores_are_the_same(local: Engine, remote: Engine) -> None:
    requests = [
        ScoreRequest(
            request_id=f"s{i}",
            context_ids=tuple(range(3, 40)),
            continuations=((4, 5, 6), (i,)),
            chunk_ends=(16,),
            top_logprobs=3,
            kv=parse_kv_policy("window:16") if i % 2 else None,
        )
        for i in range(3)
    ]
    assert isinstance(local, Scorer)
    assert isinstance(remote, Scorer)
    ours = {result.request_id: result for result in remote.score(requests)}
    assert ours == {result.request_id: result for result in local.score(requests)}
    assert ours["s1"].tokens_evicted > 0


def test_sizes_and_limits_are_the_same_but_the_process_is_another(local: Engine, remote: Engine) -> None:
    assert replace(remote.info, pid=None) == replace(local.info, pid=None)
    assert remote.info.pid != local.info.pid


def test_overrides_reach_the_child(bundle: Path) -> None:
    with open_engine(bundle, isolated=True, max_seq_len=20, kv=parse_kv_policy("window:8")) as engine:
        assert engine.info.max_seq_len == 20
        assert engine.info.kv_policy.label == "window:budget=8"
