"""Results of other benchmarks (vLLM, AIPerf, GuideLLM, trtllm-bench) as rows of claims, plus their own bookkeeping.

These files say little about the machine; `defaults` (GPU, precision, ...) fill what they leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trtkit.spec.errors import InputError

Row = dict[str, str]
Body = Mapping[str, Any]
VLLM, AIPERF, GUIDELLM, TRTLLM_BENCH = "vLLM", "AIPerf", "GuideLLM", "trtllm-bench"


def foreign_rows(body: Body, name: str, defaults: Mapping[str, str]) -> tuple[str, list[Row]]:
    """(which tool, its rows of claims).

    Raises:
        InputError: the file is of none of the known tools.
    """
    for tool, looks_like, read in _TOOLS:
        if isinstance(body, dict) and looks_like(body):
            rows = [{**defaults, **row} for row in read(body)]
            return tool, [row for row in rows if row.get("value")]
    raise InputError(f"{name}: not a result of {', '.join(tool for tool, _, _ in _TOOLS)} and not a trtkit record")


def _row(name: str, metric: str, value: object, **cells: object) -> Row:
    texts = {key: _text(cell) for key, cell in cells.items() if cell is not None}
    return {"name": f"{name} {metric}", "metric": metric, "value": _text(value), **texts}


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value)


def _whole(value: object) -> int | None:
    return round(value) if isinstance(value, (int, float)) and value >= 0.5 else None


def _per(total: object, count: object) -> int | None:
    if isinstance(total, (int, float)) and isinstance(count, (int, float)) and count > 0:
        return _whole(total / count)
    return None


def _vllm(body: Mapping[str, Any]) -> list[Row]:
    done = body.get("completed")
    cells = {
        "model": body.get("model_id"),
        "concurrency": body.get("max_concurrency"),
        "isl": _per(body.get("total_input_tokens"), done),
        "osl": _per(body.get("total_output_tokens"), done),
    }
    pairs = {
        "throughput_tok_s_total": body.get("output_throughput"),
        "ttft_ms": body.get("mean_ttft_ms"),
        "tpot_ms": body.get("mean_tpot_ms"),
        "e2e_ms": body.get("mean_e2el_ms"),
        "request_throughput": body.get("request_throughput"),
    }
    return [_row("vLLM", metric, value, **cells) for metric, value in pairs.items()]


def _average(body: Mapping[str, Any], tag: str) -> object:
    entry = body.get(tag)
    if not isinstance(entry, dict):
        return None
    value = entry.get("avg")
    seconds = str(entry.get("unit", "")).lower() in ("s", "sec", "seconds")
    return value * 1000 if seconds and isinstance(value, (int, float)) else value


def _aiperf(body: Mapping[str, Any]) -> list[Row]:
    settings = body.get("input_config") or {}
    loadgen = settings.get("loadgen") or {} if isinstance(settings, dict) else {}
    cells = {
        "concurrency": loadgen.get("concurrency"),
        "isl": _whole(_average(body, "input_sequence_length")),
        "osl": _whole(_average(body, "output_sequence_length")),
    }
    pairs = {
        "throughput_tok_s_total": _average(body, "output_token_throughput"),
        "ttft_ms": _average(body, "time_to_first_token"),
        "tpot_ms": _average(body, "inter_token_latency"),
        "e2e_ms": _average(body, "request_latency"),
        "request_throughput": _average(body, "request_throughput"),
    }
    return [_row("AIPerf", metric, value, **cells) for metric, value in pairs.items()]


def _guidellm(body: Mapping[str, Any]) -> list[Row]:
    rows = []
    for index, benchmark in enumerate(body["benchmarks"], 1):
        metrics = benchmark.get("metrics") or {}

        def mean(name: str, metrics: Mapping[str, Any] = metrics) -> object:
            return ((metrics.get(name) or {}).get("successful") or {}).get("mean")

        latency = mean("request_latency")
        cells = {
            "concurrency": _whole(mean("request_concurrency")),
            "isl": _whole(mean("prompt_token_count")),
            "osl": _whole(mean("output_token_count")),
        }
        pairs = {
            "throughput_tok_s_total": mean("output_tokens_per_second"),
            "ttft_ms": mean("time_to_first_token_ms"),
            "tpot_ms": mean("inter_token_latency_ms"),
            "e2e_ms": latency * 1000 if isinstance(latency, (int, float)) else None,
            "request_throughput": mean("requests_per_second"),
        }
        rows += [_row(f"GuideLLM {index}", metric, value, **cells) for metric, value in pairs.items()]
    return rows


def _trtllm_bench(body: Mapping[str, Any]) -> list[Row]:
    engine, world = body.get("engine") or {}, body.get("world_info") or {}
    requests, speed = body.get("request_info") or {}, body.get("performance") or {}
    streaming = body.get("streaming_metrics") or {}
    cells = {
        "model": engine.get("model"),
        "precision": engine.get("quantization") or engine.get("dtype"),
        "kv_dtype": engine.get("kv_cache_dtype"),
        "num_gpus": world.get("world_size"),
        "tp": world.get("tp_size"),
        "concurrency": _whole(requests.get("avg_num_concurrent_requests")),
        "isl": _whole(requests.get("avg_input_length")),
        "osl": _whole(requests.get("avg_output_length")),
    }
    pairs = {
        "throughput_tok_s_total": speed.get("system_output_throughput_tok_s"),
        "ttft_ms": streaming.get("avg_ttft_ms"),
        "tpot_ms": streaming.get("avg_tpot_ms"),
        "e2e_ms": speed.get("avg_request_latency_ms"),
        "request_throughput": speed.get("request_throughput_req_s"),
    }
    return [_row("trtllm-bench", metric, value, **cells) for metric, value in pairs.items()]


_TOOLS: tuple[tuple[str, Callable[[Body], bool], Callable[[Body], list[Row]]], ...] = (
    (VLLM, lambda body: "output_throughput" in body and "completed" in body, _vllm),
    (TRTLLM_BENCH, lambda body: "performance" in body and "request_info" in body, _trtllm_bench),
    (GUIDELLM, lambda body: isinstance(body.get("benchmarks"), list), _guidellm),
    (AIPERF, lambda body: "time_to_first_token" in body or "output_token_throughput" in body, _aiperf),
)
