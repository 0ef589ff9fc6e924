"""What runs on a GPU box, run here: the scripted engine for what can go wrong, the real one for the rehearsal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import forecast, llama70b, memory, page, sources, summary, sweep
from bench.gpu import rows as table
from bench.gpu.aims import AIMS
from bench.gpu.sweep import CellOutcome
from trtkit.engine import open as opening
from trtkit.engine.dummy import dummy_weights
from trtkit.spec.codec import read_record, write_record
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.errors import CapacityError, InputError, UsageError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.result import BENCH_KIND, BenchResult

ROOT = Path(__file__).parents[2]
SCRIPTED, DYING = "support.fake_dummy:open_scripted", "support.fake_dummy:open_dying"


@pytest.fixture(autouse=True)
def _child_finds_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [str(ROOT), str(ROOT / "tests"), str(ROOT / "plugins" / "h2o")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(parts))


def run(out: Path, *, rows: Sequence[str] = ("int8",), opener: str = SCRIPTED, **changes: object) -> llama70b.Record:
    job = llama70b.Job(
        out=out,
        scale=table.rehearsal_scale(),
        rows=rows,
        cells=None,
        limits={},
        time_limit_s=900.0,
        opener=opener,
        say=lambda _text: None,
    )
    return llama70b.run(replace(job, **changes))


def test_every_row_runs_its_cells_in_their_order_and_the_file_reads_back(tmp_path: Path) -> None:
    record = run(tmp_path, rows=list(table.ROWS))
    assert [row.row for row in record.rows] == list(table.ROWS)
    for row in record.rows:
        assert tuple(cell.name for cell in row.cells) == table.ROWS[row.row].cells
        assert all(cell.result is not None and cell.not_run is None for cell in row.cells)
    assert read_record(tmp_path / llama70b.FILE_NAME, llama70b.KIND, llama70b.Record) == record


def test_raw_samples_are_kept_so_that_every_metric_can_be_recomputed(tmp_path: Path) -> None:
    (row,) = run(tmp_path).rows
    for cell in row.cells:
        for repeat in cell.result.repeats:
            assert {sample.output_tokens for sample in repeat.samples} == {cell.workload.osl}
            assert {len(sample.gaps_ns) for sample in repeat.samples} == {cell.workload.osl - 1}


def test_cells_that_would_not_end_in_time_are_listed_and_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.gpu.sweep.cell_seconds", lambda *args: 0.0 if args[1].concurrency == 1 else 1e4)
    (row,) = run(tmp_path).rows
    ran = {cell.name for cell in row.cells if cell.result is not None}
    assert ran == {"c1-isl512", "c1-isl4096"}
    assert all("would take" in cell.not_run for cell in row.cells if cell.name not in ran)


def test_an_engine_that_dies_keeps_what_was_measured_and_is_opened_again_for_the_rest(tmp_path: Path) -> None:
    said: list[str] = []
    (row,) = run(tmp_path, opener=DYING, say=said.append).rows
    assert sum("\n  | something terrible" in text for text in said) > 1
    names = table.ROWS["int8"].cells
    assert tuple(cell.name for cell in row.cells) == names
    assert row.lost.startswith("engine:")
    measured = [cell.name for cell in row.cells if cell.result is not None]
    lost = [cell.name for cell in row.cells if cell.not_run is not None]
    assert measured == ["c1-isl512", "c1-isl4096"]
    assert lost == [name for name in names if name not in measured]
    on_disk = read_record(tmp_path / llama70b.FILE_NAME, llama70b.KIND, llama70b.Record)
    assert on_disk.rows == (row,)


def test_an_engine_short_of_memory_is_opened_once_more_with_a_smaller_cache(tmp_path: Path) -> None:
    (row,) = run(tmp_path, opener="support.fake_dummy:open_greedy").rows
    assert all(cell.result is not None for cell in row.cells)
    assert row.plan.limits.kv_fraction == 0.7
    assert "out of memory" in row.notes[0]
    assert row.cells[0].result.engine.plan.limits.kv_fraction == 0.7


def test_memory_that_runs_out_beside_the_pool_is_known_for_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that opens on CUDA takes the pool first and then finds no room for its graphs."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = table.rehearsal_scale().model
    made = dummy_weights(model, quant_for("fp32"))
    monkeypatch.setattr(opening, "EmbeddedEngine", full)
    with pytest.raises(CapacityError) as refused:
        opening._assemble(
            made, opening._Setup(limits=Limits(), kv_dtype=DType.FP32, kv_policy=KVPolicySpec(), device="cpu")
        )
    assert sweep._is_memory(str(refused.value))
    assert not sweep._is_memory("the device's memory does not hold the weights")


def test_a_prediction_is_not_changed_by_what_came_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def numbers(_plan, _load, _limits, batch):
        asked.append(batch)
        value = Measured(value=float(len(asked)), unit="ms", source=Source.MODELED)
        made = forecast.Numbers(batch=batch or 0, ttft_ms=None, step_ms=value, tps=value)
        return made, made, made

    monkeypatch.setattr("bench.gpu.sweep.cell_numbers", numbers)
    monkeypatch.setattr("bench.gpu.sweep.cell_seconds", lambda *_args: 0.0)
    (row,) = run(tmp_path, cells=["c8-isl512"]).rows
    (cell,) = row.cells
    assert asked == [None, 2]
    assert (cell.prediction.batch, cell.floor_measured.batch) == (0, 2)


def test_an_engine_that_never_opens_leaves_its_reason_and_the_next_row_runs(tmp_path: Path) -> None:
    record = run(tmp_path, rows=["int8", "fp8"], opener="support.fake_dummy:open_nothing")
    assert [bool(row.lost) for row in record.rows] == [True, True]
    assert record.rows[1].cells[0].not_run == "the engine did not open"


def test_a_second_call_adds_its_rows_to_the_file(tmp_path: Path) -> None:
    run(tmp_path, rows=["int8"])
    record = run(tmp_path, rows=["fp8"], cells=["c1-isl512"])
    assert [row.row for row in record.rows] == ["int8", "fp8"]
    assert [cell.name for cell in record.rows[1].cells] == ["c1-isl512"]


def test_a_rehearsal_and_a_real_run_share_no_file(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match="another directory"):
        llama70b.Writer(tmp_path / llama70b.FILE_NAME, table.real_scale("h100-sxm"))


def test_a_rehearsal_renders_no_number(tmp_path: Path) -> None:
    run(tmp_path)
    lines = summary.lines_of(tmp_path, ["core"])
    assert "rehearsal" in lines[0]
    assert not [line for line in lines if " ms" in line or "tok/s" in line]
    assert summary.complete(tmp_path, ["core"])
    assert summary.complete(tmp_path, ["core", "h2o"])
    assert not summary.complete(tmp_path, ["h2o"])
    assert not summary.complete(tmp_path / "nowhere", ["core"])


def test_the_h100_rows_are_those_whose_weights_leave_room_for_a_request() -> None:
    h100, h200 = table.real_scale("h100-sxm"), table.real_scale("h200")
    assert "fp16" not in table.default_rows(h100)
    assert table.default_rows(h200)[:2] == ["int8", "fp16"]
    assert table.default_rows(h100)[0] == "int8"


def test_floors_on_an_h100_are_those_of_bytes_and_operations() -> None:
    scale = table.real_scale("h100-sxm")
    plan = table.plan_of("int8", scale)
    one, long = (table.cell_plan(name, scale).workload for name in ("c1-isl512", "c1-isl4096"))
    _, sheet, predicted = forecast.cell_numbers(plan, one, {})
    assert sheet.step_ms.value == pytest.approx(21.1, abs=0.05)
    assert sheet.step_ms.source is Source.DATASHEET
    assert predicted.step_ms.source is Source.ASSUMED
    assert predicted.step_ms.value > sheet.step_ms.value
    assert forecast.cell_numbers(plan, long, {})[1].ttft_ms.value == pytest.approx(589, abs=1)


def test_an_fp8_prompt_is_predicted_with_the_kernels_that_the_device_path_launches() -> None:
    """Norms and activation that write FP8 rows, one quantising kernel for the attention's output, attention in 16 bits."""
    scale = table.real_scale("h100-sxm")
    each = scale.model.num_layers * scale.model.hidden_size
    int8, fp8 = table.plan_of("int8", scale), table.plan_of("fp8", scale)
    assert forecast.small_kernel_bytes(int8, 4096) == 42 * each
    assert forecast.small_kernel_bytes(fp8, 4096) == (2 * 7 + 5 + 17.5 + 3) * each
    assert forecast.small_kernel_bytes(fp8, 64) == 42 * each
    long = table.cell_plan("c1-isl4096", scale).workload
    _, sheet, predicted = forecast.cell_numbers(fp8, long, {})
    blocks = 4096 * 2 * scale.model.num_layers * scale.model.linear_params_per_layer
    attention = 4096**2 / 2 * 4 * scale.model.num_layers * scale.model.num_heads * scale.model.head_dim
    head = 2 * scale.model.vocab_size * scale.model.hidden_size
    assert sheet.ttft_ms.value == pytest.approx(1e3 * (blocks / 1978.9e12 + (attention + head) / 989.4e12), rel=1e-3)
    assert predicted.ttft_ms.value > sheet.ttft_ms.value / 0.7 + 25


def test_a_step_lasts_as_long_as_the_slower_of_reading_and_multiplying() -> None:
    scale = table.real_scale("h100-sxm")
    plan, load = table.plan_of("int8", scale), table.cell_plan("c1-isl512", scale).workload
    limits = forecast.attainable("h100-sxm")
    one, many = (forecast.step_seconds(plan, load, limits, batch) for batch in (1, 160))
    assert many > 2 * one


def test_measured_ceilings_give_a_floor_of_their_own() -> None:
    scale = table.real_scale("h100-sxm")
    plan, load = table.plan_of("int8", scale), table.cell_plan("c1-isl512", scale).workload
    half = {
        READ_BYTES_S: Measured(value=3.35e12 / 2, unit="B/s", source=Source.MEASURED),
        matmul_key(DType.BF16): Measured(value=989.4e12, unit="FLOP/s", source=Source.MEASURED),
    }
    measured, sheet, _ = forecast.cell_numbers(plan, load, half)
    assert measured.step_ms.value == pytest.approx(2 * sheet.step_ms.value)
    assert forecast.cell_numbers(plan, load, {})[0] is None


@pytest.mark.parametrize(("limit_s", "left_s"), [(80.0, [40, 60, 80]), (30.0, [20, 20, 30])])
def test_a_row_stops_in_time_for_the_first_cells_of_those_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float, left_s: list[float]
) -> None:
    """And where even those do not fit, each row is still given its own first cell, in order."""
    given: list[float] = []
    monkeypatch.setattr(llama70b, "first_cell_s", lambda _plan, cells: 20.0 if cells else 0.0)
    monkeypatch.setattr(llama70b, "run_row", lambda *arguments: given.append(arguments[-1].left_s()))
    run(tmp_path, rows=["int8", "fp8", "int4"], time_limit_s=limit_s)
    assert given == pytest.approx(left_s, abs=5)


def test_a_first_cell_is_kept_time_for_with_something_to_spare() -> None:
    scale = table.real_scale("h100-sxm")
    plan, cell = table.plan_of("int4-h2o", scale), table.cell_plan("c48-isl4096", scale, "int4-h2o")
    _, _, predicted = forecast.cell_numbers(plan, cell.workload, {})
    seconds = forecast.cell_seconds(plan, cell.workload, predicted, cell.repeats, cell.warmup)
    assert llama70b.first_cell_s(plan, [cell]) == pytest.approx(20 + 1.4 * seconds)
    assert llama70b.first_cell_s(plan, []) == 0.0
    rehearsed = table.rehearsal_scale()
    assert llama70b.first_cell_s(table.plan_of("int4", rehearsed), [table.cell_plan("c1-isl512", rehearsed)]) == 0.0


def test_the_stages_share_every_row_among_them() -> None:
    for gpu in ("h100-sxm", "h200"):
        scale = table.real_scale(gpu)
        stages = [table.default_rows(scale, stage) for stage in table.STAGES]
        assert sorted(key for stage in stages for key in stage) == sorted(table.default_rows(scale))
        assert stages[0] == ["int8"]
        assert "int4" in stages[2]
    assert "fp16" not in table.default_rows(table.rehearsal_scale())


def test_int4_reads_less_and_the_fewest_bytes_are_not_the_cheapest_where_products_take_longer() -> None:
    """At batch 64 the products of INT4 take longer than its reading; FP8's run twice as fast and take as long as reading."""
    scale = table.real_scale("h100-sxm")

    def step(row: str, batch: int) -> float:
        load = table.cell_plan("c64-isl512", scale).workload
        return forecast.step_seconds(table.plan_of(row, scale), load, forecast.attainable("h100-sxm"), batch)

    assert step("int4-kv8", 1) < 0.65 * step("fp8-kv8", 1)
    assert step("int4-kv8", 128) > step("fp8-kv8", 128)


def test_what_prompts_share_is_computed_once_and_held_once() -> None:
    scale = table.real_scale("h100-sxm")
    plan = table.plan_of("int8-reuse", scale)
    alone, full = (table.cell_plan(name, scale, "int8-reuse").workload for name in ("c1-isl4096", "c32-isl4096"))
    assert alone.shared_prefix_tokens == 3584
    _, sheet, predicted = forecast.cell_numbers(plan, alone, {})
    _, whole, wholly = forecast.cell_numbers(
        table.plan_of("int8", scale), table.cell_plan("c1-isl4096", scale).workload, {}
    )
    assert sheet.ttft_ms.value == pytest.approx(76, abs=1)
    assert sheet.ttft_ms.value < 0.15 * whole.ttft_ms.value
    assert predicted.ttft_ms.value < 0.3 * wholly.ttft_ms.value
    assert forecast.running_batch(plan, full) == 32
    blocks, each = memory.planned(plan, 4352).kv_blocks, 4352 // 32
    assert memory.most_in_flight(plan, 4352, 3584) == (blocks - 112) // (each - 112)


def test_a_step_that_checks_guesses_reads_each_cache_for_every_row_and_waits_for_the_host() -> None:
    scale = table.real_scale("h100-sxm")
    plain, guessing = table.plan_of("int8", scale), table.plan_of("int8-ngram8", scale)
    assert [forecast.guesses(guessing, batch) for batch in (1, 8, 64)] == [8, 7, 0]
    assert forecast.guesses(plain, 1) == 0
    load = table.cell_plan("c8-isl512", scale).workload
    limits = forecast.attainable("h100-sxm")
    more_s = forecast.step_seconds(plain, load, limits, 8, 7) - forecast.step_seconds(plain, load, limits, 8)
    cache_s = 7 * 8 * 639.5 * 327_680 / (0.9 * 3.35e12 * 0.75)
    assert more_s == pytest.approx(cache_s + 1.5e-3, rel=1e-3)


def test_guesses_are_held_against_the_plain_step_of_the_same_gpu(tmp_path: Path) -> None:
    def cell(step_ms: float, **counters: int) -> dict:
        metrics = {"itl_ms": {"stats": {"p50": {"value": step_ms}}}}
        return {"name": "c1-isl512", "result": {"metrics": metrics, "repeats": [{"kv": counters}] * 2}}

    plain = {"gpu": "h100-sxm", "rows": [{"row": "int8", "cells": [cell(25.0)]}]}
    guessed = {"gpu": "h100-sxm", "rows": [{"row": "int8-ngram4", "cells": [cell(30.0, draft_tokens=500)]}]}
    assert summary.guess_lines(guessed) == []
    assert summary.guess_lines(guessed, [plain | {"gpu": "h200"}]) == []
    (line,) = summary.guess_lines(guessed, [plain])
    assert "pays from 0.20 accepted a step (1,000 guessed, 0 right" in line


def test_wrong_guesses_change_no_token_and_are_counted(tmp_path: Path) -> None:
    from bench.gpu.guessing import open_guessing
    from bench.gpu.sweep import dummy_bundle
    from trtkit.backends import open_here

    scale = table.rehearsal_scale()
    plan = table.plan_of("int8-ngram4", scale)
    bundle, plain = dummy_bundle(tmp_path, plan), dummy_bundle(tmp_path, table.plan_of("int8", scale))
    requests = [Request(request_id=str(n), prompt_ids=(3 + n, 4, 5), max_tokens=20, ignore_eos=True) for n in range(3)]
    found = []
    for opener, path in ((open_guessing, bundle), (open_here, plain)):
        with opener(path, path="device") as engine:
            tokens = {request.request_id: [] for request in requests}
            for event in engine.generate(requests):
                tokens[event.request_id].append(event.token_id)
            found.append((tokens, engine.kv_stats()))
    (guessed, stats), (plainly, before) = found
    assert guessed == plainly
    assert stats.draft_tokens > 100
    assert stats.accepted_tokens < 0.1 * stats.draft_tokens
    assert before.draft_tokens == 0
    with pytest.raises(UsageError, match="does not speculate"):
        open_guessing(plain)


def test_h2o_at_half_the_cache_nearly_doubles_the_long_requests_in_flight() -> None:
    scale = table.real_scale("h100-sxm")
    full = memory.most_in_flight(table.plan_of("int8", scale), 4352)
    half = memory.most_in_flight(table.plan_of("int8-h2o-long", scale), 4352)
    assert half / full >= 1.8


def test_what_the_devices_eviction_holds_is_counted_as_the_engine_counts_it() -> None:
    from trtkit.engine.device.setup import eviction_bytes

    scale = table.real_scale("h100-sxm")
    plan = table.plan_of("int8-h2o-long", scale)
    weights = SimpleNamespace(model=plan.model, dtype=SimpleNamespace(itemsize=2))
    counted = memory.planned(plan).eviction_bytes
    assert counted == pytest.approx(eviction_bytes(weights, plan.limits, plan.kv), rel=0.02)


def test_every_row_fits_its_gpu_by_the_plan() -> None:
    for gpu in ("h100-sxm", "h200"):
        scale = table.real_scale(gpu)
        for key in table.default_rows(scale):
            layout = memory.planned(table.plan_of(key, scale))
            assert layout.total_bytes <= layout.device_bytes
            assert layout.max_sequences >= 1


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
    ],
)
def test_the_drivers_name_of_a_gpu_is_found_in_the_catalog(
    monkeypatch: pytest.MonkeyPatch, told: str, name: str
) -> None:
    monkeypatch.setattr(llama70b, "_name_by_nvml", lambda: "")
    monkeypatch.setattr(llama70b, "_name_by_torch", lambda: told)
    assert llama70b.detect_gpu() == name


def test_without_a_gpu_the_script_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama70b, "_name_by_nvml", lambda: "")
    monkeypatch.setattr(llama70b, "_name_by_torch", lambda: "")
    with pytest.raises(UsageError, match="--rehearse"):
        llama70b.detect_gpu()


def test_unknown_cells_are_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="c1-isl512"):
        table.cell_plan("c2-isl512", table.rehearsal_scale())


def test_the_source_tree_stands_in_for_an_installed_package(tmp_path: Path) -> None:
    folder = sources.write_metadata(tmp_path) / "trtkit_source-0.dist-info"
    assert "h2o = trtkit_h2o:H2O" in (folder / "entry_points.txt").read_text()
    assert "[trtkit.kv_policies]" in (folder / "entry_points.txt").read_text()


@pytest.mark.slow
def test_the_device_path_rehearses_every_row(tmp_path: Path) -> None:
    """The real engine, its device path on this CPU: H2O evicts, an 8-bit cache and 8-bit operands run."""
    command = [sys.executable, str(ROOT / "bench/gpu/llama70b.py"), "--out", str(tmp_path), "--rehearse"]
    cells = "c1-isl512,c32-isl4096,c48-isl512,c64-isl512,c48-isl4096"
    done = subprocess.run(
        [*command, "--cells", cells, "--time-limit-s", "900"],
        capture_output=True, text=True, check=False, timeout=1000, env=_bare_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / llama70b.FILE_NAME, llama70b.KIND, llama70b.Record)
    assert record.rehearsal
    assert [row.lost for row in record.rows] == [None] * len(record.rows)
    ran = {row.row: [cell for cell in row.cells if cell.result is not None] for row in record.rows}
    assert set(ran) == set(table.ROWS) - {"fp16"}
    failed = [
        check for cells in ran.values() for cell in cells for check in cell.result.checks if check.status == "fail"
    ]
    assert failed == []
    evicted = [repeat.kv.tokens_evicted for cell in ran["int8-h2o-long"] for repeat in cell.result.repeats]
    assert min(evicted) > 0
    for key, counter in (
        ("int8-ngram4", "draft_tokens"),
        ("int8-ngram8", "draft_tokens"),
        ("int8-reuse", "prompt_tokens_reused"),
    ):
        counted = [getattr(repeat.kv, counter) for cell in ran[key] for repeat in cell.result.repeats]
        assert min(counted) > 0, key
    assert "tok/s" not in done.stdout


def _bare_environment() -> dict[str, str]:
    """As on a box where nothing of this project is installed or on the path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_one_call_rehearses_its_stages_and_ends_with_a_short_table(tmp_path: Path) -> None:
    out = tmp_path / "out with a space"
    environment = _bare_environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "bench/gpu/one_call.sh"), str(out), "--limit-s", "900", "--rehearse"]
    done = subprocess.run(
        [*command, "--stages", "probe,core"], capture_output=True, text=True, check=False, timeout=1000, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["llama70b.json", "one_call.log", "probe.json", "summary.txt"]
    told = (out / "summary.txt").read_text()
    assert done.stdout.endswith(told)
    log = (out / "one_call.log").read_text()
    assert "== recompute: exit 0" in log
    assert " 0 differ" in log
    assert len(told.splitlines()) <= summary.MOST_LINES + 2
    assert " numbers, 0 differ\nstages, exit codes: probe 0; core 0; (" in told


def test_one_call_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    script = str(ROOT / "bench/gpu/one_call.sh")
    for arguments in ([], [str(tmp_path), "--limit-s", "soon"], [str(tmp_path), "--stages", "everything"], ["--fast"]):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def test_a_killed_call_still_ends_with_its_table(tmp_path: Path) -> None:
    environment = _bare_environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "bench/gpu/one_call.sh"), str(tmp_path), "--rehearse", "--stages", "core"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert any("core: at most" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=150)
    assert "core: no record" in told or "rehearsal" in told
    assert (tmp_path / "summary.txt").is_file()


def test_a_long_summary_is_cut_and_every_stage_keeps_its_share(tmp_path: Path) -> None:
    for name in summary.LINES_EACH:
        lines = [f"{name} {number}" for number in range(100)]
        (tmp_path / name).write_text(json.dumps({"data": {"rehearsal": False, "lines": lines, "rows": []}}))
    told = summary.lines_of(tmp_path, list(summary.STAGE_FILES))
    assert len(told) <= summary.MOST_LINES
    assert any("more lines" in line for line in told)
    assert "h2o.json 99" in told
    assert "probe.json 5" in told
    assert told[0].startswith("aim for one H100")
    assert len(AIMS) + 1 + sum(summary.LINES_EACH.values()) <= summary.MOST_LINES
    assert set(summary.LINES_EACH) == set(summary.STAGE_FILES.values())


def test_a_stage_alone_may_use_every_line(tmp_path: Path) -> None:
    lines = [f"row {number}" for number in range(200)]
    (tmp_path / "kernels.json").write_text(json.dumps({"data": {"rehearsal": False, "lines": lines}}))
    assert len(summary.lines_of(tmp_path, ["kernels"])) == summary.MOST_LINES


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "llama70b.json").write_text('{"data": {"rows": [')
    assert summary.lines_of(tmp_path, ["core"]) == ["core: no record"]


def test_a_rehearsed_probe_gives_no_ceilings(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    limit = {"value": 3e12, "unit": "B/s", "source": "measured", "low": None, "high": None, "note": ""}
    path.write_text(json.dumps({"rehearsal": True, "limits": {READ_BYTES_S: limit}}))
    assert summary.probe_limits(path) == {}
    path.write_text(json.dumps({"rehearsal": False, "limits": {READ_BYTES_S: limit}}))
    assert summary.probe_limits(path)[READ_BYTES_S].value == 3e12


def test_the_page_shows_no_number_of_a_rehearsal_and_says_that_nothing_was_measured(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / llama70b.FILE_NAME).rename(tmp_path / "gpu-h100-202612-llama70b.json")
    assert page.measured(tmp_path) == page.NOTHING
    assert page.keep(tmp_path, "h100-202612", tmp_path) == []


def test_the_page_shows_a_real_record_with_its_shares_and_what_was_not_run(tmp_path: Path) -> None:
    record = run(tmp_path / "out")
    (row,) = record.rows
    first = row.cells[0]
    floor = forecast.Numbers(batch=1, ttft_ms=None, step_ms=number(first, 0.5), tps=number(first, 1.0))
    cells = (replace(first, floor_measured=floor), replace(first, name="c8-isl512", result=None, not_run="no time"))
    real = replace(record, rehearsal=False, gpu="h100-sxm", rows=(replace(row, cells=cells),))
    (tmp_path / "out" / llama70b.FILE_NAME).unlink()
    write_record(tmp_path / "out" / llama70b.FILE_NAME, llama70b.KIND, real)
    (kept,) = page.keep(tmp_path / "out", "h100-202612", tmp_path)
    assert kept.name == "gpu-h100-202612-llama70b.json"
    text = page.measured(tmp_path)
    assert "| INT8 | c1-isl512 |" in text
    assert "50%" in text
    assert "c8-isl512: not run: no time" in text
    assert "| decode step at batch 1, 512 tokens | 90% of the measured read rate | 50.0% |" in page.aims_table(tmp_path)
    assert "| below 450 ms | - |" in page.aims_table(tmp_path)


def test_an_aim_is_read_from_two_calls_and_the_newest_of_a_cell_counts(tmp_path: Path) -> None:
    def record(name: str, **rows: int) -> None:
        cells = {
            row: {"name": "c32-isl4096", "result": {"valid": True, "repeats": [{"kv": {"requests_peak": peak}}]}}
            for row, peak in rows.items()
        }
        body = {
            "gpu": "h100-sxm",
            "rehearsal": False,
            "rows": [{"row": r.replace("_", "-"), "cells": [c]} for r, c in cells.items()],
        }
        (tmp_path / f"gpu-{name}-llama70b.json").write_text(json.dumps({"data": body}))

    record("h100-1", int8=5)
    assert "| 1.8x those without | - |" in page.aims_table(tmp_path)
    record("h100-2", int8_h2o_long=13)
    record("h100-3", int8=7)
    assert "| 1.8x those without | 13 of 7: 1.86x |" in page.aims_table(tmp_path)


def test_at_the_real_size_impossible_speeds_are_marked_invalid_and_have_no_price(tmp_path: Path) -> None:
    ceilings = {
        READ_BYTES_S: Measured(value=3.0e12, unit="B/s", source=Source.MEASURED),
        matmul_key(DType.BF16): Measured(value=798e12, unit="FLOP/s", source=Source.MEASURED),
    }
    scale = table.real_scale("h100-sxm")
    record = run(tmp_path, scale=scale, cells=["c1-isl512", "c1-isl4096"], limits=ceilings)
    for cell in record.rows[0].cells:
        assert not cell.result.valid
        failed = {check.name for check in cell.result.checks if check.status == "fail"}
        assert {"datasheet_limit.tpot_ms", "machine_limit.tpot_ms"} <= failed
        assert cell.usd_per_million is None
        assert cell.floor_measured.ttft_ms.value > cell.floor_datasheet.ttft_ms.value
        assert len(cell.result.repeats) == 3
        assert cell.result.environment.machine_limits == ceilings
    assert any("INVALID" in line or "invalid" in line for line in summary.lines_of(tmp_path, ["core"]))


def test_a_real_call_with_no_time_begins_nothing_and_lists_everything(tmp_path: Path) -> None:
    scale = table.real_scale("h100-sxm")
    record = run(tmp_path, scale=scale, rows=table.default_rows(scale), time_limit_s=1.0)
    assert [row.row for row in record.rows] == table.default_rows(scale)
    assert all(cell.not_run and cell.prediction is not None for row in record.rows for cell in row.cells)


def test_a_cell_on_a_hot_card_is_invalid_has_no_price_and_says_so_in_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = SimpleNamespace(read=lambda: {0: (1980, 0x20)}, max_mhz=lambda: {0: 1980})
    monkeypatch.setattr("bench.gpu.sweep.clock_gauge", lambda _baseline: hot)
    monkeypatch.setattr("trtkit.benchmark.clocks.INTERVAL_S", 0.001)
    record = run(tmp_path, cells=["c8-isl512"])
    (cell,) = record.rows[0].cells
    assert not cell.result.valid
    assert cell.usd_per_million is None
    (tmp_path / llama70b.FILE_NAME).unlink()
    write_record(tmp_path / llama70b.FILE_NAME, llama70b.KIND, replace(record, rehearsal=False))
    lines = summary.lines_of(tmp_path, ["core"])
    assert any("invalid: gpu_clock" in line and "thermal" in line for line in lines)


def test_each_real_cell_is_a_bench_record_that_the_reports_read(tmp_path: Path) -> None:
    record = run(tmp_path)
    with pytest.raises(InputError, match="rehearsal"):
        page.export(tmp_path, tmp_path / "cells")
    (tmp_path / llama70b.FILE_NAME).unlink()
    write_record(tmp_path / llama70b.FILE_NAME, llama70b.KIND, replace(record, rehearsal=False))
    made = page.export(tmp_path, tmp_path / "cells")
    assert len(made) == len(table.ROWS["int8"].cells)
    found = read_record(made[0], BENCH_KIND, BenchResult)
    assert found.engine.label == "INT8"
    assert replace(found, engine=record.rows[0].cells[0].result.engine) == record.rows[0].cells[0].result


def number(cell: CellOutcome, share: float) -> Measured:
    """That share of the cell's median step."""
    step = cell.result.metrics["itl_ms"].stats["p50"].value
    return Measured(value=step * share, unit="ms", source=Source.MODELED)


def test_the_committed_page_is_what_the_code_makes() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert page.filled(text) == text
    assert {part for part in ("measured", "aims", "floors", "memory", "levers", "guesses", "verdicts") if f"<!-- begin: {part} -->" in text} == {
        "measured", "aims", "floors", "memory", "levers", "guesses", "verdicts",
    }  # fmt: skip


def test_without_records_the_page_makes_no_claim() -> None:
    if not page.records():
        assert page.NOTHING in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
