from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_engine import fake_bundle
from support.samples import repeat, sample

from trtkit.benchmark.cells import Cell
from trtkit.benchmark.compat import vllm_view
from trtkit.benchmark.environment import fingerprint
from trtkit.benchmark.run import assemble
from trtkit.benchmark.targets import open_targets
from trtkit.spec.workload import Workload


def view(tmp_path: Path, *repeats, **load: object) -> dict[str, object]:
    workload = Workload(**{"isl": 4, "osl": 4, "num_requests": 3, "concurrency": 1, **load})
    (target,) = open_targets([fake_bundle(tmp_path)])
    cell = Cell(target=target, workload=workload, path=tmp_path / "x.json")
    return vllm_view(assemble(cell, repeats, fingerprint(device="cpu"), "p"))


def test_flat_keys_carry_the_units_and_values_that_vllm_writes(tmp_path: Path) -> None:
    flat = view(tmp_path, repeat(sample("a"), sample("b", submit_ms=16, ttft_ms=20)))
    assert flat["completed"] == 2
    assert flat["failed"] == 0
    assert flat["duration"] == pytest.approx(0.042)
    assert flat["total_input_tokens"] == 8
    assert flat["total_output_tokens"] == 8
    assert flat["output_throughput"] == pytest.approx(8 / 0.042)
    assert flat["request_throughput"] == pytest.approx(2 / 0.042)
    assert flat["total_token_throughput"] == pytest.approx(16 / 0.042)
    assert (flat["mean_ttft_ms"], flat["median_ttft_ms"], flat["std_ttft_ms"]) == (15, 15, 5)
    assert flat["median_tpot_ms"] == flat["median_itl_ms"] == 2
    assert flat["mean_e2el_ms"] == 21
    assert (flat["max_concurrency"], flat["request_rate"]) == (1, "inf")


def test_unknown_is_null_and_never_zero(tmp_path: Path) -> None:
    flat = view(tmp_path, repeat(sample("a", gaps_ms=()), sample("b", error="x")), osl=1)
    assert flat["failed"] == 1
    assert flat["request_goodput"] is None
    assert flat["mean_tpot_ms"] is flat["median_itl_ms"] is flat["p99_ttft_ms"] is None
    empty = view(replace_dir(tmp_path))
    assert empty["output_throughput"] is empty["mean_ttft_ms"] is None


def replace_dir(path: Path) -> Path:
    other = path / "other"
    other.mkdir()
    return other


def test_repeats_are_pooled_and_rates_are_their_median(tmp_path: Path) -> None:
    flat = view(tmp_path, *(repeat(replace(sample("a", ttft_ms=t)), index=i) for i, t in enumerate((4, 14, 94))))
    assert flat["num_prompts"] == 3
    assert flat["median_ttft_ms"] == 14
    assert flat["output_throughput"] == pytest.approx(4 / 0.020)
