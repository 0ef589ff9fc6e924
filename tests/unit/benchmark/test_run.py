"""Whole runs over real child processes with the scripted engine inside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from support.fake_engine import FakeScript, fake_bundle

from trtkit.benchmark.cells import ENGINE_LOST
from trtkit.benchmark.run import BenchRun, Settings, run_bench
from trtkit.benchmark.targets import open_targets
from trtkit.spec.codec import read_record
from trtkit.spec.dtype import DType
from trtkit.spec.errors import CapacityError, EngineError, InputError, MeasurementError, OutputError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.result import BENCH_KIND, BenchResult, Check
from trtkit.spec.workload import Protocol, Workload

TESTS = Path(__file__).parents[2]
OPENER = "support.fake_engine:open_fake"
QUICK = {"prefill_ns_per_token": 0, "step_ns": 50_000}


@pytest.fixture(autouse=True)
def _child_finds_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))


def no_limits(_device: str) -> Mapping[str, Measured]:
    return {}


def workload(**changes: object) -> Workload:
    return Workload(**{"isl": 16, "osl": 4, "num_requests": 6, "concurrency": 2, **changes})


def protocol(*workloads: Workload, repeats: int = 1) -> Protocol:
    return Protocol(name="test", workloads=workloads or (workload(),), repeats=repeats)


def run(paths: list[Path], tmp_path: Path, wanted: Protocol | None = None, **settings: object) -> BenchRun:
    notes: list[str] = []
    options = {"output_dir": tmp_path / "out", "opener": OPENER, "limits": no_limits, "command": ("trtkit", "bench")}
    options |= {"note": notes.append, **settings}
    result = run_bench(open_targets(paths), wanted or protocol(), Settings(**options))
    (tmp_path / "notes.txt").write_text("\n".join(notes))
    return result


def notes(tmp_path: Path) -> str:
    return (tmp_path / "notes.txt").read_text()


def bundle(tmp_path: Path, name: str = "fake", **script: object) -> Path:
    return fake_bundle(tmp_path, name, script=FakeScript(**{**QUICK, **script}))


def test_each_cell_leaves_one_record_that_holds_everything(tmp_path: Path) -> None:
    wanted = protocol(workload(), workload(isl=32, concurrency=4, num_requests=12), repeats=3)
    together = (2,) * 4 + (4,) * 4  # a warm-up and three repeats of each load
    done = run([bundle(tmp_path, name, together=together) for name in ("one", "two")], tmp_path, wanted)
    assert [r.engine.name for r in done.results] == ["one", "one", "two", "two"]
    assert sorted(done.paths) == sorted((tmp_path / "out").glob("*.json"))
    for path, result in zip(done.paths, done.results, strict=True):
        assert read_record(path, BENCH_KIND, BenchResult) == result
        assert result.valid
        assert len(result.repeats) == 3
        assert [r.warmup_requests for r in result.repeats] == [result.workload.concurrency, 0, 0]
        assert result.metrics["tps"].stats["value"].low is not None
        assert result.memory.peak_method == "rss"
        assert result.memory.peak_bytes > 10**6
        assert result.environment.command == "trtkit bench"
    assert done.results[0].memory.kv_peak_bytes == 2 * 2 * 64
    assert done.results[1].memory.kv_peak_bytes == 4 * 3 * 64


def test_what_the_engine_says_does_not_run_as_it_should_is_in_the_record(tmp_path: Path) -> None:
    done = run([bundle(tmp_path, notes=("fused kernel fell back: too wrong",)), bundle(tmp_path, "quiet")], tmp_path)
    noted, quiet = done.results
    assert [(c.status, c.detail) for c in noted.checks if c.name == "engine_as_built"] == [
        ("warn", "fused kernel fell back: too wrong")
    ]
    assert noted.valid
    assert not [check for check in quiet.checks if check.name == "engine_as_built"]


def test_finished_cells_are_kept_and_the_run_says_so(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    first = run([path], tmp_path)
    before = first.paths[0].stat().st_mtime_ns
    again = run([path], tmp_path)
    assert (first.kept, again.kept) == (0, 1)
    assert again.results == first.results
    assert again.paths[0].stat().st_mtime_ns == before
    assert "1 of 1 cells are finished already" in notes(tmp_path)


def test_another_load_policy_label_or_number_of_repeats_is_another_cell(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    run([path], tmp_path)
    run([path], tmp_path, protocol(workload(seed=1)))
    run([path], tmp_path, protocol(repeats=2))
    settings = Settings(output_dir=tmp_path / "out", opener=OPENER, limits=no_limits)
    run_bench(open_targets([path], labels={"fake": "x"}), protocol(), settings)
    run_bench(open_targets([path], {"max_batch_size": 7}), protocol(), settings)
    assert len(list((tmp_path / "out").glob("*.json"))) == 5


def test_a_damaged_record_is_measured_again(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    record = run([path], tmp_path).paths[0]
    record.write_text(record.read_text()[:100])
    again = run([path], tmp_path)
    assert again.kept == 0
    assert read_record(record, BENCH_KIND, BenchResult).valid


def test_a_dying_engine_loses_its_cell_and_the_others_go_on_in_a_fresh_process(tmp_path: Path) -> None:
    # 2 warm-up and 6 requests of 4 tokens: 32 tokens a cell, so each process dies in its second cell.
    wanted = protocol(workload(), workload(isl=20), workload(isl=24))
    done = run([bundle(tmp_path, "mortal", die_at_token=40), bundle(tmp_path, "sound")], tmp_path, wanted)
    assert [r.valid for r in done.results] == [True, False, True, True, True, True]
    lost = done.results[1]
    assert lost.checks[0].name == ENGINE_LOST
    assert "exit code 3" in lost.checks[0].detail
    assert lost.metrics == {}
    assert lost.memory.weight_bytes is None
    with pytest.raises(EngineError, match=r"1 cells have no result because their engine failed: .*exit code 3"):
        done.raise_if_incomplete()


def test_a_lost_cell_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    path = bundle(tmp_path, refuse_at_open=True)
    first = run([path], tmp_path)
    assert "does not fit by 3.00 GiB" in first.lost[0]
    record = first.paths[0].read_bytes()
    again = run([path], tmp_path)
    assert (again.kept, len(again.lost)) == (0, 1)
    settings = Settings(output_dir=tmp_path / "out", opener="support.fake_engine:open_willing", limits=no_limits)
    willing = run_bench(open_targets([path]), protocol(), settings)
    willing.raise_if_incomplete()
    assert willing.paths == first.paths
    assert willing.paths[0].read_bytes() != record


def test_an_error_for_people_inside_a_cell_loses_that_cell_alone(tmp_path: Path) -> None:
    done = run([bundle(tmp_path, raise_at_token=5)], tmp_path)
    assert "ran out of blocks" in done.lost[0]


def test_a_load_longer_than_the_engine_admits_is_refused_without_starting_it(tmp_path: Path) -> None:
    path = bundle(tmp_path, refuse_at_open=True, max_seq_len=100)
    done = run([path], tmp_path, protocol(workload(isl=98, osl=4)))
    assert done.results == ()
    assert "ISL 98 + OSL 4 = 102 tokens exceed its max_seq_len 100" in notes(tmp_path)
    with pytest.raises(CapacityError, match="1 cells were not run"):
        done.raise_if_incomplete()


def test_a_files_prompt_longer_than_the_engine_admits_is_refused_before_it_starts(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt_ids": [' + ", ".join(["5"] * 90) + "]}\n")
    load = workload(isl=0, osl=20, num_requests=1, dataset=str(data))
    with pytest.raises(InputError, match="longest prompt has 90 tokens"):
        run([bundle(tmp_path, max_seq_len=100, refuse_at_open=True)], tmp_path, protocol(load))


def test_the_injected_judge_can_make_a_result_invalid(tmp_path: Path) -> None:
    done = run([bundle(tmp_path)], tmp_path, judge=lambda r: (Check(name="j", status="fail", detail=r.engine.name),))
    assert not done.results[0].valid
    assert done.results[0].checks[-1] == Check(name="j", status="fail", detail="fake")
    with pytest.raises(MeasurementError, match="1 cells are invalid: fake, concurrency 2, ISL 16, OSL 4: j: fake"):
        done.raise_if_incomplete()


def test_an_invalid_cell_is_measured_again_by_the_next_run(tmp_path: Path) -> None:
    def refuse(_result: BenchResult) -> tuple[Check, ...]:
        return (Check(name="limit", status="fail", detail="too fast"),)

    paths = [bundle(tmp_path)]
    assert not run(paths, tmp_path, judge=refuse).results[0].valid
    again = run(paths, tmp_path)
    assert (again.kept, again.results[0].valid) == (0, True)
    assert run(paths, tmp_path).kept == 1


def test_tokens_that_are_missing_make_a_result_invalid(tmp_path: Path) -> None:
    (result,) = run([bundle(tmp_path, short_by=1)], tmp_path).results
    assert not result.valid
    assert [c.name for c in result.checks if c.status == "fail"] == ["token_counts"]


def test_a_policy_given_at_run_time_is_in_the_record_and_must_have_acted(tmp_path: Path) -> None:
    settings = Settings(output_dir=tmp_path / "out", opener=OPENER, limits=no_limits)
    target = open_targets([bundle(tmp_path)], {"kv": parse_kv_policy("h2o:8,interval=4")})
    (result,) = run_bench(target, protocol(), settings).results
    assert result.engine.plan.kv.label == "h2o:budget=8,interval=4"
    assert not result.valid
    assert [c.name for c in result.checks if c.status == "fail"] == ["kv_policy_acted"]


def test_an_output_directory_that_cannot_be_written_stops_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        run([bundle(tmp_path, refuse_at_open=True)], tmp_path)


def test_a_share_beyond_the_limit_has_the_limit_measured_again_and_the_better_one_counts(tmp_path: Path) -> None:
    def limits(scale: float) -> dict[str, Measured]:
        keys = (READ_BYTES_S, matmul_key(DType.FP32))
        return {key: Measured(value=scale, unit="x/s", source=Source.MEASURED) for key in keys}

    path, calls = bundle(tmp_path), []

    def again(device: str) -> dict[str, Measured]:
        calls.append(device)
        return limits(1e15)

    wanted = protocol(workload(), workload(isl=20))
    (first, second) = run([path], tmp_path, wanted, limits=lambda _device: limits(1.0), remeasure=again).results
    assert calls == ["cpu"]
    for result in (first, second):
        assert result.environment.machine_limits[READ_BYTES_S].value == 1e15
        assert 0 < result.shares["tpot_ms"].value < 1


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    seen: list[tuple[str, float, float]] = []
    run([bundle(tmp_path)], tmp_path, progress=lambda *call: seen.append(call))
    assert seen[-1] == ("fake, concurrency 2, ISL 16, OSL 4", 8, 8)


SCRIPT = """
import signal
import sys
import time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite started in the background hands down a deaf one
from trtkit.benchmark.run import Settings, run_bench
from trtkit.benchmark.targets import open_targets
from trtkit.spec.workload import Protocol, Workload
loads = tuple(Workload(isl=n, osl=4, num_requests=6, concurrency=2) for n in (16, 20, 24, 28))
def progress(phase, done, total):
    if sys.argv[4] == "wait" and "ISL 24" in phase and done == 3:
        Path(sys.argv[2], "waiting").touch()
        time.sleep(600)
settings = Settings(output_dir=Path(sys.argv[2]), opener=sys.argv[3], limits=lambda device: {}, progress=progress)
run_bench(open_targets([Path(sys.argv[1])]), Protocol(name="test", workloads=loads, repeats=1), settings)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_keeps_its_finished_cells_leaves_no_child_and_continues(
    tmp_path: Path, how: signal.Signals
) -> None:
    path, out = bundle(tmp_path), tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(path), str(out), OPENER]
    with subprocess.Popen([*command, "wait"], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / "waiting").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(how)
    (out / "waiting").unlink()
    finished = {record: record.read_bytes() for record in out.glob("*.json")}
    assert len(finished) == 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    subprocess.run([*command, "go"], check=True)
    assert len(list(out.glob("*.json"))) == 4
    assert all(record.read_bytes() == content for record, content in finished.items())
    assert [p.name for p in out.iterdir() if p.suffix != ".json"] == []


def test_a_hot_gpu_makes_the_cell_invalid_and_its_clocks_are_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HotGauge:
        def read(self) -> dict[int, tuple[int, int]]:
            return {0: (1980, 0x40)}

        def max_mhz(self) -> dict[int, int]:
            return {0: 1980}

    monkeypatch.setattr("trtkit.benchmark.run.clock_gauge", lambda _baseline: HotGauge())
    monkeypatch.setattr("trtkit.benchmark.clocks.INTERVAL_S", 0.0005)
    path = bundle(tmp_path, step_ns=10_000_000)
    (result,) = run([path], tmp_path).results
    assert not result.valid
    assert [check.status for check in result.checks if check.name == "gpu_clock"] == ["fail"]


def test_a_cpu_has_no_gpu_clock_to_check(tmp_path: Path) -> None:
    (result,) = run([bundle(tmp_path)], tmp_path).results
    assert [check.name for check in result.checks if check.name == "gpu_clock"] == []
