"""`LlmEngine` over a scripted `LLM`: events, limits, cancelling, failures, scoring's traps. No TensorRT-LLM, no fake."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trtkit.spec.catalog import model_preset
from trtkit.spec.engine import FinishReason, Request, ScoreRequest, TokenEvent
from trtkit.spec.errors import EngineError, UnsupportedError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for
from trtkit.trtllm.counters import EvictionCounters
from trtkit.trtllm.runtime import LlmEngine

VOCAB = 11


class Output:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.generation_logits: torch.Tensor | None = None


class Answer:
    """One response: a list of updates, each a list of tokens; may wait for ever, raise, or change the prompt."""

    def __init__(self, llm: Scripted, prompt: list[int], parameters: dict[str, Any]) -> None:
        self.prompt_token_ids = llm.mangle(prompt)
        self.outputs = [Output()]
        self.aborted = asyncio.Event()
        self._llm, self._prompt, self._parameters = llm, prompt, parameters

    def abort(self) -> None:
        self._llm.loop.call_soon_threadsafe(self.aborted.set)

    async def aresult(self) -> Answer:
        self.outputs[0].generation_logits = self._llm.logits(self._prompt)
        return self

    async def __aiter__(self) -> Any:
        self._llm.running += 1
        self._llm.most_running = max(self._llm.most_running, self._llm.running)
        try:
            await self._llm.meet()
            for update in self._llm.updates(self._prompt, self._parameters["max_tokens"]):
                await asyncio.sleep(0)
                if update is None:
                    await self.aborted.wait()
                    self.outputs[0].finish_reason = "cancelled"
                    return
                self.outputs[0].token_ids += update
                yield self
            self.outputs[0].finish_reason = "length"
        finally:
            self._llm.running -= 1


class Scripted:
    def __init__(self) -> None:
        self.running = self.most_running = self.company = 0
        self.opened: list[bool] = []
        self.closed = 0
        self.prompts: list[list[int]] = []
        self.mangle: Callable[[list[int]], list[int]] = list
        self.updates: Callable[[list[int], int], Any] = lambda prompt, count: [[5]] * count
        self.logits: Callable[[list[int]], torch.Tensor | None] = lambda prompt: torch.zeros(1, VOCAB)

    def generate_async(self, inputs: list[int], sampling_params: dict[str, Any], *, streaming: bool) -> Answer:
        self.loop = asyncio.get_running_loop()
        self.prompts.append(inputs)
        if inputs[0] == 9:
            raise ValueError("prompt is cursed\nsecond line")
        return Answer(self, inputs, sampling_params)

    async def meet(self) -> None:
        """Holds each answer until `company` have run at once, then long enough for one more to come in."""
        if self.company:
            deadline = time.monotonic() + 20
            while self.most_running < self.company and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return [
            {"kvCacheStats": {"maxNumBlocks": 50, "usedNumBlocks": 3, "tokensPerBlock": 32}, "numActiveRequests": 2}
        ]

    def shutdown(self) -> None:
        self.closed += 1


def plan(kv: str = "full") -> BuildPlan:
    model = dataclasses.replace(model_preset("llama-3-70b"), vocab_size=VOCAB, eos_ids=(2,))
    limits = Limits(max_batch_size=2, max_seq_len=16, max_num_tokens=16)
    return BuildPlan(
        name="p", model=model, model_source="x", gpu="h100-sxm", quant=quant_for("int8"), target="tensorrt",
        limits=limits, kv=parse_kv_policy(kv),
    )  # fmt: skip


@pytest.fixture
def llm() -> Scripted:
    return Scripted()


def open_engine(llm: Scripted, kv: str = "full", counters: EvictionCounters | None = None) -> LlmEngine:
    def open_llm(scoring: bool) -> Scripted:
        llm.opened.append(scoring)
        return llm

    return LlmEngine(plan(kv), open_llm, lambda **arguments: arguments, weight_bytes=7, counters=counters)


@pytest.fixture
def engine(llm: Scripted) -> Iterator[LlmEngine]:
    with open_engine(llm) as opened:
        yield opened


def request(name: str = "r", prompt: tuple[int, ...] = (1, 2), max_tokens: int = 3, **changes: Any) -> Request:
    return Request(request_id=name, prompt_ids=prompt, max_tokens=max_tokens, **changes)


def short(events: list[TokenEvent]) -> list[tuple[int, int | None, FinishReason | None]]:
    return [(e.index, e.token_id, e.finish) for e in events]


def test_each_token_is_an_event_and_the_last_one_says_why_it_is_the_last(engine: LlmEngine) -> None:
    events = list(engine.generate([request()]))
    assert short(events) == [(0, 5, None), (1, 5, None), (2, 5, FinishReason.LENGTH)]
    assert [e.time_ns for e in events] == sorted(e.time_ns for e in events)


def test_tokens_that_arrive_together_are_events_of_the_same_moment(engine: LlmEngine, llm: Scripted) -> None:
    llm.updates = lambda prompt, count: [[4, 5], [6]]
    events = list(engine.generate([request()]))
    assert [e.token_id for e in events] == [4, 5, 6]
    assert events[0].time_ns == events[1].time_ns


def test_an_end_token_stops_and_is_emitted_and_what_follows_is_dropped(engine: LlmEngine, llm: Scripted) -> None:
    llm.updates = lambda prompt, count: [[4], [2], [4]]
    assert short(list(engine.generate([request()])))[-1] == (1, 2, FinishReason.STOP)
    events = list(engine.generate([request(ignore_eos=True)]))
    assert short(events)[-1] == (2, 4, FinishReason.LENGTH)


def test_no_more_run_at_once_than_the_batch_admits(engine: LlmEngine, llm: Scripted) -> None:
    llm.company = 2
    events = list(engine.generate([request(str(i)) for i in range(7)]))
    assert sum(e.finish is not None for e in events) == 7
    assert llm.most_running == 2


def test_a_feed_that_has_none_right_now_is_asked_again(engine: LlmEngine) -> None:
    events = list(engine.generate(iter([None, request("a"), None, None, request("b"), None])))
    assert {e.request_id for e in events} == {"a", "b"}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (request(prompt=()), "empty"),
        (request(prompt=(VOCAB,)), "token id 11"),
        (request(prompt=(1,) * 16), "max_seq_len is 16"),
        (request(kv=parse_kv_policy("window:8")), "built with"),
        (request(prompt=(9,)), "TensorRT-LLM: prompt is cursed"),
    ],
)
def test_a_bad_request_ends_with_one_line_and_the_others_run(engine: LlmEngine, bad: Request, says: str) -> None:
    events = list(engine.generate([bad, request("good")]))
    (refused,) = [e for e in events if e.request_id == "r"]
    assert (refused.token_id, refused.finish) == (None, FinishReason.ERROR)
    assert says in (refused.error or "")
    assert "\n" not in (refused.error or "")
    assert sum(e.request_id == "good" for e in events) == 3


def test_output_is_cut_where_prompt_and_output_reach_the_limit(engine: LlmEngine) -> None:
    assert len(list(engine.generate([request(prompt=(1,) * 14, max_tokens=9)]))) == 2


def test_a_cancelled_request_ends_as_cancelled(engine: LlmEngine, llm: Scripted) -> None:
    llm.updates = lambda prompt, count: [[4], None]
    events = []
    for event in engine.generate([request()]):
        events.append(event)
        engine.cancel("r")
    assert short(events) == [(0, 4, None), (1, None, FinishReason.CANCELLED)]
    engine.cancel("r")


def test_a_response_that_ends_early_is_an_error_and_not_a_short_answer(engine: LlmEngine, llm: Scripted) -> None:
    llm.updates = lambda prompt, count: [[4]]
    last = list(engine.generate([request()]))[-1]
    assert (last.finish, last.token_id) == (FinishReason.ERROR, None)
    assert "after 1 tokens" in (last.error or "")


def test_the_pool_is_what_the_statistics_say(engine: LlmEngine) -> None:
    assert engine.info.kv_pool_bytes == 50 * 32 * 320 * 1024
    assert (engine.kv_stats().blocks_used, engine.kv_stats().requests_running) == (3, 2)


def evicted(engine: LlmEngine) -> tuple[int | None, ...]:
    stats = engine.kv_stats()
    return stats.evictions, stats.tokens_evicted, stats.blocks_freed


def test_what_workers_evicted_is_theirs_to_tell_and_unknown_until_they_do(llm: Scripted) -> None:
    counters = EvictionCounters()
    told = counters.directory / "rank0.json"
    with open_engine(llm, "h2o:8", counters) as engine:
        assert evicted(engine) == (None, None, None)
        told.write_text('{"evictions": 3, "tokens_evicted": 70, "blocks_freed": 2}')
        assert evicted(engine) == (3, 70, 2)
        told.write_text('{"evictions": 3')
        assert evicted(engine) == (None, None, None), "a broken file tells nothing"
    assert not told.parent.exists()


def test_an_engine_that_evicts_and_does_not_tell_is_not_said_to_have_evicted_nothing(llm: Scripted) -> None:
    with open_engine(llm, "window:8") as engine:
        assert evicted(engine) == (None, None, None)
    with open_engine(llm) as engine:
        assert evicted(engine) == (0, 0, 0)


def test_statistics_that_never_come_are_an_error(llm: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtkit.trtllm.pool._FIRST_S", 0.05)
    monkeypatch.setattr(llm, "get_stats", lambda timeout=2: [])
    with pytest.raises(EngineError, match="no KV-cache statistics"):
        open_engine(llm)


def one_hot(prompt: list[int]) -> torch.Tensor:
    """Padded logits whose best next token is the prompt's length."""
    row = torch.zeros(1, VOCAB + 3)
    row[0, len(prompt)], row[0, VOCAB:] = 2.0, 99.0
    return row


def test_position_i_is_scored_from_the_prefix_that_ends_before_it(engine: LlmEngine, llm: Scripted) -> None:
    llm.logits = one_hot
    asked = ScoreRequest(request_id="s", context_ids=(1, 2), continuations=((2, 3), (2, 7), (4,)), top_logprobs=1)
    (result,) = engine.score([asked])
    assert [c.is_greedy for c in result.continuations] == [(True, True), (True, False), (False,)]
    best = result.continuations[0].top[1]
    assert best[0][0] == 3
    assert result.continuations[0].logprobs[0] == pytest.approx(
        2 - torch.logsumexp(torch.tensor([2.0] + [0.0] * 10), 0)
    )


def test_shared_prefixes_are_asked_once_and_the_context_first(engine: LlmEngine, llm: Scripted) -> None:
    llm.prompts.clear()
    list(engine.score([ScoreRequest(request_id="s", context_ids=(1,), continuations=((2, 3), (2, 4)))]))
    assert llm.prompts[-2:] == [[1], [1, 2]]


def test_scoring_opens_the_engine_for_logits_and_generation_opens_it_without(engine: LlmEngine, llm: Scripted) -> None:
    score = ScoreRequest(request_id="s", context_ids=(1,), continuations=((2,),))
    list(engine.score([score])), list(engine.score([score])), list(engine.generate([request()]))
    assert llm.opened == [False, True, False]
    assert llm.closed == 2


@pytest.mark.parametrize("logits", [None, torch.zeros(2, VOCAB), torch.zeros(1, VOCAB - 1)])
def test_logits_of_another_shape_are_refused(engine: LlmEngine, llm: Scripted, logits: torch.Tensor | None) -> None:
    llm.logits = lambda prompt: logits
    with pytest.raises(EngineError, match="logits of one token"):
        list(engine.score([ScoreRequest(request_id="s", context_ids=(1,), continuations=((2,),))]))


def test_a_prompt_that_was_cut_on_the_way_is_refused(engine: LlmEngine, llm: Scripted) -> None:
    llm.mangle = lambda prompt: prompt[1:]
    with pytest.raises(EngineError, match="changed a prompt of 2 tokens"):
        list(engine.score([ScoreRequest(request_id="s", context_ids=(1, 3), continuations=((2,),))]))


def test_a_context_that_is_too_long_is_one_refused_result(engine: LlmEngine) -> None:
    (result,) = engine.score([ScoreRequest(request_id="s", context_ids=(1,) * 16, continuations=((2,),))])
    assert "max_seq_len is 16" in (result.error or "")


def test_scoring_under_eviction_is_refused(llm: Scripted) -> None:
    with open_engine(llm, "window:8") as engine, pytest.raises(UnsupportedError, match="evicted"):
        engine.score([])


def test_closing_twice_shuts_down_once(engine: LlmEngine, llm: Scripted) -> None:
    engine.close()
    engine.close()
    assert llm.closed == 1
