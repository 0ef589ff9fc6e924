"""Recompute a GPU run's records from their raw samples, with arithmetic of its own (numpy; nothing of trtkit).

    python3 bench/gpu/recompute.py OUT_DIR|record.json ...

llama70b.json: every metric with its interval from raw token times, validity from the raw identities, floors and shares from
the plan's shape and the record's ceilings, price from throughput. kernels.json: medians and percentiles from the samples,
floors and shares from the recorded work and ceilings. h2o.json: steps from single gaps, ratios of rounds, gain in flight.
probe.json: every rate and ceiling. peers.json: every round from the times of its tokens. Prints a line for each difference and the sum of all last; exit 1 if there is one, or nothing was there to recompute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.recompute_cells import Differences, Json, llama_differences


def kernel_differences(record: Json) -> Differences:
    """Every row of kernels.json."""
    found = Differences()
    for row in record["rows"]:
        where = f"{row['name']} {row['dtype']} {row['shape']}"
        right = row["error"] is not None and row["error"] <= row["error_bound"]
        found.same(f"{where}: ok", row["ok"], right)
        for which in ("timing", "torch_timing"):
            if row.get(which):
                _timing(found, f"{where} {which}", row[which])
        ours, theirs = row.get("timing"), row.get("torch_timing")
        floor = _kernel_floor(row, record["limits"])
        found.same(f"{where}: floor", row["floor_us"], floor)
        median = ours["median_us"] if ours else None
        found.same(f"{where}: share", row["share"], floor / median if floor and median else None)
        ratio = theirs["median_us"] / median if theirs and median else None
        found.same(f"{where}: torch / ours", row["times_torch"], ratio)
        shape = row["shape"]
        if {"T", "O", "I"} <= shape.keys():
            found.same(f"{where}: operations", row["flops"], 2.0 * shape["T"] * shape["O"] * shape["I"])
    return found


def _timing(found: Differences, where: str, timing: Json) -> None:
    raw = np.sort(np.array(timing["raw_us"]))
    found.same(f"{where}: samples", timing["samples"], len(raw))
    if len(raw):
        found.same(f"{where}: median", timing["median_us"], float(np.median(raw)))
        found.same(f"{where}: least", timing["least_us"], float(raw[0]))
        for name, share in (("p10_us", 0.1), ("p90_us", 0.9)):
            found.same(f"{where}: {name}", timing[name], float(raw[min(len(raw) - 1, int(share * len(raw)))]))


def _kernel_floor(row: Json, limits: Json) -> float | None:
    rates = {key: entry["value"] for key, entry in limits.items()}
    narrow, wide = rates.get(f"matmul_flops_s.{row['operands']}"), rates.get("matmul_flops_s.bf16")
    if "read_bytes_s" not in rates or (row["flops"] and (narrow is None or (row["wide_flops"] and wide is None))):
        return None
    parts = [row["bytes_moved"] / rates["read_bytes_s"], rates.get("graph_node_s", 0.0)]
    if row["flops"] and narrow:
        parts.append((row["flops"] - row["wide_flops"]) / narrow + row["wide_flops"] / (wide or narrow))
    return 1e6 * max(parts)


def probe_differences(record: Json) -> Differences:
    """Every rate from its samples, and each ceiling from the row that it names."""
    found = Differences()
    rows = {row["name"]: row for row in record["rows"]}
    for name, row in rows.items():
        timing, work = row["timing"], row["bytes_moved"] or row["flops"]
        if timing:
            _timing(found, name, timing)
            seconds = timing["median_us"] / 1e6
            found.same(f"{name}: value", row["value"], seconds if row["unit"] == "s" else work / seconds)
        elif row["raw_s"]:
            found.same(f"{name}: value", row["value"], float(np.median(row["raw_s"])))
    for key, limit in record["limits"].items():
        row = rows.get(limit["note"].removesuffix(", median"))
        found.same(f"{key}: of a right result", bool(row and row["ok"]), True)
        found.same(key, limit["value"], row and row["value"])
    return found


def h2o_differences(record: Json) -> Differences:
    """Every row of h2o.json."""
    found = Differences()
    rows = {(row["item"], row["variant"] == "full"): row for row in record["rows"]}
    for (item, _), row in rows.items():
        where, values, samples = f"{item}, {row['variant']}", row["values"], row["samples"]
        if samples.get("gaps_ms"):
            means = np.array(samples["gaps_ms"]).reshape(len(samples["step_ms"]), -1).mean(axis=1)
            for index, (one, again) in enumerate(zip(samples["step_ms"], means, strict=True)):
                found.same(f"{where} step_ms: round {index}", one, float(again))
        for key in ("step_ms", "over_full", "ttft_ms"):
            if key in samples:
                _rounds(found, f"{where} {key}", values[key], samples[key])
        if "over_full" in samples and (item, True) in rows:
            before = rows[item, True]["samples"]["step_ms"]
            for index, one in enumerate(samples["over_full"]):
                found.same(f"{where} over_full: round {index}", one, samples["step_ms"][index] / before[index] - 1)
        if "eviction_ms" in samples:
            found.same(
                f"{where} eviction", values["eviction_ms_per_step"]["value"], float(np.mean(samples["eviction_ms"]))
            )
        if item == "in flight" and "in_flight" in values:
            replayed = values["replay_in_flight"]["value"]
            found.same(f"{where}: the scheduler's replay of the same steps", values["in_flight"]["value"], replayed)
    return found


def _rounds(found: Differences, where: str, value: Json, samples: list[float]) -> None:
    for key, again in (("value", np.median(samples)), ("low", np.min(samples)), ("high", np.max(samples))):
        found.same(f"{where}: {key}", value[key], float(again))


def peer_differences(record: Json) -> Differences:
    """Every round of peers.json from the times of its tokens."""
    found = Differences()
    for cell in record["cells"]:
        where = f"{cell['who']} {cell['model']} {cell['precision']} c{cell['concurrency']} {cell['isl']}/{cell['osl']}"
        found.same(f"{where}: rounds, or a reason for none", bool(cell["rounds"] or cell["not_run"]), True)
        for index, each in enumerate(cell["rounds"]):
            requests = each["requests"]
            found.same(f"{where}: requests of round {index}", len(requests), cell["concurrency"])
            made = [request["tokens"][-1] for request in requests]
            found.same(f"{where}: tokens of round {index}", made, [cell["osl"]] * len(requests))
            asked, first, last = (
                np.array(times)
                for times in zip(*((r["asked_ms"], r["times_ms"][0], r["times_ms"][-1]) for r in requests), strict=True)
            )
            after = np.array([cell["osl"] - request["tokens"][0] for request in requests]).clip(min=1)
            tps = sum(made) / (last.max() - asked.min()) * 1e3
            for key, again in (("ttft_ms", np.median(first - asked)), ("tpot_ms", np.median((last - first) / after))):
                found.same(f"{where}: {key} of round {index}", each[key], float(again))
            found.same(f"{where}: tps of round {index}", each["tps"], float(tps))
    return found


KINDS: dict[str, Callable[[Json], Differences]] = {
    "gpu-llama70b": llama_differences,
    "gpu-probe": probe_differences,
    "gpu-kernels": kernel_differences,
    "gpu-h2o": h2o_differences,
    "gpu-peers": peer_differences,
}


def recompute(path: Path) -> Differences | None:
    """Differences of one record; None where it is of a kind that keeps no raw samples.

    Raises:
        ValueError: not a record.
    """
    body = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or "kind" not in body:
        raise ValueError(f"{path}: not a record of trtkit")
    check = KINDS.get(body["kind"])
    try:
        return None if check is None else check(body["data"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not as a record is written: {type(error).__name__} {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="OUT_DIR|record.json")
    paths = [
        file
        for path in parser.parse_args().paths
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    compared = different = 0
    for path in paths:
        try:
            found = recompute(path)
        except (OSError, ValueError) as error:
            print(f"recompute: {error}", file=sys.stderr)
            return 1
        if found is None:
            continue
        for line in found:
            print(f"{path.name}: {line}")
        print(f"{path.name}: {found.compared} numbers compared, {len(found)} differ")
        compared, different = compared + found.compared, different + len(found)
    print(
        f"recomputed from raw samples: {compared:,} numbers, {different:,} differ"
        if compared
        else "no raw samples here"
    )
    return 0 if compared and not different else 1


if __name__ == "__main__":
    raise SystemExit(main())
