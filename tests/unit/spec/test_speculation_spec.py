"""Speculation as people write it, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trtkit.spec.codec import from_plain, to_plain
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import SpeculationSpec, parse_speculation, speculation_label

MODEL = ModelSpec(
    name="tiny",
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=256,
    max_position_embeddings=128,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", None),
        (" OFF ", None),
        ("ngram:4", SpeculationSpec(max_draft_tokens=4)),
        ("NGram: 7", SpeculationSpec(max_draft_tokens=7)),
        ("ngram:63", SpeculationSpec(max_draft_tokens=63)),
        ("ngram:4,match=2", SpeculationSpec(max_draft_tokens=4, max_ngram=2)),
        ("ngram:4, adaptive=no", SpeculationSpec(max_draft_tokens=4, adaptive=False)),
        ("ngram:4,adaptive=off,match=1", SpeculationSpec(max_draft_tokens=4, max_ngram=1, adaptive=False)),
        ("ngram:4,adaptive=yes", SpeculationSpec(max_draft_tokens=4)),
    ],
)
def test_speculation_is_read_as_people_write_it(text: str, expected: SpeculationSpec | None) -> None:
    assert parse_speculation(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown speculation '': allowed are off, ngram:4"),
        ("medusa", "unknown speculation 'medusa': allowed are off, ngram:4"),
        ("off:4", "unknown speculation 'off:4'"),
        ("ngram", "number of guessed tokens is ''"),
        ("ngram:", "number of guessed tokens is ''"),
        ("ngram:four", "number of guessed tokens is 'four', expected a number"),
        ("ngram:0", "guesses 0 tokens, allowed are 1 to 63"),
        ("ngram:64", "guesses 64 tokens, allowed are 1 to 63"),
        ("ngram:4,match=0", "matches 0 tokens, allowed are 1 to 16"),
        ("ngram:4,match=17", "matches 17 tokens, allowed are 1 to 16"),
        ("ngram:4,match=x", "match is 'x', expected a number"),
        ("ngram:4,match=2,match=2", "cannot read 'match=2'"),
        ("ngram:4,adaptive=perhaps", "cannot read 'adaptive=perhaps'"),
        ("ngram:4,window=2", "cannot read 'window=2'"),
        ("ngram:4,", "cannot read ''"),
    ],
)
def test_unreadable_speculation_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_speculation(text)


@pytest.mark.parametrize(
    "text", ["off", "ngram:4", "ngram:8,match=2", "ngram:1,adaptive=no", "ngram:3,match=5,adaptive=no"]
)
def test_a_label_reads_back(text: str) -> None:
    spec = parse_speculation(text)
    assert speculation_label(spec) == text
    assert from_plain(BuildPlan, to_plain(plan(speculation=spec))) == plan(speculation=spec)


def test_a_plan_without_speculation_is_spelled_as_before_there_was_any() -> None:
    assert "speculation" not in to_plain(plan(speculation=None))
    assert to_plain(plan())["speculation"]["max_draft_tokens"] == 4


def test_an_unknown_kind_of_a_record_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown speculation 'eagle'"):
        SpeculationSpec(kind="eagle", max_draft_tokens=4)


def plan(**changes: object) -> BuildPlan:
    whole = BuildPlan(
        name="demo",
        model=MODEL,
        model_source="demo",
        gpu="cpu",
        quant=quant_for("fp16"),
        speculation=SpeculationSpec(max_draft_tokens=4),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_a_plan_with_eviction_refuses_speculation_in_one_line() -> None:
    assert plan().speculation == SpeculationSpec(max_draft_tokens=4)
    with pytest.raises(UsageError, match=r"'ngram:4' with KV policy 'h2o:50%'.*--kv full or --speculate off") as caught:
        plan(kv=parse_kv_policy("h2o:50%"))
    assert "\n" not in str(caught.value)


def test_tensorrt_engines_refuse_speculation_and_the_pytorch_target_takes_it() -> None:
    assert plan(target="pytorch").speculation is not None
    with pytest.raises(UsageError, match="target 'tensorrt' has none; use --target embedded or pytorch"):
        plan(target="tensorrt")
