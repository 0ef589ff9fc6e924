"""Records: what a measurement leaves behind. Reports, comparisons and gates read these and nothing else.

One `BenchResult` is one cell: one engine under one `Workload`, `repeats` times. Unknown is None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trtkit.spec.engine import KVStats
from trtkit.spec.kv import KVFidelity
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.workload import Workload

BENCH_KIND = "bench"
QUALITY_KIND = "quality"
"""What the envelope of a record file calls a `BenchResult` and a `QualityResult`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat:
    """A number over repeats: `value` is the median of `repeats`, `low` and `high` its 95 % interval (None below three)."""

    value: float
    low: float | None = None
    high: float | None = None
    repeats: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One metric of one cell. `stats` has "value" for a plain number, else mean, p50, p90, p95, p99, min, max as present."""

    unit: str
    source: Source
    samples: int
    stats: Mapping[str, Stat]


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSample:
    """One measured request: times in ns since the repeat's first submit, token gaps in ns."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    submit_ns: int
    first_token_ns: int | None
    last_token_ns: int | None
    gaps_ns: tuple[int, ...] = ()
    finish: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """One pass over the workload in a warm engine, with its raw samples.

    `kv` is the block pool at its end; its counters of evictions and preemptions cover this repeat alone.
    """

    index: int
    samples: tuple[RequestSample, ...]
    kv: KVStats
    warmup_requests: int
    duration_ns: int


def tokens_per_step(repeats: Sequence[Repeat]) -> float | None:
    """Output tokens that a step gave each of its requests, on average: 1 without speculation; None if nobody tells."""
    return _per_step(repeats, sum(sample.output_tokens for repeat in repeats for sample in repeat.samples))


def tokens_per_decode_step(repeats: Sequence[Repeat]) -> float | None:
    """The same of decode steps alone: a request's first token comes from its prompt's step, which guesses nothing."""
    counts = (sample.output_tokens for repeat in repeats for sample in repeat.samples)
    return _per_step(repeats, sum(max(count - 1, 0) for count in counts))


def _per_step(repeats: Sequence[Repeat], written: int) -> float | None:
    """`written` tokens by the steps that wrote them: each accepted guess saved one."""
    told = [repeat.kv.accepted_tokens for repeat in repeats]
    accepted = [tokens for tokens in told if tokens is not None]
    if len(accepted) < len(told):
        return None
    return written / (written - sum(accepted)) if written > sum(accepted) else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySplit:
    """Peak device memory in bytes, sampled outside the process; `other` is peak - weights - KV pool.

    `peak_method` says what was sampled: "nvml" on NVIDIA, "rss" on a CPU. A cell that never ran knows none of these.
    """

    peak_bytes: int | None
    peak_method: str
    weight_bytes: int | None
    kv_pool_bytes: int | None
    kv_peak_bytes: int | None
    other_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One plausibility check: `status` is pass, warn, fail or skipped; `detail` is its arithmetic in one line."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRef:
    """Which engine was measured: its name, the bundle's digest, its plan and how closely it carries out the KV policy."""

    name: str
    digest: str
    plan: BuildPlan
    fidelity: KVFidelity
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where a record was made. `machine_limits` are measured ceilings of the device (keys: `trtkit.spec.limits`)."""

    hostname_hash: str
    platform: str
    device: str
    device_count: int
    cpu: str
    cores: int
    memory_bytes: int
    python: str
    versions: Mapping[str, str]
    trtkit_commit: str | None
    command: str
    started_utc: str
    gpu: Mapping[str, str] = field(default_factory=dict)
    machine_limits: Mapping[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """One cell. `valid` is False when a check failed; `checks` says why, and nothing is averaged away."""

    engine: EngineRef
    workload: Workload
    protocol: str
    metrics: Mapping[str, MetricResult]
    memory: MemorySplit
    repeats: tuple[Repeat, ...]
    environment: Environment
    checks: tuple[Check, ...] = ()
    valid: bool = True
    shares: Mapping[str, Measured] = field(default_factory=dict)
    """Metric key -> share of this machine's limit (1.0 is the limit), where one is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentOutcome:
    """One scored document: `document` is a stable id or hash that pairs engines, `score` in the task's metric.

    `values` are the natural-log probabilities of the choices, where the task has choices.
    """

    document: str
    group: str
    score: float
    prediction: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityResult:
    """One task on one engine. `score` is the mean over documents, `stderr` its standard error.

    `evictions` counts rounds while scoring; an evicting engine with none is marked invalid. `reference` is the other
    engine of a metric that needs two (agreement, KL).
    """

    engine: EngineRef
    task: str
    metric: str
    unit: str
    better: str
    protocol: str
    score: float
    stderr: float | None
    documents: tuple[DocumentOutcome, ...]
    evictions: int
    tokens_evicted: int
    environment: Environment
    truncated: int = 0
    valid: bool = True
    checks: tuple[Check, ...] = ()
    reference: EngineRef | None = None
