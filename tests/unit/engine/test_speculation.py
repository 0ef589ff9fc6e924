"""Guesses: how many there are, what becomes of them, and what they may not do. That text never changes is a property."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import cache
from typing import Any

import pytest
import torch
from support.device_engines import Replays, open_device
from support.engine_models import make_hf, open_hf, spec_of, trtllm_tensors

from trtkit.engine.batch import RowInput
from trtkit.engine.block_pool import BlockPool
from trtkit.engine.device.setup import device_needs
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.scheduler import Scheduler, Step
from trtkit.engine.sequence import Sequence
from trtkit.engine.speculation import NgramIndex, NgramProposer, Speculator
from trtkit.engine.step import Draw, StepInput, one_by_one
from trtkit.spec.dtype import DType
from trtkit.spec.engine import FinishReason, KVStats, Request, Sampling, TokenEvent
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.plan import Limits
from trtkit.spec.speculation import SpeculationSpec, decode_rows

FOUR = SpeculationSpec(max_draft_tokens=4, adaptive=False)
PROMPT = (5, 6, 7)
OPENED = [open_hf, open_device]


@cache
def _hf() -> Any:
    return make_hf()


def _request(name: str = "a", prompt: Seq[int] = PROMPT, count: int = 21, **fields: Any) -> Request:
    return Request(request_id=name, prompt_ids=tuple(prompt), max_tokens=count, **{"ignore_eos": True, **fields})


def _run(engine: EmbeddedEngine, *requests: Request) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for event in engine.generate(list(requests)):
        events.setdefault(event.request_id, []).append(event)
    return events


def _ids(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


@cache
def _written(count: int = 21) -> tuple[int, ...]:
    return tuple(i for i in _ids(_run(open_hf(_hf()), _request(count=count))["a"]) if i is not None)


class Knows:
    """Guesses the right tokens, of every `most` the last `wrong` ones not."""

    def __init__(self, wrong: int = 0, text: Seq[int] | None = None) -> None:
        self.wrong = wrong
        self.text = text

    def propose(self, sequence: Sequence, most: int) -> Seq[int]:
        done = len(sequence.output_ids)
        text = list(self.text or _written())[done : done + most]
        right = max(0, len(text) - self.wrong)
        return [*text[:right], *((token + 1) % 90 for token in text[right:])]

    def forget(self, sequence: Sequence) -> None:
        """Nothing is remembered."""


def _count_steps(engine: EmbeddedEngine) -> list[int]:
    """Rows of each step that is launched from now on."""
    rows: list[int] = []
    launch = engine._runner.launch

    def counted(step: StepInput) -> Any:
        rows.append(sum(1 + row.drafts for row in step.rows))
        return launch(step)

    engine._runner.launch = counted  # type: ignore[method-assign]
    return rows


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize(
    ("wrong", "steps", "drafted", "accepted"),
    # The prompt's step writes one of 21 tokens. With four right guesses a step writes five, with three of four it writes
    # four, until four are left: two right guesses of three and the token after them, then the last.
    [(0, 1 + 4, 16, 16), (1, 1 + 4 + 1 + 1, 19, 14), (4, 1 + 20, None, 0)],
)
def test_a_step_writes_its_right_guesses_and_one_token_more(
    opened: Any, wrong: int, steps: int, drafted: int | None, accepted: int
) -> None:
    engine = opened(_hf(), speculation=FOUR, proposer=Knows(wrong))
    launched = _count_steps(engine)
    events = _run(engine, _request())["a"]
    assert tuple(_ids(events)) == _written()
    assert [event.index for event in events] == list(range(21))
    stats = engine.kv_stats()
    assert (len(launched), stats.accepted_tokens) == (steps, accepted)
    assert drafted is None or stats.draft_tokens == drafted
    assert stats.draft_tokens == sum(launched[1:]) - len(launched[1:])


@pytest.mark.parametrize("opened", OPENED)
def test_tokens_of_one_step_existed_at_the_same_moment(opened: Any) -> None:
    events = _run(opened(_hf(), speculation=FOUR, proposer=Knows()), _request())["a"]
    assert len({event.time_ns for event in events}) == 5


@pytest.mark.parametrize("opened", OPENED)
def test_a_stop_id_among_right_guesses_ends_the_request_there(opened: Any) -> None:
    stop = next(token for place, token in enumerate(_written()) if token not in _written()[:place] and place > 2)
    end = _written().index(stop)
    engine = opened(_hf(), speculation=FOUR, proposer=Knows())
    events = _run(engine, _request(stop_ids=(stop,)))["a"]
    assert tuple(_ids(events)) == _written()[: end + 1]
    assert [event.finish for event in events[-2:]] == [None, FinishReason.STOP]
    engine.check()
    assert engine.kv_stats().blocks_used == 0


@pytest.mark.parametrize("opened", OPENED)
def test_the_last_token_is_never_guessed_past(opened: Any) -> None:
    engine = opened(_hf(), speculation=SpeculationSpec(max_draft_tokens=63), proposer=Knows())
    launched = _count_steps(engine)
    events = _run(engine, _request())["a"]
    assert (tuple(_ids(events)), events[-1].finish) == (_written(), FinishReason.LENGTH)
    assert launched == [1, 20], "20 tokens are left after the first: 19 guesses and what follows them"


def test_a_repeating_text_is_guessed_from_itself() -> None:
    proposer, text = NgramProposer(3), [5, 6, 7, 8] * 3
    sequence = Sequence(request=_request(prompt=text), arrival=0, max_new_tokens=21)
    sequence.output_ids = [5, 6]
    assert proposer.propose(sequence, 6) == [7, 8, 5, 6, 7, 8]
    sequence.output_ids += [9]
    assert proposer.propose(sequence, 6) == [], "9 is new"
    sequence.output_ids += [5]
    assert proposer.propose(sequence, 2) == [], "one token says too little"
    sequence.output_ids += [6]
    assert proposer.propose(sequence, 2) == [9, 5], "the latest 5, 6 was followed by these"
    single = NgramProposer(1)
    assert single.propose(sequence, 1) == [9]
    sequence.output_ids += [9, 5]
    assert single.propose(sequence, 2) == [6, 9], "one token is enough where one is asked for"


def test_the_longest_match_wins_over_a_later_shorter_one() -> None:
    index = NgramIndex(3)
    index.extend([1, 2, 3, 10, 2, 3, 20, 3, 30, 1, 2, 3])
    assert index.continuation(1) == [10]
    shorter = NgramIndex(2)
    shorter.extend(index.tokens)
    assert shorter.continuation(1) == [20]


@pytest.mark.parametrize("opened", OPENED)
def test_a_request_whose_guesses_are_wrong_is_soon_left_alone(opened: Any) -> None:
    def drafted(adaptive: bool) -> int:
        spec = SpeculationSpec(max_draft_tokens=2, adaptive=adaptive)
        engine = opened(_hf(), speculation=spec, proposer=Knows(wrong=2, text=_written(100)))
        assert tuple(_ids(_run(engine, _request(count=100))["a"])) == _written(100)
        return engine.kv_stats().draft_tokens or 0

    assert drafted(False) == 2 * 97 + 1, "every step but the first, the last, and the one with a single token to guess"
    assert 0 < drafted(True) <= 24


def test_a_pause_doubles_with_each_failed_trial_and_halves_with_a_right_guess() -> None:
    scheduler, step = _step(1)
    sequence = step.feeds[0].sequence
    sequence.max_new_tokens = 10_000

    class Always(Knows):
        def propose(self, sequence: Sequence, most: int) -> Seq[int]:
            return [9] * most

    speculator = Speculator(SpeculationSpec(max_draft_tokens=4), scheduler, None, Always())

    def pause_before(accepted: int) -> int:
        before = len(sequence.output_ids)
        while not speculator.guess(step)[0]:
            sequence.output_ids.append(9)
        speculator.settle(sequence, 4, accepted)
        return len(sequence.output_ids) - before

    assert [pause_before(0) for _ in range(5)] == [0] * 5, "a new request is trusted for five steps"
    assert [pause_before(0) for _ in range(6)] == [8, 16, 32, 64, 128, 128]
    assert [pause_before(1), pause_before(0), pause_before(0), pause_before(0)] == [128, 0, 0, 64]
    assert pause_before(4) == 128
    assert [pause_before(4) for _ in range(4)] == [0] * 4
    while not pause_before(0):
        pass
    assert pause_before(0) == 16, "five right steps have brought the pause down to the least, and this is the second"


@pytest.mark.parametrize("opened", OPENED)
def test_blocks_of_wrong_guesses_are_free_before_the_next_step(opened: Any) -> None:
    engine = opened(_hf(), speculation=FOUR, proposer=Knows(wrong=4), tokens_per_block=1)
    peak = 0
    for event in engine.generate([_request()]):
        fed = 0 if event.finish else len(PROMPT) + event.index
        assert engine.kv_stats().blocks_used == fed, "the newest token is not fed yet"
        peak = max(peak, engine.kv_stats().blocks_peak)
    assert peak == len(PROMPT) + 20, "guesses never reach beyond the last token, which is not fed"


def test_guesses_preempt_nobody_and_take_no_block_that_is_not_free() -> None:
    pool = BlockPool(8)
    scheduler = Scheduler(Limits(max_batch_size=2, max_num_tokens=64, tokens_per_block=4), pool)
    for name in ("a", "b"):
        scheduler.add(Sequence(request=_request(name, range(3, 9), 9), arrival=ord(name), max_new_tokens=9))
    for feed in scheduler.schedule().feeds:
        feed.sequence.advance(feed.count)
        feed.sequence.output_ids.append(9)
    pool.allocate(pool.num_free, "somebody else")
    step = scheduler.schedule()
    drafts = Speculator(FOUR, scheduler, None, Knows(text=range(3, 90))).guess(step)
    assert (pool.num_free, scheduler.preemptions) == (0, 0)
    assert [len(guessed) for guessed in drafts] == [1, 1], "seven tokens are fed and one place is left in each's block"
    assert step.new_blocks == []


def _step(*counts: int) -> tuple[Scheduler, Step]:
    """A step that feeds each sequence this many tokens: several of a prompt, or one while decoding."""
    limits = Limits(max_batch_size=len(counts), max_num_tokens=1000, tokens_per_block=4)
    scheduler = Scheduler(limits, BlockPool(1000))
    for place, count in enumerate(counts):
        sequence = Sequence(request=_request(str(place), range(3, 3 + count), 50), arrival=place, max_new_tokens=50)
        scheduler.add(sequence)
    return scheduler, scheduler.schedule()


@pytest.mark.parametrize(
    ("counts", "most_rows", "expected"),
    [
        ((1, 1, 1), None, [4, 4, 4]),
        ((1, 1, 1), 10, [2, 2, 3]),
        ((1, 1, 1), 5, [0, 1, 1]),
        ((1, 1, 1), 3, [0, 0, 0]),
        ((1, 7, 1), 10, [3, 0, 4]),
    ],
)
def test_rows_that_a_step_has_left_are_shared_out(
    counts: tuple[int, ...], most_rows: int | None, expected: list[int]
) -> None:
    scheduler, step = _step(*counts)
    drafts = Speculator(FOUR, scheduler, most_rows, Knows(text=range(3, 90))).guess(step)
    assert [len(guessed) for guessed in drafts] == expected
    scheduler.check()


def test_guesses_stay_within_the_tokens_of_a_step() -> None:
    engine = open_hf(_hf(), speculation=FOUR, proposer=Knows(), max_num_tokens=4)
    launched = _count_steps(engine)
    assert tuple(_ids(_run(engine, _request())["a"])) == _written()
    assert max(launched) == 4


def test_without_speculation_a_device_step_is_as_large_as_its_batch_and_one_runs_ahead() -> None:
    plain, guessing = (
        open_device(_hf(), max_batch_size=8, capture=Replays(), speculation=spec) for spec in (None, FOUR)
    )
    assert (plain._runner.most_rows, plain._runner._graphs.sizes) == (8, (1, 2, 4, 8))
    assert guessing._runner._graphs.sizes == (1, 2, 4, 8, 16, 24, 32, 40)
    assert (plain._max_in_flight, guessing._max_in_flight) == (1, 0)


@pytest.mark.parametrize(
    ("batch", "drafts", "rows"),
    [(1, 0, 1), (1, 4, 5), (8, 4, 40), (32, 4, 64), (32, 0, 32), (100, 4, 100), (1, 63, 64)],
)
def test_a_decode_step_has_room_for_guesses_up_to_64_rows(batch: int, drafts: int, rows: int) -> None:
    assert decode_rows(batch, drafts) == rows


def test_memory_for_drawing_is_counted_for_every_row_of_guesses() -> None:
    weights, few = open_hf(_hf())._runner.weights, Limits(max_batch_size=8, max_seq_len=64)
    plain, guessing = (device_needs(weights, few, DType.FP32, KVPolicySpec(), "cpu", spec) for spec in (None, FOUR))
    assert guessing.sampling == 5 * plain.sampling > 0


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_of_guesses_replays_the_graph_of_its_rows(captured: bool) -> None:
    capture = Replays(fails=not captured)
    engine = open_device(_hf(), speculation=FOUR, proposer=Knows(), capture=capture)
    assert tuple(_ids(_run(engine, _request())["a"])) == _written()
    assert capture.replayed == (4 if captured else 0)


def test_a_row_with_drafts_becomes_a_row_for_each_token() -> None:
    sequence, other = (Sequence(request=_request(n), arrival=0, max_new_tokens=9) for n in "ab")
    draw = Draw(how=Sampling(), seed=3, index=5)
    step = StepInput(
        rows=[
            RowInput(sequence=other, token_ids=(1, 2)),
            RowInput(sequence=sequence, token_ids=(7, 8, 9), drafts=2),
        ],
        draws=[None, draw],
        new_blocks=[4],
    )
    single = one_by_one(step)
    assert single.rows[0] is step.rows[0]
    assert [(r.sequence, tuple(r.token_ids), r.drafts, r.ahead) for r in single.rows[1:]] == [
        (sequence, (7,), 0, 0),
        (sequence, (8,), 0, 1),
        (sequence, (9,), 0, 2),
    ]
    assert [d.index if d else None for d in single.draws] == [None, 5, 6, 7]
    assert single.new_blocks == [4]


@pytest.mark.parametrize("opened", OPENED)
def test_speculation_with_eviction_is_refused_in_one_line(opened: Any) -> None:
    with pytest.raises(UsageError, match="'ngram:4,adaptive=no' with KV policy 'h2o:budget=16'") as caught:
        open_tensors(spec_of(_hf()), trtllm_tensors(_hf()), kv_policy=parse_kv_policy("h2o:16"), speculation=FOUR)
    assert "\n" not in str(caught.value)
    events = _run(opened(_hf(), speculation=FOUR), _request("bad", kv=parse_kv_policy("h2o:16")), _request("good"))
    assert "an eviction cannot be taken back" in (events["bad"][-1].error or "")
    assert tuple(_ids(events["good"])) == _written()


def _poison(engine: EmbeddedEngine, token: int) -> EmbeddedEngine:
    """Make everything of `token`, once it is fed, a NaN; no other token is any different. Weights may be shared.

    A step that is asked again for ever fails.
    """
    embedding = engine._runner.weights.embedding
    embedding[token] = float("nan")
    launch, steps = engine._runner.launch, iter(range(50))

    def counted(step: StepInput) -> Any:
        assert next(steps, None) is not None, "these requests take 21 steps, and one more for a spoilt one"
        return launch(step)

    engine._runner.launch = counted  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("tokens_per_block", [1, 2, 16])
@pytest.mark.parametrize("opened", OPENED)
def test_a_wrong_guess_that_is_no_number_harms_nobody(opened: Any, tokens_per_block: int, reuse: bool) -> None:
    poison = next(token for token in range(3, 96) if token not in _written())

    class Poisons(Knows):
        def propose(self, sequence: Sequence, most: int) -> Seq[int]:
            return [poison] * most

    options = {"tokens_per_block": tokens_per_block, "enable_block_reuse": reuse}
    engine = _poison(opened(make_hf(), speculation=FOUR, proposer=Poisons(), **options), poison)
    for event in engine.generate([_request()]):
        engine.check()
        assert event.token_id == _written()[event.index]
    assert event.finish is FinishReason.LENGTH
    assert engine.kv_stats().draft_tokens
    assert engine.kv_stats().accepted_tokens == 0


@pytest.mark.parametrize("opened", OPENED)
def test_a_block_that_a_guess_has_spoilt_is_found_by_nobody(opened: Any) -> None:
    poison = next(token for token in range(3, 96) if token not in _written())

    class Poisons(Knows):
        def propose(self, sequence: Sequence, most: int) -> Seq[int]:
            # The step feeds the third token of the output, which fills a block: the prompt has three as well.
            return [poison] * most if sequence.request_id == "a" and len(sequence.output_ids) == 3 else []

    options = {"tokens_per_block": 6, "enable_block_reuse": True}
    engine = _poison(opened(make_hf(), speculation=FOUR, proposer=Poisons(), **options), poison)
    launch = engine._runner.launch

    def cancels(step: StepInput) -> Any:
        if any(row.drafts for row in step.rows):
            engine.cancel("a")
        return launch(step)

    engine._runner.launch = cancels  # type: ignore[method-assign]
    assert _run(engine, _request())["a"][-1].finish is FinishReason.CANCELLED
    again = _run(engine, _request("b", (*PROMPT, *_written()[:4]), 17))["b"]
    assert tuple(_ids(again)) == _written()[4:]


@pytest.mark.parametrize("opened", OPENED)
def test_an_output_that_is_no_number_ends_its_request_where_it_would_without_guesses(opened: Any) -> None:
    hf = make_hf(seed=1)
    written = [token or 0 for token in _ids(_run(opened(hf), _request())["a"])]
    poison = written[4]
    assert poison not in (*written[:4], *PROMPT)
    plain = _run(_poison(opened(hf), poison), _request())["a"]
    guessing = _poison(opened(hf, speculation=FOUR, proposer=Knows(text=written)), poison)
    guessed = _run(guessing, _request())["a"]
    assert (plain[-1].finish, len(plain)) == (FinishReason.ERROR, 6)
    assert [(e.index, e.token_id, e.finish, e.error) for e in guessed] == [
        (e.index, e.token_id, e.finish, e.error) for e in plain
    ]
    assert guessing.kv_stats().blocks_used == 0


def test_only_the_slots_named_are_cleared() -> None:
    cache = PagedCache(spec_of(_hf()), 4, 4, DType.FP32, "cpu")
    cache.storage.fill_(1.0)
    cache.clear_slots([2, 0, 3], 6, 11)
    left = cache.storage[0, :, 0, 0, :, 0]
    assert left.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert torch.equal(cache.storage.amin(dim=(0, 2, 3, 5)), left)
    assert torch.equal(cache.storage.amax(dim=(0, 2, 3, 5)), left)


def test_an_ended_request_leaves_nothing_behind() -> None:
    engine = open_hf(_hf(), speculation=SpeculationSpec(max_draft_tokens=4))
    _run(engine, _request(), _request("b", stop_ids=tuple(range(90))))
    assert not engine._speculator._trust
    assert not engine._speculator._proposer._indices


def test_counters_of_an_engine_without_speculation_are_zero_and_left_out_of_records() -> None:
    from trtkit.spec.codec import to_plain

    engine = open_hf(_hf())
    _run(engine, _request())
    stats = engine.kv_stats()
    assert (stats.draft_tokens, stats.accepted_tokens, engine.info.speculation) == (0, 0, None)
    assert not {"draft_tokens", "accepted_tokens"} & to_plain(stats).keys()
    assert isinstance(stats, KVStats)
