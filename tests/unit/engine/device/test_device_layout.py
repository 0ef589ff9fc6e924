"""A mixed step laid out: every index against plain loops over the rows."""

from __future__ import annotations

import pytest
import torch

from trtkit.engine.batch import RowInput
from trtkit.engine.device.layout import NOWHERE, DecodeLayout, RowFacts, row_order, send_mixed
from trtkit.engine.device.segments import Segment
from trtkit.engine.device.staging import Staging
from trtkit.engine.sequence import PENDING, Sequence
from trtkit.spec.engine import Request

CPU = torch.device("cpu")
NO_TABLE = torch.zeros(0, dtype=torch.int32)


def _input(name: str, tokens: tuple[int, ...], position: int, cached: int, table: list[int], *, evicts: bool = False) -> RowInput:  # fmt: skip
    sequence = Sequence(
        request=Request(request_id=name, prompt_ids=(3,) * 50, max_tokens=9), arrival=0, max_new_tokens=9, evicts=evicts
    )
    sequence.num_tokens, sequence.cache_len, sequence.block_table = position, cached, table
    return RowInput(sequence=sequence, token_ids=tokens)


SEGMENTS = (Segment(start=0, count=3, cached_before=2, evict_to=1), Segment(start=3, count=2, cached_before=1))


def _facts(inputs: list[RowInput]) -> RowFacts:
    return RowFacts(
        place_of={item.sequence: 10 + index for index, item in enumerate(inputs)},
        dump=99,
        no_table=NO_TABLE,
        ring_places=lambda rows: [70 + row.input_index for row in rows],
        segments=lambda row: SEGMENTS if row.sequence.evicts else None,
    )


INPUTS = [
    _input("watched", (20, 21, 22, 23, 24), 12, 2, [8, 9], evicts=True),
    _input("plain", (30, 31, 32), 0, 0, [4]),
    _input("decode", (PENDING,), 7, 7, [1, 2]),
    _input("longer", (40, 41), 5, 5, [6, 7, 3]),
    _input("known", (50,), 9, 3, [5], evicts=True),
]


def test_a_mixed_step_against_plain_loops() -> None:
    order = row_order(INPUTS, lambda item: item.sequence.evicts)
    assert [INPUTS[index].sequence.request_id for index in order] == ["decode", "known", "plain", "longer", "watched"]
    step = send_mixed(INPUTS, order, _facts(INPUTS), Staging(CPU, 16))
    assert step.num_decode == 2
    assert step.plain_tokens == 7
    assert step.token_ids_T.tolist() == [PENDING, 50, 30, 31, 32, 40, 41, 20, 21, 22, 23, 24]
    assert step.sources_T.tolist() == [12, *([NOWHERE] * 11)]
    assert step.positions_T.tolist() == [7, 9, 0, 1, 2, 5, 6, 12, 13, 14, 15, 16]
    assert step.slots_T.tolist() == [7, 3, 0, 1, 2, 5, 6, 2, 3, 4, 1, 2]
    assert step.rows_T is not None
    assert step.rows_T.tolist() == [0, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    assert step.lengths_B.tolist() == [8, 4]
    assert step.ring_T.tolist() == [72, 74, *([NOWHERE] * 10)]
    assert [table[: len(t)] for table, t in zip(step.tables_RM.tolist(), ([1, 2], [5], [4], [6, 7, 3], [8, 9]), strict=True)] == [[1, 2], [5], [4], [6, 7, 3], [8, 9]]  # fmt: skip
    assert step.last_tokens == [11, 4, 0, 6, 1]


def test_attention_calls_are_one_for_all_plain_rows_and_one_for_each_segment() -> None:
    order = row_order(INPUTS, lambda item: item.sequence.evicts)
    plain, first, second = send_mixed(INPUTS, order, _facts(INPUTS), Staging(CPU, 16)).calls
    assert (plain.tokens, plain.max_count, plain.segment) == (slice(2, 7), 3, None)
    assert plain.starts_P1.tolist() == [0, 3, 5]
    assert plain.cached_P.tolist() == [0, 5]
    assert plain.lengths_P.tolist() == [3, 7]
    assert plain.tables_PM[1].tolist()[:3] == [6, 7, 3]
    assert (first.tokens, first.segment) == (slice(7, 10), SEGMENTS[0])
    assert (second.tokens, second.segment) == (slice(10, 12), SEGMENTS[1])
    assert [c.starts_P1.tolist() for c in (first, second)] == [[0, 3], [0, 2]]
    assert [c.cached_P.tolist() for c in (first, second)] == [[2], [1]]
    assert [c.lengths_P.tolist() for c in (first, second)] == [[5], [3]]
    assert first.row is not None
    assert first.row.table.tolist()[:2] == [8, 9]


def test_a_token_in_flight_beside_others_is_a_mistake() -> None:
    inputs = [_input("a", (4, PENDING), 0, 0, [0])]
    with pytest.raises(AssertionError, match="fed alone"):
        send_mixed(inputs, [0], _facts(inputs), Staging(CPU, 16))


def test_a_decode_step_pads_to_its_size_with_rows_that_touch_nothing() -> None:
    inputs = [INPUTS[2], INPUTS[4]]
    memory = torch.full((DecodeLayout.words(4, 3),), 77, dtype=torch.int32)
    layout = DecodeLayout(4, 3, memory)
    step = layout.send(inputs, [5, 6], _facts(inputs), Staging(CPU, 16))
    assert step.token_ids_T.tolist() == [PENDING, 50, 0, 0]
    assert step.sources_T.tolist() == [10, NOWHERE, NOWHERE, NOWHERE]
    assert step.slots_T.tolist() == [7, 3, NOWHERE, NOWHERE]
    assert step.lengths_B.tolist() == [8, 4, 0, 0]
    assert step.ring_T.tolist() == [70, 71, NOWHERE, NOWHERE]
    assert step.tables_RM.tolist() == [[1, 2, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert layout.targets.tolist() == [5, 6, 99, 99]
    assert step.rows[1].table.tolist() == [5, 0, 0], "eviction gets its table"
    assert step.rows[0].table is NO_TABLE
    layout.clear(99)
    assert (layout.step.slots_T == NOWHERE).all()
    assert (layout.targets == 99).all()


@pytest.mark.parametrize("size", [1, 3, 8, 24])
def test_the_memory_reserved_for_a_size_holds_it(size: int) -> None:
    memory = torch.zeros(DecodeLayout.words(size, 7), dtype=torch.int32)
    assert DecodeLayout(size, 7, memory).step.tables_RM.shape == (size, 7)
