"""A run: every engine in a fresh child process, every cell warmed up, repeated, checked, and written when it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import numpy as np

from trtkit.backends.remote import DEFAULT_OPENER, RemoteEngine, Timeouts
from trtkit.benchmark.cells import ENGINE_LOST, Cell, load_title, plan_cells, prepare_output
from trtkit.benchmark.checks import FAIL, bookkeeping_checks, engine_checks
from trtkit.benchmark.clocks import ClockSampler, clock_check, clock_gauge
from trtkit.benchmark.driver import run_repeat
from trtkit.benchmark.environment import fingerprint
from trtkit.benchmark.machine import best_of, measured_limits, remeasured_limits
from trtkit.benchmark.memory import UNKNOWN_MEMORY, PeakSampler, gauge_for, nvml_baseline, split
from trtkit.benchmark.metrics import compute_metrics
from trtkit.benchmark.prompts import PromptSet, build_prompts
from trtkit.benchmark.shares import lowered_kv, shares
from trtkit.benchmark.targets import Target
from trtkit.spec.codec import write_record
from trtkit.spec.engine import Engine, Request
from trtkit.spec.errors import CapacityError, EngineError, InputError, MeasurementError, TrtkitError
from trtkit.spec.measured import Measured
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.result import BENCH_KIND, BenchResult, Check, Environment, Repeat, tokens_per_decode_step
from trtkit.spec.workload import Protocol, Workload

Judge = Callable[[BenchResult], tuple[Check, ...]]


def no_judge(_result: BenchResult) -> tuple[Check, ...]:
    """Only the bookkeeping checks."""
    return ()


def _silent(_text: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to run. `judge` adds checks to a result (the audit's, which this package may not import)."""

    output_dir: Path
    judge: Judge = no_judge
    progress: Progress = no_progress
    note: Callable[[str], None] = _silent
    command: Sequence[str] = field(default_factory=lambda: tuple(sys.argv))
    opener: str = DEFAULT_OPENER
    timeouts: Timeouts = field(default_factory=Timeouts)
    limits: Callable[[str], Mapping[str, Measured]] = measured_limits
    remeasure: Callable[[str], Mapping[str, Measured]] = remeasured_limits


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRun:
    """What a run left: records in the order of the cells, and one line per cell that has none or a bad one."""

    results: tuple[BenchResult, ...]
    paths: tuple[Path, ...]
    kept: int
    refused: tuple[str, ...]
    lost: tuple[str, ...]

    def raise_if_incomplete(self) -> None:
        """Turn missing and invalid cells into the error a command ends with.

        Raises:
            EngineError: an engine died or would not open.
            CapacityError: a workload does not fit an engine's limits.
            MeasurementError: a check failed.
        """
        if self.lost:
            raise EngineError(f"{len(self.lost)} cells have no result because their engine failed: {self.lost[0]}")
        if self.refused:
            raise CapacityError(f"{len(self.refused)} cells were not run: {self.refused[0]}")
        failed = [
            f"{r.engine.name}, {load_title(r.workload)}: {check.name}: {check.detail}"
            for r in self.results
            for check in r.checks
            if check.status == FAIL
        ]
        if failed:
            invalid = sum(not result.valid for result in self.results)
            raise MeasurementError(f"{invalid} cells are invalid: {failed[0]}")


def run_bench(targets: Sequence[Target], protocol: Protocol, settings: Settings) -> BenchRun:
    """Measure every engine under every workload of the protocol.

    Finished cells found in the output directory are kept; interrupting loses only the cell in progress.

    Raises:
        OutputError: the output directory cannot be written; checked before anything starts.
        InputError: the data set cannot give the prompts.
    """
    prepare_output(settings.output_dir)
    cells = plan_cells(targets, protocol, settings.output_dir)
    results: dict[Path, BenchResult] = {cell.path: cell.done for cell in cells if cell.done is not None}
    kept = len(results)
    if kept:
        settings.note(f"{kept} of {len(cells)} cells are finished already in {settings.output_dir} and are kept")
    refused = [cell.refusal for cell in cells if cell.refusal and cell.done is None]
    for line in refused:
        settings.note(f"not run: {line}")
    todo = [cell for cell in cells if cell.done is None and not cell.refusal]
    for _, group in groupby(todo, key=lambda cell: cell.target.path):
        for cell, result in _run_engine(list(group), protocol, settings):
            write_record(cell.path, BENCH_KIND, result)
            results[cell.path] = result
    ordered = [cell.path for cell in cells if cell.path in results]
    lost = [check.detail for path in ordered for check in results[path].checks if check.name == ENGINE_LOST]
    return BenchRun(
        results=tuple(results[path] for path in ordered),
        paths=tuple(ordered),
        kept=kept,
        refused=tuple(refused),
        lost=tuple(lost),
    )


def _run_engine(cells: Sequence[Cell], protocol: Protocol, settings: Settings) -> Iterator[tuple[Cell, BenchResult]]:
    """All cells of one engine in one child; a child that dies is replaced for the next cell, once it has opened."""
    target = cells[0].target
    environment = fingerprint(
        device=target.device,
        device_count=target.plan.parallel.world_size,
        command=settings.command,
        limits=settings.limits(target.device),
    )
    waiting = list(cells)
    prompts = _prompts(waiting[0], protocol)
    while waiting:
        baseline = nvml_baseline() if target.device.startswith("cuda") else None
        try:
            settings.progress(f"{target.ref.name}: open", 0, 1)
            engine = RemoteEngine(target.path, target.overrides, opener=settings.opener, timeouts=settings.timeouts)
        except TrtkitError as error:
            settings.note(f"cannot open {target.ref.name}: {error}")
            for cell in waiting:
                yield cell, _lost(cell, protocol, environment, str(error))
            return
        settings.progress(f"{target.ref.name}: open", 1, 1)
        with engine:
            session = _Session(engine, baseline, environment, protocol, settings)
            alive = True
            while waiting and alive:
                cell = waiting.pop(0)
                try:
                    result = session.run(cell, prompts)
                except TrtkitError as error:
                    settings.note(f"{cell.title}: {error}")
                    result = _lost(cell, protocol, environment, str(error))
                    alive = False
                yield cell, result
                if waiting:
                    prompts = _prompts(waiting[0], protocol)


def _prompts(cell: Cell, protocol: Protocol) -> PromptSet:
    target, workload = cell.target, cell.workload
    prompts = build_prompts(
        workload, target.plan.model, target.tokenizer_dir, repeats=protocol.repeats, warmup=warmup_count(workload)
    )
    longest = max(prompt.size for repeat in prompts.repeats for prompt in repeat)
    if longest + workload.osl > target.plan.limits.max_seq_len:
        raise InputError(
            f"{workload.dataset}: its longest prompt has {longest} tokens; with OSL {workload.osl} that exceeds "
            f"{target.ref.name}'s max_seq_len {target.plan.limits.max_seq_len}; cut the prompts with --isl"
        )
    return prompts


def warmup_count(workload: Workload) -> int:
    """At least one warm-up request for each place that will be busy."""
    return max(workload.warmup_requests, workload.concurrency or 1)


class _Session:
    """An open engine and what its cells share."""

    def __init__(
        self,
        engine: RemoteEngine,
        baseline: tuple[object, dict[int, int]] | None,
        environment: Environment,
        protocol: Protocol,
        settings: Settings,
    ) -> None:
        self._engine = engine
        self._gauge = gauge_for(engine.info, baseline)
        self._clocks = clock_gauge(baseline)
        self._environment = environment
        self._protocol = protocol
        self._settings = settings

    def run(self, cell: Cell, prompts: PromptSet) -> BenchResult:
        started = _now()
        with PeakSampler(self._gauge) as sampler, ClockSampler(self._clocks) as clocks:
            warmup, repeats = run_cell(self._engine, cell.workload, prompts, self._reporter(cell))
        method = self._gauge.method if self._gauge else "none"
        memory = split(self._engine.info, [repeat.kv for repeat in (warmup, *repeats)], sampler.peak_bytes, method)
        measured = self._measured(cell, repeats, started)
        if any(share.value > 1 for share in measured.shares.values()):
            # Beyond a limit means that the limit was measured too low: something else had the machine. Once more.
            again = best_of(self._environment.machine_limits, self._settings.remeasure(cell.target.device))
            self._environment = replace(self._environment, machine_limits=again)
            measured = self._measured(cell, repeats, started)
        reports = clocks.reports()
        checks = (*measured.checks, *engine_checks(self._engine.info.notes))
        checks = (*checks, clock_check(reports)) if reports else checks
        return judged(replace(measured, memory=memory, checks=checks), self._settings.judge)

    def _measured(self, cell: Cell, repeats: tuple[Repeat, ...], started: str) -> BenchResult:
        return assemble(cell, repeats, replace(self._environment, started_utc=started), self._protocol.name)

    def _reporter(self, cell: Cell) -> Callable[[int], None]:
        total = warmup_count(cell.workload) + self._protocol.repeats * cell.workload.num_requests
        return lambda done: self._settings.progress(cell.title, done, total)


def run_cell(
    engine: Engine, workload: Workload, prompts: PromptSet, progress: Callable[[int], None]
) -> tuple[Repeat, tuple[Repeat, ...]]:
    """Warm up in a closed loop, then each repeat with its own prompts; the first repeat records the warm-up's size.

    Returns:
        The warm-up, whose times count for nothing but whose peaks are the cell's too, and the repeats.
    """
    warm = replace(workload, request_rate=None, concurrency=workload.concurrency or 1)
    phases = [_requests("w", prompts.warmup, workload)]
    phases += [_requests(f"r{index}-", arrays, workload) for index, arrays in enumerate(prompts.repeats)]
    ended = 0

    def count(_done: int) -> None:
        nonlocal ended
        ended += 1
        progress(ended)

    warmup = run_repeat(engine, phases[0], warm, progress=count)
    repeats = [
        run_repeat(engine, requests, workload, index=index, progress=count) for index, requests in enumerate(phases[1:])
    ]
    return warmup, (replace(repeats[0], warmup_requests=len(phases[0])), *repeats[1:])


def _requests(prefix: str, prompts: Sequence[np.ndarray], workload: Workload) -> list[Request]:
    return [
        Request(
            request_id=f"{prefix}{number}",
            prompt_ids=tuple(prompt.tolist()),
            max_tokens=workload.osl,
            ignore_eos=workload.ignore_eos,
        )
        for number, prompt in enumerate(prompts)
    ]


def assemble(cell: Cell, repeats: tuple[Repeat, ...], environment: Environment, protocol: str) -> BenchResult:
    """Metrics, shares and bookkeeping checks of one cell; its memory is not known here."""
    plan = cell.target.plan
    metrics = compute_metrics(repeats, cell.workload)
    peak = max((repeat.kv.requests_peak for repeat in repeats), default=0)
    limits = environment.machine_limits
    return BenchResult(
        engine=cell.target.ref,
        workload=cell.workload,
        protocol=protocol,
        metrics=metrics,
        memory=UNKNOWN_MEMORY,
        repeats=repeats,
        environment=environment,
        checks=bookkeeping_checks(repeats, cell.workload, lowered_kv(plan, cell.workload)),
        shares=shares(
            plan, cell.workload, metrics, limits, requests_peak=peak or None, per_step=tokens_per_decode_step(repeats)
        ),
    )


def judged(result: BenchResult, judge: Judge) -> BenchResult:
    """The result with the judge's checks, and its verdict."""
    checks = (*result.checks, *judge(result))
    return replace(result, checks=checks, valid=all(check.status != FAIL for check in checks))


def _lost(cell: Cell, protocol: Protocol, environment: Environment, reason: str) -> BenchResult:
    """The record of a cell whose engine failed: nothing measured, invalid, with the reason."""
    empty = assemble(cell, (), replace(environment, started_utc=_now()), protocol.name)
    return replace(empty, checks=(Check(name=ENGINE_LOST, status=FAIL, detail=reason),), valid=False)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
