"""Recording graphs by the rules of CUDA and torch: what is refused before, and what is put right where it fails."""

from __future__ import annotations

import pytest
import torch
from support.fake_cuda import FakeCuda

from trtkit.engine.device.capture import record, waiting_forbidden
from trtkit.engine.device.graphs import CudaCapture, DecodeGraphs

DEVICE = torch.device("cuda")


def test_work_is_warm_before_it_is_recorded_and_all_of_it_is_on_one_side_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda(monkeypatch)
    capture = CudaCapture(DEVICE)
    replays = [capture(lambda name=name: fake.launch(name)) for name in ("a", "b")]  # type: ignore[misc]
    each = [
        "side 1 waits for default", "{0} on side 1", "{0} on side 1", "default waits for side 1",
        "recording, thread_local", "{0} on side 1 recorded",
    ]  # fmt: skip
    assert fake.log == [line.format(name) for name in "ab" for line in each]
    assert fake.pools == 1
    replays[0]()
    assert fake.log[-1] == "replay on default"


def test_work_that_waits_for_the_device_is_refused_before_anything_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaCapture(DEVICE)(fake.wait)
    assert not any("recording" in line for line in fake.log)
    assert (fake.sync_mode, fake.current) == (0, fake.default)


@pytest.mark.parametrize("unwinds", [False, True], ids=["torch 2.11", "torch that unwinds"])
def test_a_recording_that_breaks_leaves_stream_and_allocator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, *, unwinds: bool
) -> None:
    fake = FakeCuda(monkeypatch, unwinds=unwinds)
    pool = torch.cuda.graph_pool_handle()
    record(lambda: fake.launch("good"), pool=pool)
    with pytest.raises(RuntimeError, match="previous error"):
        record(fake.wait, pool=pool)
    assert fake.current is fake.default
    fake.empty_cache()
    assert fake.used[pool] == (2 if unwinds else 1), "what torch has released itself is not released again"
    record(lambda: fake.launch("later"))
    assert fake.log[-1] == "later on torch's own recorded"


def test_a_failure_that_is_not_cudas_own_is_told_and_unwound_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        record(out_of_memory)
    assert fake.current is fake.default
    fake.empty_cache()


def test_an_engine_whose_capture_breaks_opens_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)

    def work(size: int) -> None:
        fake.launch(f"step of {size}")
        if size == 1 and fake.recording:
            fake.wait()

    graphs = DecodeGraphs((1, 2), work, CudaCapture(DEVICE), lambda _: None)
    torch.cuda.empty_cache()
    assert graphs.captured == 1
    assert len(graphs.notes) == 1
    graphs.run(1)
    assert fake.log[-1] == "step of 1 on default"


def test_waiting_is_allowed_again_after_work_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    fake.sync_mode = 1
    with pytest.raises(ZeroDivisionError), waiting_forbidden():
        raise ZeroDivisionError
    assert fake.sync_mode == 1
