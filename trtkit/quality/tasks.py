"""lm-evaluation-harness tasks on an engine, as `QualityResult` records with every document's outcome."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trtkit.backends.tokenizer import Tokenizer
from trtkit.quality.journal import Journal
from trtkit.quality.records import MetricSpec, QualitySource, eviction_check, quality_result
from trtkit.quality.scoring import ContinuationScorer, ScoringRules
from trtkit.quality.selftest import check_alignment
from trtkit.spec.engine import Engine, Scorer
from trtkit.spec.errors import InputError, MissingDependencyError, UnsupportedError, UsageError
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.result import Check, DocumentOutcome, QualityResult

GOLD_METRIC = "gold_logprob"
_LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
_BOOTSTRAPS = 100
"""Any positive number gives lm-eval's closed-form standard errors; only a few metrics are bootstrapped at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSelection:
    """Which tasks, and how: `limit` takes the first documents of every subject, the same for every engine."""

    names: tuple[str, ...]
    directory: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    rules: ScoringRules = field(default_factory=ScoringRules)

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("no task given; name some with --tasks, e.g. --tasks mmlu")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"--num-fewshot is {self.num_fewshot}, must not be negative")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}, must be at least 1")

    def with_directory(self, directory: Path) -> TaskSelection:
        """The same tasks, their files elsewhere."""
        return replace(self, directory=directory)

    @property
    def protocol(self) -> str:
        """One line that two records must share to be compared."""
        shots = "the task's own" if self.num_fewshot is None else str(self.num_fewshot)
        chat = "; chat template" if self.apply_chat_template else ""
        limit = f"; first {self.limit} of each" if self.limit is not None else ""
        return f"lm-eval; few-shot: {shots}; evict after: {self.rules.evict_after}{chat}{limit}"


def run_tasks(
    engine: Engine,
    tokenizer: Tokenizer,
    source: QualitySource,
    selection: TaskSelection,
    *,
    journal: Journal | None = None,
    progress: Progress = no_progress,
) -> tuple[QualityResult, ...]:
    """Run lm-eval tasks and return one record per task or group and metric.

    Raises:
        UsageError: a task is unknown (near misses are named), or contexts would be truncated.
        UnsupportedError: the engine cannot score.
        MissingDependencyError: lm-eval is not installed.
        MeasurementError: the engine's log-probabilities fail the self-test.
    """
    if not isinstance(engine, Scorer):
        raise UnsupportedError("this engine gives no log-probabilities, so tasks cannot be scored on it")
    manager = _task_manager(selection)
    journal = journal or Journal()
    records: list[QualityResult] = []
    for name in selection.names:
        scoring = ContinuationScorer(
            scorer=engine,
            info=engine.info,
            rules=selection.rules,
            journal=journal,
            engine_digest=source.journal_digest(engine.info),
            progress=progress,
        )
        one = replace(selection, names=(name,))
        records += _run_one((engine, tokenizer), source, one, manager, scoring)
    return tuple(records)


def _run_one(
    run: tuple[Engine, Tokenizer],
    source: QualitySource,
    selection: TaskSelection,
    manager: Any,  # noqa: ANN401 - lm-eval's type
    scoring: ContinuationScorer,
) -> tuple[QualityResult, ...]:
    """One task or group, with counts of its own: each must show that eviction acted on it."""
    from trtkit.quality.lm_eval_model import EngineLM

    engine, tokenizer = run
    lm = EngineLM(
        engine,
        scoring,
        tokenizer,
        question_of=functools.partial(_question, manager),
        self_test=functools.partial(check_alignment, engine, scoring.scorer),
    )
    results = _evaluate(lm, manager, selection)
    return _records(results, source, selection, scoring, lm.checks)


def _task_manager(selection: TaskSelection) -> Any:  # noqa: ANN401 - lm-eval's type
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingDependencyError("tasks need lm-eval; install it with `pip install trtkit[eval]`") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    class Remembering(TaskManager):  # type: ignore[misc]
        """Keeps the tasks it loaded, so that a request's own question can be told from the worked examples."""

        tasks_by_name: Mapping[str, Any] = {}

        def load(self, specs: Any) -> Any:  # noqa: ANN401
            loaded = super().load(specs)
            self.tasks_by_name = loaded["tasks"]
            return loaded

    _quiet_downloads()
    directory = selection.directory
    if directory is not None and not directory.is_dir():
        raise InputError(f"{directory}: no such directory of tasks")
    include = None if directory is None else str(directory)
    manager = Remembering(include_path=include, include_defaults=directory is None)
    known = manager.all_tasks
    for name in selection.names:
        if name not in known and "*" not in name:
            near = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"did you mean {', '.join(near)}?"
                if near
                else f"{len(known)} tasks are known in {include or 'lm-eval'}"
            )
            raise UsageError(f"unknown task {name!r}: {hint}")
    return manager


def _quiet_downloads() -> None:
    """No bar per split of every subject: our own progress says how far it is."""
    importlib.import_module("datasets").disable_progress_bars()


def _question(manager: Any, request: Any) -> str | None:  # noqa: ANN401
    """The text of a request's own question, where the task can say it."""
    task = manager.tasks_by_name.get(request.task_name)
    if task is None:
        return None
    text = task.doc_to_text(request.doc)
    return text if isinstance(text, str) and text else None


def _evaluate(lm: Any, manager: Any, selection: TaskSelection) -> Mapping[str, Any]:  # noqa: ANN401
    from lm_eval import simple_evaluate

    try:
        results = simple_evaluate(
            model=lm,
            tasks=list(selection.names),
            num_fewshot=selection.num_fewshot,
            limit=selection.limit,
            bootstrap_iters=_BOOTSTRAPS,
            apply_chat_template=selection.apply_chat_template,
            task_manager=manager,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise InputError(
            f"the data of {', '.join(selection.names)} cannot be loaded ({str(error).splitlines()[0][:200]}); "
            "without a hub, give local tasks with --tasks-dir"
        ) from error
    assert results is not None, "only rank 0 runs here"
    return dict(results)


def _records(
    results: Mapping[str, Any],
    source: QualitySource,
    selection: TaskSelection,
    scoring: ContinuationScorer,
    checks: Sequence[Check],
) -> tuple[QualityResult, ...]:
    """One record per top-level task and metric, its documents grouped by subject."""
    counts = scoring.counts
    checks = [*checks, *eviction_check(scoring.info, counts), _resumed(counts.resumed, counts.contexts)]
    records = []
    for name, leaves in _leaves(results).items():
        for metric, documents in _documents(results, leaves).items():
            spec = MetricSpec(
                task=name,
                metric=metric.removesuffix(",none"),
                unit=_unit(metric),
                better="lower" if metric.split(",")[0] in _LOWER_IS_BETTER else "higher",
                protocol=f"{selection.protocol}; lm-eval {results.get('lm_eval_version', '')}",
            )
            aggregate = _aggregate(results, name, metric)
            records.append(quality_result(source, spec, documents, counts=counts, checks=checks, aggregate=aggregate))
    return tuple(records)


def _resumed(resumed: int, contexts: int) -> Check:
    return Check(name="resumed", status="pass", detail=f"{resumed} of {contexts} contexts were finished before")


def _leaves(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Asked task or outermost group -> the leaf tasks below it."""
    groups: Mapping[str, Sequence[str]] = {k: v for k, v in results.get("group_subtasks", {}).items() if v}
    inner = {child for children in groups.values() for child in children}

    def expand(name: str) -> list[str]:
        children = groups.get(name)
        return [name] if not children else [leaf for child in children for leaf in expand(child)]

    tops = [name for name in (*groups, *results["samples"]) if name not in inner]
    return {name: sorted(set(expand(name)) & set(results["samples"])) for name in dict.fromkeys(tops)}


def _documents(results: Mapping[str, Any], leaves: Sequence[str]) -> dict[str, list[DocumentOutcome]]:
    """Metric key ("acc,none") -> outcomes over all leaves, in a stable order."""
    documents: dict[str, list[DocumentOutcome]] = {}
    for leaf in leaves:
        for sample in sorted(results["samples"][leaf], key=lambda s: s["doc_id"]):
            identity = f"{leaf}/{sample['doc_id']}/{sample['doc_hash'][:12]}"
            values = _choice_logprobs(sample)
            prediction = _prediction(sample, values)
            for metric in sample["metrics"]:
                score = _number(sample[metric])
                if score is not None:
                    outcome = DocumentOutcome(
                        document=identity, group=leaf, score=score, prediction=prediction, values=values
                    )
                    documents.setdefault(f"{metric},{sample['filter']}", []).append(outcome)
            gold = sample["target"]
            if values and isinstance(gold, int) and 0 <= gold < len(values):
                score = values[gold] - _log_sum(values)
                outcome = DocumentOutcome(document=identity, group=leaf, score=score, prediction=prediction)
                documents.setdefault(f"{GOLD_METRIC},{sample['filter']}", []).append(outcome)
    return documents


def _choice_logprobs(sample: Mapping[str, Any]) -> tuple[float, ...]:
    """The log-probability of each choice, where the task scores choices."""
    responses = sample["filtered_resps"]
    if len(responses) > 1 and all(isinstance(r, (tuple, list)) and len(r) == 2 for r in responses):
        return tuple(float(r[0]) for r in responses)
    return ()


def _prediction(sample: Mapping[str, Any], values: Sequence[float]) -> str:
    if values:
        return str(max(range(len(values)), key=values.__getitem__))
    first = sample["filtered_resps"][0]
    return first if isinstance(first, str) else ""


def _number(value: object) -> float | None:
    """A document's score as one number; lm-eval's pairs are (log-likelihood, weight) or (gold, prediction)."""
    if isinstance(value, (bool, int, float)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        first, second = value
        if isinstance(first, float) and isinstance(second, (int, float)) and second:
            return -first / second
        if isinstance(first, (int, str)):
            return float(first == second)
    return None


def _log_sum(values: Sequence[float]) -> float:
    peak = max(values)
    return peak + math.log(math.fsum(math.exp(v - peak) for v in values))


def _aggregate(results: Mapping[str, Any], name: str, metric: str) -> tuple[float | None, float | None]:
    """lm-eval's own score and standard error, None where it has none (then the mean over documents counts)."""
    row: Mapping[str, Any] = results["results"].get(name, {})
    metric_name, _, filter_name = metric.partition(",")
    score, stderr = (row.get(key) for key in (metric, f"{metric_name}_stderr,{filter_name}"))
    return (
        None if score is None or isinstance(score, str) else float(score),
        None if stderr is None or isinstance(stderr, str) else float(stderr),
    )


def _unit(metric: str) -> str:
    name = metric.split(",")[0]
    if name == GOLD_METRIC:
        return "nats"
    return "bits/byte" if name == "bits_per_byte" else "ppl" if name in _LOWER_IS_BETTER else "fraction"
