"""Cells of one engine, most important first, inside a time limit: trtkit's own protocol, nothing measured differently.

The engine is opened once per configuration (making 73 GB of weights costs more than a cell) in a child process; driver,
statistics, checks, memory sampling and records are `trtkit.benchmark`'s. A cell that would not end in time is not begun
and says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from bench.gpu.forecast import Numbers, cell_numbers, cell_seconds
from trtkit.audit.records import check_result
from trtkit.backends.remote import DEFAULT_OPENER, RemoteEngine, Timeouts
from trtkit.benchmark.cells import Cell
from trtkit.benchmark.clocks import ClockSampler, clock_check, clock_gauge
from trtkit.benchmark.driver import run_repeat
from trtkit.benchmark.environment import fingerprint
from trtkit.benchmark.memory import PeakSampler, gauge_for, nvml_baseline, split
from trtkit.benchmark.prompts import build_prompts
from trtkit.benchmark.run import assemble, judged
from trtkit.benchmark.targets import Target, open_targets
from trtkit.spec.bundle import Manifest, write_manifest
from trtkit.spec.engine import EngineInfo, Request
from trtkit.spec.errors import TrtkitError
from trtkit.spec.kv import KVFidelity
from trtkit.spec.measured import Measured
from trtkit.spec.plan import BuildPlan
from trtkit.spec.result import BenchResult, Check, Environment, Repeat
from trtkit.spec.workload import Workload

PROTOCOL = "gpu-llama70b"
MARGIN_S = 5.0
"""What is kept of the time limit for closing the engine and writing."""
STALL_S = 60.0
"""Silence while tokens are owed after which an engine is ended: a kernel that hangs costs its cell, not the call."""
ROOMY_FRACTION = 0.7
LOST = "engine: "
_TOO_LITTLE_MEMORY = ("out of memory", "not enough memory", "buffers beside the kv pool")
"""As torch, Python and the engine's opening say it."""
_LOG_LINES = 60
_SURVIVABLE = (
    TrtkitError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError, LookupError, OSError,
)  # fmt: skip
"""What one cell may fail with."""
_FIRST_GUESS = 1.25
"""A cell is taken to last this much longer than predicted until one has been measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellPlan:
    """One cell to run. `warmup` requests of `warmup_osl` tokens go first; the engine's graphs are captured at opening."""

    name: str
    workload: Workload
    repeats: int
    warmup: int = 1
    warmup_osl: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CellOutcome:
    """One cell with its limits: `floor_measured` from ceilings measured on this machine (modeled), `floor_datasheet`,
    and `prediction`, made before it ran. `result` is None where it was not run; `not_run` says why.
    """

    name: str
    workload: Workload
    floor_measured: Numbers | None
    floor_datasheet: Numbers | None
    prediction: Numbers | None
    seconds: float | None = None
    result: BenchResult | None = None
    usd_per_million: Measured | None = None
    not_run: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOutcome:
    """One configuration: how long it took to open, what it holds, what the engine says of itself, and its cells."""

    row: str
    label: str
    plan: BuildPlan
    environment: Environment
    opened_s: float | None = None
    info: EngineInfo | None = None
    notes: tuple[str, ...] = ()
    memory: Mapping[str, Measured] = field(default_factory=dict)
    cells: tuple[CellOutcome, ...] = ()
    lost: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What a row's cells need. `deadline_s` is on `time.monotonic`; `saved` is called whenever there is something new."""

    work_dir: Path
    limits: Mapping[str, Measured]
    deadline_s: float
    saved: Callable[[RowOutcome], None]
    usd_per_hour: float | None = None
    opener: str = DEFAULT_OPENER
    overrides: Mapping[str, object] = field(default_factory=dict)
    command: Sequence[str] = field(default_factory=lambda: tuple(sys.argv))
    say: Callable[[str], None] = print
    rehearsal: bool = False

    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.deadline_s - time.monotonic()


def dummy_bundle(directory: Path, plan: BuildPlan) -> Path:
    """An engine directory without weights: opening it makes random ones of the plan's shape."""
    path = directory / f"{plan.name}.engine"
    path.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(plan=plan, fidelity=KVFidelity.EXACT, versions={}, files={}, created_utc=_now())
    write_manifest(path, manifest)
    return path


def run_row(row: str, label: str, plan: BuildPlan, cells: Sequence[CellPlan], sweep: Sweep) -> RowOutcome:
    """Open one configuration and run its cells while time is left; whatever fails is in the outcome, nothing is raised.

    An engine that is lost is opened again for the cells after the one that lost it; one that found too little memory,
    once, with more of it left free.
    """
    environment = fingerprint(device="cpu" if plan.gpu == "cpu" else "cuda", command=sweep.command, limits=sweep.limits)
    outcome = RowOutcome(row=row, label=label, plan=plan, environment=environment)
    waiting = list(cells)
    while waiting:
        if sweep.left_s() <= MARGIN_S:
            outcome = _unrun(outcome, waiting, sweep, "no time was left to open the engine")
            break
        outcome, waiting, problem = _attempt(outcome, waiting, sweep)
        if problem is None:
            continue
        sweep.say(f"{label}: {problem}\n{_log_end(_log_of(outcome.plan, sweep))}")
        outcome = replace(outcome, lost=problem)
        roomy = roomier(outcome.plan)
        if _is_memory(problem) and outcome.plan != roomy:
            note = f"opened again with {roomy.limits.kv_fraction:.0%} of the free memory for the cache: {problem}"[:300]
            outcome = replace(outcome, plan=roomy, notes=(*outcome.notes, note))
        elif outcome.opened_s is None:
            outcome = _unrun(outcome, waiting, sweep, "the engine did not open")
            break
    sweep.saved(outcome)
    return outcome


def roomier(plan: BuildPlan) -> BuildPlan:
    """The same with more memory left free beside the cache."""
    return replace(plan, limits=replace(plan.limits, kv_fraction=min(plan.limits.kv_fraction, ROOMY_FRACTION)))


def _is_memory(problem: str) -> bool:
    """Whether a smaller cache may help: memory ran out while serving, or while opening once the weights were there."""
    return any(words in problem.lower() for words in _TOO_LITTLE_MEMORY)


def _log_of(plan: BuildPlan, sweep: Sweep) -> Path:
    return sweep.work_dir / f"{plan.name}.log"


def _log_end(log: Path) -> str:
    """What the engine's process wrote last; the file itself stays on a machine that nobody may see again."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(f"  | {line}" for line in text.splitlines()[-_LOG_LINES:])


def _unrun(outcome: RowOutcome, cells: Sequence[CellPlan], sweep: Sweep, reason: str) -> RowOutcome:
    outcome = replace(outcome, cells=(*outcome.cells, *not_run(outcome.plan, cells, sweep, reason)))
    sweep.saved(outcome)
    return outcome


def _attempt(
    outcome: RowOutcome, cells: Sequence[CellPlan], sweep: Sweep
) -> tuple[RowOutcome, list[CellPlan], str | None]:
    """Open the engine once and run cells until they end or it does: the outcome, the cells left, and what went wrong."""
    (target,) = open_targets([dummy_bundle(sweep.work_dir, outcome.plan)], sweep.overrides)
    baseline = nvml_baseline() if target.device.startswith("cuda") else None
    started = time.monotonic()
    left_s = max(sweep.left_s() - MARGIN_S, 1.0)
    try:
        timeouts = Timeouts(start_s=left_s, stall_s=min(left_s, STALL_S), close_s=10.0)
        log = _log_of(outcome.plan, sweep)
        engine = RemoteEngine(target.path, target.overrides, opener=sweep.opener, timeouts=timeouts, log_path=log)
    except TrtkitError as error:
        return replace(outcome, opened_s=None), list(cells), str(error)
    opened_s = time.monotonic() - started
    notes = (*outcome.notes, *(note for note in engine.info.notes if note not in outcome.notes))
    outcome = replace(outcome, opened_s=opened_s, info=engine.info, notes=notes)
    sweep.say(f"{outcome.label}: opened in {opened_s:.1f} s")
    with engine:
        return _Runner(engine, target, outcome, baseline, sweep).run(cells)


def not_run(plan: BuildPlan, cells: Sequence[CellPlan], sweep: Sweep, reason: str) -> tuple[CellOutcome, ...]:
    """Cells that were not run, with their floors and predictions."""
    return tuple(replace(_planned(plan, cell, sweep), not_run=reason) for cell in cells)


def _planned(plan: BuildPlan, cell: CellPlan, sweep: Sweep, batch: int | None = None) -> CellOutcome:
    measured, datasheet, predicted = cell_numbers(plan, cell.workload, sweep.limits, batch)
    return CellOutcome(
        name=cell.name,
        workload=cell.workload,
        floor_measured=measured,
        floor_datasheet=datasheet,
        prediction=predicted,
    )


class _Runner:
    """An open engine, and how much slower than predicted it has been."""

    def __init__(
        self,
        engine: RemoteEngine,
        target: Target,
        outcome: RowOutcome,
        baseline: tuple[object, dict[int, int]] | None,
        sweep: Sweep,
    ) -> None:
        self._engine = engine
        self._target = target
        self._outcome = outcome
        self._sweep = sweep
        self._gauge = gauge_for(engine.info, baseline)
        self._clocks = clock_gauge(baseline)
        self._slowness = _FIRST_GUESS

    def run(self, cells: Sequence[CellPlan]) -> tuple[RowOutcome, list[CellPlan], str | None]:
        waiting = list(cells)
        while waiting:
            done = self._cell(waiting.pop(0))
            self._add(done)
            if done.not_run and done.not_run.startswith(LOST):
                return self._outcome, waiting, done.not_run
        return self._outcome, [], None

    def _add(self, outcome: CellOutcome) -> None:
        self._outcome = replace(self._outcome, cells=(*self._outcome.cells, outcome))
        self._sweep.saved(self._outcome)

    def _cell(self, cell: CellPlan) -> CellOutcome:
        plan, sweep = self._target.plan, self._sweep
        planned = _planned(plan, cell, sweep)
        predicted_s = cell_seconds(plan, cell.workload, planned.prediction, cell.repeats, cell.warmup)
        needed_s = predicted_s * self._slowness
        if needed_s > sweep.left_s() - MARGIN_S:
            reason = f"would take about {needed_s:.0f} s, {max(sweep.left_s(), 0):.0f} s were left"
            sweep.say(f"  {cell.name}: not run: {reason}")
            return replace(planned, not_run=reason)
        started = time.monotonic()
        try:
            result = self._measure(cell)
        except _SURVIVABLE as error:
            # Nobody is there to start again: whatever it was costs this cell and no other.
            sweep.say(f"  {cell.name}: {type(error).__name__}: {error}")
            return replace(planned, not_run=f"{LOST}{error}")
        seconds = time.monotonic() - started
        if predicted_s > 0:
            self._slowness = max(1.1 * seconds / predicted_s, 0.5)
        running = max((repeat.kv.requests_peak for repeat in result.repeats), default=0)
        # What ran at once is known now, so the floors are its own; the prediction stays what it was.
        floors = _planned(plan, cell, sweep, running or None)
        planned = replace(planned, floor_measured=floors.floor_measured, floor_datasheet=floors.floor_datasheet)
        told = one_line(result, rates=not sweep.rehearsal)
        sweep.say(f"  {cell.name}: {told} ({seconds:.0f} s)")
        return replace(planned, seconds=seconds, result=result, usd_per_million=price(result, sweep.usd_per_hour))

    def _measure(self, cell: CellPlan) -> BenchResult:
        target = self._target
        prompts = build_prompts(
            cell.workload, target.plan.model, target.tokenizer_dir, repeats=cell.repeats, warmup=cell.warmup
        )
        environment = replace(self._outcome.environment, started_utc=_now())
        with PeakSampler(self._gauge) as sampler, ClockSampler(self._clocks) as clocks:
            warm = replace(cell.workload, osl=min(cell.warmup_osl, cell.workload.osl), concurrency=cell.warmup)
            warmup = run_repeat(self._engine, _requests("w", prompts.warmup, warm), warm)
            repeats: list[Repeat] = []
            for index, arrays in enumerate(prompts.repeats):
                requests = _requests(f"r{index}-", arrays, cell.workload)
                repeats.append(run_repeat(self._engine, requests, cell.workload, index=index))
        repeats[0] = replace(repeats[0], warmup_requests=cell.warmup)
        method = self._gauge.method if self._gauge else "none"
        memory = split(self._engine.info, [r.kv for r in (warmup, *repeats)], sampler.peak_bytes, method)
        where = Cell(target=target, workload=cell.workload, path=Path(cell.name))
        result = assemble(where, tuple(repeats), environment, PROTOCOL)
        reports = clocks.reports()
        extra: tuple[Check, ...] = (clock_check(reports),) if reports else ()
        return judged(replace(result, memory=memory, checks=(*result.checks, *extra)), check_result)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _requests(prefix: str, prompts: Sequence, workload: Workload) -> list[Request]:
    return [
        Request(
            request_id=f"{prefix}{number}",
            prompt_ids=tuple(prompt.tolist()),
            max_tokens=workload.osl,
            ignore_eos=workload.ignore_eos,
        )
        for number, prompt in enumerate(prompts)
    ]


def value(result: BenchResult, key: str, stat: str = "p50") -> float | None:
    """One statistic of one metric; None where there is none."""
    metric = result.metrics.get(key)
    found = None if metric is None else metric.stats.get(stat)
    return None if found is None else found.value


def price(result: BenchResult, usd_per_hour: float | None) -> Measured | None:
    """USD per million output tokens at this cell's throughput; None for an invalid cell or an unknown price."""
    from trtkit.plan.cost import cost_of

    metric = result.metrics.get("tps")
    if not result.valid or usd_per_hour is None or metric is None:
        return None
    stat = metric.stats["value"]
    rate = Measured(value=stat.value, unit=metric.unit, source=metric.source, low=stat.low, high=stat.high)
    return cost_of(rate, usd_per_hour)


def one_line(result: BenchResult, *, rates: bool = True) -> str:
    """The cell in a few words; a rehearsal has no rates to tell."""
    parts = [] if rates else [f"{sum(s.output_tokens for r in result.repeats for s in r.samples)} tokens"]
    for key, stat, text in (
        ("ttft_ms", "p50", "TTFT {:.0f} ms"),
        ("tpot_ms", "p50", "TPOT {:.2f} ms"),
        ("itl_ms", "p50", "step {:.2f} ms"),
        ("tps", "value", "{:.1f} tok/s"),
    ):
        found = value(result, key, stat) if rates else None
        if found is not None:
            parts.append(text.format(found))
    if not result.valid:
        reason = next(check for check in result.checks if check.status == "fail")
        parts.append(f"INVALID: {reason.name}: {reason.detail}")
    return ", ".join(parts) or "nothing measured"
