"""What a search is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.spec.model import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Traffic in output tokens a month, lengths, and limits (None is no limit)."""

    model: ModelSpec
    tokens_per_month: float
    isl: int
    osl: int
    ttft_p99_ms: float | None = None
    tpot_ms: float | None = None
    max_mmlu_drop: float | None = None
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to serve the traffic: `replicas` times `tp` GPUs, each replica at `concurrency` requests."""

    gpu: str
    tp: int
    precision: str
    kv: str
    replicas: int
    concurrency: int
    usd_per_month: float
    usd_per_million: float
    tok_s: float
    ttft_p99_ms: float
    tpot_ms: float
    mmlu_drop: float
    utilisation: float
    basis: str

    @property
    def num_gpus(self) -> int:
        """Devices rented in all."""
        return self.tp * self.replicas

    @property
    def label(self) -> str:
        """`2 x h100-sxm, TP1, int8, full`."""
        return f"{self.num_gpus} x {self.gpu}, TP{self.tp}, {self.precision}, KV {self.kv}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """One way that does not serve, and why."""

    label: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lever:
    """What one step from the reference buys and costs."""

    step: str
    usd_per_month: float | None
    saving: float | None
    tok_s_gain: float | None
    mmlu_points: float
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """Options by cost, cheapest first; what was rejected; the levers; and what to heed."""

    options: tuple[Option, ...]
    rejected: tuple[Rejected, ...]
    levers: tuple[Lever, ...]
    advice: tuple[str, ...]
