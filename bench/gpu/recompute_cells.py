"""The cells of a llama70b.json again from their raw samples: metrics, intervals, validity, floors, shares and prices.

Part of `recompute.py`; numpy and `recount.py` alone, nothing of trtkit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from bench.gpu import recount

Json = Mapping[str, Any]
TOLERANCE = 1e-6
PERCENTILES = {"p50": (50, 1), "p90": (90, 29), "p95": (95, 59), "p99": (99, 299)}
"""Percentile, and how many samples it takes."""


class Differences(list[str]):
    """What does not agree, one line each, and how many numbers were compared."""

    compared = 0

    def same(self, where: str, recorded: Any, again: Any, *, tolerance: float = TOLERANCE) -> None:
        """Compare two numbers, or two answers that are no numbers."""
        self.compared += 1
        if isinstance(recorded, (int, float)) and isinstance(again, (int, float)) and not isinstance(again, bool):
            if math.isclose(recorded, again, rel_tol=tolerance, abs_tol=1e-12):
                return
        elif recorded == again:
            return
        self.append(f"{where}: recorded {recorded!r}, recomputed {again!r}")


def cell_differences(found: Differences, row: Json, cell: Json) -> None:
    """One cell of llama70b.json."""
    result = cell.get("result")
    if result is None:
        found.same(f"{row['row']} {cell['name']}: a reason for no result", bool(cell.get("not_run")), True)
        return
    where = f"{row['row']} {cell['name']}"
    repeats, load = result["repeats"], result["workload"]
    metrics = dict(_metrics(repeats, load))
    found.same(f"{where}: metrics", sorted(result["metrics"]), sorted(key for key, each in metrics.items() if each))
    for key, stats in metrics.items():
        recorded = result["metrics"].get(key, {}).get("stats", {})
        found.same(f"{where} {key}: statistics", sorted(recorded), sorted(stats))
        for name in stats.keys() & recorded.keys():
            _same_stat(found, f"{where} {key}.{name}", recorded[name], stats[name])
    failed = [check["name"] for check in result["checks"] if check["status"] == "fail"]
    found.same(f"{where}: valid", result["valid"], not failed)
    broken = list(_broken(repeats, load))
    found.same(f"{where}: broken identities that no check tells of", [] if failed else broken, [])
    _floors(found, where, cell, result, metrics)
    if cell.get("usd_per_million") and result["metrics"].get("tps"):
        _price(found, where, cell, row)


def _metrics(repeats: list[Json], load: Json) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """By metric, then statistic: its value in each repeat."""
    whole = [[sample for sample in repeat["samples"] if _ended(sample)] for repeat in repeats]
    for key, of_one in _DISTRIBUTIONS.items():
        each = [np.array([v for s in samples for v in of_one(s)], dtype=float) for samples in whole]
        yield key, _distribution(each)
    for key, of_run in _RUNS.items():
        values = [value for samples in whole if samples and (value := of_run(samples, load)) is not None]
        yield key, {"value": values} if values else {}


def _ended(sample: Json) -> bool:
    return sample.get("error") is None and sample.get("first_token_ns") is not None


def _tpot(sample: Json) -> list[float]:
    count = sample["output_tokens"] - 1
    return [(sample["last_token_ns"] - sample["first_token_ns"]) / 1e6 / count] if count > 0 else []


_DISTRIBUTIONS: dict[str, Callable[[Json], list[float]]] = {
    "ttft_ms": lambda s: [(s["first_token_ns"] - s["submit_ns"]) / 1e6],
    "tpot_ms": _tpot,
    "itl_ms": lambda s: [gap / 1e6 for gap in s["gaps_ns"]],
    "e2e_ms": lambda s: [(s["last_token_ns"] - s["submit_ns"]) / 1e6],
    "tps_user": lambda s: [1e3 / value for value in _tpot(s) if value],
}


def _span_s(samples: list[Json]) -> float:
    return (max(s["last_token_ns"] for s in samples) - min(s["submit_ns"] for s in samples)) / 1e9


def _window(samples: list[Json], load: Json) -> float | None:
    """Tokens a second between the first and the last moment at which as many requests ran as were asked."""
    if load["concurrency"] is None or load["request_rate"] is not None:
        return None
    starts, ends = (np.array([s[key] for s in samples]) for key in ("submit_ns", "last_token_ns"))
    moments = np.unique(np.concatenate((starts, ends)))
    running = np.array([((starts <= at) & (ends > at)).sum() for at in moments])
    full = np.flatnonzero(running == load["concurrency"])
    if not full.size:
        return None
    # A request that ends at the moment another begins leaves first; what runs from a moment on lasts to the next.
    begin, end = moments[full[0]], moments[full[-1] + 1]
    times = np.concatenate([s["first_token_ns"] + np.cumsum([0, *s["gaps_ns"]]) for s in samples])
    return float(((times > begin) & (times <= end)).sum() / (end - begin) * 1e9) if end > begin else None


_RUNS: dict[str, Callable[[list[Json], Json], float | None]] = {
    "tps": lambda samples, _: sum(s["output_tokens"] for s in samples) / _span_s(samples),
    "tps_window": _window,
    "total_tps": lambda samples, _: sum(s["output_tokens"] + s["prompt_tokens"] for s in samples) / _span_s(samples),
    "requests_s": lambda samples, _: len(samples) / _span_s(samples),
    "in_flight": lambda samples, _: sum(s["last_token_ns"] - s["submit_ns"] for s in samples) / 1e9 / _span_s(samples),
}


def _distribution(each: list[np.ndarray]) -> dict[str, list[float]]:
    if not each or not all(samples.size for samples in each):
        return {}
    stats = {name: [float(getattr(np, name)(samples)) for samples in each] for name in ("mean", "min", "max")}
    for name, (percent, least) in PERCENTILES.items():
        if all(samples.size >= least for samples in each):
            stats[name] = [_percentile(samples, percent) for samples in each]
    return stats


def _percentile(samples: np.ndarray, percent: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = np.sort(samples)
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _same_stat(found: Differences, where: str, recorded: Json, values: list[float]) -> None:
    centre = float(np.sort(values)[(len(values) - 1) // 2] + np.sort(values)[len(values) // 2]) / 2
    found.same(where, recorded["value"], centre)
    found.same(f"{where}: repeats", len(recorded["repeats"]), len(values))
    for index, (one, again) in enumerate(zip(recorded["repeats"], values, strict=False)):
        found.same(f"{where}: repeat {index}", one, again)
    if len(values) < 3:
        found.same(f"{where}: interval of fewer than three", [recorded.get("low"), recorded.get("high")], [None, None])
        return
    low, high = _interval(values, centre)
    found.same(f"{where}: low", recorded.get("low"), low, tolerance=1e-4)
    found.same(f"{where}: high", recorded.get("high"), high, tolerance=1e-4)


def _interval(values: list[float], centre: float) -> tuple[float, float]:
    """Student's 95 % interval of the logarithms where all are positive, widened to hold the median."""
    positive = min(values) > 0
    scaled = np.log(values) if positive else np.array(values)
    half = _student(len(values) - 1) * scaled.std(ddof=1) / math.sqrt(len(values))
    ends = np.array([scaled.mean() - half, scaled.mean() + half])
    low, high = np.exp(ends) if positive else ends
    return min(float(low), centre), max(float(high), centre)


@cache
def _student(degrees: int) -> float:
    """The two-sided 95 % point, by adding up the density until 0.975 (good to six digits)."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    t, width = np.linspace(0, 20, 400_001, retstep=True)
    density = scale * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2 * width)))
    return float(np.interp(0.475, area, t))


def _broken(repeats: list[Json], load: Json) -> Iterator[str]:
    """Identities of raw samples that do not hold."""
    for sample in (sample for repeat in repeats for sample in repeat["samples"]):
        name = sample["request_id"]
        if not _ended(sample):
            yield f"{name} did not end"
            continue
        gaps, first, last = sample["gaps_ns"], sample["first_token_ns"], sample["last_token_ns"]
        if sample["submit_ns"] > first or min(gaps, default=0) < 0 or first + sum(gaps) != last:
            yield f"{name}: times do not add up"
        if load["ignore_eos"] and not sample["output_tokens"] == load["osl"] == len(gaps) + 1:
            yield f"{name}: {sample['output_tokens']} tokens of {load['osl']}"
        if load["isl"] and sample["prompt_tokens"] != load["isl"]:
            yield f"{name}: a prompt of {sample['prompt_tokens']}"


def _floors(found: Differences, where: str, cell: Json, result: Json, metrics: Json) -> None:
    """Floors by measured ceilings and by the datasheet, and the result's shares of the machine's limit."""
    plan, load = result["engine"]["plan"], result["workload"]
    peak = max(repeat["kv"].get("requests_peak") or 0 for repeat in result["repeats"])
    asked = min(load["concurrency"] or plan["limits"]["max_batch_size"], plan["limits"]["max_batch_size"])
    wide_only = "fp32" if plan["quant"]["weights"] == "fp32" else None
    ceilings = recount.rates_of(result["environment"]["machine_limits"], wide_only=wide_only)
    for name, rates in (("floor_measured", ceilings), ("floor_datasheet", recount.DATASHEET.get(plan["gpu"], {}))):
        recorded = cell.get(name)
        batch = recorded["batch"] if recorded else max(1, peak or asked)
        if peak and recorded:
            found.same(f"{where} {name}: batch", batch, peak)
        least = recount.floor_s(plan, load, rates, batch)
        found.same(f"{where} {name}: known", recorded is not None, least is not None)
        if recorded is None or least is None:
            continue
        prompt_s, step_s = least
        requests = load["concurrency"]
        round_s = requests * prompt_s + math.ceil(requests / batch) * (load["osl"] - 1) * step_s
        found.same(f"{where} {name}: step", recorded["step_ms"]["value"], 1e3 * step_s)
        found.same(f"{where} {name}: tok/s", recorded["tps"]["value"], requests * load["osl"] / round_s)
        ttft = recorded["ttft_ms"]
        found.same(
            f"{where} {name}: TTFT", None if ttft is None else ttft["value"], 1e3 * prompt_s * (requests == 1) or None
        )
    batch = max(1, min(asked, peak or asked))
    per_step = _tokens_per_step(result["repeats"])
    least = recount.floor_s(plan, load, ceilings, batch)
    again = _shares(least, metrics, load, batch) if least else {}
    if again and plan.get("speculation"):
        # A step gives a request several tokens: one may be luckier than the mean, so its TPOT has no known limit.
        guessing = recount.floor_s(plan, load, ceilings, batch, per_step=per_step)
        again = {key: value for key, value in again.items() if key == "ttft_ms"}
        again |= {"tps": _shares(guessing, metrics, load, batch)["tps"]} if guessing else {}
    shares = {key: entry["value"] for key, entry in result.get("shares", {}).items()}
    found.same(f"{where}: shares", sorted(shares), sorted(again))
    for key in shares.keys() & again.keys():
        found.same(f"{where}: share of {key}", shares[key], again[key])


def _tokens_per_step(repeats: list[Json]) -> float:
    """Tokens for each decode step of a request: an accepted guess saved one, and the first token came with the prompt."""
    written = sum(max(sample["output_tokens"] - 1, 0) for repeat in repeats for sample in repeat["samples"])
    accepted = sum(repeat["kv"].get("accepted_tokens") or 0 for repeat in repeats)
    return written / max(written - accepted, 1)


def _shares(least: tuple[float, float], metrics: Json, load: Json, batch: int) -> dict[str, float]:
    prompt_s, step_s = least

    def middle(key: str, name: str) -> float:
        return float(np.median(metrics[key][name]))

    seconds = batch * prompt_s + (load["osl"] - 1) * step_s
    found = {"ttft_ms": 1e3 * prompt_s / middle("ttft_ms", "p50")}
    if metrics["tpot_ms"]:
        found["tpot_ms"] = 1e3 * step_s / middle("tpot_ms", "p50")
    return found | {"tps": middle("tps", "value") * seconds / (batch * load["osl"])}


def _price(found: Differences, where: str, cell: Json, row: Json) -> None:
    """Every price of a row comes from one price of an hour."""

    def hour(other: Json) -> float:
        rate = other["result"]["metrics"]["tps"]["stats"]["value"]["value"]
        return other["usd_per_million"]["value"] * rate * 3600 / 1e6

    first = next(other for other in row["cells"] if other.get("usd_per_million") and other.get("result"))
    found.same(f"{where}: USD of an hour, as of {first['name']}", hour(cell), hour(first))


def llama_differences(record: Json) -> Differences:
    """Every cell of every row."""
    found = Differences()
    for row in record["rows"]:
        for cell in row["cells"]:
            cell_differences(found, row, cell)
    return found
