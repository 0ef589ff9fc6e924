"""H2O from `trtkit build` to `trtkit bench` through the strict fake TensorRT-LLM, whose paged parts keep real pools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_trtllm import fake_environment
from support.tiny_checkpoints import write_model

from trtkit.backends import open_engine
from trtkit.backends.build import build_engine
from trtkit.backends.recipe import BuildOptions, make_plan
from trtkit.engine.open import open_checkpoint
from trtkit.report.records import load_records
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Engine, KVStats, Request, ScoreRequest
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit.spec.plan import Limits

LIMITS: dict[str, object] = {
    "max_batch_size": 4, "max_num_tokens": 96, "max_seq_len": 96, "tokens_per_block": 8, "kv_memory": "4MiB",
}  # fmt: skip
JOBS = [(28, 40), (9, 50), (31, 20), (20, 31), (5, 14)]
"""Prompts of at most 32 tokens, which the embedded engine feeds whole too. None ends where a round falls due: the embedded
engine holds that round, TensorRT-LLM frees the request first."""

pytestmark = pytest.mark.slow


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in fake_environment(FAKE_GPUS="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trtkit.backends.build_pytorch.verify_unified", lambda *_: {})
    return monkeypatch


def build(folder: Path, kv: str, *, allow_approximate: bool = False, **options: object) -> EngineBundle:
    if not (folder / "m").is_dir():
        write_model(folder / "m", spread=0.4)
    given = BuildOptions(
        model=str(folder / "m"), gpu="h100", target="pytorch", precision="fp16", kv=kv, **{**LIMITS, **options},
    )  # type: ignore[arg-type]  # fmt: skip
    plan, source = make_plan(given)
    return build_engine(plan, source, folder / "builds", allow_approximate=allow_approximate)


def run(engine: Engine) -> tuple[dict[str, list[int | None]], KVStats]:
    requests = [
        Request(
            request_id=str(i), prompt_ids=tuple((7 * i + 3 * t) % 50 + 3 for t in range(length)), max_tokens=count,
            ignore_eos=True,
        )
        for i, (length, count) in enumerate(JOBS)
    ]  # fmt: skip
    found: dict[str, list[int | None]] = {}
    for event in engine.generate(requests):
        assert event.error is None, event.error
        found.setdefault(event.request_id, []).append(event.token_id)
    return found, engine.kv_stats()


def reference(folder: Path, bundle: EngineBundle, kv: str) -> tuple[dict[str, list[int | None]], KVStats]:
    """The embedded engine on an ordinary conversion of the same model, in the fake's fp32."""
    from trtkit.trtllm.convert import convert

    if not (folder / "reference").is_dir():
        convert(folder / "m", folder / "reference", quant=bundle.manifest.plan.quant)
    limits = Limits(max_batch_size=4, max_num_tokens=96, max_seq_len=96, tokens_per_block=8)
    policy = parse_kv_policy(kv)
    with open_checkpoint(folder / "reference", limits=limits, kv_policy=policy, dtype=DType.FP32) as engine:
        return run(engine)


@pytest.mark.parametrize(
    ("kv", "tp"),
    [
        ("h2o:50%,sinks=2,recent=4,interval=4", 1),
        ("h2o:50%,sinks=2,recent=4,interval=4", 2),
        ("snapkv:24,recent=8,sinks=2,interval=4", 1),
        ("window:20,interval=4", 2),
    ],
)
def test_a_policy_gives_the_embedded_engines_tokens_and_counts(
    fake: pytest.MonkeyPatch, tmp_path: Path, kv: str, tp: int
) -> None:
    bundle = build(tmp_path, kv, tp=tp)
    assert bundle.manifest.fidelity is KVFidelity.EXACT
    expected, theirs = reference(tmp_path, bundle, kv)
    assert expected != reference(tmp_path, bundle, "full")[0], "nothing was evicted, so nothing was tested"
    with open_engine(bundle.path) as engine:
        tokens, ours = run(engine)
        asked = ScoreRequest(request_id="s", context_ids=(1, 2, 3), continuations=((4, 5),))
        with pytest.raises(UnsupportedError, match="before anything is evicted"):
            list(engine.score([asked]))  # type: ignore[attr-defined]
    assert tokens == expected
    assert (ours.evictions, ours.tokens_evicted, ours.blocks_freed) == (
        theirs.evictions, theirs.tokens_evicted, theirs.blocks_freed,
    )  # fmt: skip


def test_long_prompts_come_in_chunks_where_a_step_is_shorter(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = build(tmp_path, "h2o:16,sinks=2,recent=4,interval=4", max_num_tokens=24)
    with open_engine(bundle.path) as engine:
        tokens, stats = run(engine)
        assert {int(name): len(found) for name, found in tokens.items()} == {i: n for i, (_, n) in enumerate(JOBS)}
        assert (stats.evictions or 0) > 20


def test_bench_reports_what_the_workers_evicted(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build(tmp_path, "h2o:50%,sinks=2,recent=4,interval=4", tp=2).path
    command = [
        sys.executable, "-m", "trtkit", "bench", str(path), "--isl", "28", "--osl", "30", "--num-requests", "6",
        "--concurrency", "3", "--repeats", "2", "--warmup", "3", "-o", str(tmp_path / "records"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (record,) = load_records([tmp_path / "records"]).bench
    assert all((repeat.kv.evictions or 0) > 10 for repeat in record.repeats)
    (acted,) = [check for check in record.checks if check.name == "kv_policy_acted"]
    assert acted.status == "pass"
    handicaps = [check.detail for check in record.checks if check.name == "engine_as_built"]
    assert [line.partition(": ")[2].split(" (")[0] for line in handicaps] == [
        "CUDA graphs are off", "the overlap scheduler is off",
    ]  # fmt: skip


def release(fake: pytest.MonkeyPatch, version: str, folder: Path) -> None:
    """Another release; what is installed is looked at once for each Python path."""
    fake.setenv("FAKE_TRTLLM_VERSION", version)
    fake.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], str(folder)]))


def test_on_1_3_only_generated_tokens_are_evicted_and_only_if_allowed(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release(fake, "1.3.0", tmp_path)
    kv = "h2o:8,sinks=0,recent=4,interval=4"
    with pytest.raises(UnsupportedError, match=r"1\.3\.0 can evict generated tokens only.*--allow-approximate"):
        build(tmp_path, kv)
    bundle = build(tmp_path, kv, allow_approximate=True)
    assert bundle.manifest.fidelity is KVFidelity.GENERATED_ONLY
    with open_engine(bundle.path) as engine:
        tokens, stats = run(engine)
    rounds = [max(0, (n - 1 - 8) // 4) for _, n in JOBS]
    assert (stats.evictions, stats.tokens_evicted) == (sum(rounds), 4 * sum(rounds))
    assert tokens != reference(tmp_path, bundle, "full")[0]


def test_a_bundle_of_1_2_is_not_opened_by_a_release_that_would_pin_its_prompts(
    fake: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = build(tmp_path, "h2o:16").path
    release(fake, "1.3.0", tmp_path)
    with pytest.raises(UnsupportedError, match="evict generated tokens only"):
        open_engine(path)
