"""Guessing and block reuse through the strict fake of TensorRT-LLM: same tokens, counted, recorded, or one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_trtllm import fake_environment
from support.tiny_checkpoints import write_model

from trtkit.backends import open_engine
from trtkit.backends.build import build_engine
from trtkit.backends.recipe import BuildOptions, make_plan
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.engine import Engine, KVStats, Request, ScoreRequest
from trtkit.spec.errors import TrtkitError, UnsupportedError, UsageError
from trtkit.spec.speculation import parse_speculation

pytestmark = pytest.mark.slow

PROMPT = tuple(range(1, 22))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The fake without the comparison with transformers, which takes seconds to import."""
    for name, value in fake_environment(FAKE_GPUS="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trtkit.backends.build_tensorrt.verify", lambda *_: {})
    monkeypatch.setattr("trtkit.backends.build_pytorch.verify_unified", lambda *_: {})
    return monkeypatch


def build(
    folder: Path, *, target: str = "pytorch", speculate: str = "off", reuse: bool = False, **options: object
) -> EngineBundle:
    if not (folder / "m").is_dir():
        write_model(folder / "m", spread=0.4)
    given = BuildOptions(
        model=str(folder / "m"), gpu="h100", target=target, max_batch_size=4, max_num_tokens=64, max_seq_len=64,
        tokens_per_block=8, kv_memory="1MiB", **options,  # type: ignore[arg-type]
    )  # fmt: skip
    plan, source = make_plan(given)
    plan = replace(
        plan, name=f"{target}-{speculate.replace(':', '')}-{reuse}", speculation=parse_speculation(speculate)
    )
    plan = replace(plan, limits=replace(plan.limits, enable_block_reuse=reuse))
    return build_engine(plan, source, folder / "builds")


def tokens(engine: Engine, count: int = 3) -> dict[str, list[int | None]]:
    found: dict[str, list[int | None]] = {}
    for i in range(count):
        asked = Request(request_id=str(i), prompt_ids=PROMPT, max_tokens=10 + i, ignore_eos=True)
        for event in engine.generate([asked]):
            assert event.error is None, event.error
            found.setdefault(event.request_id, []).append(event.token_id)
    return found


def settled(engine: Engine, holds: Callable[[KVStats], bool]) -> KVStats:
    """Statistics reach the engine's process through a thread, some time after the tokens."""
    deadline = time.monotonic() + 60
    while not holds(engine.kv_stats()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine.kv_stats()


@pytest.mark.parametrize("version", ["1.2.1", "1.3.0"])
def test_guessing_gives_the_same_tokens_and_says_how_many_guesses_were_right(
    fake: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    fake.setenv("FAKE_TRTLLM_VERSION", version)
    plain, guessing = build(tmp_path), build(tmp_path, speculate="ngram:3,match=2")
    written = json.loads((guessing.path / "llm_args.json").read_text())
    assert written["speculative_config"]["decoding_type"] == "NGram"
    assert "speculative_config" not in json.loads((plain.path / "llm_args.json").read_text())
    with open_engine(plain.path) as engine:
        expected = tokens(engine)
        assert (engine.kv_stats().draft_tokens, engine.kv_stats().accepted_tokens) == (0, 0)
    with open_engine(guessing.path) as engine:
        assert engine.info.speculation == guessing.manifest.plan.speculation
        assert engine.info.notes[0] == "speculation ngram:3,match=2: the overlap scheduler is off"
        assert tokens(engine) == expected
        list(engine.score([ScoreRequest(request_id="s", context_ids=(1, 2), continuations=((3,),))]))  # type: ignore[attr-defined]
        assert tokens(engine) == expected, "opened again after scoring"
        stats = settled(engine, lambda stats: bool(stats.accepted_tokens))
    assert stats.draft_tokens is not None
    assert stats.accepted_tokens is not None
    assert 0 < stats.accepted_tokens < stats.draft_tokens


def test_speculation_can_be_changed_when_the_engine_is_opened(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    guessing, plain = build(tmp_path, speculate="ngram:3"), build(tmp_path)
    with open_engine(guessing.path, speculation="off") as engine:
        assert (engine.info.speculation, engine.info.notes) == (None, ())
    with open_engine(plain.path, speculation="ngram:2") as engine:
        assert engine.info.speculation == parse_speculation("ngram:2")


def test_a_release_without_the_class_is_one_line_before_the_build(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    guessing = build(tmp_path, speculate="ngram:3")
    fake.setenv("FAKE_TRTLLM_NGRAM", "gone")
    fake.setenv("PATH", f"{tmp_path}:{fake_environment()['PATH']}")  # another environment is probed anew
    with pytest.raises(UnsupportedError, match=r"has no .*NGramDecodingConfig"):
        build(tmp_path, speculate="ngram:4")
    with pytest.raises(UnsupportedError, match=r"has no .*NGramDecodingConfig"):
        open_engine(guessing.path)
    with open_engine(guessing.path, speculation="off") as engine:
        assert tokens(engine, 1)


def test_pipeline_stages_and_engines_do_not_guess(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not run on pipeline stages"):
        build(tmp_path, speculate="ngram:3", pp=2)
    with pytest.raises(UsageError, match="target 'tensorrt' has none"):
        build(tmp_path, target="tensorrt", speculate="ngram:3")
    engine = build(tmp_path, target="tensorrt")
    with pytest.raises(UsageError, match="target 'tensorrt' has none"):
        open_engine(engine.path, speculation="ngram:3")


@pytest.mark.parametrize("target", ["tensorrt", "pytorch"])
def test_a_prompt_met_again_is_found_in_whole_blocks_only_where_the_plan_says_so(
    fake: pytest.MonkeyPatch, tmp_path: Path, target: str
) -> None:
    with open_engine(build(tmp_path, target=target).path) as engine:
        expected = tokens(engine)
        assert (engine.kv_stats().prompt_tokens_reused, engine.kv_stats().blocks_cached) == (0, 0)
    with open_engine(build(tmp_path, target=target, reuse=True).path) as engine:
        assert tokens(engine) == expected
        stats = settled(engine, lambda stats: stats.prompt_tokens_reused == 2 * 16)
    assert stats.prompt_tokens_reused == 2 * 16, "two whole blocks of the prompt's 21 tokens, for two of three requests"
    assert stats.blocks_cached is None, "not told"


def test_reuse_is_refused_where_the_cache_type_or_a_policy_forbids_it(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="needs paged context FMHA"):
        build(tmp_path, target="tensorrt", reuse=True, precision="int8", kv_dtype="fp8")
    with pytest.raises(TrtkitError, match="cannot be compacted"):
        build(tmp_path, reuse=True, kv="window:16")
