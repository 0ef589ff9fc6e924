"""One claim: a number somebody states about a configuration, with everything that its limit depends on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trtkit.plan.names import Precision, model_word, precision_from
from trtkit.plan.rows import gpu_of, whole_number
from trtkit.spec.catalog import model_preset
from trtkit.spec.errors import InputError, TrtkitError
from trtkit.spec.gpu import GpuSpec
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.units import GB, GIB

COLUMNS = (
    "name",
    "model",
    "gpu",
    "num_gpus",
    "tp",
    "precision",
    "kv",
    "kv_dtype",
    "metric",
    "concurrency",
    "isl",
    "osl",
    "value",
    "unit",
    "price_usd_per_gpu_h",
)
OPTIONAL = ("accept_length", "cached_tokens", "sparsity", "tokens_per_month")
"""Declared things that move a limit: tokens per verified step, prompt tokens from a prefix cache, "2:4"; and traffic."""

TTFT, TPOT, THROUGHPUT, DECODE, PER_USER, PER_GPU = "ttft", "tpot", "throughput", "decode", "per_user", "per_gpu"
E2E, MEMORY, KV_REQUEST, KV_TOTAL, WEIGHTS = "e2e", "memory", "kv_per_request", "kv_total", "weights"
COST, MONTHLY, QUALITY, REQUESTS = "cost", "monthly_cost", "quality", "requests"

_METRICS = {
    TTFT: ("ttft_ms", "ttft", "time_to_first_token", "time_to_first_token_ms", "ftl_ms"),
    TPOT: ("tpot_ms", "itl_ms", "tpot", "itl", "inter_token_latency", "time_per_output_token"),
    THROUGHPUT: ("throughput_tok_s_total", "throughput", "throughput_tok_s", "output_throughput", "tok_s"),
    DECODE: ("tps", "decode_tps", "decode_tok_s", "decode_throughput"),
    PER_USER: ("decode_tok_s_user", "tps_user", "tps_per_user", "tok_s_user"),
    PER_GPU: ("per_gpu", "tps_per_gpu", "throughput_per_gpu"),
    E2E: ("e2e_ms", "e2e", "e2el_ms", "request_latency", "latency_ms"),
    MEMORY: ("mem_gb", "peak_vram", "peak_vram_gb", "vram_gb", "vram", "memory_gb", "memory", "peak_memory"),
    KV_REQUEST: ("kv_gb_per_request", "kv_per_request", "kv_per_request_gb", "kv_cache_per_request"),
    KV_TOTAL: ("kv_gb", "kv_total_gb", "kv_cache_gb", "kv_cache", "kv_memory_gb"),
    WEIGHTS: ("weights_gb", "weight_gb", "weights", "model_gb"),
    COST: ("cost_per_1m", "usd_per_1m", "cost_per_million", "usd_per_1m_tokens", "cost_per_1m_tokens"),
    MONTHLY: ("usd_per_month", "monthly_cost", "monthly_cost_usd", "cost_per_month"),
    QUALITY: ("mmlu", "mmlu_5shot", "mmlu_5_shot"),
    REQUESTS: ("request_throughput", "requests_s", "req_s"),
}
_KIND_OF = {word: kind for kind, words in _METRICS.items() for word in words}
_PATTERNS = (
    ("ttft|first_token", TTFT),
    ("tpot|itl|inter_token|time_per_output", TPOT),
    ("e2e|request_latency", E2E),
    ("(cost|usd).*month|monthly", MONTHLY),
    ("(cost|usd).*(1m|million|mtok)", COST),
    ("kv.*request", KV_REQUEST),
    ("kv.*(gb|gib|size|memory)", KV_TOTAL),
    ("vram|(peak|gpu)_mem|memory_use", MEMORY),
    ("weight.*(gb|gib|size|memory)", WEIGHTS),
    ("(tps|tok_s|tokens_s|throughput).*user", PER_USER),
    ("(tps|tok_s|tokens_s|throughput).*gpu", PER_GPU),
    ("^(output_)?(throughput|tok_s|tokens_s|tps)", THROUGHPUT),
    ("mmlu", QUALITY),
)
"""Names not in the list, by what they contain, first match wins; a configuration's columns match none of them."""
_TIME = {"": 1.0, "ms": 1.0, "s": 1000.0, "sec": 1000.0, "seconds": 1000.0, "us": 1e-3, "ms/token": 1.0}
_RATE = {"": 1.0, "tok/s": 1.0, "tokens/s": 1.0, "t/s": 1.0, "tps": 1.0, "tok/s/gpu": 1.0, "tok/s/user": 1.0}
_RATE |= {"tok/s per gpu": 1.0, "tok/s per user": 1.0, "ktok/s": 1000.0}
_SIZE = {
    "": 1.0,
    "gb": 1.0,
    "gib": GIB / GB,
    "mb": 1e-3,
    "mib": 2**20 / GB,
    "tb": 1e3,
    "tib": 2**40 / GB,
    "bytes": 1e-9,
}
_MONEY = {"": 1.0, "usd": 1.0, "$": 1.0, "usd/1m": 1.0, "usd/1m tokens": 1.0, "usd/month": 1.0, "cents": 0.01}
_SHARE = {"": 1.0, "%": 1.0, "percent": 1.0, "points": 1.0, "fraction": 100.0}
_UNITS = dict.fromkeys((TTFT, TPOT, E2E), _TIME)
_UNITS |= dict.fromkeys((THROUGHPUT, DECODE, PER_USER, PER_GPU), _RATE)
_UNITS |= dict.fromkeys((MEMORY, KV_REQUEST, KV_TOTAL, WEIGHTS), _SIZE)
_UNITS |= {COST: _MONEY, MONTHLY: _MONEY, QUALITY: _SHARE, REQUESTS: {"": 1.0, "req/s": 1.0, "1/s": 1.0}}
BASE_UNIT = {TTFT: "ms", TPOT: "ms", E2E: "ms", MEMORY: "GB", KV_REQUEST: "GB", KV_TOTAL: "GB", WEIGHTS: "GB"}
BASE_UNIT |= dict.fromkeys((THROUGHPUT, DECODE, PER_USER, PER_GPU), "tok/s")
BASE_UNIT |= {COST: "USD/1M", MONTHLY: "USD/month", QUALITY: "%", REQUESTS: "req/s"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A stated number in its base unit (ms, tok/s, GB, USD, %). None is not stated.

    `concurrency` None at maximum load or not stated (`at_maximum` tells). `row` counts data rows from 1.
    """

    row: int
    name: str
    kind: str
    metric: str
    value: float
    model: ModelSpec
    gpu: GpuSpec
    num_gpus: int
    tp: int
    precision: Precision
    policy: KVPolicySpec = field(default_factory=KVPolicySpec)
    concurrency: int | None = None
    at_maximum: bool = False
    isl: int | None = None
    osl: int | None = None
    usd_per_gpu_h: float | None = None
    accept_length: float = 1.0
    cached_tokens: int = 0
    sparsity: float = 1.0
    tokens_per_month: float | None = None
    origin: str = ""
    """Whose software and report, where the table says so; claims of different origin are not held against each other."""

    @property
    def configuration(self) -> tuple[object, ...]:
        """What two claims of one machine and model share, whatever the load."""
        return (self.origin, self.model.name, self.gpu.name, self.num_gpus, self.precision.name, self.policy.label)


def kind_of(metric: str) -> str | None:
    """Which quantity a metric's name means, None for an unknown one."""
    word = re.sub(r"[\s\-/]+", "_", metric.strip().lower())
    if word in _KIND_OF:
        return _KIND_OF[word]
    return next((kind for pattern, kind in _PATTERNS if re.search(pattern, word)), None)


def claim_from(row: Mapping[str, str], number: int, *, catalogs: Sequence[Path] = ()) -> Claim:
    """Read one row.

    Raises:
        InputError: a cell is missing or wrong; the message names the row and the column.
    """
    return _Reader(row, number, catalogs).claim()


@dataclass(frozen=True)
class _Reader:
    """Reads cells of one row; every error says where."""

    row: Mapping[str, str]
    number: int
    catalogs: Sequence[Path]

    def text(self, column: str) -> str:
        return (self.row.get(column) or "").strip()

    def fail(self, column: str, why: str) -> InputError:
        return InputError(f"row {self.number}, column {column}: {why}")

    def claim(self) -> Claim:
        kind = kind_of(self.text("metric"))
        if kind is None:
            known = ", ".join(words[0] for words in _METRICS.values())
            raise self.fail("metric", f"{self.text('metric')!r} is unknown; known are {known}")
        num_gpus = self.count("num_gpus") or 1
        concurrency, at_maximum = self.load()
        return Claim(
            row=self.number,
            name=self.text("name") or f"row {self.number}",
            kind=kind,
            metric=self.text("metric"),
            value=self.value(kind),
            model=self.named("model", lambda text: model_preset(model_word(text), catalogs=self.catalogs)),
            gpu=self.named("gpu", lambda text: gpu_of(text, self.catalogs)),
            num_gpus=num_gpus,
            tp=self.count("tp") or num_gpus,
            precision=self.named("precision", lambda text: precision_from(text, kv_dtype=self.text("kv_dtype"))),
            policy=self.policy(),
            concurrency=concurrency,
            at_maximum=at_maximum,
            isl=self.length("isl"),
            osl=self.length("osl"),
            usd_per_gpu_h=self.positive("price_usd_per_gpu_h"),
            accept_length=self.positive("accept_length") or 1.0,
            cached_tokens=self.count("cached_tokens") or 0,
            sparsity=self.sparsity(),
            tokens_per_month=self.positive("tokens_per_month"),
            origin=" ".join(self.text(column) for column in ("source", "engine", "engine_version")).strip(),
        )

    def named(self, column: str, read):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        """Whatever `read` makes of a cell that must not be empty."""
        if not self.text(column):
            raise self.fail(column, "empty")
        try:
            return read(self.text(column))
        except TrtkitError as error:
            raise self.fail(column, str(error).removeprefix(f"{column}: ")) from None

    def policy(self) -> KVPolicySpec:
        text = self.text("kv").lower() or "full"
        if re.fullmatch(r"\d+(\.\d+)?%", text):
            text = f"h2o:{text}"
        try:
            return parse_kv_policy(text.replace(" ", ":", 1) if ":" not in text else text)
        except TrtkitError as error:
            raise self.fail("kv", str(error)) from None

    def value(self, kind: str) -> float:
        text = self.text("value").replace(",", "").removeprefix("$").removesuffix("%")
        unit = re.sub(r"\s+", " ", self.text("unit").lower())
        scales = _UNITS[kind]
        suffix = self.text("metric").lower().rpartition("_")[2]
        if not unit and suffix in scales:
            unit = suffix
        if unit not in scales:
            allowed = ", ".join(word for word in scales if word)
            raise self.fail("unit", f"{self.text('unit')!r} does not measure {self.text('metric')}; use {allowed}")
        value = self.number_in("value", text) * scales[unit]
        if value <= 0:
            raise self.fail("value", f"{self.text('value')!r} must be above 0")
        return value

    def number_in(self, column: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise self.fail(column, f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise self.fail(column, f"{text!r} is not a finite number")
        return value

    def positive(self, column: str) -> float | None:
        text = self.text(column).replace(",", "").removeprefix("$")
        if not text:
            return None
        value = self.number_in(column, text)
        if value <= 0:
            raise self.fail(column, f"{text!r} must be above 0")
        return value

    def count(self, column: str) -> int | None:
        if not self.text(column):
            return None
        try:
            return whole_number(self.row, column)
        except InputError as error:
            raise self.fail(column, str(error).removeprefix(f"{column}: ")) from None

    def length(self, column: str) -> int | None:
        """Tokens; a data set's name is a length that is not stated."""
        return None if re.search(r"[a-z]", self.text(column).lower()) else self.count(column)

    def load(self) -> tuple[int | None, bool]:
        column = "concurrency" if self.text("concurrency") else "batch_or_concurrency"
        text = self.text(column).lower()
        if not text or re.search(r"[a-z]", text):
            return None, text.startswith(("max", "inf", "offline"))
        return self.count(column), False

    def sparsity(self) -> float:
        text = self.text("sparsity").lower()
        if text in ("", "none", "dense", "1"):
            return 1.0
        if text in ("2:4", "50%"):
            return 2.0
        raise self.fail("sparsity", f"{text!r} is unknown; use 2:4 or leave it empty")
