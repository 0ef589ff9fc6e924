"""`Workload`: one point of load, expanded to the same requests everywhere from its seed; `Protocol`: a grid of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtkit.spec.codec import LATER
from trtkit.spec.errors import UsageError
from trtkit.spec.plan import Limits

SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True, slots=True)
class SLO:
    """Limits a request must keep to count as good; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One load: closed loop at `concurrency`, or open loop at `request_rate` per second (Poisson).

    With both, arrivals are open loop and `concurrency` caps what is in flight. `dataset` is "synthetic", "sharegpt"
    or the path of a JSONL file; prompts are exactly `isl` tokens (a JSONL file's own lengths where `isl` is 0).
    All synthetic prompts of the cell, warm-up included, begin with the same `shared_prefix_tokens`.
    """

    isl: int
    osl: int
    num_requests: int
    concurrency: int | None = 1
    request_rate: float | None = None
    warmup_requests: int = 0
    dataset: str = SYNTHETIC
    seed: int = 0
    ignore_eos: bool = True
    slo: SLO = field(default_factory=SLO)
    shared_prefix_tokens: int = field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        if self.isl < 0 or self.osl < 1 or self.num_requests < 1 or self.warmup_requests < 0:
            raise UsageError(
                f"workload: isl={self.isl}, osl={self.osl}, num_requests={self.num_requests}, "
                f"warmup={self.warmup_requests}: lengths and counts must be positive"
            )
        if self.concurrency is None and self.request_rate is None:
            raise UsageError("workload: give --concurrency, --request-rate or both")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"concurrency is {self.concurrency}, must be at least 1")
        if self.request_rate is not None and self.request_rate <= 0:
            raise UsageError(f"request rate is {self.request_rate}, must be above 0")
        if self.shared_prefix_tokens:
            self._check_shared_prefix()

    def _check_shared_prefix(self) -> None:
        if self.dataset != SYNTHETIC:
            raise UsageError(
                f"shared prefix of {self.shared_prefix_tokens} tokens: only synthetic prompts are made with one, "
                f"--dataset {self.dataset} has its own"
            )
        if not 0 < self.shared_prefix_tokens < self.isl:
            raise UsageError(
                f"shared prefix of {self.shared_prefix_tokens} tokens: must be above 0 and below --isl {self.isl}"
            )

    @property
    def lengths(self) -> str:
        """Prompt and output as people write them."""
        shared = f" ({self.shared_prefix_tokens} shared)" if self.shared_prefix_tokens else ""
        return f"ISL {self.isl or 'as given'}{shared}, OSL {self.osl}"

    def reusable_tokens(self, limits: Limits) -> int:
        """Most tokens of a prompt that need no computing under these limits: none without block reuse.

        Whole blocks, and never the last token. What begins alike in synthetic prompts is known; prompts of a file may
        come again in every repeat.
        """
        if not limits.enable_block_reuse:
            return 0
        alike = self.shared_prefix_tokens if self.dataset == SYNTHETIC else self.isl
        size = limits.tokens_per_block
        return max(0, min(alike, self.isl - 1)) // size * size


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """A benchmark protocol: the workloads each engine runs, each `repeats` times."""

    name: str
    workloads: tuple[Workload, ...]
    repeats: int = 3
    description: str = ""

    def __post_init__(self) -> None:
        if not self.workloads or self.repeats < 1:
            raise UsageError(f"protocol {self.name!r} needs at least one workload and one repeat")
