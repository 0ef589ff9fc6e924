"""`KVPolicySpec`: how much of the KV cache a request keeps, in tokens, and what chooses them.

Budgets are integers per (layer, KV head). A percentage is a wish about a context length; `resolved` turns
it into tokens before anything below the command line sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from enum import Enum

from trtkit.spec.errors import UsageError

FULL = "full"
_OPTIONS = {"budget": int, "recent": int, "sinks": int, "interval": int, "scorer": str}
_ALIASES = {"sink": "sinks", "beta": "interval"}
_ROUNDING = 1e-6
"""29 % of 100 is 29, although 0.29 * 100 is 28.999999999999996 in floating point."""


class KVFidelity(str, Enum):
    """How closely a backend carries out the policy that was asked for.

    GENERATED_ONLY keeps all of a prompt and lets the budget count generated tokens alone.
    """

    EXACT = "exact"
    PREFILL_ONLY = "prefill_only"
    WINDOW_ONLY = "window_only"
    GENERATED_ONLY = "generated_only"


@dataclass(frozen=True, kw_only=True, slots=True)
class KVPolicySpec:
    """One eviction policy with its budget.

    `kind` is "full" or the name of an entry point in `trtkit.kv_policies`. Exactly one of `budget` (tokens kept
    per KV head after an eviction) and `budget_fraction` (of the context, in (0, 1]) is set, unless `kind` is "full".
    `recent` None means the policy's own default. The cache oscillates in [budget, budget + interval].
    """

    kind: str = FULL
    budget: int | None = None
    budget_fraction: float | None = None
    recent: int | None = None
    sinks: int | None = None
    scorer: str | None = None
    interval: int | None = None

    def __post_init__(self) -> None:
        if self.kind == FULL:
            self._refuse_options_of_full()
            return
        if (self.budget is None) == (self.budget_fraction is None):
            raise UsageError(
                f"KV policy {self.kind!r} needs one budget, as tokens ({self.kind}:2048) or as a share ({self.kind}:50%)"
            )
        if self.budget is not None and self.budget <= 0:
            raise UsageError(f"KV budget is {self.budget} tokens, must be at least 1")
        if self.budget_fraction is not None and not 0 < self.budget_fraction <= 1:
            raise UsageError(f"KV budget is {self.budget_fraction:.0%}, must be above 0% and at most 100%")
        if (self.recent or 0) < 0 or (self.sinks or 0) < 0:
            raise UsageError("KV policy: recent and sinks must not be negative")
        if self.interval is not None and self.interval <= 0:
            raise UsageError(f"KV policy: interval is {self.interval}, must be at least 1")
        protected = (self.recent or 0) + (self.sinks or 0)
        if self.budget is not None and protected > self.budget:
            raise UsageError(
                f"KV budget {self.budget} is below sinks + recent = {protected}; "
                f"raise the budget to at least {protected} or protect fewer tokens"
            )

    def _refuse_options_of_full(self) -> None:
        given = [
            name
            for name in ("budget", "budget_fraction", "recent", "sinks", "scorer", "interval")
            if getattr(self, name) is not None
        ]
        if given:
            raise UsageError(f"KV policy 'full' keeps everything and takes no {', '.join(given)}")

    @property
    def is_full(self) -> bool:
        """Nothing is ever evicted."""
        return self.kind == FULL

    @property
    def label(self) -> str:
        """The spelling `parse_kv_policy` reads back."""
        if self.is_full:
            return FULL
        parts = [f"budget={self.budget}" if self.budget_fraction is None else f"{_percent(self.budget_fraction)}%"]
        parts += [
            f"{name}={getattr(self, name)}"
            for name in ("recent", "sinks", "scorer", "interval")
            if getattr(self, name) is not None
        ]
        return f"{self.kind}:{','.join(parts)}"

    def resolved(self, context_tokens: int) -> KVPolicySpec:
        """The same policy with its budget in tokens: a share of `context_tokens`, but no less than what is protected.

        `context_tokens` is the longest one request's context can get: its prompt and its output.
        """
        if self.budget_fraction is None:
            return self
        protected = (self.recent or 0) + (self.sinks or 0)
        share = int(self.budget_fraction * context_tokens + _ROUNDING)
        return replace(self, budget=max(1, protected, share), budget_fraction=None)


def _percent(fraction: float) -> str:
    """`fraction` as a percentage that reads back exactly: the decimal point moves, nothing is rounded."""
    return f"{Decimal(repr(fraction)).scaleb(2):f}"


def parse_kv_policy(text: str) -> KVPolicySpec:
    """Read `full`, `h2o:50%`, `h2o:2048`, `h2o:budget=2048,recent=512,sinks=4,scorer=mean,interval=64`.

    Raises:
        UsageError: with the option that is wrong and the ones that exist.
    """
    kind, _, rest = text.strip().partition(":")
    options: dict[str, object] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, value = _parse_option(text, part)
        if key in options:
            raise UsageError(f"KV policy {text!r}: {key} is given twice")
        options[key] = value
    return KVPolicySpec(kind=kind.strip().lower() or FULL, **options)  # type: ignore[arg-type]


def _parse_option(text: str, part: str) -> tuple[str, object]:
    key, separator, value = part.partition("=")
    if not separator:
        key, value = "budget", part
    key = _ALIASES.get(key.strip(), key.strip())
    if key not in _OPTIONS:
        raise UsageError(f"KV policy {text!r}: unknown option {key!r}; allowed are {', '.join(_OPTIONS)}")
    try:
        if key == "budget" and value.endswith("%"):
            return "budget_fraction", float(f"{value[:-1].strip()}e-2")
        return key, _OPTIONS[key](value.strip())
    except ValueError:
        raise UsageError(f"KV policy {text!r}: {key} is {value!r}, expected {_OPTIONS[key].__name__}") from None
