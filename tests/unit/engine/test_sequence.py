"""Counting inside one sequence: pieces, replay and slots."""

from __future__ import annotations

from typing import Any

from trtkit.engine.sequence import Sequence, blocks_for
from trtkit.spec.engine import Request


def _sequence(prompt: int, new: int = 4, **fields: Any) -> Sequence:
    request = Request(request_id="r", prompt_ids=tuple(range(prompt)), max_tokens=new)
    return Sequence(request=request, arrival=0, max_new_tokens=new, **fields)


def _pieces(sequence: Sequence) -> list[int]:
    ends = []
    while sequence.num_tokens < sequence.known_len:
        ends.append(sequence.piece_end())
        sequence.advance(ends[-1] - sequence.num_tokens)
    return ends


def test_blocks_are_rounded_up() -> None:
    assert [blocks_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_the_last_output_token_needs_no_slot() -> None:
    assert _sequence(10, new=1).peak_slots == 10
    assert _sequence(10, new=4).peak_slots == 13


def test_a_cap_bounds_the_slots() -> None:
    assert _sequence(10, new=40, kv_cap_tokens=16).peak_slots == 16


def test_without_eviction_a_prompt_is_one_piece() -> None:
    assert _pieces(_sequence(10)) == [10]


def test_a_quantum_ends_pieces_at_absolute_multiples_and_at_the_prompts_end() -> None:
    assert _pieces(_sequence(10, prefill_quantum=4)) == [4, 8, 10]


def test_chunk_ends_are_obeyed_and_the_end_is_implied() -> None:
    assert _pieces(_sequence(10, chunk_ends=(1, 7))) == [1, 7, 10]


def test_a_replay_without_eviction_is_one_piece_through_prompt_and_output() -> None:
    sequence = _sequence(5)
    sequence.output_ids += [50, 51]
    assert _pieces(sequence) == [7]


def test_an_evicting_sequence_replays_its_output_one_by_one_after_the_prompt() -> None:
    sequence = _sequence(5, prefill_quantum=4, evicts=True)
    sequence.output_ids += [50, 51]
    assert _pieces(sequence) == [4, 5, 6, 7]


def test_token_slices_run_from_the_prompt_into_the_output() -> None:
    sequence = _sequence(3)
    sequence.output_ids += [50, 51]
    assert sequence.token_slice(2) == [0, 1]
    assert sequence.token_slice(5) == [0, 1, 2, 50, 51]
    sequence.advance(4)
    assert sequence.token_slice(1) == [51]


def test_logical_and_live_length_part_when_slots_are_dropped() -> None:
    sequence = _sequence(10)
    sequence.advance(10)
    sequence.cache_len = 6
    sequence.advance(1)
    assert (sequence.num_tokens, sequence.cache_len) == (11, 7)


def test_reset_keeps_the_output() -> None:
    sequence = _sequence(3)
    sequence.output_ids.append(9)
    sequence.advance(3)
    sequence.reset()
    assert (sequence.num_tokens, sequence.cache_len, sequence.output_ids, sequence.pending) == (0, 0, [9], 4)
