"""Records of GPU runs, recomputed from their raw samples by other arithmetic; whatever is changed in one is found."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.gpu import common, forecast, h2o, kernel_bench, llama70b, probe, recompute, recompute_cells, recount
from bench.gpu import rows as table
from bench.gpu.h2o_runs import Setup
from trtkit.benchmark.shares import floor
from trtkit.engine.dummy import dummy_weights
from trtkit.plan.work import decode_flops, prefill_flops, weight_read_bytes
from trtkit.spec.codec import to_plain
from trtkit.spec.dtype import DType
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.quant import quant_for

ROOT = Path(__file__).parents[2]
CEILINGS = {
    READ_BYTES_S: Measured(value=3.0e12, unit="B/s", source=Source.MEASURED),
    matmul_key(DType.BF16): Measured(value=798e12, unit="FLOP/s", source=Source.MEASURED),
    matmul_key(DType.FP8): Measured(value=1400e12, unit="FLOP/s", source=Source.MEASURED),
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows at the real size with ceilings, prices and intervals, from the scripted engine."""
    out = tmp_path_factory.mktemp("scripted")
    parts = [str(ROOT), str(ROOT / "tests"), str(ROOT / "plugins" / "h2o")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(parts))
        # The scripted engine is too fast for its datasheet, and an invalid cell has no price.
        patch.setattr("bench.gpu.sweep.check_result", lambda _result: ())
        llama70b.run(
            llama70b.Job(
                out=out, scale=table.real_scale("h100-sxm"), rows=["int8", "fp8"], cells=["c1-isl512", "c8-isl512"],
                limits=CEILINGS, time_limit_s=2000.0, opener="support.fake_dummy:open_scripted", say=lambda _text: None,
            )
        )  # fmt: skip
    return out / llama70b.FILE_NAME


@pytest.fixture
def record(scripted: Path) -> dict[str, Any]:
    return copy.deepcopy(json.loads(scripted.read_text(encoding="utf-8"))["data"])


def test_a_record_says_nothing_else_than_its_raw_samples(record: dict[str, Any]) -> None:
    found = recompute.llama_differences(record)
    assert list(found) == []
    assert found.compared > 800
    cells = [cell for row in record["rows"] for cell in row["cells"]]
    assert len(cells) == 4
    assert all(cell["usd_per_million"] and cell["floor_datasheet"] and cell["result"]["shares"] for cell in cells)


PLACES = {
    "a first token a millisecond later": ("result.repeats.1.samples.0.first_token_ns", 1_000_000, "ttft_ms"),
    "a gap twice as long": ("result.repeats.2.samples.0.gaps_ns.7", 200_000, "do not add up"),
    "a median": ("result.metrics.itl_ms.stats.p50.value", 0.01, "itl_ms.p50: recorded"),
    "one repeat of a rate": ("result.metrics.tps.stats.value.repeats.1", 1.0, "tps.value: repeat 1"),
    "an interval's end": ("result.metrics.tpot_ms.stats.p50.high", 0.01, "tpot_ms.p50: high"),
    "a steady rate": ("result.metrics.tps_window.stats.value.value", 1.0, "tps_window.value"),
    "a token too few": ("result.repeats.0.samples.0.output_tokens", -1, "tokens of 256"),
    "a floor of the datasheet": ("floor_datasheet.step_ms.value", 0.1, "floor_datasheet: step"),
    "a floor by ceilings": ("floor_measured.tps.value", 1.0, "floor_measured: tok/s"),
    "a share": ("result.shares.tpot_ms.value", 0.01, "share of tpot_ms"),
    "a ceiling": ("result.environment.machine_limits.read_bytes_s.value", 1e11, "floor_measured: step"),
    "a batch": ("floor_measured.batch", 1, "floor_measured: batch"),
    "a prompt's length": ("result.repeats.0.samples.0.prompt_tokens", 1, "a prompt of 513"),
}


@pytest.mark.parametrize("what", PLACES)
def test_whatever_is_changed_in_a_record_is_found(record: dict[str, Any], what: str) -> None:
    path, change, told = PLACES[what]
    place: Any = record["rows"][1]["cells"][0]
    *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parts:
        place = place[part]
    place[last] += change
    found = recompute.llama_differences(record)
    assert any(told in line for line in found), list(found)[:5]


def test_validity_prices_and_missing_metrics_are_held_against_the_samples_too(record: dict[str, Any]) -> None:
    cells = record["rows"][0]["cells"]
    cells[0]["result"]["valid"] = False
    cells[1]["usd_per_million"]["value"] *= 1.01
    del cells[1]["result"]["metrics"]["in_flight"]
    record["rows"][1]["cells"][0] |= {"result": None, "not_run": None}
    told = "\n".join(recompute.llama_differences(record))
    for line in ("valid: recorded False", "USD of an hour", "c8-isl512: metrics", "a reason for no result"):
        assert line in told


@pytest.mark.parametrize("gpu", ["h100-sxm", "h200"])
def test_work_counted_a_second_way_is_the_same_for_every_row_and_cell(gpu: str) -> None:
    scale = table.real_scale(gpu)
    for key in table.default_rows(scale):
        plan = table.plan_of(key, scale)
        recounted = recount.read_bytes(to_plain(plan))
        assert recounted == pytest.approx(weight_read_bytes(plan.model, plan.quant), rel=1e-9)
        for name in table.ROWS[key].cells:
            load = table.cell_plan(name, scale, key).workload
            _, sheet, _ = forecast.cell_numbers(plan, load, {})
            prompt_s, step_s = recount.floor_s(to_plain(plan), to_plain(load), recount.DATASHEET[gpu], sheet.batch)
            assert 1e3 * step_s == pytest.approx(sheet.step_ms.value, rel=1e-9)
            twice = recount.floor_s(to_plain(plan), to_plain(load), recount.DATASHEET[gpu], sheet.batch, per_step=2.0)
            theirs = floor(plan, load, forecast.datasheet_limits(gpu), sheet.batch, per_step=2.0)
            assert twice == pytest.approx((theirs.prefill_s, theirs.step_s), rel=1e-9)
            if sheet.ttft_ms is not None:
                assert 1e3 * prompt_s == pytest.approx(sheet.ttft_ms.value, rel=1e-9)
            assert sum(recount.token_flops(to_plain(plan), to_plain(load))) == pytest.approx(
                decode_flops(plan.model, recount.context(to_plain(plan), to_plain(load)))
            )
    assert sum(recount.prompt_flops(to_plain(plan), {"isl": 512})) == pytest.approx(prefill_flops(plan.model, 512))


def test_a_speculating_cells_shares_are_limited_by_what_its_steps_gave(record: dict[str, Any]) -> None:
    """As the engine's own count says: a quarter of what was decoded were right guesses, so a step gave four thirds."""
    cell = record["rows"][0]["cells"][1]
    result = cell["result"]
    plan, load = result["engine"]["plan"], result["workload"]
    plan["speculation"] = {"kind": "ngram", "max_draft_tokens": 4}
    for repeat in result["repeats"]:
        repeat["kv"]["accepted_tokens"] = 8 * (256 - 1) // 4
    rates = recount.rates_of(result["environment"]["machine_limits"])
    batch = max(repeat["kv"]["requests_peak"] for repeat in result["repeats"])
    prompt_s, step_s = recount.floor_s(plan, load, rates, batch, per_step=4 / 3)
    rate = result["metrics"]["tps"]["stats"]["value"]["value"]
    share = rate * (batch * prompt_s + (load["osl"] - 1) * step_s) / (batch * load["osl"])
    kept = {"value": result["shares"]["ttft_ms"]["value"]}
    result["shares"] = {"ttft_ms": kept, "tps": {"value": share}}
    assert [line for line in recompute.llama_differences(record) if "share" in line] == []
    result["shares"]["tps"]["value"] *= 1.2
    assert [line for line in recompute.llama_differences(record) if "share of tps" in line]


def test_students_point_is_that_of_the_tables() -> None:
    for degrees, point in ((2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423)):
        assert recompute_cells._student(degrees) == pytest.approx(point, abs=6e-5)


def kernel_record() -> dict[str, Any]:
    """Rows as a real run makes them, with times that are made up."""
    rows: list[Any] = []
    rng = np.random.default_rng(3)

    def timed(_call: object, _copies: int) -> common.Timing:
        return common._timing(rng.uniform(10, 20, 9).tolist(), 4, "graph", "")

    session = SimpleNamespace(rehearsal=False, device=torch.device("cpu"), time=timed, add=rows.append)
    limits = {**CEILINGS, "graph_node_s": Measured(value=1e-6, unit="s", source=Source.MEASURED)}
    bench = kernel_bench.Bench(session=session, scale=kernel_bench.TINY, limits=limits)  # type: ignore[arg-type]
    mixed = kernel_bench.Work(bytes_moved=3000, flops=1e10, wide_flops=2e9, operands=DType.FP8)
    for shape, work in (
        ({"T": 2, "O": 50, "I": 100}, kernel_bench.Work(bytes_moved=10_000_000, flops=20_000.0)),
        ({"B": 1}, mixed),
        ({"R": 1}, kernel_bench.Work(bytes_moved=8)),
    ):
        bench.measure(
            kernel_bench.Case(
                family="matmul", name="one", shape=shape, dtype="int8", call=print, bound=0.1, work=work,
                check=lambda: [(torch.ones(4), torch.full((4,), 1.05))],
                other=kernel_bench.Other(name="theirs", call=print),
            )
        )  # fmt: skip
    return json.loads(json.dumps({"rows": to_plain(rows), "limits": to_plain(limits)}))


def test_kernels_are_recomputed_from_their_samples() -> None:
    record = kernel_record()
    found = recompute.kernel_differences(record)
    assert list(found) == []
    assert found.compared > 40
    assert [row["limit_by"] for row in record["rows"]] == ["bytes", "flops", "launch"]
    assert len(record["rows"][0]["timing"]["raw_us"]) == 9


@pytest.mark.parametrize(
    ("row", "key", "told"),
    [(0, "share", "share"), (0, "floor_us", "floor"), (1, "flops", "floor"), (1, "times_torch", "torch / ours"),
     (2, "error", "ok"), (0, "flops", "operations"), (1, "wide_flops", "floor")],
)  # fmt: skip
def test_a_changed_kernel_row_is_found(row: int, key: str, told: str) -> None:
    record = kernel_record()
    record["rows"][row][key] *= 4
    assert any(f": {told}:" in line for line in recompute.kernel_differences(record))


@pytest.mark.parametrize("key", ["median_us", "least_us", "p10_us", "p90_us"])
def test_a_changed_time_of_a_kernel_is_found(key: str) -> None:
    record = kernel_record()
    record["rows"][0]["timing"][key] += 0.01
    assert recompute.kernel_differences(record)


def probe_record() -> dict[str, Any]:
    """Rows as a real run makes them, with times that are made up."""
    rng = np.random.default_rng(5)
    taken = SimpleNamespace(rows=[], limits={})
    session = SimpleNamespace(
        rehearsal=True, record=taken, add=taken.rows.append, device=torch.device("cpu"),
        time=lambda _call, **_: common._timing(rng.uniform(10, 20, 8).tolist(), 4, "graph", ""),
    )  # fmt: skip
    made = probe.Probe(session)  # type: ignore[arg-type]
    made._row("read", print, bytes_moved=1 << 20, limit=READ_BYTES_S)
    made._row("product", print, flops=1e9, limit=matmul_key(DType.BF16))
    made._row("node", print, unit="s", limit="graph_node_s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        made._host_time("launch", lambda: None, limit="launch_s")
    return json.loads(json.dumps(to_plain({"rows": taken.rows, "limits": taken.limits})))


def test_ceilings_are_recomputed_from_their_samples_and_a_changed_one_is_found() -> None:
    found = recompute.probe_differences(probe_record())
    assert list(found) == []
    assert found.compared == 3 * 6 + 1 + 2 * 4
    for index in range(4):
        record = probe_record()
        record["rows"][index]["value"] *= 1.01
        assert len(recompute.probe_differences(record)) == 2
    record = probe_record()
    record["rows"][0]["timing"]["raw_us"][0] += 5.0
    record["limits"][READ_BYTES_S]["value"] *= 2
    record["rows"][1]["ok"] = False
    told = "\n".join(recompute.probe_differences(record))
    assert all(words in told for words in ("read: ", f"{READ_BYTES_S}: recorded", "of a right result"))


@pytest.fixture(scope="module")
def h2o_record() -> dict[str, Any]:
    """A run on this CPU that takes itself for a GPU's; its times mean nothing."""
    scale, quant = h2o.rehearsal_scale(), quant_for("int8", compute=DType.FP32)
    rows: list[Any] = []
    session = SimpleNamespace(
        rehearsal=False, device=torch.device("cpu"), add=rows.append, left_s=600.0,
        record=SimpleNamespace(rows=rows, notes=[], seed=3),
    )  # fmt: skip
    bench = h2o.Bench(session, scale)  # type: ignore[arg-type]
    bench._setup = Setup(weights=dummy_weights(scale.model, quant), kv_dtype=quant.kv, device="cpu")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(h2o, "PAIR_BYTES", 0)
        patch.setattr(h2o, "detect_gpu", lambda: "h100-sxm")
        patch.setattr(h2o.EvictionClock, "take_ms", lambda self: [0.25] * 8)
        patch.setattr(bench, "blocks", lambda: 240)
        for item in (bench.equal_live, bench.first_token, bench.in_flight):
            item()
    return {"rows": to_plain(rows)}


def test_h2os_steps_ratios_and_counts_are_recomputed(h2o_record: dict[str, Any]) -> None:
    found = recompute.h2o_differences(h2o_record)
    assert list(found) == []
    assert found.compared > 20


@pytest.mark.parametrize(
    ("item", "full", "group", "key"),
    [("equal live length", True, "samples", "step_ms"), ("equal live length", False, "samples", "over_full"),
     ("equal live length", False, "samples", "eviction_ms"), ("equal live length", True, "samples", "gaps_ms"),
     ("first token", True, "samples", "ttft_ms"), ("equal live length", False, "values", "step_ms"),
     ("in flight", False, "values", "in_flight")],
)  # fmt: skip
def test_a_changed_number_of_h2os_record_is_found(
    h2o_record: dict[str, Any], item: str, full: bool, group: str, key: str
) -> None:
    record = json.loads(json.dumps(h2o_record))
    (row,) = [row for row in record["rows"] if (row["item"], row["variant"] == "full") == (item, full)]
    if group == "samples":
        row["samples"][key] = [value * 1.01 for value in row["samples"][key]]
    else:
        row["values"][key]["value"] *= 1.01
    assert recompute.h2o_differences(record)


def command(*paths: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "bench/gpu/recompute.py"), *map(str, paths)]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def test_the_command_ends_with_one_for_a_difference_for_a_broken_file_and_for_nothing(
    scripted: Path, tmp_path: Path
) -> None:
    good = command(scripted.parent)
    assert (good.returncode, good.stderr) == (0, "")
    assert "0 differ" in good.stdout
    body = json.loads(scripted.read_text(encoding="utf-8"))
    body["data"]["rows"][0]["cells"][0]["result"]["metrics"]["tps"]["stats"]["value"]["value"] *= 1.001
    changed = tmp_path / "llama70b.json"
    changed.write_text(json.dumps(body))
    bad = command(changed)
    assert bad.returncode == 1
    assert "INT8" not in bad.stdout
    assert "llama70b.json: int8 c1-isl512 tps.value: recorded" in bad.stdout
    changed.write_text("{")
    assert command(changed).returncode == 1
    assert len(command(changed).stderr.splitlines()) == 1
    changed.unlink()
    assert command(tmp_path).returncode == 1


def test_a_rehearsal_is_recomputed_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [str(ROOT), str(ROOT / "tests"), str(ROOT / "plugins" / "h2o")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(parts))
    job = llama70b.Job(
        out=tmp_path, scale=table.rehearsal_scale(), rows=["int8", "int8-kv8"], cells=None, limits={},
        time_limit_s=900.0, opener="support.fake_dummy:open_scripted", say=lambda _text: None,
    )  # fmt: skip
    llama70b.run(job)
    assert command(tmp_path).returncode == 0
    (row, *_) = llama70b.run(replace(job, out=tmp_path / "dying", opener="support.fake_dummy:open_dying")).rows
    assert row.lost
    assert command(tmp_path / "dying").returncode == 0
