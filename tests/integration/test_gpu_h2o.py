"""H2O's GPU benchmark, rehearsed: every item runs, no rate is told, and the replayed scheduler counts what an engine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.gpu import h2o
from bench.gpu.h2o_runs import InFlight, Paced, Setup, replay_load, requests_of, round_bytes, run_load
from trtkit.engine.dummy import dummy_weights
from trtkit.spec.dtype import DType
from trtkit.spec.errors import EngineError
from trtkit.spec.measured import Source
from trtkit.spec.quant import quant_for

ROOT = Path(__file__).parents[2]
SCALE = h2o.rehearsal_scale()


@pytest.fixture(scope="module")
def setup():
    quant = quant_for("int8", compute=DType.FP32)
    return Setup(weights=dummy_weights(SCALE.model, quant), kv_dtype=quant.kv, device="cpu")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("h2o") / "h2o.json"
    command = [sys.executable, str(ROOT / "bench/gpu/h2o.py"), "--out", str(out), "--rehearse", "--seed", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["data"], done.stdout


def test_every_item_of_a_rehearsal_runs_and_tells_no_rate(record):
    data, said = record
    assert data["complete"]
    assert data["rehearsal"]
    assert not data["notes"]
    items = [(row["item"], row["variant"] == "full") for row in data["rows"]]
    assert len(items) == len(set(items)) == 8
    assert not [key for row in data["rows"] for key in row["values"] if key.endswith("_ms") or key == "over_full"]
    assert " ms" not in said


def test_half_the_cache_holds_half_the_tokens_of_an_equal_request_and_as_many_at_equal_length(record):
    values = {(row["item"], row["variant"] == "full"): row["values"] for row in record[0]["rows"]}

    def held(item, full):
        return values[item, full]["held"]["value"]

    assert held("equal live length", True) == pytest.approx(held("equal live length", False), abs=4)
    assert held("equal request", False) == pytest.approx(SCALE.budget + SCALE.interval / 2, abs=4)
    assert held("equal request", True) > SCALE.isl
    assert values["equal request", False]["evictions"]["value"] > 4
    assert values["equal request", True]["evictions"]["value"] == 0


def test_the_replayed_load_counts_what_the_engine_ran(record):
    for row in record[0]["rows"]:
        if row["item"] == "in flight":
            assert row["values"]["in_flight"]["value"] == row["values"]["replay_in_flight"]["value"] > 1
            assert row["values"]["in_flight_whole_load"]["source"] == Source.MODELED.value


@pytest.mark.parametrize("kv", ["full", SCALE.half, "h2o:20,interval=4"])
@pytest.mark.parametrize("blocks", [45, 80])
def test_a_replay_equals_a_run_step_by_step_under_pressure_too(setup, kv, blocks):
    limits = SCALE.limits
    requests = requests_of(SCALE.model, 6, 70, 30, np.random.default_rng(0))
    with torch.inference_mode():
        engine = setup.open(kv, limits, blocks)
        ran = run_load(engine, requests, float("inf"))
    assert engine.kv_stats().blocks_used == 0
    replayed = replay_load(SCALE.model, kv, limits, blocks, [(70, 30)] * 6)
    assert replayed == ran
    assert ran.complete
    assert ran.running
    short = replay_load(SCALE.model, kv, limits, blocks, [(70, 30)] * 6, 9)
    assert (short.steps, short.complete) == (9, False)


def test_a_load_that_runs_out_of_time_says_so_and_leaves_nothing_running(setup):
    with torch.inference_mode():
        engine = setup.open("full", SCALE.limits, 80)
        ran = run_load(engine, requests_of(SCALE.model, 6, 70, 30, np.random.default_rng(0)), 0.0)
    assert not ran.complete
    assert engine.kv_stats().blocks_used == 0


def test_counting_past_the_end_of_a_request_is_refused(setup):
    with torch.inference_mode():
        engine = setup.open("full", SCALE.limits, 80)
        paced = Paced(engine, requests_of(SCALE.model, 2, 20, 12, np.random.default_rng(0)))
        assert len(paced.steps_ms(4)) == 4
        with pytest.raises(EngineError, match="more output tokens"):
            paced.steps_ms(8)


def test_the_real_load_has_nearly_twice_as_many_requests_in_flight_with_rings_and_ledgers_paid_for():
    scale = h2o.real_scale(None)
    ledger = (scale.budget + scale.budget // 8) * scale.model.num_layers * scale.model.num_kv_heads * 8
    ring = 16 * scale.model.num_layers * scale.model.num_heads * (scale.model.head_dim * 2 + 4)
    block = 32 * 327_680
    lengths = [(scale.isl, scale.osl)] * scale.load
    full = replay_load(scale.model, "full", scale.limits, 868, lengths)
    side = -(-scale.limits.max_batch_size * (ledger + ring) // block)
    half = replay_load(scale.model, scale.half, scale.limits, 868 - side, lengths)
    assert full.complete
    assert half.complete
    assert half.mean > 1.8 * full.mean
    assert half.preemptions == 0


def test_means_are_of_steps_in_which_somebody_waited():
    assert InFlight(running=(2, 4), preemptions=0, steps=9, complete=True).mean == 3
    assert InFlight(running=(), preemptions=0, steps=9, complete=True).mean is None


def test_fewer_layers_change_nothing_else():
    assert replace(h2o.real_scale(2), model=h2o.real_scale(None).model) == h2o.real_scale(None)
    assert h2o.real_scale(2).model.num_layers == 2


def test_bytes_of_a_round_are_mostly_its_passes_over_the_keys():
    model = h2o.real_scale(None).model
    keys = (2048 + 16 + 2048 + 32) * 80 * 8 * 128 * 2
    moved = round_bytes(model, 2048, 32, 16)
    assert moved == pytest.approx(0.9073e9, rel=1e-3)
    assert keys / moved == pytest.approx(0.748, abs=0.005)
    assert round_bytes(model, 2048, 32, 32) == pytest.approx(moved - keys / 2, rel=0.03)
    assert round_bytes(model, 2048, 30, 16) > round_bytes(model, 2048, 16, 16)


@pytest.fixture
def timed(setup, monkeypatch):
    """A run that is no rehearsal, as far as the code can tell: times are this CPU's and mean nothing."""
    rows, notes = [], []
    record = SimpleNamespace(rows=rows, notes=notes, seed=3)
    session = SimpleNamespace(
        rehearsal=False, device=torch.device("cpu"), record=record, add=rows.append, left_s=600.0, finish=None
    )
    monkeypatch.setattr(h2o, "PAIR_BYTES", 0)
    monkeypatch.setattr(h2o, "detect_gpu", lambda: "h100-sxm")
    monkeypatch.setattr(h2o.EvictionClock, "take_ms", lambda self: [0.25] * 8)
    bench = h2o.Bench(session, SCALE)
    bench._setup = setup
    monkeypatch.setattr(bench, "blocks", lambda: 240)
    return bench


def test_rates_stand_beside_their_rounds_and_what_was_predicted(timed):
    with torch.inference_mode():
        for item in (timed.equal_live, timed.first_token, timed.equal_request, timed.in_flight):
            item()
    rows = {(row.item, row.variant == "full"): row for row in timed.session.record.rows}
    assert len(rows) == 8
    half = rows["equal live length", False]
    assert len(half.samples["step_ms"]) == len(half.samples["over_full"]) == SCALE.rounds
    full = rows["equal live length", True].samples["step_ms"]
    ratios = [ours / theirs - 1 for ours, theirs in zip(half.samples["step_ms"], full, strict=True)]
    assert half.samples["over_full"] == pytest.approx(ratios)
    value = half.values["over_full"]
    assert value.low == min(ratios)
    assert value.high == max(ratios)
    assert value.source is Source.MEASURED
    assert half.values["eviction_ms_per_step"].value == 0.25
    batch = half.values["batch"].value
    assert batch == 2
    floor = round_bytes(SCALE.model, SCALE.budget, SCALE.interval, 16) * batch / SCALE.interval / 3.35e12 * 1e3
    assert half.values["eviction_floor_ms_per_step"].value == pytest.approx(floor)
    assert half.values["eviction_floor_ms_per_step"].source is Source.DATASHEET
    assert "over_full" not in rows["equal live length", True].values
    assert len(rows["first token", True].samples["ttft_ms"]) == SCALE.rounds
    assert "in_flight" in rows["in flight", False].values
    lines = h2o.lines_of(timed.session)
    assert any("over_full (measured)" in line for line in lines)
    assert any(line.startswith("in_flight_whole_load") and "modeled" in line for line in lines)


def test_a_load_for_which_no_time_is_left_is_replayed_alone(timed):
    timed.session.left_s = 10.0
    with torch.inference_mode():
        timed.in_flight()
    for row in timed.session.record.rows:
        assert "in_flight" not in row.values
        assert row.values["in_flight_whole_load"].value > 1


def test_refusals_of_an_item_become_what_a_session_survives():
    def refuses():
        raise EngineError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        h2o.told(refuses)()
