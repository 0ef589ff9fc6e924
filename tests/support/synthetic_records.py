"""Made-up records of the four published configurations on an invented machine. Nothing here was measured."""

from __future__ import annotations

from dataclasses import replace

from trtkit.plan.prices import GpuPrice, OnPrem, PriceBook
from trtkit.spec.dtype import DType
from trtkit.spec.engine import KVStats
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit.spec.measured import Measured, Source
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.result import (
    BenchResult,
    Check,
    DocumentOutcome,
    EngineRef,
    Environment,
    MemorySplit,
    MetricResult,
    QualityResult,
    Repeat,
    RequestSample,
    Stat,
)
from trtkit.spec.workload import Workload

MODEL = ModelSpec(
    name="synthetic-llama",
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=256,
    max_position_embeddings=1024,
)
PRICES = PriceBook(
    gpu=(
        GpuPrice(gpu="cpu", kind="cloud", name="made-up", usd_per_gpu_h=0.1, source="assumed: made up", date="2026-01"),
    ),
    onprem=OnPrem(
        capex_usd=0.0,
        amortise_months=1,
        power_overhead=1.0,
        usd_per_kwh=0.0,
        maintenance_usd_month=0.0,
        source="assumed: made up",
        date="2026-01",
    ),
)
CONCURRENCIES = (1, 4, 8)
CONTEXTS = (64, 256)
SPEED = {"fp32": 100.0, "int8": 150.0, "fp32-h2o": 110.0, "int8-h2o": 180.0}
"""Invented tokens per second of one request, per configuration."""


def environment(*, device: str = "synthetic CPU", started_utc: str = "2026-01-02T03:04:05Z") -> Environment:
    return Environment(
        hostname_hash="0123456789ab",
        platform="Synthetic-1.0",
        device=device,
        device_count=1,
        cpu="synthetic CPU",
        cores=2,
        memory_bytes=8 << 30,
        python="3.11.0",
        versions={"trtkit": "0.0-synthetic"},
        trtkit_commit=None,
        command="synthetic",
        started_utc=started_utc,
        machine_limits={"read_bytes_s": Measured(value=1e10, unit="B/s", source=Source.MEASURED)},
    )


def engine(name: str, *, fidelity: KVFidelity = KVFidelity.EXACT, label: str = "") -> EngineRef:
    precision, _, policy = name.partition("-")
    plan = BuildPlan(
        name=name,
        model=MODEL,
        model_source="synthetic",
        gpu="cpu",
        quant=quant_for(precision, compute=DType.FP32),
        kv=parse_kv_policy("h2o:50%" if policy else "full"),
        limits=Limits(max_batch_size=16 if name == "int8-h2o" else 8, max_num_tokens=512, max_seq_len=512),
    )
    return EngineRef(name=name, digest=f"{name}-digest", plan=plan, fidelity=fidelity, label=label)


def stat(value: float, *, spread: float = 0.02) -> Stat:
    repeats = (round(value * (1 - spread), 4), round(value, 4), round(value * (1 + spread), 4))
    return Stat(value=round(value, 4), low=repeats[0], high=repeats[2], repeats=repeats)


def bench(name: str = "fp32", *, concurrency: int = 1, isl: int = 64, osl: int = 32) -> BenchResult:
    """One cell with numbers that follow from `SPEED` by a formula."""
    tps = SPEED[name] * concurrency**0.7
    tpot_ms, ttft_ms = 1000 * concurrency / tps, isl * 0.5 * concurrency * 100 / SPEED[name]
    weights = 400_000 if name.startswith("fp32") else 100_000
    pool = 1_000_000 if name.endswith("h2o") else 2_000_000
    return BenchResult(
        engine=engine(name),
        workload=Workload(isl=isl, osl=osl, num_requests=20, concurrency=concurrency),
        protocol="synthetic",
        metrics={
            "tps": MetricResult(unit="tok/s", source=Source.MEASURED, samples=20, stats={"value": stat(tps)}),
            "ttft_ms": MetricResult(
                unit="ms",
                source=Source.MEASURED,
                samples=20,
                stats={"mean": stat(ttft_ms), "p50": stat(ttft_ms), "max": stat(1.5 * ttft_ms)},
            ),
            "tpot_ms": MetricResult(unit="ms", source=Source.MEASURED, samples=20, stats={"p50": stat(tpot_ms)}),
            "tps_user": MetricResult(
                unit="tok/s", source=Source.MEASURED, samples=20, stats={"p50": stat(1000 / tpot_ms)}
            ),
        },
        memory=MemorySplit(
            peak_bytes=weights + pool + 50_000_000,
            peak_method="rss",
            weight_bytes=weights,
            kv_pool_bytes=pool,
            kv_peak_bytes=pool // 2,
            other_bytes=50_000_000,
        ),
        repeats=tuple(repeat(index, ttft_ms, tpot_ms, osl) for index in range(3)),
        environment=environment(),
        checks=(Check(name="synthetic identity", status="pass", detail="1 = 1"),),
        shares={"tps": Measured(value=round(tps / 1000, 4), unit="share", source=Source.MEASURED)},
    )


def repeat(index: int, ttft_ms: float, tpot_ms: float, osl: int) -> Repeat:
    first_ns, gap_ns = int(ttft_ms * 1e6), int(tpot_ms * 1e6)
    samples = tuple(
        RequestSample(
            request_id=f"r{i}",
            prompt_tokens=64,
            output_tokens=osl,
            submit_ns=i * 1000,
            first_token_ns=i * 1000 + first_ns + i * 10_000,
            last_token_ns=i * 1000 + first_ns + i * 10_000 + gap_ns * (osl - 1),
        )
        for i in range(20)
    )
    pool = KVStats(tokens_per_block=32, block_bytes=8192, blocks_total=64, blocks_used=0, blocks_peak=32)
    return Repeat(index=index, samples=samples, kv=pool, warmup_requests=4, duration_ns=10**9)


def quality(name: str = "fp32", *, score: float = 5.0, stderr: float | None = 0.05) -> QualityResult:
    return QualityResult(
        engine=engine(name),
        task="held-out",
        metric="perplexity",
        unit="ppl",
        better="lower",
        protocol="synthetic windows",
        score=score,
        stderr=stderr,
        documents=(
            DocumentOutcome(document="d0", group="", score=score),
            DocumentOutcome(document="d1", group="", score=score),
        ),
        evictions=0,
        tokens_evicted=0,
        environment=environment(),
    )


def invalid(result: BenchResult, detail: str = "1,800 tok/s is above the limit of 900 tok/s") -> BenchResult:
    """The same cell, failed by a check."""
    return replace(result, valid=False, checks=(Check(name="roofline", status="fail", detail=detail),))


def small_set() -> tuple[tuple[BenchResult, ...], tuple[QualityResult, ...]]:
    """Four configurations under two loads; one cell is invalid and one was not run."""
    cells, scores = full_set()
    kept = [c for c in cells if c.workload.isl == 64 and c.workload.concurrency in (1, 8)]
    gone = ("fp32-h2o", 1)
    return tuple(c for c in kept if (c.engine.name, c.workload.concurrency) != gone), scores


def full_set() -> tuple[tuple[BenchResult, ...], tuple[QualityResult, ...]]:
    """Four configurations, three concurrencies, two contexts; one cell is invalid and one was not run."""
    cells = [bench(name, concurrency=c, isl=isl) for name in SPEED for isl in CONTEXTS for c in CONCURRENCIES]
    cells = [c for c in cells if not (c.engine.name == "fp32-h2o" and c.workload == cells[5].workload)]
    cells = [invalid(c) if c.engine.name == "int8-h2o" and c.workload == cells[2].workload else c for c in cells]
    scores = {"fp32": 5.0, "int8": 5.01, "fp32-h2o": 5.4, "int8-h2o": 5.45}
    return tuple(cells), tuple(quality(name, score=score) for name, score in scores.items())
