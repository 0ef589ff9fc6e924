"""How the autotuner's timings fall back where Triton's own timer has no memory."""

from __future__ import annotations

import importlib.util
import os
import sys
import types

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" not in sys.modules:  # other files of this process want its interpreter; this one does not mind
    os.environ["TRITON_INTERPRET"] = "1"

from trtkit.kernels import matmul_configs


class Clock:
    """Stands for CUDA events: each record is one launch later, 2 ms apart."""

    now = 0.0

    def __init__(self, *, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, later):
        return later.at - self.at


def test_without_room_to_empty_the_cache_launches_are_timed_back_to_back(monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no 256 MB left")

    def launch():
        Clock.now += 2.0

    monkeypatch.setattr(matmul_configs.triton, "testing", types.SimpleNamespace(do_bench=no_room))
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert matmul_configs.bench(launch, (0.5, 0.2, 0.8)) == [2.0, 2.0, 2.0]


def test_a_rejected_tile_is_tried_no_more(monkeypatch):
    monkeypatch.setattr(matmul_configs, "INTERPRETED", False)
    tiles = matmul_configs.tiles_for(32, 1)
    try:
        matmul_configs.reject(32, tiles[0])
        assert matmul_configs.candidates(32, 1) == tiles[1:]
        assert matmul_configs.candidates(16, 1) == matmul_configs.tiles_for(16, 1)
    finally:
        matmul_configs._rejected().clear()


@pytest.mark.parametrize("item", [1, 2])
def test_the_autotuner_is_offered_the_tiles_of_the_launch(monkeypatch, item):
    monkeypatch.setattr(matmul_configs, "INTERPRETED", False)
    weight = torch.empty(4, 4, dtype=torch.int8 if item == 1 else torch.float16)
    offered = matmul_configs.prune([], {"weight": weight}, BT=64)
    assert [matmul_configs.tile_of(config.kwargs) for config in offered] == list(matmul_configs.tiles_for(64, item))
