"""Building and running TensorRT-LLM bundles through the strict fake, TP=2 included; and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.fake_trtllm import fake_environment
from support.tiny_checkpoints import write_model

from trtkit.backends import open_engine
from trtkit.backends import verify as verify_module
from trtkit.backends.build import build_engine
from trtkit.backends.recipe import BuildOptions, make_plan
from trtkit.engine.open import open_checkpoint
from trtkit.spec.bundle import EngineBundle, open_bundle
from trtkit.spec.engine import Engine, Request, ScoreRequest
from trtkit.spec.errors import (
    CapacityError,
    EngineError,
    MissingDependencyError,
    OutputError,
    TrtkitError,
    UnsupportedError,
)
from trtkit.spec.kv import KVFidelity
from trtkit.spec.plan import Limits

ROOT = Path(__file__).parents[2]
LIMITS: dict[str, object] = {
    "max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": 64, "tokens_per_block": 8, "kv_memory": "1MiB",
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in fake_environment(FAKE_GPUS="2").items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def quick(fake: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the comparison with transformers, which takes seconds to import."""
    fake.setattr("trtkit.backends.build_tensorrt.verify", lambda *_: {})
    fake.setattr("trtkit.backends.build_pytorch.verify_unified", lambda *_: {})
    return fake


def build(folder: Path, *, allow_approximate: bool = False, **options: object) -> EngineBundle:
    if not (folder / "m").is_dir():
        write_model(folder / "m", spread=0.4)
    given = BuildOptions(model=str(folder / "m"), gpu="h100", **{**LIMITS, **options})  # type: ignore[arg-type]
    plan, source = make_plan(given)
    return build_engine(plan, source, folder / "builds", allow_approximate=allow_approximate)


def tokens(engine: Engine, count: int = 6) -> dict[str, list[int | None]]:
    requests = [
        Request(request_id=str(i), prompt_ids=(1, 2, 3 + i), max_tokens=6, ignore_eos=True) for i in range(count)
    ]
    found: dict[str, list[int | None]] = {}
    for event in engine.generate(requests):
        assert event.error is None, event.error
        found.setdefault(event.request_id, []).append(event.token_id)
    return found


def reference_tokens(folder: Path, bundle: EngineBundle) -> dict[str, list[int | None]]:
    """The embedded engine on an ordinary conversion of the same model."""
    from trtkit.trtllm.convert import convert

    convert(folder / "m", folder / "reference", quant=bundle.manifest.plan.quant)
    limits = Limits(max_batch_size=4, max_num_tokens=64, max_seq_len=64, tokens_per_block=8)
    with open_checkpoint(folder / "reference", limits=limits) as engine:
        return tokens(engine)


def test_an_engine_generates_and_scores_what_the_embedded_engine_does(
    quick: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = build(tmp_path, target="tensorrt", precision="fp16", tp=2)
    assert sorted(bundle.manifest.files) == [
        "checkpoint/config.json", "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors",
        "engine/config.json", "engine/rank0.engine", "engine/rank1.engine", "llm_args.json", "tokenizer/config.json",
    ]  # fmt: skip
    assert bundle.manifest.versions["tensorrt_llm"] == "1.2.1"
    assert (bundle.manifest.peak_build_bytes or 0) >= 1_333_750_000, "what trtllm-build reported"
    assert "Total time of building" in (bundle.path / "build.log").read_text()
    expected = reference_tokens(tmp_path, bundle)
    asked = ScoreRequest(request_id="s", context_ids=(1, 2, 3), continuations=((4, 5),), top_logprobs=1)
    with open_checkpoint(tmp_path / "reference") as embedded:
        (theirs,) = embedded.score([asked])
    with open_engine(bundle.path) as engine:
        assert tokens(engine) == expected
        assert len(workers()) == 1, "the second rank"
        (ours,) = engine.score([asked])  # type: ignore[attr-defined]
        assert ours.continuations[0].logprobs == pytest.approx(theirs.continuations[0].logprobs, abs=5e-3)
        assert tokens(engine, 2) == {key: expected[key] for key in ("0", "1")}
    assert workers() == []


@pytest.mark.parametrize("version", ["1.2.1", "1.3.0"])
def test_the_pytorch_backend_generates_what_the_embedded_engine_does(
    quick: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    quick.setenv("FAKE_TRTLLM_VERSION", version)
    bundle = build(tmp_path, target="pytorch", precision="int8")
    config = json.loads((bundle.checkpoint_dir / "hf_quant_config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W8A16"
    with open_engine(bundle.path) as engine:
        assert tokens(engine) == reference_tokens(tmp_path, bundle)


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or not any("fake-mpi-worker" in a for a in process.cmdline()):
                continue
            if process.environ().get("FAKE_OWNER") == str(os.getpid()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_dead_worker_is_reported_with_its_last_words_and_leaves_nobody_behind(
    quick: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = build(tmp_path, target="tensorrt", tp=2)
    quick.setenv("FAKE_TRTLLM_DIE_AFTER", "9")
    engine = open_engine(bundle.path)
    try:
        with pytest.raises(EngineError, match=r"exit code 134.*illegal memory access"):
            tokens(engine)
    finally:
        engine.close()
    deadline = time.monotonic() + 60
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers() == []


def test_a_build_that_is_killed_keeps_the_checkpoint_and_continues_with_the_engine(
    quick: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick.setenv("FAKE_TRTLLM_BUILD", "kill")
    with pytest.raises(EngineError, match=r"SIGKILL.*run the same command again"):
        build(tmp_path, target="tensorrt", tp=2)
    assert not list((tmp_path / "builds").glob("*.engine"))
    quick.delenv("FAKE_TRTLLM_BUILD")
    bundle = build(tmp_path, target="tensorrt", tp=2)
    assert set(bundle.manifest.phases_s) == {"trtllm-build", "manifest"}, "no second conversion or verification"
    assert "drift" not in bundle.manifest.verification, "the quick fixture verifies nothing"
    (cache,) = (tmp_path / "builds" / ".timing").iterdir()
    assert cache.name == "trtllm-1.2.1-h100-sxm.cache"


def test_out_of_memory_is_a_capacity_error_that_says_what_to_lower(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick.setenv("FAKE_TRTLLM_BUILD", "oom")
    with pytest.raises(CapacityError, match="lower --max-num-tokens"):
        build(tmp_path, target="tensorrt")


def test_an_engine_says_what_it_lacks_when_it_is_opened(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build(tmp_path, target="tensorrt", tp=2).path
    refusals: list[tuple[dict[str, str], type[TrtkitError], str]] = [
        ({"FAKE_GPUS": "1"}, MissingDependencyError, r"built for 2 x h100-sxm.*has NVIDIA H100"),
        ({"FAKE_GPU": "NVIDIA A100-SXM4-80GB, 81920, 8.0"}, MissingDependencyError, "NVIDIA A100"),
        ({"FAKE_TRTLLM_VERSION": "1.2.0"}, EngineError, r"built by TensorRT-LLM 1\.2\.1, here is 1\.2\.0"),
        ({"FAKE_TRTLLM_VERSION": "1.3.0"}, UnsupportedError, r"here is 1\.3\.0"),
        ({"PYTHONPATH": str(ROOT)}, MissingDependencyError, "not installed"),
    ]
    for knobs, error, says in refusals:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in knobs.items():
                patch.setenv(name, value)
            with pytest.raises(error, match=says):
                open_engine(path)
    (path / "engine" / "rank1.engine").unlink()
    with pytest.raises(EngineError, match=r"rank1\.engine: missing"):
        open_engine(path)


def test_limits_above_those_of_the_build_are_refused(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build(tmp_path, target="tensorrt").path
    with pytest.raises(TrtkitError, match="max_batch_size 8 is above the 4"):
        open_engine(path, max_batch_size=8)
    with open_engine(path, max_batch_size=2) as engine:
        assert engine.info.max_batch_size == 2


def test_without_the_right_gpu_nothing_is_started(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick.setenv("FAKE_GPUS", "0")
    with pytest.raises(MissingDependencyError, match="no NVIDIA GPU"):
        build(tmp_path, target="tensorrt")
    assert not (tmp_path / "builds").exists()


def test_a_window_that_stands_in_for_h2o_is_recorded_as_one(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--allow-approximate"):
        build(tmp_path, target="tensorrt", kv="h2o:32")
    bundle = build(tmp_path, target="tensorrt", kv="h2o:32", allow_approximate=True)
    assert open_bundle(bundle.path).manifest.fidelity is KVFidelity.WINDOW_ONLY
    arguments = json.loads((bundle.path / "llm_args.json").read_text())
    assert arguments["kv_cache_config"]["max_attention_window"] == [32]


def test_h2o_is_refused_where_the_release_has_no_room_for_it(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = build(tmp_path, target="pytorch", precision="fp16", kv="h2o:32")
    assert bundle.manifest.fidelity is KVFidelity.EXACT
    manager = "tensorrt_llm._torch.pyexecutor.resource_manager:KVCacheManager"
    quick.setenv("FAKE_TRTLLM_WITHOUT", f"{manager}.rewind_kv_cache")
    with pytest.raises(
        UnsupportedError, match=r"no room for H2O: freeing blocks: .* has no KVCacheManager\.rewind_kv_cache"
    ):
        open_engine(bundle.path)
    with pytest.raises(UnsupportedError, match="no adapter"):
        build(tmp_path, target="pytorch", precision="fp16", kv="random:32")


def test_a_disk_that_is_too_small_is_refused_before_the_conversion(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    quick.setattr("trtkit.spec.directory.shutil.disk_usage", lambda _: usage)
    for target in ("tensorrt", "pytorch"):
        with pytest.raises(OutputError, match=r"needs .* GiB, the disk has 0\.00 GiB free"):
            build(tmp_path, target=target)
    assert not list((tmp_path / "builds").rglob("*.safetensors"))


def test_a_launcher_with_as_many_ranks_as_the_engine_runs_it(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build(tmp_path, target="tensorrt", tp=2).path
    program = shutil.which("mpirun")
    assert program is not None
    for ranks, code in ((2, 0), (3, 8)):
        command = [
            program, "-n", str(ranks), "trtllm-llmapi-launch", sys.executable, "-m", "trtkit", "generate", str(path),
            "--prompt-ids", "1,2,3", "--max-tokens", "2", "--json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
        assert done.returncode == code, done.stderr
        assert ("launched with 3 ranks" in done.stderr) == (ranks == 3)


def test_verification_still_looks_at_what_an_engine_is_built_from(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drifts = build(tmp_path, target="tensorrt", precision="int8", tp=2).manifest.verification
    assert 0 < drifts["drift"] < verify_module.MAX_DRIFT
    unified = build(tmp_path, target="pytorch", precision="int8", name="u").manifest.verification
    assert unified["drift"] < verify_module.MAX_DRIFT
    assert unified["quantisation_drift"] > 0
