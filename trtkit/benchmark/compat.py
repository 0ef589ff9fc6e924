"""A cell as the flat keys that `vllm bench serve --save-result` writes, which most dashboards already read."""

from __future__ import annotations

import numpy as np

from trtkit.benchmark.metrics import completed, samples_of
from trtkit.spec.metrics import MIN_SAMPLES, PERCENTILES
from trtkit.spec.result import BenchResult, Stat

_LATENCIES = {"ttft": "ttft_ms", "tpot": "tpot_ms", "itl": "itl_ms", "e2el": "e2e_ms"}
_RATES = {
    "request_throughput": "requests_s",
    "request_goodput": "goodput_s",
    "output_throughput": "tps",
    "total_token_throughput": "total_tps",
}


def vllm_view(result: BenchResult) -> dict[str, object]:
    """Flat keys of one cell, all repeats pooled (rates: median of the repeats). Unknown is None."""
    samples = [sample for repeat in result.repeats for sample in repeat.samples]
    done = completed(samples)
    view: dict[str, object] = {
        "date": result.environment.started_utc,
        "backend": f"trtkit-{result.engine.plan.target}",
        "model_id": result.engine.plan.model.name,
        "tokenizer_id": result.engine.plan.model_source,
        "label": result.engine.label or result.engine.name,
        "num_prompts": len(samples),
        "request_rate": result.workload.request_rate if result.workload.request_rate is not None else "inf",
        "max_concurrency": result.workload.concurrency,
        "duration": sum(repeat.duration_ns for repeat in result.repeats) / 1e9,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "total_input_tokens": sum(s.prompt_tokens for s in done),
        "total_output_tokens": sum(s.output_tokens for s in done),
    }
    view |= {name: _rate(result, key) for name, key in _RATES.items()}
    for name, key in _LATENCIES.items():
        view |= _latency(name, np.concatenate([samples_of(key, repeat) for repeat in result.repeats] or [np.empty(0)]))
    return view


def _rate(result: BenchResult, key: str) -> float | None:
    stat: Stat | None = result.metrics[key].stats.get("value") if key in result.metrics else None
    return None if stat is None else stat.value


def _latency(name: str, samples: np.ndarray) -> dict[str, float | None]:
    known = samples.size > 0
    view: dict[str, float | None] = {
        f"mean_{name}_ms": float(samples.mean()) if known else None,
        f"median_{name}_ms": float(np.median(samples)) if known else None,
        f"std_{name}_ms": float(samples.std()) if known else None,
    }
    for percentile, percent in PERCENTILES.items():
        enough = samples.size >= MIN_SAMPLES[percentile]
        view[f"{percentile}_{name}_ms"] = float(np.percentile(samples, percent)) if enough else None
    return view
