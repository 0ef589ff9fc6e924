"""What to rent for a traffic: every GPU, rank count, precision and KV budget, ranked by cost, and why others lost."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trtkit.plan.ask import LoadPoint, scenario_at
from trtkit.plan.cost import monthly_capacity
from trtkit.plan.forecast import Answer, answers
from trtkit.plan.levers import advice, levers
from trtkit.plan.memory import Placement, plan_memory
from trtkit.plan.names import Precision, precision_from
from trtkit.plan.options import Option, Rejected, SearchResult, Wanted
from trtkit.plan.prices import GpuPrice, PriceBook
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.gpu import GpuSpec
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits, Parallelism
from trtkit.spec.units import HOURS_PER_MONTH, MILLION

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same module under its older name
    import tomli as tomllib

PRECISIONS = ("fp16", "fp8", "int8", "int8-sq", "int4-awq")
POLICIES = ("full", "h2o:70%", "h2o:50%")
RANKS = (1, 2, 4, 8)
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TAIL = 1.75
"""p99 over mean of TTFT under server load: MLPerf Llama 2 70B on 8xH100 and 8xH200, 1.67 and 1.82."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    gpu: GpuSpec
    price: GpuPrice
    tp: int
    precision: Precision
    kv: str

    @property
    def label(self) -> str:
        return f"{self.gpu.name}, TP{self.tp}, {self.precision.name}, KV {self.kv}"


@cache
def quality_costs() -> dict[str, dict[str, dict[str, object]]]:
    """Expected MMLU points per precision and KV budget, with sources."""
    path = Path(__file__).with_name("quality.toml")
    loaded: dict[str, dict[str, dict[str, object]]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return loaded


def mmlu_drop(precision: str, kv: str) -> float:
    """Expected loss of a precision and a KV budget together, in points; losses are taken to add up."""
    costs = quality_costs()
    return float(str(costs["precision"][precision]["points"])) + float(str(costs["kv"][kv]["points"]))


def search(wanted: Wanted, book: PriceBook) -> SearchResult:
    """Rank everything the catalog and the price book allow.

    Raises:
        UsageError: a named GPU is not in the catalog.
    """
    candidates, rejected = _candidates(wanted, book)
    options: list[Option] = []
    points = [LoadPoint(isl=wanted.isl, osl=wanted.osl, concurrency=c) for c in CONCURRENCIES]
    scenarios = [
        scenario_at(_placement(wanted, each), each.precision, point) for each in candidates for point in points
    ]
    found = answers(scenarios) if scenarios else []
    for index, candidate in enumerate(candidates):
        own = found[index * len(points) : (index + 1) * len(points)]
        outcome = _best(wanted, candidate, own)
        if isinstance(outcome, Option):
            options.append(outcome)
        else:
            rejected.append(outcome)
    options.sort(key=lambda option: (option.usd_per_month, option.num_gpus, option.mmlu_drop, option.label))
    return SearchResult(
        options=tuple(options),
        rejected=tuple(rejected),
        levers=tuple(levers(options)),
        advice=tuple(advice(wanted, options)),
    )


def _candidates(wanted: Wanted, book: PriceBook) -> tuple[list[_Candidate], list[Rejected]]:
    kept: list[_Candidate] = []
    rejected: list[Rejected] = []
    names = wanted.gpus or tuple(dict.fromkeys(price.gpu for price in book.gpu if price.gpu != "cpu"))
    for name in names:
        gpu = gpu_spec(name)
        price = book.find(gpu.name)
        if price is None:
            rejected.append(Rejected(label=gpu.name, reason="no price; add one with --prices"))
            continue
        for precision in (precision_from(p) for p in PRECISIONS):
            for tp in RANKS:
                for kv in POLICIES:
                    candidate = _Candidate(gpu=gpu, price=price, tp=tp, precision=precision, kv=kv)
                    reason = _why_not(wanted, candidate)
                    if reason:
                        rejected.append(Rejected(label=candidate.label, reason=reason))
                    else:
                        kept.append(candidate)
    return kept, rejected


def _why_not(wanted: Wanted, candidate: _Candidate) -> str:
    """What rules a candidate out before any forecast."""
    try:
        candidate.precision.gemm_flops_s(candidate.gpu)
    except UnsupportedError as error:
        return str(error)
    heads = wanted.model.num_heads
    if heads % candidate.tp or (wanted.model.num_kv_heads % candidate.tp and candidate.tp % wanted.model.num_kv_heads):
        return f"TP{candidate.tp} does not divide the heads"
    drop = mmlu_drop(candidate.precision.name, candidate.kv)
    if wanted.max_mmlu_drop is not None and drop > wanted.max_mmlu_drop:
        return f"expected MMLU loss {drop:.2f} points, at most {wanted.max_mmlu_drop:g} wanted"
    memory = plan_memory(_placement(wanted, candidate), sequence_tokens=wanted.isl + wanted.osl)
    if not memory.fits:
        return f"does not fit by {memory.missing_bytes / 2**30:.1f} GiB per GPU"
    return ""


def _placement(wanted: Wanted, candidate: _Candidate) -> Placement:
    length = wanted.isl + wanted.osl
    return Placement(
        model=wanted.model,
        gpu=candidate.gpu,
        quant=candidate.precision.quant,
        policy=parse_kv_policy(candidate.kv),
        parallel=Parallelism(tp=candidate.tp),
        limits=Limits(max_batch_size=CONCURRENCIES[-1], max_num_tokens=8192, max_seq_len=length),
    )


def _best(wanted: Wanted, candidate: _Candidate, found: Sequence[Answer]) -> Option | Rejected:
    """The concurrency with the most throughput that keeps the limits, and the replicas that the traffic needs."""
    closest = ""
    best: Option | None = None
    for concurrency, answer in zip(CONCURRENCIES, found, strict=True):
        forecast = answer.forecast
        if forecast is None:
            return Rejected(label=candidate.label, reason=answer.reason)
        p99 = forecast.ttft_ms.value * TAIL
        if wanted.ttft_p99_ms is not None and p99 > wanted.ttft_p99_ms:
            closest = closest or f"TTFT p99 {p99:,.0f} ms at {concurrency} in flight, {wanted.ttft_p99_ms:g} wanted"
            continue
        if wanted.tpot_ms is not None and forecast.tpot_ms.value > wanted.tpot_ms:
            closest = closest or f"TPOT {forecast.tpot_ms.value:.1f} ms at {concurrency}, {wanted.tpot_ms:g} wanted"
            continue
        if best is None or forecast.tok_s.value > best.tok_s:
            best = _option(wanted, candidate, concurrency, answer)
    return best or Rejected(label=candidate.label, reason=closest)


def _option(wanted: Wanted, candidate: _Candidate, concurrency: int, answer: Answer) -> Option:
    assert answer.forecast is not None
    tok_s = answer.forecast.tok_s.value
    replicas = max(1, math.ceil(wanted.tokens_per_month / monthly_capacity(tok_s)))
    month = candidate.price.usd_per_gpu_h * candidate.tp * replicas * HOURS_PER_MONTH
    return Option(
        gpu=candidate.gpu.name,
        tp=candidate.tp,
        precision=candidate.precision.name,
        kv=candidate.kv,
        replicas=replicas,
        concurrency=concurrency,
        usd_per_month=month,
        usd_per_million=month / wanted.tokens_per_month * MILLION,
        tok_s=tok_s,
        ttft_p99_ms=answer.forecast.ttft_ms.value * TAIL,
        tpot_ms=answer.forecast.tpot_ms.value,
        mmlu_drop=mmlu_drop(candidate.precision.name, candidate.kv),
        utilisation=wanted.tokens_per_month / (monthly_capacity(tok_s) * replicas),
        basis=answer.forecast.tok_s.note,
    )


def pareto(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in both monthly cost and time per token."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.usd_per_month, o.tpot_ms)):
        if not front or option.tpot_ms < front[-1].tpot_ms:
            front.append(option)
    return front
