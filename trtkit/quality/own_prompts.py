"""A team's prompts on an engine: graded answers, their length, and the drift from a reference engine."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.backends.tokenizer import Tokenizer
from trtkit.quality.drift import Forced, agreement, force, mean_kl
from trtkit.quality.generation import Generated, Job, generate_texts
from trtkit.quality.prompts import PromptSet, encoded, grade_answers
from trtkit.quality.records import MetricSpec, QualitySource, eviction_check, quality_result
from trtkit.quality.scoring import ContinuationScorer, ScoringCounts
from trtkit.spec.engine import Engine
from trtkit.spec.errors import MeasurementError
from trtkit.spec.result import Check, DocumentOutcome, EngineRef, QualityResult

_CHECK_UNIT = "fraction"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRun:
    """One engine's answers; `forced` are its distributions along them where it is the reference."""

    engine: EngineRef
    prompt_ids: tuple[tuple[int, ...], ...]
    answers: tuple[Generated, ...]
    forced: tuple[Forced, ...] = ()
    records: tuple[QualityResult, ...] = ()


def answer_prompts(
    engine: Engine,
    scoring: ContinuationScorer,
    source: QualitySource,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    max_tokens: int,
) -> PromptRun:
    """Answer every prompt greedily; records: one per check, and the answers' length in tokens."""
    ids = encoded(prompts, tokenizer, engine.info.max_seq_len, max_tokens)
    stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    jobs = [
        Job(prompt_ids=tokens, max_tokens=prompt.max_tokens or max_tokens, stop_ids=stops)
        for prompt, tokens in zip(prompts.prompts, ids, strict=True)
    ]
    scoring.counts = ScoringCounts(contexts=len(jobs))
    answers = generate_texts(engine, tokenizer, jobs, scoring)
    checks = eviction_check(scoring.info, scoring.counts)
    records = _answer_records(source, prompts, answers, (scoring.counts, checks), max_tokens)
    return PromptRun(engine=source.engine, prompt_ids=tuple(ids), answers=tuple(answers), records=records)


def _answer_records(
    source: QualitySource,
    prompts: PromptSet,
    answers: list[Generated],
    counted: tuple[ScoringCounts, tuple[Check, ...]],
    max_tokens: int,
) -> tuple[QualityResult, ...]:
    counts, checks = counted
    protocol = f"{prompts.protocol}, up to {max_tokens} tokens"
    records = []
    for check, outcomes in grade_answers(prompts.prompts, answers).items():
        spec = MetricSpec(task=prompts.name, metric=check, unit=_CHECK_UNIT, protocol=protocol)
        records.append(quality_result(source, spec, outcomes, counts=counts, checks=checks))
    lengths = [
        DocumentOutcome(document=p.id, group=p.group, score=float(len(a.token_ids)), prediction=a.text)
        for p, a in zip(prompts.prompts, answers, strict=True)
    ]
    spec = MetricSpec(task=prompts.name, metric="generated_tokens", unit="tokens", protocol=protocol, better="neither")
    records.append(quality_result(source, spec, lengths, counts=counts, checks=checks))
    return tuple(records)


def teach(
    engine: Engine,
    scoring: ContinuationScorer,
    source: QualitySource,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    max_tokens: int,
) -> PromptRun:
    """The reference's answers with its own next-token distributions along them."""
    run = answer_prompts(engine, scoring, source, tokenizer, prompts, max_tokens)
    pairs = [(p, a.token_ids) for p, a in zip(run.prompt_ids, run.answers, strict=True)]
    if not all(continuation for _, continuation in pairs):
        raise MeasurementError(f"{source.engine.name}: the reference engine answered a prompt with no token at all")
    forced = force(scoring, pairs)
    return PromptRun(engine=run.engine, prompt_ids=run.prompt_ids, answers=run.answers, forced=tuple(forced))


def drift_records(
    scoring: ContinuationScorer, source: QualitySource, prompts: PromptSet, teacher: PromptRun
) -> tuple[QualityResult, ...]:
    """Agreement and KL against the reference along its answers, and the loss on them, document by document."""
    pairs = [(p, a.token_ids) for p, a in zip(teacher.prompt_ids, teacher.answers, strict=True)]
    scoring.counts = ScoringCounts()
    forced = force(scoring, pairs)
    checks = (*eviction_check(scoring.info, scoring.counts), _mass_check(teacher, forced))
    values = {
        ("agreement", "fraction", "higher"): [agreement(a, b) for a, b in zip(teacher.forced, forced, strict=True)],
        ("kl", "nats", "lower"): [mean_kl(a, b) for a, b in zip(teacher.forced, forced, strict=True)],
        ("nll", "nats/token", "lower"): [-sum(f.logprobs) / len(f.logprobs) for f in forced],
    }
    records = []
    for (metric, unit, better), scores in values.items():
        spec = MetricSpec(
            task=prompts.name,
            metric=metric,
            unit=unit,
            better=better,
            protocol=f"{prompts.protocol}; teacher-forced on {teacher.engine.name} ({teacher.engine.digest})",
            reference=teacher.engine,
        )
        documents = [
            DocumentOutcome(document=prompt.id, group=prompt.group, score=score)
            for prompt, score in zip(prompts.prompts, scores, strict=True)
        ]
        records.append(quality_result(source, spec, documents, counts=scoring.counts, checks=checks))
    return tuple(records)


def _mass_check(teacher: PromptRun, forced: list[Forced]) -> Check:
    """How much of the vocabulary the KL bound sees."""
    positions = sum(len(f.top) for f in forced)
    seen = len(teacher.forced[0].top[0]) if teacher.forced else 0
    detail = f"KL is a lower bound from the best {seen} tokens of each engine at {positions} positions"
    return Check(name="kl bound", status="pass", detail=detail)
