"""One row of a published table, in the spelling of the project's ground truth, read as a `Scenario` and a metric."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.plan.calibration import version_number
from trtkit.plan.names import gpu_word, model_word, precision_from
from trtkit.plan.scenario import TENSORRT_LLM, Scenario
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.errors import InputError, TrtkitError, UnsupportedError, UsageError
from trtkit.spec.gpu import GpuSpec

SERVED = "tensorrt-llm-served"
NIM, VLLM, LMDEPLOY, GPT_FAST = "nim", "vllm", "lmdeploy", "gpt-fast"
METRIC_UNITS = {
    "throughput_tok_s_total": "tok/s",
    "per_gpu": "tok/s per GPU",
    "decode_tok_s_user": "tok/s per user",
    "ttft_ms": "ms",
    "tpot_ms": "ms",
    "itl_ms": "ms",
    "e2e_ms": "ms",
    "mem_gb": "GB per GPU",
}
STREAM_STEPS = 19
"""Served TensorRT-LLM runs of 1,024/1,024 tokens on up to four GPUs send their first 20 tokens together: their TTFT
exceeds that of the same prompt with another output length by 19 decode steps at every concurrency."""
_OTHER_STACKS = {"lmdeploy": LMDEPLOY, "vllm": VLLM, "gpt-fast": GPT_FAST, "nim": NIM}
_LAST_STATIC_RELEASE = (0, 7)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A row that was understood. `num_gpus` counts all replicas."""

    scenario: Scenario
    metric: str
    num_gpus: int

    @property
    def replicas(self) -> float:
        """Independent copies of the model that share the load."""
        return self.num_gpus / self.scenario.num_gpus


def parse_row(row: Mapping[str, str], *, catalogs: Sequence[Path] = ()) -> TableRow:
    """Read one row.

    Raises:
        TrtkitError: a cell is missing or not understood; the message names the column, for the `reason` cell.
    """
    metric = _cell(row, "metric")
    if metric not in METRIC_UNITS:
        raise InputError(f"metric: {metric!r} is not one of {', '.join(METRIC_UNITS)}")
    num_gpus = whole_number(row, "num_gpus")
    tp = whole_number(row, "tp")
    if num_gpus % tp:
        raise InputError(f"tp: {tp} does not divide num_gpus {num_gpus}")
    stack, version, static = _stack(row)
    isl, osl = whole_number(row, "isl"), whole_number(row, "osl")
    scenario = Scenario(
        model=model_preset(model_word(_cell(row, "model")), catalogs=catalogs),
        gpu=gpu_of(_cell(row, "gpu"), catalogs),
        precision=precision_from(_cell(row, "precision"), kv_dtype=row.get("kv_dtype", "") or ""),
        isl=isl,
        osl=osl,
        concurrency=_concurrency(row),
        tp=tp,
        stack=stack,
        version=version,
        static=static,
        stream_steps=STREAM_STEPS if stack == SERVED and tp <= 4 and isl == osl == 1024 else 0,
    )
    return TableRow(scenario=scenario, metric=metric, num_gpus=num_gpus)


def gpu_of(text: str, catalogs: Sequence[Path] = ()) -> GpuSpec:
    """The device a published spelling means.

    Raises:
        UnsupportedError: it is in no catalog.
    """
    try:
        return gpu_spec(gpu_word(text), catalogs=catalogs)
    except UsageError as error:
        raise UnsupportedError(f"gpu: {error}") from None


def _cell(row: Mapping[str, str], column: str) -> str:
    text = (row.get(column) or "").strip()
    if not text:
        raise InputError(f"{column}: empty")
    return text


def whole_number(row: Mapping[str, str], column: str) -> int:
    """A positive whole number, thousands separators allowed.

    Raises:
        InputError: the cell is empty, not a number, or not positive.
    """
    text = _cell(row, column)
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        raise InputError(f"{column}: {text!r} is not a number") from None
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise InputError(f"{column}: {text!r} is not a whole number of at least 1")
    return int(value)


def _concurrency(row: Mapping[str, str]) -> int | None:
    column = "batch_or_concurrency" if "batch_or_concurrency" in row else "concurrency"
    text = _cell(row, column).lower()
    if text.startswith(("max", "inf", "offline")):
        return None
    if re.fullmatch(r"[\d.,]+\s*(rps|req/s)", text):
        raise UnsupportedError(f"{column}: an arrival rate ({text}) needs mean lengths; give a concurrency")
    return whole_number(row, column)


def _stack(row: Mapping[str, str]) -> tuple[str, str | None, bool]:
    """(serving stack, release, one static batch?) of a row."""
    engine = (row.get("engine") or "TensorRT-LLM").strip().lower()
    version = (row.get("engine_version") or "").strip() or None
    metric = row.get("metric", "")
    numeric = (row.get("batch_or_concurrency") or row.get("concurrency") or "").strip().replace(".", "").isdigit()
    for prefix, stack in _OTHER_STACKS.items():
        if prefix in engine:
            return stack, None, stack == LMDEPLOY
    if not engine.startswith(("tensorrt-llm", "trt")):
        return engine, version, False
    if "inferencex" in (row.get("source") or "").lower() or (version is None and numeric and metric.endswith("_ms")):
        return SERVED, None, False
    number = version_number(version or "")
    static = numeric and (0, 0) < number <= _LAST_STATIC_RELEASE and metric in ("throughput_tok_s_total", "per_gpu")
    return TENSORRT_LLM, version, static


def try_parse(row: Mapping[str, str], *, catalogs: Sequence[Path] = ()) -> tuple[TableRow | None, str]:
    """The row, or None and the reason."""
    try:
        return parse_row(row, catalogs=catalogs), ""
    except TrtkitError as error:
        return None, str(error)
