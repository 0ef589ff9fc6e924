"""Captured decode steps: which sizes there are, what replays, and what follows the static memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.device_engines import Replays, open_device
from support.engine_models import make_hf

from trtkit.engine.device.graphs import DecodeGraphs, buckets
from trtkit.spec.engine import Request


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (16, (1, 2, 4, 8, 16)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
        (50, (1, 2, 4, 8, 16, 24, 32, 48, 50)),
        (80, (1, 2, 4, 8, 16, 24, 32, 48, 64, 80)),
    ],
)
def test_bucket_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert buckets(most) == sizes


def test_a_step_runs_in_the_next_larger_bucket() -> None:
    graphs = DecodeGraphs(buckets(32), lambda _: None, None, lambda _: None)
    assert [graphs.bucket(rows) for rows in (1, 2, 3, 8, 9, 17, 25, 32)] == [1, 2, 4, 8, 16, 24, 32, 32]


def test_every_size_is_prepared_before_it_is_captured_and_replayed_as_itself() -> None:
    log: list[str] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: log.append("replay")

    graphs = DecodeGraphs((1, 2), lambda size: log.append(f"work {size}"), capture, lambda size: log.append(f"prepare {size}"))  # fmt: skip
    assert log == ["prepare 2", "work 2", "prepare 1", "work 1"]
    assert graphs.captured == 2
    graphs.run(2)
    assert log[-1] == "replay"


def test_after_a_failed_capture_no_other_is_tried_and_all_that_failed_run_as_they_are() -> None:
    ran: list[int] = []
    tried = 0

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal tried
        tried += 1
        if tried == 2:
            raise RuntimeError("")
        return lambda: ran.append(0)

    graphs = DecodeGraphs((1, 2, 4), ran.append, capture, lambda _: None)
    assert tried == 2
    assert graphs.notes == ["CUDA graph of batch size 2 not captured, it runs eagerly: RuntimeError"]
    for size in (4, 2, 1):
        graphs.run(size)
    assert ran == [0, 2, 1]


def test_a_replay_reads_static_memory_alone() -> None:
    """A captured step is given nothing at replay: what it writes must follow what lies in its memory."""
    engine = open_device(make_hf(), capture=Replays(), max_batch_size=2)
    runner: Any = engine._runner
    list(engine.generate([Request(request_id="a", prompt_ids=(5, 6, 7), max_tokens=4, ignore_eos=True)]))
    buffers, layout = runner._buffers, runner._buffers.layout(1)
    with torch.inference_mode():
        answers = []
        for token in (9, 33, 9):
            buffers.clear(1)
            layout.step.token_ids_T.fill_(token)
            runner._graphs.run(1)
            answers.append((int(buffers.tokens_B[0]), buffers.logits_BV[0].clone()))
    assert torch.equal(answers[0][1], answers[2][1])
    assert not torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize("fill", ["clear", "rehearse"])
def test_padding_changes_nothing_that_anybody_reads(fill: str) -> None:
    engine = open_device(make_hf(), capture=Replays(), max_batch_size=8, blocks=40)
    runner: Any = engine._runner
    before = runner.cache.storage.clone()
    tokens = runner._last.tokens_P.clone()
    with torch.inference_mode():
        getattr(runner._buffers, fill)(8)
        runner._graphs.run(8)
    assert torch.equal(runner.cache.storage.nan_to_num(), before.nan_to_num())
    assert torch.equal(runner._last.tokens_P[:-1], tokens[:-1])


def test_a_rehearsal_reads_as_much_as_a_request_from_blocks_all_over_the_cache() -> None:
    runner: Any = open_device(make_hf(), max_batch_size=8, blocks=40)._runner
    runner._buffers.rehearse(4)
    step = runner._buffers.layout(4).step
    assert step.lengths_B.tolist() == [128] * 4, "all that a request of this engine may hold"
    assert sorted(step.tables_RM.flatten().unique().tolist()) == list(range(40))
