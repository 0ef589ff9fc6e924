"""`trtkit eval`: engines in, quality records on disk out; finished documents survive an interruption."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trtkit.backends import open_engine
from trtkit.backends.tokenizer import Tokenizer, load_tokenizer
from trtkit.quality.heldout import HeldoutRules, read_windows, score_heldout
from trtkit.quality.journal import Journal
from trtkit.quality.local_tasks import prepare_tasks
from trtkit.quality.own_prompts import PromptRun, answer_prompts, drift_records, teach
from trtkit.quality.prompts import PromptSet
from trtkit.quality.records import QualitySource, engine_ref, write_quality
from trtkit.quality.scoring import ContinuationScorer
from trtkit.quality.tasks import TaskSelection, run_tasks
from trtkit.spec.bundle import EngineBundle, open_bundle
from trtkit.spec.engine import Engine, Scorer
from trtkit.spec.errors import InputError, UnsupportedError, UsageError
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.result import Environment, QualityResult

SHIPPED_TEXT = "shipped"
Opener = Callable[[Path], Engine]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRequest:
    """What to evaluate. `output_dir` receives the records and, under `journal/`, every finished document."""

    engines: tuple[Path, ...]
    output_dir: Path
    tasks: TaskSelection | None = None
    prompts: PromptSet | None = None
    max_tokens: int = 128
    text: Path | None = None
    text_windows: int = 0
    reference: Path | None = None
    sheet: Path | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if not self.engines:
            raise UsageError("no engine given; name some, e.g. builds/*.engine")
        if self.tasks is None and self.prompts is None and self.text is None:
            raise UsageError("nothing to evaluate; give --tasks, --prompts or --text")
        if self.prompts is None and (self.reference is not None or self.sheet is not None):
            raise UsageError("--reference and --sheet compare answers to your prompts; give --prompts too")
        if self.sheet is not None and self.reference is None:
            raise UsageError("a side-by-side sheet needs two engines; give the other one with --reference")
        if self.sheet is not None and len(self.engines) != 1:
            raise UsageError(
                f"a side-by-side sheet compares one engine with the reference, {len(self.engines)} are given"
            )
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens is {self.max_tokens}, must be at least 1")

    @property
    def device(self) -> str:
        """What the engines run on, "cpu" or "cuda", by their plans."""
        return "cpu" if all(open_bundle(path).manifest.plan.gpu == "cpu" for path in self.engines) else "cuda"


def isolated(path: Path) -> Engine:
    """A fresh child process per engine."""
    return open_engine(path, isolated=True)


def evaluate(
    request: EvalRequest, environment: Environment, *, opener: Opener = isolated, progress: Progress = no_progress
) -> list[QualityResult]:
    """Evaluate every engine in turn, write each record as it is finished, and return them.

    Raises:
        TrtkitError: what was asked cannot be done; records of engines before it are kept.
    """
    bundles = [_with_weights(open_bundle(path)) for path in request.engines]
    tokenizers = {bundle.path: _tokenizer(bundle) for bundle in bundles}
    teacher = None
    if request.reference is not None and request.prompts is not None:
        teacher = _teacher(request, environment, opener, progress, tokenizers)
    records: list[QualityResult] = []
    with _prepared(request.tasks) as tasks:
        for bundle in bundles:
            with _opened(bundle, request, environment, opener, progress) as run:
                records += _one(run, tokenizers[bundle.path], request, tasks, teacher)
    return records


@contextmanager
def _prepared(tasks: TaskSelection | None) -> Iterator[TaskSelection | None]:
    """The selection with its directory turned into lm-eval's task files."""
    if tasks is None or tasks.directory is None:
        yield tasks
        return
    with tempfile.TemporaryDirectory(prefix="trtkit-tasks-") as temporary:
        yield tasks.with_directory(prepare_tasks(tasks.directory, Path(temporary) / "tasks"))


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """An open engine with everything its records need."""

    engine: Engine
    source: QualitySource
    scoring: ContinuationScorer


@contextmanager
def _opened(
    bundle: EngineBundle, request: EvalRequest, environment: Environment, opener: Opener, progress: Progress
) -> Iterator[OpenRun]:
    source = QualitySource(engine=engine_ref(bundle, request.label), environment=environment)
    path = request.output_dir / "journal" / f"{bundle.name}-{bundle.manifest.digest}.jsonl"
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(path))
        engine = stack.enter_context(opener(bundle.path))
        if not isinstance(engine, Scorer):
            raise UnsupportedError(f"{bundle.path}: this engine gives no log-probabilities, so it cannot be scored")
        scoring = ContinuationScorer(
            scorer=engine,
            info=engine.info,
            journal=journal,
            engine_digest=source.journal_digest(engine.info),
            progress=lambda phase, done, total: progress(f"{bundle.name}: {phase}", done, total),
        )
        yield OpenRun(engine=engine, source=source, scoring=scoring)


def _with_weights(bundle: EngineBundle) -> EngineBundle:
    """The bundle, if its answers mean anything."""
    if bundle.manifest.plan.load_format == "dummy":
        raise UnsupportedError(
            f"{bundle.path}: its weights are random (load format dummy), so there is no quality to judge; build it from a model"
        )
    return bundle


def _tokenizer(bundle: EngineBundle) -> Tokenizer:
    try:
        return load_tokenizer(bundle.tokenizer_dir)
    except InputError as error:
        raise InputError(f"{bundle.path}: quality needs the model's tokenizer: {error}") from None


def _teacher(
    request: EvalRequest,
    environment: Environment,
    opener: Opener,
    progress: Progress,
    tokenizers: dict[Path, Tokenizer],
) -> PromptRun:
    """The reference engine's answers and its distributions along them."""
    assert request.reference is not None
    assert request.prompts is not None
    bundle = _with_weights(open_bundle(request.reference))
    tokenizer = _tokenizer(bundle)
    for path, other in tokenizers.items():
        _same_vocabulary(bundle.path, tokenizer, path, other)
    with _opened(bundle, request, environment, opener, progress) as run:
        return teach(run.engine, run.scoring, run.source, tokenizer, request.prompts, request.max_tokens)


def _same_vocabulary(path: Path, tokenizer: Tokenizer, other_path: Path, other: Tokenizer) -> None:
    probe = "The quick brown fox, 1234567890: def main(): return {'a': [1, 2]}\n\tÄ€漢字"
    same = tokenizer.encode(probe, add_special_tokens=True) == other.encode(probe, add_special_tokens=True)
    if tokenizer.vocab_size != other.vocab_size or not same:
        raise UsageError(
            f"{other_path} and {path} have different vocabularies ({other.vocab_size} and {tokenizer.vocab_size} tokens), "
            "so their next-token distributions cannot be compared; leave out --reference"
        )


def _one(
    run: OpenRun,
    tokenizer: Tokenizer,
    request: EvalRequest,
    tasks: TaskSelection | None,
    teacher: PromptRun | None,
) -> list[QualityResult]:
    records: list[QualityResult] = []
    if tasks is not None:
        records += run_tasks(
            run.engine, tokenizer, run.source, tasks, journal=run.scoring.journal, progress=run.scoring.progress
        )
    if request.text is not None:
        records += _heldout(run, tokenizer, request.text, request.text_windows)
    if request.prompts is not None:
        answers = answer_prompts(run.engine, run.scoring, run.source, tokenizer, request.prompts, request.max_tokens)
        records += answers.records
        if teacher is not None:
            records += drift_records(run.scoring, run.source, request.prompts, teacher)
        if teacher is not None and request.sheet is not None:
            _write_sheet(request.sheet, request.prompts, teacher, answers)
    for record in records:
        write_quality(request.output_dir, record)
    return records


def _heldout(run: OpenRun, tokenizer: Tokenizer, text: Path, limit: int) -> list[QualityResult]:
    """Perplexity and next-token accuracy on a text; "shipped" is the project's own."""
    rules = HeldoutRules(limit=limit)
    windows = read_windows(tokenizer, rules, None if str(text) == SHIPPED_TEXT else text)
    scores = score_heldout(
        run.scoring.scorer, run.scoring.info, windows, run.source, rules=rules, progress=run.scoring.progress
    )
    return [scores.perplexity, scores.accuracy]


def _write_sheet(path: Path, prompts: PromptSet, teacher: PromptRun, answers: PromptRun) -> None:
    from trtkit.quality.sheet import write_sheet

    write_sheet(path, prompts, teacher, answers)


def expand_engines(patterns: Sequence[Path]) -> tuple[Path, ...]:
    """The directories named; a shell has expanded wildcards already, so each must exist.

    Raises:
        UsageError: one is named twice.
    """
    resolved = [path.resolve() for path in patterns]
    for path in patterns:
        if resolved.count(path.resolve()) > 1:
            raise UsageError(f"{path} is given twice")
    return tuple(patterns)
