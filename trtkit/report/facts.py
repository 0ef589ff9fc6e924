"""The small print: definitions, checks, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trtkit.report.cells import condition
from trtkit.report.columns import Configuration
from trtkit.report.cost_rows import COST_KEY
from trtkit.report.model import CheckLine, Definition, Fact, Section
from trtkit.spec.codec import canonical_json, to_plain
from trtkit.spec.measured import Measured
from trtkit.spec.metrics import HIGHER, LOWER, METRICS
from trtkit.spec.result import BenchResult, Environment, QualityResult
from trtkit.spec.units import GB, format_count, format_gib

_RUN_FIELDS = ("command", "started_utc", "machine_limits", "trtkit_commit")
"""What differs from record to record of one machine."""
_OWN = (
    Definition(
        key="peak_memory",
        label="peak memory",
        unit="B",
        better=LOWER,
        formula="highest memory of the engine's process, sampled from outside (NVML on a GPU, resident set on a CPU)",
    ),
    Definition(key="memory_weights", label="weights", unit="B", better=LOWER, formula="bytes of the loaded weights"),
    Definition(
        key="memory_kv_pool",
        label="KV pool reserved",
        unit="B",
        better=LOWER,
        formula="blocks of the KV cache x bytes of a block, keys and values of all layers",
    ),
    Definition(
        key="memory_kv_peak", label="KV peak used", unit="B", better=LOWER, formula="most blocks in use at once x bytes"
    ),
    Definition(
        key="memory_other", label="other", unit="B", better=LOWER, formula="peak memory - weights - KV pool reserved"
    ),
    Definition(
        key=COST_KEY,
        label="cost per 1M output tokens",
        unit="USD/1M tokens",
        better=LOWER,
        formula="USD per hour of all devices / (TPS x 3600) x 1,000,000: every hour is bought and fully used",
    ),
)
_GENERAL = (
    Definition(
        key="share",
        label="% of limit",
        unit="share",
        better=HIGHER,
        formula="the speed of the bytes or operations that the work cannot avoid / what this machine was measured to do",
    ),
    Definition(
        key="ratio",
        label="x",
        unit="ratio",
        better="",
        formula="value / value of the first column; with ~ in front the two spreads overlap, so it may be noise",
    ),
    Definition(
        key="spread",
        label="low - high",
        unit="as the value",
        better="",
        formula="95 % interval over repeats, or min-max where there are fewer than three; ± is one standard error",
    ),
    Definition(
        key="paired",
        label="paired",
        unit="as the score's documents",
        better=HIGHER,
        formula="mean difference from the first column over the same documents, with its 95 % interval; above 0 is better",
    ),
)


def definitions(sections: Sequence[Section], found: Sequence[Configuration]) -> tuple[Definition, ...]:
    """What every quantity in these sections means, each once, in the order of the metric table."""
    used = {row.metric for section in sections for row in section.rows}
    metrics = [
        Definition(key=m.key, label=m.label, unit=m.unit, better=m.better, formula=m.formula)
        for m in METRICS.values()
        if m.key in used
    ]
    scores = {f"{q.task}.{q.metric}": _task(q) for c in found for q in c.quality}
    return (*metrics, *(d for d in _OWN if d.key in used), *(scores[k] for k in sorted(scores)), *_GENERAL)


def _task(score: QualityResult) -> Definition:
    return Definition(
        key=f"{score.task}.{score.metric}",
        label=f"{score.task} {score.metric}",
        unit=score.unit,
        better=score.better,
        formula=f"over {len(score.documents)} documents; {score.protocol}",
    )


def check_lines(found: Sequence[Configuration]) -> tuple[CheckLine, ...]:
    """Every check of every record, failed ones first."""
    order = {"fail": 0, "warn": 1, "skipped": 2, "pass": 3}
    lines = [
        CheckLine(
            column=c.column.title,
            condition=condition(record.workload) if isinstance(record, BenchResult) else f"{record.task}",
            name=check.name,
            status=check.status,
            detail=check.detail,
        )
        for c in found
        for record in c.records
        for check in record.checks
    ]
    return tuple(sorted(lines, key=lambda line: order.get(line.status, 0)))


def environment_facts(found: Sequence[Configuration]) -> tuple[tuple[Fact, ...], tuple[str, ...]]:
    """The machines the records come from, and a note where they are not one and the same."""
    machines: dict[str, tuple[Environment, dict[str, None]]] = {}
    for configuration in found:
        for record in configuration.records:
            key = _identity(record.environment)
            machines.setdefault(key, (record.environment, {}))[1][configuration.column.title] = None
    facts = []
    for index, (environment, titles) in enumerate(machines.values(), 1):
        prefix = f"machine {index}: " if len(machines) > 1 else ""
        if prefix:
            facts.append(Fact(name=f"{prefix}columns", text=", ".join(titles)))
        facts += [Fact(name=f"{prefix}{name}", text=text) for name, text in _describe(environment) if text]
    commits = {record.environment.trtkit_commit or "unknown" for c in found for record in c.records}
    facts.append(Fact(name="trtkit commit", text=", ".join(sorted(commits))))
    return (*facts, *_protocols(found)), _mixed(len(machines), len(commits))


def _mixed(machines: int, commits: int) -> tuple[str, ...]:
    """What makes the columns differ besides the engines."""
    counts = ((machines, "different environments"), (commits, "commits of trtkit"))
    return tuple(f"records come from {n} {what}; ratios compare those too" for n, what in counts if n > 1)


def _identity(environment: Environment) -> str:
    plain = to_plain(environment)
    return canonical_json({k: v for k, v in plain.items() if k not in _RUN_FIELDS})


def _describe(environment: Environment) -> list[tuple[str, str]]:
    limits = ", ".join(
        f"{name} {_rate(limit)} ({limit.source.value})" for name, limit in sorted(environment.machine_limits.items())
    )
    return [
        ("device", f"{environment.device_count} x {environment.device}"),
        ("CPU", f"{environment.cpu}, {environment.cores} cores, {format_gib(environment.memory_bytes)} memory"),
        ("GPU", _pairs(environment.gpu)),
        ("platform", environment.platform),
        ("Python", environment.python),
        ("versions", _pairs(environment.versions)),
        ("limits of this machine", limits),
        ("started", environment.started_utc),
        ("command", environment.command),
        ("host", environment.hostname_hash),
    ]


def _rate(limit: Measured) -> str:
    """A rate per second in giga-units, anything else as it is."""
    if limit.unit in ("B/s", "FLOP/s"):
        return f"{limit.value / GB:,.1f} G{limit.unit}"
    return f"{format_count(limit.value)} {limit.unit}"


def _pairs(mapping: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(mapping.items()))


def _protocols(found: Sequence[Configuration]) -> list[Fact]:
    bench = [result for c in found for result in c.bench]
    texts = {
        f"{r.protocol}: {r.workload.num_requests} requests a cell, {_warmups(r)} warm-up, {len(r.repeats)} repeats, "
        f"seed {r.workload.seed}, dataset {r.workload.dataset}"
        for r in bench
    }
    return [Fact(name="protocol", text=text) for text in sorted(texts)]


def _warmups(result: BenchResult) -> str:
    used = sorted({repeat.warmup_requests for repeat in result.repeats})
    return ", ".join(str(count) for count in used) or "no"
