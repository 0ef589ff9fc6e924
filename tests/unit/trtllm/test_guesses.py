"""N-gram speculation in TensorRT-LLM's words."""

from __future__ import annotations

from types import SimpleNamespace

from trtkit.spec.catalog import model_preset
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import parse_speculation
from trtkit.trtllm.guesses import guess_arguments, guess_counts, guess_handicaps, native_guesses


def plan(speculation: str) -> BuildPlan:
    return BuildPlan(
        name="p", model=model_preset("llama-3-8b"), model_source="x", gpu="h100-sxm", quant=quant_for("fp16"),
        target="pytorch", speculation=parse_speculation(speculation),
    )  # fmt: skip


def test_a_plan_that_guesses_nothing_adds_nothing() -> None:
    assert (guess_arguments(plan("off")), guess_handicaps(plan("off"))) == ({}, ())


def test_the_class_is_named_by_the_decoding_type_which_is_no_argument_of_it() -> None:
    made = native_guesses({"decoding_type": "NGram", "max_draft_len": 4}, SimpleNamespace(NGramDecodingConfig=dict))
    assert made == {"max_draft_len": 4}


def test_what_is_given_up_is_said_and_pauses_only_where_they_were_asked_for() -> None:
    (overlap,) = guess_handicaps(plan("ngram:4,adaptive=no"))
    assert overlap == "speculation ngram:4,adaptive=no: the overlap scheduler is off"
    assert "does not pause" in guess_handicaps(plan("ngram:4"))[1]


def test_counts_are_unknown_until_a_release_tells_them_and_then_add_up() -> None:
    count: tuple[int | None, int | None] = (None, None)
    for entry in ({}, {"specDecodingStats": None}, {"specDecodingStats": {"numDraftTokens": 3}}):
        count = guess_counts(entry, count)
        assert count == (None, None)
    for drafted, accepted in ((4, 1), (0, 0), (4, 4)):
        told = {"specDecodingStats": {"numDraftTokens": drafted, "numAcceptedTokens": accepted}}
        count = guess_counts(told, count)
    assert count == (8, 5)
