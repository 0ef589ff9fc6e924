"""Llama 3 70B of random weights on one GPU, by trtkit's own protocol: the rows of the published table, measured.

    python3 bench/gpu/llama70b.py --out DIR [--stage core|more|levers | --rows int8,int8-h2o] [--cells c1-isl512]
                                  [--time-limit-s 300] [--rehearse]

Speed does not depend on the weights' values, so no checkpoint is needed. Each row is one configuration in a fresh child
process, its cells run most important first until the time is over; what was not run is listed with its floor and its
prediction. --rehearse runs the same code on a CPU with a tiny shape and gives no rates.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import sources
from bench.gpu.forecast import cell_numbers, cell_seconds
from bench.gpu.memory import fits, memory_rows
from bench.gpu.rows import ROWS, STAGES, Scale, cell_plan, default_rows, plan_of, real_scale, rehearsal_scale
from bench.gpu.sweep import CellPlan, RowOutcome, Sweep, run_row
from trtkit.backends.remote import DEFAULT_OPENER
from trtkit.benchmark.nvml import management_library
from trtkit.plan.names import gpu_word
from trtkit.plan.prices import load_prices
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.codec import read_record, write_record
from trtkit.spec.errors import InputError, TrtkitError, UsageError
from trtkit.spec.measured import Measured
from trtkit.spec.plan import BuildPlan

KIND = "gpu-llama70b"
FILE_NAME = "llama70b.json"
OPENING_S = 20.0
"""Kept for making a row's weights, checking its kernels and capturing its graphs (assumed)."""
SPARE = 1.4
"""Times the predicted length of a cell that is kept for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What the file holds. A rehearsal proves that the code runs; its numbers mean nothing and are never rendered."""

    rehearsal: bool
    gpu: str
    rows: tuple[RowOutcome, ...] = ()


def detect_gpu() -> str:
    """The catalog's name of the first GPU.

    Raises:
        UsageError: none, or one the catalog does not know.
    """
    name = _name_by_nvml() or _name_by_torch()
    if not name:
        raise UsageError("no NVIDIA GPU here that NVML or torch can see; --rehearse runs on a CPU, --gpu names one")
    return gpu_spec(gpu_word(name)).name


def _name_by_nvml() -> str:
    nvml = management_library()
    if nvml is None:
        return ""
    try:
        nvml.nvmlInit()
        name = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(0))
    except nvml.NVMLError:  # no driver or no device
        return ""
    return name if isinstance(name, str) else name.decode()


def _name_by_torch() -> str:
    """Asked in another process, so that this one never holds a CUDA context."""
    program = "import torch; print(torch.cuda.get_device_name(0))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def limits_from(path: Path | None, gpu: str) -> Mapping[str, Measured]:
    """Ceilings that the probe measured, if its file is there; else measured now, which takes some seconds."""
    from bench.gpu.summary import probe_limits
    from trtkit.benchmark.machine import measured_limits

    found = probe_limits(path) if path is not None else {}
    return found or ({} if gpu == "cpu" else measured_limits("cuda"))


class Writer:
    """Keeps the file up to date after every cell, beside the rows of earlier calls."""

    def __init__(self, path: Path, scale: Scale) -> None:
        self._path = path
        self.record = Record(rehearsal=scale.rehearsal, gpu=scale.gpu)
        if path.is_file():
            earlier = read_record(path, KIND, Record)
            if (earlier.rehearsal, earlier.gpu) != (scale.rehearsal, scale.gpu):
                raise InputError(f"{path}: holds rows of {earlier.gpu}; give another directory")
            self.record = earlier
        self._before = self.record.rows

    def saved(self, row: RowOutcome) -> None:
        """Write the row as it is now."""
        seen = [cell.result.memory for cell in row.cells if cell.result is not None]
        peak = max(seen, key=lambda memory: memory.peak_bytes or 0, default=None)
        row = replace(row, memory=memory_rows(row.plan, row.info, peak))
        kept = tuple(other for other in self.record.rows if other.row != row.row or other in self._before)
        self.record = replace(self.record, rows=(*kept, row))
        write_record(self._path, KIND, self.record)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One call of this script."""

    out: Path
    scale: Scale
    rows: Sequence[str]
    cells: Sequence[str] | None
    limits: Mapping[str, Measured]
    time_limit_s: float
    opener: str = DEFAULT_OPENER
    say: Callable[[str], None] = field(default=print)


def run(job: Job) -> Record:
    """Every row that fits, in order; what is left when the time is over is recorded as not run.

    A row stops in time for the first cell of each later row, which matters more than its own last ones.
    """
    deadline_s = time.monotonic() + job.time_limit_s
    job.out.mkdir(parents=True, exist_ok=True)
    writer = Writer(job.out / FILE_NAME, job.scale)
    price = load_prices().find(job.scale.gpu)
    plans = {key: plan_of(key, job.scale) for key in job.rows}
    for key in [key for key, plan in plans.items() if not fits(plan)]:
        job.say(f"{ROWS[key].label}: does not fit {job.scale.gpu}")
        del plans[key]
    cells = {key: _cells(job, key) for key in plans}
    with tempfile.TemporaryDirectory(prefix="trtkit-gpu-") as work:
        for index, (key, plan) in enumerate(plans.items()):
            later = list(plans)[index + 1 :]
            own_s = first_cell_s(plan, cells[key])
            kept_s = sum(first_cell_s(plans[each], cells[each]) for each in later)
            sweep = Sweep(
                work_dir=Path(work),
                limits=job.limits,
                deadline_s=min(deadline_s, max(deadline_s - kept_s, time.monotonic() + own_s)),
                saved=writer.saved,
                usd_per_hour=price.usd_per_gpu_h if price else None,
                opener=(ROWS[key].opener or job.opener) if job.opener == DEFAULT_OPENER else job.opener,
                # On a CPU the engine would choose its CPU path; what is rehearsed is the device path.
                overrides={"path": "device"} if job.scale.rehearsal else {},
                say=job.say,
                rehearsal=job.scale.rehearsal,
            )
            if cells[key]:
                run_row(key, ROWS[key].label, plan, cells[key], sweep)
    return writer.record


def _cells(job: Job, key: str) -> list[CellPlan]:
    names = [name for name in ROWS[key].cells if job.cells is None or name in job.cells]
    return [cell_plan(name, job.scale, key) for name in names]


def first_cell_s(plan: BuildPlan, cells: Sequence[CellPlan]) -> float:
    """Seconds to open a row and run its first cell, as predicted with something to spare; 0 where nothing is predicted."""
    if not cells:
        return 0.0
    first = cells[0]
    _, _, predicted = cell_numbers(plan, first.workload, {})
    needed_s = cell_seconds(plan, first.workload, predicted, first.repeats, first.warmup)
    return OPENING_S + SPARE * needed_s if needed_s else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"directory for {FILE_NAME}")
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)}; default: all that fit")
    parser.add_argument("--stage", choices=STAGES, help="only the default rows of this stage of one_call.sh")
    parser.add_argument("--skip", default="", help="rows to leave out of the default ones")
    parser.add_argument("--cells", help="such as c1-isl512,c32-isl4096; default: each row's own")
    parser.add_argument("--gpu", help="catalog name; default: the first GPU's")
    parser.add_argument("--probe", type=Path, help="the probe's record, for measured ceilings")
    parser.add_argument("--time-limit-s", type=float, default=600.0)
    parser.add_argument("--rehearse", action="store_true", help="tiny shape on the CPU, no rates")
    args = parser.parse_args()
    # A polite end: the child goes with us, and what is finished is written already.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        scale = rehearsal_scale() if args.rehearse else real_scale(args.gpu or detect_gpu())
        skipped = args.skip.split(",") if args.skip else []
        rows = (
            args.rows.split(",")
            if args.rows
            else [key for key in default_rows(scale, args.stage) if key not in skipped]
        )
        unknown = [key for key in (*rows, *skipped) if key not in ROWS]
        if unknown:
            raise UsageError(f"unknown row {unknown[0]!r}: there are {', '.join(ROWS)}")
        with tempfile.TemporaryDirectory(prefix="trtkit-path-") as metadata:
            sources.use(Path(metadata))
            if scale.rehearsal:
                os.environ.setdefault("OMP_NUM_THREADS", "1")
            ceilings = {} if scale.rehearsal else limits_from(args.probe, scale.gpu)
            job = Job(
                out=args.out,
                scale=scale,
                rows=rows,
                cells=args.cells.split(",") if args.cells else None,
                limits=ceilings,
                # What starting and measuring ceilings took counts, too.
                time_limit_s=args.time_limit_s - (time.monotonic() - sources.began_s()),
                say=lambda text: print(text, flush=True),
            )
            record = run(job)
    except TrtkitError as error:
        print(f"llama70b: {error}", file=sys.stderr)
        return error.exit_code
    done = sum(cell.result is not None for row in record.rows for cell in row.cells)
    print(f"{done} cells measured{' in rehearsal' if record.rehearsal else ''}; {args.out / FILE_NAME}")
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
