"""Two answers side by side for each scenario: the floor (nothing beats it) and the forecast (what to expect)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trtkit.plan import work
from trtkit.plan.calibration import Calibration, ErrorBand, load_calibration, rates_of
from trtkit.plan.perfmodel import Times, closed_loop
from trtkit.plan.roofline import Floors, floors, max_sequences
from trtkit.plan.scenario import Scenario, load_of
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.measured import Measured, Source
from trtkit.spec.units import MS_PER_S, format_gib

THROUGHPUT, TPOT, TTFT = "throughput", "tpot", "ttft"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What to expect. Times in ms; `in_flight` is how many requests run at once, `capacity` how many fit."""

    ttft_ms: Measured
    tpot_ms: Measured
    itl_ms: Measured
    tok_s: Measured
    e2e_ms: Measured
    in_flight: float
    capacity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """`forecast` is None where nothing was measured on this GPU and precision; `reason` then says so."""

    floors: Floors
    forecast: Forecast | None
    reason: str = ""


def answer(scenario: Scenario, calibration: Calibration | None = None) -> Answer:
    """Floor and forecast of one scenario."""
    return answers([scenario], calibration)[0]


def answers(scenarios: Sequence[Scenario], calibration: Calibration | None = None) -> list[Answer]:
    """Floor and forecast of many scenarios, computed together.

    Raises:
        UnsupportedError: a device has no unit for a scenario's operands, so that not even a floor exists.
    """
    constants = calibration or load_calibration()
    reasons = [_reason(scenario, constants) for scenario in scenarios]
    limits = [floors(scenario) for scenario in scenarios]
    known = [index for index, reason in enumerate(reasons) if not reason]
    found: dict[int, Forecast] = {}
    if known:
        chosen = [scenarios[index] for index in known]
        times = closed_loop(load_of(chosen), rates_of(chosen, constants))
        found = {index: _one(scenarios[index], limits[index], times, at, constants) for at, index in enumerate(known)}
    return [
        Answer(floors=limits[index], forecast=found.get(index), reason=reason) for index, reason in enumerate(reasons)
    ]


def _reason(scenario: Scenario, constants: Calibration) -> str:
    try:
        constants.group(scenario)
    except UnsupportedError as error:
        return str(error)
    held = work.weight_bytes(scenario.model, scenario.precision.quant)
    room = scenario.num_gpus * scenario.gpu.memory_bytes
    if held > room:
        return f"does not fit: {format_gib(held)} of weights, {format_gib(room)} on {scenario.num_gpus} GPUs"
    if max_sequences(scenario) < 1:
        return f"does not fit: {format_gib(room - held)} beside the weights do not hold one request of this length"
    return ""


def _one(scenario: Scenario, limit: Floors, times: Times, index: int, constants: Calibration) -> Forecast:
    note = constants.caveat(scenario) or "calibrated"

    def time_ms(seconds: float, least: Measured, metric: str) -> Measured:
        return _modeled(seconds * MS_PER_S, "ms", constants.band(metric, scenario), note, least=least.value)

    ttft_ms = time_ms(float(times.ttft_s[index]), limit.ttft_ms, TTFT)
    tpot_ms = time_ms(float(times.tpot_s[index]), limit.tpot_ms, TPOT)
    e2e_s = (ttft_ms.value + (scenario.osl - 1) * tpot_ms.value) / MS_PER_S
    band = constants.band(THROUGHPUT, scenario)
    return Forecast(
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        itl_ms=tpot_ms,
        tok_s=_modeled(float(times.tok_s[index]), "tok/s", band, note, most=limit.tok_s.value),
        e2e_ms=time_ms(e2e_s, limit.e2e_ms, TPOT),
        in_flight=float(times.in_flight[index]),
        capacity=float(times.capacity[index]),
    )


def _modeled(
    value: float, unit: str, band: ErrorBand, note: str, *, least: float = 0.0, most: float = math.inf
) -> Measured:
    """A forecast with its band; neither it nor an end of the band lies beyond the floor."""
    low, middle, high = (
        min(max(value * factor, least), most) for factor in (math.exp(-band.p90), 1.0, math.exp(band.p90))
    )
    return Measured(value=middle, unit=unit, source=Source.MODELED, low=low, high=high, note=note)
