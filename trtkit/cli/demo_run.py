"""The demonstration: build the tiny engines, measure them, score them, report. The same functions the commands call."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trtkit.backends import open_engine
from trtkit.backends.build import build_engine, engine_path
from trtkit.backends.model_source import ModelSource
from trtkit.backends.recipe import load_recipe, make_plan
from trtkit.backends.tokenizer import load_tokenizer
from trtkit.benchmark.cells import plan_cells
from trtkit.benchmark.environment import fingerprint
from trtkit.benchmark.protocol import load_protocol
from trtkit.benchmark.run import Judge, Settings, no_judge, run_bench
from trtkit.benchmark.targets import Target, open_targets
from trtkit.plan.prices import PriceBook
from trtkit.quality.heldout import TASK, HeldoutRules, default_heldout, read_windows, score_heldout
from trtkit.quality.records import QualitySource, write_quality
from trtkit.report.assemble import assemble
from trtkit.report.model import Report
from trtkit.report.records import Records
from trtkit.report.write import write
from trtkit.spec.bundle import EngineBundle, open_bundle
from trtkit.spec.codec import read_record
from trtkit.spec.engine import Scorer
from trtkit.spec.errors import (
    EngineError,
    InputError,
    MissingDependencyError,
    TrtkitError,
    UnsupportedError,
    UsageError,
)
from trtkit.spec.plan import BuildPlan
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.result import QUALITY_KIND, BenchResult, QualityResult
from trtkit.version import __version__

RECIPES = ("tiny-fp32-cpu", "tiny-int8-cpu", "tiny-fp32-h2o50-cpu", "tiny-int8-h2o50-cpu")
"""The published comparison's four configurations, in its order, on the shipped model."""
RULES = HeldoutRules(context=256, scored=64, piece=32, limit=96)
FORMATS = ("md", "html", "json")
_SCORES_PER_ENGINE = 2
_CANNOT = (UnsupportedError, MissingDependencyError, UsageError)


def _silent(_text: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Where things go and how much is done. `again` forgets engines and measurements of an earlier demonstration."""

    output_dir: Path = Path("results/demo")
    engines_dir: Path = Path("builds")
    protocol: str = "demo"
    recipes: Sequence[str] = RECIPES
    rules: HeldoutRules = RULES
    prices: PriceBook | None = None
    again: bool = False
    judge: Judge = no_judge
    progress: Progress = no_progress
    note: Callable[[str], None] = _silent


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What a demonstration left. `left_out` says which configurations are missing and why."""

    report: Report
    engines: tuple[Path, ...]
    files: tuple[Path, ...]
    left_out: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class _Built:
    bundles: list[EngineBundle] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def run_demo(settings: DemoSettings) -> Demo:
    """Do the whole job. What an earlier run finished is kept, so a killed demonstration continues.

    Raises:
        TrtkitError: not even the baseline can be built, or an output cannot be written.
    """
    started = time.monotonic()
    # A tiny model's operations are shorter than waking a second thread; the engines' processes inherit this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    built = _build(settings)
    targets = open_targets([bundle.path for bundle in built.bundles])
    settings.note(f"measuring {len(targets)} engines with protocol {settings.protocol}")
    bench = _bench(targets, settings)
    settings.note("scoring held-out text")
    quality = _score(targets, settings)
    report = assemble(
        Records(bench=bench, quality=quality),
        settings.prices,
        title="trtkit demonstration",
    )
    report = replace(report, notes=(*report.notes, *built.left_out))
    files = write(report, {settings.output_dir / f"report.{fmt}": fmt for fmt in FORMATS}, force=True)
    return Demo(
        report=report,
        engines=tuple(bundle.path for bundle in built.bundles),
        files=files,
        left_out=tuple(built.left_out),
        seconds=time.monotonic() - started,
    )


def _build(settings: DemoSettings) -> _Built:
    """Every recipe's engine; one that cannot be built here is left out with the reason, except the first."""
    built = _Built()
    for index, recipe in enumerate(settings.recipes):
        try:
            plan, source = _plan(recipe)
            built.bundles.append(_bundle(plan, source, settings))
        except _CANNOT as error:
            if index == 0:
                raise
            built.left_out.append(f"{recipe} is left out: {error}")
            settings.note(built.left_out[-1])
    return built


def _plan(recipe: str) -> tuple[BuildPlan, ModelSource]:
    """The recipe's plan; an installed package keeps the tiny model beside its held-out text."""
    options = load_recipe(recipe)
    if options.model is not None and Path(options.model).is_absolute() and not Path(options.model).is_dir():
        options = replace(options, model=str(default_heldout().parent / "model"))
    return make_plan(options)


def _bundle(plan: BuildPlan, source: ModelSource, settings: DemoSettings) -> EngineBundle:
    path = engine_path(plan, settings.engines_dir)
    if not settings.again and (finished := _finished(path, plan, source.fetch())):
        settings.note(f"{path.name} is built already")
        return finished
    settings.note(f"building {path.name}")
    return build_engine(plan, source, settings.engines_dir, progress=settings.progress, force=path.exists())


def _finished(path: Path, plan: BuildPlan, source_dir: Path) -> EngineBundle | None:
    """The engine at `path`, if this trtkit built it from this plan and the source has not changed since."""
    try:
        bundle = open_bundle(path)
    except (EngineError, InputError):
        return None
    built_ns = (path / "trtkit.json").stat().st_mtime_ns
    newest_ns = max((file.stat().st_mtime_ns for file in source_dir.iterdir()), default=0)
    same = bundle.manifest.plan == plan and bundle.manifest.versions.get("trtkit") == __version__
    return bundle if same and newest_ns <= built_ns else None


def _bench(targets: Sequence[Target], settings: DemoSettings) -> tuple[BenchResult, ...]:
    protocol = load_protocol(settings.protocol)
    if settings.again:
        for cell in plan_cells(targets, protocol, settings.output_dir):
            cell.path.unlink(missing_ok=True)
    run = run_bench(
        targets,
        protocol,
        Settings(output_dir=settings.output_dir, progress=settings.progress, note=settings.note, judge=settings.judge),
    )
    return run.results


def _score(targets: Sequence[Target], settings: DemoSettings) -> tuple[QualityResult, ...]:
    """Held-out text on every engine; an engine that fails is said and has no score."""
    scores: list[QualityResult] = []
    for target in targets:
        kept = () if settings.again else _scored(target, settings)
        try:
            scores += kept or _score_one(target, settings)
        except TrtkitError as error:
            settings.note(f"{target.ref.name} has no score: {error}")
    return tuple(scores)


def _scored(target: Target, settings: DemoSettings) -> tuple[QualityResult, ...]:
    """What an earlier run scored on this very engine by the same rules."""
    found = []
    for path in sorted(settings.output_dir.glob(f"quality-{target.ref.name}-{TASK}-*.json")):
        try:
            record = read_record(path, QUALITY_KIND, QualityResult)
        except TrtkitError:
            continue
        if (record.engine, record.protocol) == (target.ref, settings.rules.protocol):
            found.append(record)
    return tuple(found) if len(found) == _SCORES_PER_ENGINE else ()


def _score_one(target: Target, settings: DemoSettings) -> tuple[QualityResult, ...]:
    windows = read_windows(load_tokenizer(target.bundle.tokenizer_dir), settings.rules)
    source = QualitySource(engine=target.ref, environment=fingerprint(device=target.device, command=sys.argv))
    with open_engine(target.path, isolated=True) as engine:
        if not isinstance(engine, Scorer):
            raise UnsupportedError(f"{target.ref.name} cannot score text")
        scores = score_heldout(
            engine, engine.info, windows, source, rules=settings.rules, progress=_named(target, settings.progress)
        )
    records = (scores.perplexity, scores.accuracy)
    for record in records:
        write_quality(settings.output_dir, record)
    return records


def _named(target: Target, progress: Progress) -> Progress:
    """One bar per engine."""
    return lambda phase, done, total: progress(f"{target.ref.name}: {phase}", done, total)
