"""The GPU scripts without a GPU: rehearsed whole as their own processes, and their timing against a pretended clock."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import bench.gpu as bench_package
from bench.gpu import common, kernel_bench, kernels, probe, sources
from trtkit.spec.dtype import DType
from trtkit.spec.measured import Measured, Source

ROOT = Path(__file__).parents[2]
SCRIPTS = {"probe": "gpu-probe", "kernels": "gpu-kernels"}


def rehearse(script, out, *more):
    """Run a script as somebody without an installation would: from elsewhere, with nothing on the path."""
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:__main__"}
    command = [sys.executable, ROOT / "bench" / "gpu" / f"{script}.py", "--rehearse", "--out", out, *more]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    body = json.loads(out.read_text(encoding="utf-8"))
    assert body["kind"] == SCRIPTS[script]
    return done.stdout, body["data"]


def session_for(tmp_path, kind="gpu-kernels", **more):
    options = {"rehearse": True, "out": tmp_path / "r.json", "time_limit_s": 60, "seed": 1, "only": "", "resume_at": 0}
    return common.Session(kind, argparse.Namespace(**(options | more)))


def rates_in(data):
    """Whatever in a record could be taken for a measurement."""
    rows = data["rows"]
    named = [row.get(key) for row in rows for key in ("timing", "torch_timing", "value", "share", "floor_us")]
    return [value for value in [*named, *data["limits"].values()] if value is not None]


def test_the_probe_rehearses_without_rates(tmp_path):
    text, data = rehearse("probe", tmp_path / "probe.json")
    assert data["rehearsal"] is True
    assert data["complete"] is True
    assert rates_in(data) == []
    assert {"read", "copy", "write", "launch, torch"} <= {row["name"] for row in data["rows"]}
    assert sum(row["name"].startswith("fp8") for row in data["rows"]) >= 16
    assert text == "\n".join(data["lines"]) + "\n" == "probe: rehearsal, 32 items ran, no rates\n"


def test_the_kernels_rehearse_without_rates_and_every_family_is_right(tmp_path):
    _, data = rehearse("kernels", tmp_path / "kernels.json", "--seed", "5")
    assert data["rehearsal"] is True
    assert data["seed"] == 5
    assert rates_in(data) == []
    assert data["notes"] == data["not_run"] == []
    assert {row["family"] for row in data["rows"]} == {"matmul", "paged", "ranking", "fused", "sampling"}
    assert [row for row in data["rows"] if not row["ok"]] == []
    assert all(row["runs"] == "twin" and row["bytes_moved"] > 0 for row in data["rows"])
    assert any(row["error"] > 0 for row in data["rows"])
    names = [f"{row['name']} {row['dtype']} {row['shape']}" for row in data["rows"]]
    assert len(names) == len(set(names)), "an item ran twice"


def test_a_run_that_starts_again_keeps_what_it_had(tmp_path):
    out = tmp_path / "kernels.json"
    _, first = rehearse("kernels", out, "--only", "norm T=")
    _, both = rehearse("kernels", out, "--only", "greedy", "--resume-at", "1")
    assert [row["name"] for row in first["rows"]] == ["add and norm"] * 3
    assert [row["name"] for row in both["rows"]] == ["add and norm"] * 3 + ["greedy"] * 2
    assert both["rows"][:3] == first["rows"]


def test_without_a_gpu_and_without_rehearsal_one_line_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, ROOT / "bench" / "gpu" / "probe.py", "--out", tmp_path / "probe.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "no CUDA device here; --rehearse runs the same calls on a CPU, without rates\n"
    assert not (tmp_path / "probe.json").exists()


def case(**more):
    options = {
        "family": "fused", "name": "one", "shape": {"T": 1}, "dtype": "bf16", "call": lambda _: None,
        "check": lambda: [(torch.ones(4), torch.ones(4))], "bound": 0.0, "work": kernel_bench.Work(bytes_moved=8),
    }  # fmt: skip
    return kernel_bench.Case(**(options | more))


@pytest.mark.parametrize(
    ("pairs", "ok", "error"),
    [
        ([(torch.ones(4), torch.ones(4))], True, 0.0),
        ([(torch.zeros(4), torch.zeros(4))], True, 0.0),
        ([(torch.full((4,), 1.5), torch.ones(4))], False, 0.5),
        ([(torch.ones(4), torch.ones(4)), (torch.full((4,), 3.0), torch.ones(4))], False, 2.0),
        ([(torch.tensor([1.0, float("nan")]), torch.ones(2))], False, None),
        ([(torch.tensor([1.0, float("inf")]), torch.ones(2))], False, None),
        ([(torch.ones(4), torch.zeros(4))], False, None),
    ],
)
def test_a_result_that_is_wrong_is_marked_wrong(tmp_path, pairs, ok, error):
    session = session_for(tmp_path)
    kernel_bench.Bench(session=session, scale=kernel_bench.TINY).measure(case(check=lambda: pairs))
    (row,) = session.record.rows
    assert (row.ok, row.error) == (ok, error)
    text = "\n".join(kernels.lines_of(session))
    assert ("WRONG: one" in text) is not ok


def rate(value, unit="B/s"):
    return Measured(value=value, unit=unit, source=Source.MEASURED)


def test_the_floor_is_the_largest_of_bytes_operations_and_a_launch():
    work = kernel_bench.Work(bytes_moved=3000, flops=8e6)
    limits = {"read_bytes_s": rate(3e9), "matmul_flops_s.bf16": rate(1e12), "matmul_flops_s.fp8": rate(16e12)}
    assert kernel_bench.floor(work, limits) == (pytest.approx(8.0), "flops")
    eight_bits = kernel_bench.Work(bytes_moved=3000, flops=8e6, operands=DType.FP8)
    assert kernel_bench.floor(eight_bits, limits) == (pytest.approx(1.0), "bytes")
    assert kernel_bench.floor(eight_bits, limits | {"graph_node_s": rate(2e-6)}) == (pytest.approx(2.0), "launch")
    mixed = kernel_bench.Work(bytes_moved=3000, flops=32e6, wide_flops=8e6, operands=DType.FP8)
    assert kernel_bench.floor(mixed, limits) == (pytest.approx(24 / 16 + 8), "flops")
    assert kernel_bench.floor(mixed, {key: limits[key] for key in limits if "bf16" not in key}) == (None, "")
    assert kernel_bench.floor(work, {"read_bytes_s": rate(3e9)}) == (None, "")
    assert kernel_bench.floor(work, {}) == (None, "")


def test_the_datasheet_is_found_by_the_name_that_the_driver_tells():
    limits = kernel_bench.datasheet_limits("NVIDIA H100 80GB HBM3")
    assert limits["read_bytes_s"].value == 3.35e12
    assert limits["read_bytes_s"].source is Source.DATASHEET
    assert kernel_bench.datasheet_limits("NVIDIA H200")["read_bytes_s"].value == 4.8e12
    assert kernel_bench.datasheet_limits("a toaster") == {}


def test_products_count_their_bytes_and_operations(tmp_path):
    session = session_for(tmp_path)
    bench = kernel_bench.Bench(session=session, scale=kernel_bench.TINY)
    kernels.kernel_products.product(bench, "int8", "qkv", 3)
    kernels.kernel_attention.decode(bench, "fp8", 3, 24)
    linear, attention = session.record.rows
    assert linear.bytes_moved == 192 * 64 + 2 * 192 + 2 * 3 * 64 + 2 * 3 * 192
    assert linear.flops == 2 * 3 * 64 * 192
    assert attention.bytes_moved == 3 * 24 * 2 * 2 * 16 + 3 * 8 * (2 * 2 * 16 + 4)
    assert attention.flops == 4 * 3 * 24 * 8 * 16


def test_a_prompts_layer_in_fp8_runs_the_kernels_of_the_device_path(tmp_path, monkeypatch):
    """Norms and activation write FP8 rows themselves; only the attention's output is quantised on its own."""
    called = []
    for module, name in (("fused", "add_rms_norm_fp8"), ("fused", "silu_mul_fp8")):
        whole = getattr(getattr(kernels.kernel_layer, module), name)
        monkeypatch.setattr(
            getattr(kernels.kernel_layer, module), name,
            lambda *given, name=name, whole=whole, **more: (called.append(name), whole(*given, **more))[1],
        )  # fmt: skip
    bench = kernel_bench.Bench(session=session_for(tmp_path), scale=kernel_bench.TINY)
    with torch.inference_mode():
        kernels.kernel_layer.prefill_layer(bench, "fp8", 70)
    (row,) = bench.session.record.rows
    once = ["add_rms_norm_fp8", "add_rms_norm_fp8", "silu_mul_fp8"]
    assert called[: len(once)] == once
    assert (row.ok, row.operands, row.wide_flops) == (True, "fp8", 4.0 * 70 * 71 / 2 * 8 * 16)


class PretendedGpu:
    """Just enough of `torch.cuda`: every call takes a given time on a clock that only calls move."""

    def __init__(self, monkeypatch, *, capturable=True):
        self.now_us, self.graph, self.launched, self.capturable = 0.0, None, 0, capturable
        self.waiting_is_forbidden = False
        for name in ("Event", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        for name in (
            "synchronize", "current_stream", "set_stream", "graph_pool_handle", "get_sync_debug_mode", "current_device",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.forbid_waiting)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)

    def forbid_waiting(self, mode):
        self.waiting_is_forbidden = mode == "error"

    def wait(self):
        if self.graph is not None:
            raise RuntimeError("a capture is broken, and with it the allocator")
        if self.waiting_is_forbidden:
            raise RuntimeError("called a synchronizing CUDA operation")

    def run(self, duration_us):
        if self.graph is not None:
            self.graph.append(duration_us)
        else:
            self.launched += 1
            self.now_us += duration_us + 5.0  # a launch costs more than a node

    def Event(self, enable_timing):  # noqa: N802
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now_us

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) / 1000

        return Event()

    def CUDAGraph(self):  # noqa: N802
        gpu = self

        class Graph(list):
            def replay(self):
                gpu.now_us += sum(self)

        return Graph()

    @contextlib.contextmanager
    def capture(self, graph, **_):
        self.graph = graph
        try:
            yield
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            self.graph = None


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """A session that believes to measure: a CPU that poses as a GPU on whose clock every replayed graph takes 1 us."""
    gpu = PretendedGpu(monkeypatch)
    for name, value in {
        "is_available": lambda: True, "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3", "empty_cache": lambda: None,
        "get_device_properties": lambda *_: types.SimpleNamespace(L2_cache_size=4096),
        "mem_get_info": lambda: (1 << 20, 1 << 20),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(common, "_device", lambda **_: torch.device("cpu"))
    monkeypatch.setattr(common, "clocks", lambda **_: common.Clocks())
    monkeypatch.setattr(probe, "clocks", lambda **_: common.Clocks())
    monkeypatch.setattr(common, "_LAUNCH_BOUND_CALLS", 4)

    def elapsed(run):
        run()
        gpu.now_us += 1000.0
        return 1000.0

    monkeypatch.setattr(common, "_elapsed_us", elapsed)
    return lambda kind: session_for(tmp_path, kind, rehearse=False)


def test_every_item_runs_as_on_a_gpu(measuring):
    session = measuring("gpu-kernels")
    limits = {"read_bytes_s": rate(3e12), "matmul_flops_s.bf16": rate(7e14), "matmul_flops_s.fp8": rate(14e14)}
    bench = kernel_bench.Bench(
        session=session, scale=kernel_bench.TINY, limits=limits,
        datasheet=kernel_bench.datasheet_limits(session.record.gpu),
    )  # fmt: skip
    session.items(kernels.items(bench))
    assert session.record.notes == session.record.not_run == []
    assert len(session.record.rows) == len(kernels.items(bench))
    for row in session.record.rows:
        assert row.ok, row
        assert row.timing is not None
        assert row.share is not None
        assert row.share_datasheet is not None
        assert "failed" not in row.note
        assert (row.torch_timing is None) == (row.torch_name == "")
    session.finish(kernels.lines_of(session))
    assert len(session.record.lines) <= 24
    assert kernel_bench.probed_limits(session.out) == {}


def test_every_ceiling_is_measured_as_on_a_gpu(measuring, monkeypatch):
    pretended = types.SimpleNamespace(
        READ_SHAPES=((64, 4, 2), (128, 4, 1)), reads_right=lambda _: True, nothing=lambda _: None,
        read_all=lambda source, _, **shape: source.sum(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "bench.gpu.probe_kernels", pretended)
    monkeypatch.setattr(bench_package, "probe_kernels", pretended, raising=False)
    monkeypatch.setattr(probe, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(probe, "SQUARE", 32)
    monkeypatch.setattr(probe, "MATRICES", {"qkv": (48, 32)})
    monkeypatch.setattr(probe.Probe, "_round_trip", lambda *_: None)  # pinned memory needs a driver
    session = measuring("gpu-probe")
    session.items(probe.items(probe.Probe(session)))
    assert session.record.notes == session.record.not_run == []
    assert set(session.record.limits) == {
        "read_bytes_s", "copy_bytes_s", "matmul_flops_s.bf16", "matmul_flops_s.fp16", "matmul_flops_s.fp8", "launch_s",
        "graph_node_s",
    }  # fmt: skip
    assert all(row.value and row.value > 0 for row in session.record.rows)
    lines = probe.lines_of(session)
    assert lines[0].startswith("probe on NVIDIA H100 80GB HBM3")
    assert len(lines) <= 12


def test_short_calls_are_timed_in_a_graph_over_all_rotating_inputs(monkeypatch):
    gpu = PretendedGpu(monkeypatch)
    seen = set()

    def call(index):
        seen.add(index % 3)
        gpu.run(7.0)

    timing = common.time_on_gpu(call, 3, budget_s=0.01)
    assert (timing.how, timing.note) == ("graph", "")
    assert timing.median_us == pytest.approx(7.0)
    assert timing.calls_per_sample % 3 == 0
    assert timing.calls_per_sample >= 500
    assert timing.samples >= 5
    assert seen == {0, 1, 2}


def test_long_calls_are_timed_one_by_one(monkeypatch):
    gpu = PretendedGpu(monkeypatch)
    timing = common.time_on_gpu(lambda _: gpu.run(3000.0), 2, budget_s=0.01)
    assert timing.how == "events"
    assert timing.median_us == pytest.approx(3005.0)
    assert timing.calls_per_sample == 2


def test_what_cannot_be_captured_is_launched_and_the_note_says_why(monkeypatch):
    gpu = PretendedGpu(monkeypatch, capturable=False)
    timing = common.time_on_gpu(lambda _: gpu.run(7.0), budget_s=0.01)
    assert timing.how == "events"
    assert timing.median_us == pytest.approx(12.0)
    assert timing.note == "not captured: operation not permitted when stream is capturing"


def test_what_waits_for_the_device_is_never_captured(monkeypatch):
    gpu = PretendedGpu(monkeypatch)

    def call(_):
        gpu.run(7.0)
        gpu.wait()

    timing = common.time_on_gpu(call, budget_s=0.01)
    assert (timing.how, timing.note) == ("events", "not captured: called a synchronizing CUDA operation")
    assert not gpu.waiting_is_forbidden


def real_run(session, monkeypatch):
    """Let a rehearsal's session believe that it measures."""
    session.rehearsal = False
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(common, "_context_is_lost", lambda: False)


def test_a_failing_item_is_noted_and_an_item_without_time_is_listed(tmp_path, monkeypatch):
    session = session_for(tmp_path)
    real_run(session, monkeypatch)
    ran = []

    def fail():
        raise torch.cuda.OutOfMemoryError("no room\nat all")

    session.items(
        [("first", 1.0, fail), ("long", 1e6, lambda: ran.append("long")), ("last", 1.0, lambda: ran.append(1))]
    )
    assert ran == [1]
    assert session.record.notes == ["first: OutOfMemoryError: no room"]
    assert session.record.not_run == ["long"]
    session.finish(["done"])
    data = json.loads(session.out.read_text(encoding="utf-8"))["data"]
    assert (data["complete"], data["not_run"], data["lines"]) == (False, ["long"], ["done"])


@pytest.mark.parametrize("error", [KeyError("a compiler's"), ZeroDivisionError("rate"), OSError("no cache")], ids=repr)
def test_whatever_an_item_fails_with_costs_no_other(tmp_path, monkeypatch, error):
    session = session_for(tmp_path)
    real_run(session, monkeypatch)
    ran = []

    def fail():
        raise error

    session.items([("bad", 1.0, fail), ("next", 1.0, lambda: ran.append(1))])
    assert ran == [1]
    assert session.record.notes == [f"bad: {type(error).__name__}: {error}"]


@pytest.mark.parametrize("error", [RuntimeError(""), AttributeError("no such operation")], ids=repr)
def test_torchs_way_may_fail_without_a_word_and_ours_is_kept(error):
    def timed(call, _copies):
        call(0)
        return common._timing([1.0, 2.0], 1, "graph", "")

    def fail(_):
        raise error

    rows = []
    session = types.SimpleNamespace(rehearsal=False, device=torch.device("cpu"), time=timed, add=rows.append)
    kernel_bench.Bench(session=session, scale=kernel_bench.TINY).measure(
        kernel_bench.Case(
            family="matmul", name="one", shape={"T": 1}, dtype="int8", call=lambda _: None, bound=0.1,
            work=kernel_bench.Work(bytes_moved=8), check=lambda: [(torch.ones(2), torch.ones(2))],
            other=kernel_bench.Other(name="theirs", call=fail),
        )
    )  # fmt: skip
    assert rows[0].timing.median_us == 1.5
    assert rows[0].torch_timing is None
    assert rows[0].note == f"torch's way failed: {type(error).__name__}: {error}"


def test_a_lost_context_starts_the_script_again_after_the_guilty_item(tmp_path, monkeypatch):
    session = session_for(tmp_path)
    real_run(session, monkeypatch)
    monkeypatch.setattr(common, "_context_is_lost", lambda: True)
    started = []

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(common.os, "execv", lambda _, command: started.append(command))
    session.items([("good", 1.0, lambda: None), ("bad", 1.0, fail)])
    (command,) = started
    assert command[0] == sys.executable
    assert command[command.index("--resume-at") + 1] == "2"
    assert command[command.index("--seed") + 1] == "1"
    # A restarted script counts its time from the beginning of the process, which is the same one.
    lived_s = time.monotonic() - sources.began_s()
    assert float(command[command.index("--time-limit-s") + 1]) == pytest.approx(60 + lived_s, abs=10)
    assert json.loads(session.out.read_text(encoding="utf-8"))["data"]["notes"][0].startswith("bad: RuntimeError")


def test_a_time_limit_counts_from_the_beginning_of_the_process(tmp_path):
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
time.sleep(0.6)
from bench.gpu.sources import began_s
print(time.monotonic() - began_s())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 120
    args = argparse.Namespace(rehearse=True, out=tmp_path / "r.json", time_limit_s=60, seed=1, only="", resume_at=0)
    session = common.Session("gpu-probe", args, began_s=time.monotonic() - 20)
    assert session.left_s == pytest.approx(40, abs=10)


def timing(median_us):
    return common.Timing(
        median_us=median_us, p10_us=median_us, p90_us=median_us, least_us=median_us, samples=5, calls_per_sample=8,
        how="graph",
    )  # fmt: skip


def kernel_row(name, shape, *, family="matmul", dtype="int8", us=100.0, floor_us=90.0):
    return kernel_bench.KernelRow(
        family=family, name=name, shape=shape, dtype=dtype, runs="triton", ok=True, error=0.001, error_largest=0.01,
        error_bound=0.01, reference="float64", bytes_moved=int(us), flops=8.0, timing=timing(us), floor_us=floor_us,
        limit_by="bytes", share=floor_us / us, torch_name="t", torch_timing=timing(2 * us), times_torch=2.0,
    )  # fmt: skip


def test_the_table_adds_up_a_step_and_shows_the_rest(tmp_path):
    session = session_for(tmp_path)
    session.record.rehearsal = False
    for name in ("qkv", "dense", "gate_up", "down"):
        session.record.rows.append(kernel_row(f"int8 {name}", {"T": 1, "O": 1, "I": 1}))
    session.record.rows.append(kernel_row("fp8 qkv", {"T": 1, "O": 1, "I": 1}))
    for count in (1, 8):
        shape = {"B": count, "N": 512}
        session.record.rows.append(kernel_row("decode attention", shape, family="paged", us=10.0 * count))
    session.record.notes.append("score: RuntimeError: no")
    session.record.not_run.append("rest")
    lines = kernels.lines_of(session)
    products = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("int8 ", "fp8 "))}
    assert products == {"int8": ["32.00", "(90%)", *"-----"], "fp8": [*"------"]}
    assert any(line.startswith("decode attention, B=8 N=512") and "80.0" in line for line in lines)
    assert "failed: score: RuntimeError: no" in lines
    assert lines[-1] == "not run, no time left: 1 items"


def test_the_probes_table_tells_ceilings_and_what_held_the_clocks(tmp_path):
    session = session_for(tmp_path, "gpu-probe")
    record = session.record
    record.rehearsal, record.gpu = False, "NVIDIA H100 80GB HBM3"
    state = common.Clocks(sm_mhz=1755, sm_max_mhz=1980, memory_mhz=2619, temperature_c=40, power_w=600.5)
    record.clocks_before = record.clocks_after = state
    keep = probe.Probe(session)._keep
    capped = common.Clocks(sm_mhz=1400, reasons=("idle", "power cap"))
    for name, value in (("slow", 2.5e12), ("quick", 3.0e12), ("slower", 2.0e12)):
        keep(probe.ProbeRow(name=name, value=value, unit="B/s", clocks_after=capped), "read_bytes_s")
    for value in (3e-6, 2e-6, 4e-6):
        keep(probe.ProbeRow(name="node", value=value, unit="s"), "graph_node_s")
    keep(probe.ProbeRow(name="wrong", value=9e12, unit="B/s", ok=False), "read_bytes_s")
    assert record.limits["read_bytes_s"].value == 3.0e12
    assert record.limits["graph_node_s"].value == 2e-6
    lines = probe.lines_of(session)
    assert "SM 1755 of 1980 MHz, memory 2619 MHz, 40 C, 600.5 W, held by: none" in lines[0]
    assert "read_bytes_s  3.000 TB/s  quick, median" in lines
    assert "clock limits seen: power cap" in lines
    assert "WRONG RESULT: wrong" in lines
    session.write()
    limits = kernel_bench.probed_limits(session.out)
    assert limits == record.limits
    record.rehearsal = True
    session.write()
    assert kernel_bench.probed_limits(session.out) == {}
    assert kernel_bench.probed_limits(tmp_path / "none.json") == {}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_is_right_when_its_public_function_calls_it(tmp_path):
    out = tmp_path / "kernels.json"
    paths = [ROOT / "tests", ROOT, ROOT / "plugins" / "h2o"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.interpreted_bench", "--out", out, "--seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    data = json.loads(out.read_text(encoding="utf-8"))["data"]
    assert {row["runs"] for row in data["rows"]} == {"triton"}
    assert [(row["name"], row["shape"], row["error"]) for row in data["rows"] if not row["ok"]] == []


class PretendedNvml(types.SimpleNamespace):
    """What `clocks` asks of NVML; temperature is not supported here, as on some cards."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return f"gpu {index}"

    def nvmlDeviceGetClockInfo(self, _, kind):  # noqa: N802
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetMaxClockInfo(self, *_):  # noqa: N802
        return 1980

    def nvmlDeviceGetTemperature(self, *_):  # noqa: N802
        raise self.NVMLError("not supported")

    def nvmlDeviceGetPowerUsage(self, _):  # noqa: N802
        return 650_500


@pytest.mark.parametrize(
    "name", ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
)
def test_clocks_are_read_from_old_and_new_drivers(monkeypatch, name):
    nvml = PretendedNvml()
    setattr(nvml, name, lambda _: 0x04 | 0x80)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert common.clocks() == common.Clocks(
        sm_mhz=1755, sm_max_mhz=1980, memory_mhz=2619, power_w=650.5, reasons=("power cap", "power brake")
    )
    monkeypatch.setattr(nvml, "nvmlInit", nvml.nvmlDeviceGetTemperature)
    assert common.clocks() == common.Clocks()
