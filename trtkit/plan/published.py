"""The published comparison's numbers beside what physics and the forecast say: a recipe's claims, corrected."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.plan.ask import LoadPoint, scenario_at
from trtkit.plan.cost import cost_per_million
from trtkit.plan.forecast import answers
from trtkit.plan.memory import Placement, plan_memory
from trtkit.plan.names import Precision
from trtkit.plan.prices import PriceBook
from trtkit.spec.units import GB

CLAIMS: dict[tuple[str, str, bool], dict[str, float]] = {
    ("a100-80gb-sxm", "fp16", True): {
        "TPS b=1": 25,
        "TPS b=32": 680,
        "TTFT 512 ms": 85,
        "TTFT 4096 ms": 340,
        "peak memory GB": 140,
        "USD per 1M": 0.82,
    },
    ("h100-sxm", "int8", True): {
        "TPS b=1": 42,
        "TPS b=32": 1150,
        "TTFT 512 ms": 62,
        "TTFT 4096 ms": 250,
        "peak memory GB": 75,
        "USD per 1M": 0.48,
    },
    ("a100-80gb-sxm", "fp16", False): {
        "TPS b=1": 27,
        "TPS b=32": 740,
        "TTFT 512 ms": 80,
        "TTFT 4096 ms": 290,
        "peak memory GB": 120,
        "USD per 1M": 0.71,
    },
    ("h100-sxm", "int8", False): {
        "TPS b=1": 45,
        "TPS b=32": 1560,
        "TTFT 512 ms": 58,
        "TTFT 4096 ms": 215,
        "peak memory GB": 68,
        "USD per 1M": 0.47,
    },
}
"""(GPU, precision, whole cache?) -> claims of "The Token Tax" (NavyaAI, 2024-25), Llama 3 70B, outputs of 256."""
_OSL = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """One published number with its limit and the forecast. For rates `limit` is a ceiling, for the rest a floor."""

    quantity: str
    published: float
    limit: float
    forecast: float | None
    possible: bool


def corrected(placement: Placement, precision: Precision, book: PriceBook) -> tuple[Corrected, ...]:
    """The published configuration's numbers corrected; empty where this is none of the four."""
    key = (placement.gpu.name, precision.name, placement.policy.is_full)
    ranks = {"a100-80gb-sxm": 2, "h100-sxm": 1}.get(placement.gpu.name)
    is_70b = placement.model.num_params == 70_553_706_496
    if key not in CLAIMS or placement.parallel.world_size != ranks or not is_70b:
        return ()
    loads = [LoadPoint(isl=512, osl=_OSL, concurrency=1), LoadPoint(isl=512, osl=_OSL, concurrency=32)]
    loads.append(LoadPoint(isl=4096, osl=_OSL, concurrency=1))
    one, many, long = answers([scenario_at(placement, precision, load) for load in loads])
    claims = CLAIMS[key]
    memory = plan_memory(placement, sequence_tokens=512 + _OSL)
    price = book.gpu_price(placement.gpu.name).usd_per_gpu_h
    ceiling = 32 / many.floors.tpot_ms.value * 1000
    seen = (one.forecast, many.forecast, long.forecast)
    speeds: tuple[float | None, ...] = (None,) * 4
    if all(seen):
        first, second, third = (forecast for forecast in seen if forecast)
        speeds = (1000 / first.tpot_ms.value, second.tok_s.value, first.ttft_ms.value, third.ttft_ms.value)
    rows = [
        _rate("TPS b=1", claims, 1000 / one.floors.tpot_ms.value, speeds[0]),
        _rate("TPS b=32", claims, ceiling, speeds[1]),
        _time("TTFT 512 ms", claims, one.floors.ttft_ms.value, speeds[2]),
        _time("TTFT 4096 ms", claims, long.floors.ttft_ms.value, speeds[3]),
        _time("peak memory GB", claims, memory.weight_bytes * ranks / GB, memory.total_bytes * ranks / GB),
    ]
    own = cost_per_million(claims["TPS b=32"], price, ranks)
    expected = cost_per_million(many.forecast.tok_s.value, price, ranks) if many.forecast else None
    cost = claims["USD per 1M"]
    rows.append(
        Corrected(quantity="USD per 1M", published=cost, limit=own, forecast=expected, possible=cost >= own * 0.95)
    )
    return tuple(rows)


def _rate(quantity: str, claims: dict[str, float], ceiling: float, forecast: float | None) -> Corrected:
    value = claims[quantity]
    return Corrected(quantity=quantity, published=value, limit=ceiling, forecast=forecast, possible=value <= ceiling)


def _time(quantity: str, claims: dict[str, float], floor: float, forecast: float | None) -> Corrected:
    value = claims[quantity]
    return Corrected(quantity=quantity, published=value, limit=floor, forecast=forecast, possible=value >= floor)


def corrected_text(rows: tuple[Corrected, ...]) -> str:
    """Published beside limit and forecast. The cost's limit is its own throughput at its own price."""
    lines = [f"  {'published comparison':<20} {'published':>10} {'limit':>10} {'forecast':>10}"]
    for row in rows:
        forecast = "-" if row.forecast is None else f"{row.forecast:,.4g}"
        verdict = "" if row.possible else "  impossible" if row.quantity != "USD per 1M" else "  does not follow"
        lines.append(f"  {row.quantity:<20} {row.published:>10,.4g} {row.limit:>10,.4g} {forecast:>10}{verdict}")
    return "\n".join(lines)
