"""Fit the planner's constants to published measurements and write `trtkit/plan/calibration.json`.

    OMP_NUM_THREADS=1 python bench/calibrate.py [--facts ../shared/facts] [--check]

Reads perf-truth.csv, op-70b-gemm-sums.csv and aiconfigurator-estimates.csv from the facts directory; none of their
rows is copied into the project. Prints the error on whole configurations (stack, GPU, precision, ranks, lengths) left
out of the fit, and the comparison with aiconfigurator on the rows both cover. --check fits nothing and only reports
how the committed constants do.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from trtkit.plan import perfmodel
from trtkit.plan.calibration import BUILT_IN, FIRST_NEW_SCHEDULER, load_calibration, rates_of, version_number
from trtkit.plan.names import precision_from
from trtkit.plan.roofline import floors
from trtkit.plan.rows import TableRow, try_parse
from trtkit.plan.scenario import Scenario, load_of

# Prior (value, width in log) of each constant, and how far one GPU's or stack's may stray from the common value.
# weight_bw and prefill_mfu are relative to what the matrix kernels alone reach (OP_PRIOR where none was measured).
RATES = {
    "weight_bw": (1.0, 0.04, 0.06),
    "kv_bw": (0.6, 0.3, 0.2),
    "decode_mfu": (0.55, 0.3, 0.15),
    "attention_mfu": (0.35, 0.3, 0.2),
    "comm_us": (6.0, 0.4, 0.3),
    "link": (0.5, 0.3, 0.2),
    "step_ms": (2.0, 0.4, 0.2),
    "seq_us": (10.0, 0.6, 0.3),
    "prefill_mfu": (0.95, 0.05, 0.08),
}
SERVING = {
    "slowdown": (1.0, 0.03),
    "step": (1.0, 0.25),
    "seq": (1.0, 0.5),
    "comm": (1.0, 0.3),
    "interrupt": (0.8, 0.2),
    "host_ms": (15.0, 0.7),
    "first": (0.85, 0.15),
    "queue": (0.08, 0.6),
    "queue_power": (0.6, 0.3),
    "pool": (1.0, 0.1),
    "burst": (0.03, 0.6),
}
VERSION = {"speed": (1.0, 0.05), "max_batch": (1.0, 1.0), "reserve": (1.0, 0.5)}
POOL = {
    "runtime_gb": (1.5, 0.3),
    "pool_fraction": (0.9, 0.03),
    "sharpness": (2.5, 0.3),
    "tp_runtime_gb": (2.0, 0.4),
}
OP_PRIOR = {"weight_bw": 0.7, "prefill_mfu": 0.62}
CORRECTION_WIDTH = 0.06
SPREAD = {"throughput": 0.05, "ttft": 0.08, "tpot": 0.05}
OLD_WEIGHT = 0.4
METRIC_CLASS = {
    "throughput_tok_s_total": "throughput",
    "per_gpu": "throughput",
    "ttft_ms": "ttft",
    "tpot_ms": "tpot",
    "itl_ms": "tpot",
    "decode_tok_s_user": "tpot",
}
# Not one configuration: an untuned baseline of the tuning guide, speculative decoding, lengths lost in the excerpt.
SKIP_NOTES = (
    "tab headings",
    "without XQA",
    "spec dec",
    "baseline",
    "+multiple",
    "+paged",
    "+gemm_plugin",
    "8-GPU rows",
)
OP_DTYPES = {"bfloat16": "bf16", "fp8": "fp8", "int8_wo": "int8", "sq": "int8-sq", "int4_wo": "int4-awq"}
OP_GPUS = {"a100_sxm": "a100-80gb-sxm", "h100_sxm": "h100-sxm", "h200_sxm": "h200", "l40s": "l40s"}
SAME_CHIP = {"h100-sxm": "h200", "h200": "h100-sxm", "a100-80gb-pcie": "a100-80gb-sxm", "gh200": "h200"}


@dataclass(frozen=True)
class Observation:
    row: TableRow
    value: float
    source: str

    @property
    def scenario(self) -> Scenario:
        return self.row.scenario

    @property
    def kind(self) -> str:
        return METRIC_CLASS[self.row.metric]

    @property
    def group(self) -> str:
        return f"{self.scenario.gpu.name}/{self.scenario.precision.family}"

    @property
    def release(self) -> str:
        number = version_number(self.scenario.version or "1.2")
        return f"{number[0]}.{number[1]}"

    @property
    def old(self) -> bool:
        return version_number(self.scenario.version or "1.2") < FIRST_NEW_SCHEDULER

    @property
    def configuration(self) -> tuple:
        s = self.scenario
        return (s.stack, s.gpu.name, s.precision.family, s.tp, s.isl, s.osl)


def observations(path: Path) -> list[Observation]:
    """Every row that is one configuration of one stack, with a value."""
    found = []
    with path.open(newline="", encoding="utf-8") as handle:
        for raw in csv.DictReader(handle):
            row, _ = try_parse(raw)
            skipped = any(word in (raw["notes"] or "") for word in SKIP_NOTES)
            if row is None or skipped or row.metric not in METRIC_CLASS or not float(raw["value"] or 0) > 0:
                continue
            if row.scenario.stack in ("tensorrt-llm", "tensorrt-llm-served", "nim", "vllm", "lmdeploy", "gpt-fast"):
                found.append(Observation(row, float(raw["value"]), raw["source"]))
    # A GPU seen in a single source of a handful of rows teaches nothing about it.
    rows = Counter(o.group for o in found)
    return [o for o in found if rows[o.group] >= 4 or o.scenario.precision.family == "int8"]


class Fit:
    """The vector of constants (logarithms, relative to their priors) and what it predicts for the observations."""

    def __init__(self, seen: list[Observation], kernels: dict) -> None:
        self.seen = seen
        self.groups = sorted({o.group for o in seen})
        self.stacks = sorted({o.scenario.stack for o in seen})
        self.releases = sorted({o.release for o in seen}, key=version_number)
        self.kernel = np.array([[kernel_share(kernels, group, name) for name in RATES] for group in self.groups])
        self.load = load_of([o.scenario for o in seen])
        self.group_of = np.array([self.groups.index(o.group) for o in seen])
        self.stack_of = np.array([self.stacks.index(o.scenario.stack) for o in seen])
        self.release_of = np.array([self.releases.index(o.release) for o in seen])
        self.old = np.array([int(o.old) for o in seen])
        self.terms = perfmodel.correction_terms(self.load.isl, self.load.osl, self.load.tp)
        self.metric = np.array([o.row.metric for o in seen])
        self.kind = np.array([o.kind for o in seen])
        self.replicas = np.array([o.row.replicas for o in seen])
        self.gpus = np.array([float(o.row.num_gpus) for o in seen])
        self.target = np.log([o.value for o in seen])
        self.weight = np.array([(OLD_WEIGHT if o.old else 1.0) / SPREAD[o.kind] for o in seen])
        widths = [w for _, w, _ in RATES.values()]
        widths += [w for _ in self.groups for _, _, w in RATES.values()]
        widths += [w for _ in self.stacks for _, w in SERVING.values()]
        widths += [w for _ in self.releases for _, w in VERSION.values()]
        widths += [w for _, w in POOL.values()]
        widths += [CORRECTION_WIDTH] * (2 * perfmodel.CORRECTION_TERMS)
        self.widths = np.array(widths)

    def constants(self, vector: np.ndarray) -> dict:
        theta = vector * self.widths
        take = iter_blocks(theta)
        base = take(len(RATES))
        groups = take(len(self.groups) * len(RATES)).reshape(len(self.groups), len(RATES))
        stacks = take(len(self.stacks) * len(SERVING)).reshape(len(self.stacks), len(SERVING))
        releases = take(len(self.releases) * len(VERSION)).reshape(len(self.releases), len(VERSION))
        pool = take(len(POOL))
        corrections = take(2 * perfmodel.CORRECTION_TERMS).reshape(2, perfmodel.CORRECTION_TERMS)

        def values(priors: dict, logs: np.ndarray) -> np.ndarray:
            return np.array([p[0] for p in priors.values()]) * np.exp(logs)

        return {
            "groups": values(RATES, base + groups) * self.kernel,
            "serving": values(SERVING, stacks),
            "versions": values(VERSION, releases),
            "pool": values(POOL, pool),
            "corrections": corrections,
        }

    def log_prediction(self, vector: np.ndarray) -> np.ndarray:
        c = self.constants(vector)
        rates = perfmodel.Rates(
            rate=dict(zip(RATES, c["groups"][self.group_of].T, strict=True)),
            serving=dict(zip(SERVING, c["serving"][self.stack_of].T, strict=True)),
            version=dict(zip(VERSION, c["versions"][self.release_of].T, strict=True)),
            pool=dict(zip(POOL, c["pool"], strict=True)),
            correction=(c["corrections"][self.old] * self.terms).sum(axis=-1),
        )
        return np.log(in_metric(self, perfmodel.closed_loop(self.load, rates)))

    def solve(self, use: np.ndarray, start: np.ndarray | None = None, evaluations: int = 60) -> np.ndarray:
        start = np.zeros(len(self.widths)) if start is None else start

        def residuals(vector: np.ndarray) -> np.ndarray:
            error = (self.log_prediction(vector) - self.target) * self.weight * use
            return np.concatenate([error, vector])

        return least_squares(residuals, start, loss="soft_l1", max_nfev=evaluations).x


def iter_blocks(vector: np.ndarray):
    position = 0

    def take(count: int) -> np.ndarray:
        nonlocal position
        position += count
        return vector[position - count : position]

    return take


def in_metric(fit: Fit, times: perfmodel.Times) -> np.ndarray:
    """Predictions in each observation's own metric and unit."""
    total = times.tok_s * fit.replicas
    choices = {
        "throughput_tok_s_total": total,
        "per_gpu": total / fit.gpus,
        "ttft_ms": times.ttft_s * 1e3,
        "tpot_ms": times.tpot_s * 1e3,
        "itl_ms": times.tpot_s * 1e3,
        "decode_tok_s_user": 1 / times.tpot_s,
    }
    return np.select([fit.metric == name for name in choices], list(choices.values()))


def left_out(fit: Fit, start: np.ndarray, count: int) -> np.ndarray:
    """Errors of each observation when its configuration, in every release, was not in the fit."""
    names = sorted({o.configuration for o in fit.seen})
    np.random.default_rng(0).shuffle(names)
    names = [tuple(name) for name in names]
    fold_of = {tuple(str(x) for x in name): index % count for index, name in enumerate(names)}
    folds = np.array([fold_of[tuple(str(x) for x in o.configuration)] for o in fit.seen])
    errors = np.zeros(len(fit.seen))
    for fold in range(count):
        held = folds == fold
        errors[held] = (fit.log_prediction(fit.solve(~held, start, evaluations=12)) - fit.target)[held]
    return errors


def bands(fit: Fit, errors: np.ndarray) -> dict:
    """Median and 90th percentile of the left-out errors: by metric, by stack, by stack and release."""
    size = np.abs(errors)
    keys = defaultdict(list)
    for index, o in enumerate(fit.seen):
        keys[o.kind].append(index)
        keys[f"{o.kind}/{o.scenario.stack}"].append(index)
        keys[f"{o.kind}/{o.scenario.stack}/{'old' if o.old else 'new'}"].append(index)
    return {
        key: {"median": rounded(np.median(size[rows])), "p90": rounded(np.quantile(size[rows], 0.9)), "rows": len(rows)}
        for key, rows in sorted(keys.items())
        if len(rows) >= 20 or "/" not in key
    }


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def named(names: dict, values: np.ndarray) -> dict:
    return {name: rounded(value) for name, value in zip(names, values, strict=True)}


def kernel_tables(path: Path) -> dict:
    """(GPU, precision) -> tokens -> the row of summed kernel latencies."""
    sums: dict = defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if row["system"] in OP_GPUS and row["dtype"] in OP_DTYPES:
                sums[OP_GPUS[row["system"]], OP_DTYPES[row["dtype"]]][int(row["m"])] = row
    return dict(sums)


def kernel_share(sums: dict, group: str, name: str) -> float:
    """Share of the datasheet peak that a group's matrix kernels reach: of bytes at 8 and 32 tokens, of operations at
    512 and 4,096. 1 for every other constant."""
    column, sizes = {"weight_bw": ("mbu", (8, 32)), "prefill_mfu": ("mfu", (512, 4096))}.get(name, ("", ()))
    if not column:
        return 1.0
    for (gpu, precision), rows in sums.items():
        if group == f"{gpu}/{precision_from(precision).family}":
            return math.sqrt(math.prod(float(rows[size][column]) for size in sizes))
    return OP_PRIOR[name]


def op_groups(groups: dict, sums: dict) -> dict:
    """Constants of precisions that were never served in public, scaled from kernel tables: the fitted 16-bit (or FP8)
    constants of the same GPU, times the ratio of the kernels' efficiencies."""
    found = {}
    for gpu in ("a100-80gb-sxm", "a100-80gb-pcie", "h100-sxm", "h200", "gh200", "l40s"):
        for precision in ("bf16", "fp8", "int8", "int8-sq", "int4-awq"):
            key = f"{gpu}/{precision_from(precision).family}"
            table = gpu if (gpu, precision) in sums else SAME_CHIP.get(gpu, "")
            if key in groups or (table, precision) not in sums:
                continue
            found[key] = scaled(groups, gpu, table, sums, precision)
    return found


def scaled(groups: dict, gpu: str, table: str, sums: dict, precision: str) -> dict:
    reference_gpu, reference = next(
        (g, p)
        for g in (gpu, SAME_CHIP.get(gpu, ""), table, "h100-sxm")
        for p in ("bf16", "fp8")
        if f"{g}/{precision_from(p).family}" in groups and ((table, p) in sums or (g, p) in sums)
    )
    base = dict(groups[f"{reference_gpu}/{precision_from(reference).family}"]["rates"])
    own = sums[table, precision]
    other = sums[table, reference] if (table, reference) in sums else sums[reference_gpu, reference]

    def ratio(column: str, at: int) -> float:
        return float(own[at][column]) / float(other[at][column])

    base["weight_bw"] = rounded(base["weight_bw"] * math.sqrt(ratio("mbu", 8) * ratio("mbu", 32)))
    base["decode_mfu"] = rounded(base["decode_mfu"] * math.sqrt(ratio("mfu", 128) * ratio("mfu", 512)))
    base["prefill_mfu"] = rounded(base["prefill_mfu"] * math.sqrt(ratio("mfu", 512) * ratio("mfu", 4096)))
    borrowed = table != gpu or reference_gpu != gpu
    return {
        "rates": base,
        "basis": "borrowed" if borrowed else "op tables",
        "rows": 0,
        "provenance": f"{reference_gpu} {reference} constants x kernel ratios {precision}/{reference} on {table} "
        "(op-70b-gemm-sums.csv)",
    }


def calibration(fit: Fit, vector: np.ndarray, errors: np.ndarray, facts: Path, folds: int) -> dict:
    c = fit.constants(vector)
    rows = Counter(o.group for o in fit.seen)
    sources = defaultdict(set)
    for o in fit.seen:
        sources[o.group].add(o.source)
    groups = {
        name: {
            "rates": named(RATES, c["groups"][index]),
            "basis": "fitted",
            "rows": rows[name],
            "provenance": "perf-truth.csv: " + "; ".join(sorted(sources[name])),
        }
        for index, name in enumerate(fit.groups)
    }
    truth = facts / "perf-truth.csv"
    return {
        "provenance": {
            "script": "bench/calibrate.py",
            "data": f"perf-truth.csv sha256 {hashlib.sha256(truth.read_bytes()).hexdigest()[:16]}, {len(fit.seen)} rows used",
            "validation": f"{folds} folds over whole configurations (stack, GPU, precision, ranks, lengths)",
        },
        "groups": groups | op_groups(groups, kernel_tables(facts / "op-70b-gemm-sums.csv")),
        "serving": {name: named(SERVING, c["serving"][i]) for i, name in enumerate(fit.stacks)},
        "versions": {name: named(VERSION, c["versions"][i]) for i, name in enumerate(fit.releases)},
        "pool": named(POOL, c["pool"]),
        "corrections": {
            name: [rounded(x) for x in c["corrections"][index]] for index, name in enumerate(("new", "old"))
        },
        "errors": bands(fit, errors),
        "reserved_fraction": rounded(reserved_fraction(truth)),
        "highest_shares": highest_shares(fit.seen),
    }


def highest_shares(seen: list[Observation]) -> dict:
    """By metric class, the largest share of the physical limit that a measurement needed."""
    shares: dict = defaultdict(float)
    for o in seen:
        limits = floors(o.scenario)
        if o.kind == "throughput":
            total = o.value * (o.row.num_gpus if o.row.metric == "per_gpu" else 1)
            share = total / o.row.replicas / limits.tok_s.value
        elif o.row.metric == "decode_tok_s_user":
            share = o.value * limits.tpot_ms.value / 1e3
        else:
            share = (limits.ttft_ms if o.kind == "ttft" else limits.tpot_ms).value / o.value
        shares[o.kind] = max(shares[o.kind], share)
    return {kind: rounded(share) for kind, share in sorted(shares.items())}


def reserved_fraction(path: Path) -> float:
    """Median share of a GPU's memory that pool-reserving stacks were seen to use."""
    shares = []
    with path.open(newline="", encoding="utf-8") as handle:
        for raw in csv.DictReader(handle):
            row, _ = try_parse(raw)
            if row is not None and row.metric == "mem_gb":
                shares.append(float(raw["value"]) * 1e9 / row.scenario.gpu.memory_bytes)
    return float(np.median(shares))


def report(fit: Fit, errors: np.ndarray, title: str) -> None:
    print(f"{title}: median |error| (rows)")
    size, names = np.abs(errors), ("throughput", "tpot", "ttft")
    lines = {"all": np.ones(len(size), bool), "TensorRT-LLM 0.15 and newer, served": new_rows(fit)}
    for name, chosen in lines.items():
        cells = [
            f"{kind} {np.median(size[chosen & (fit.kind == kind)]):.1%} ({(chosen & (fit.kind == kind)).sum()})"
            for kind in names
        ]
        print(f"  {name}: " + ", ".join(cells))
    for what, of in (("stack", [o.scenario.stack for o in fit.seen]), ("group", [o.group for o in fit.seen])):
        print(f"  by {what}:")
        for key in sorted(set(of)):
            chosen = np.array([x == key for x in of])
            cells = [
                f"{kind} {np.median(size[chosen & (fit.kind == kind)]):.1%} ({(chosen & (fit.kind == kind)).sum()})"
                for kind in names
                if (chosen & (fit.kind == kind)).any()
            ]
            print(f"    {key}: " + ", ".join(cells))


def new_rows(fit: Fit) -> np.ndarray:
    return np.array([not o.old and o.scenario.stack not in ("lmdeploy", "gpt-fast") for o in fit.seen])


PEERS = {"h100_sxm": "h100-sxm", "h200_sxm": "h200", "a100_sxm": "a100-80gb-sxm"}
PEER_GEMM = {"fp8": "fp8", "bfloat16": "bf16", "int8_wo": "int8", "sq": "int8-sq", "int4_wo": "int4-awq"}


def compare_peer(fit: Fit, errors: np.ndarray, path: Path) -> None:
    """aiconfigurator's static estimates beside ours (left out), on single-request rows, lengths interpolated."""
    table = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if row["batch"] == "1" and row["ttft_ms"] and row["system"] in PEERS and row["gemm"] in PEER_GEMM:
                key = (PEERS[row["system"]], int(row["tp"]), precision_from(PEER_GEMM[row["gemm"]]).family)
                table[key].append((float(row["isl"]), float(row["ttft_ms"]), float(row["tpot_ms"])))
    ours: dict = defaultdict(list)
    theirs: dict = defaultdict(list)
    for o, error in zip(fit.seen, errors, strict=True):
        s = o.scenario
        points = sorted(table.get((s.gpu.name, s.tp, s.precision.family), ()))
        if s.concurrency not in (1, 4) or len(points) < 2 or o.kind == "throughput":
            continue
        if o.kind == "ttft" and (s.concurrency != 1 or s.isl < 16):
            continue
        isl, ttft, tpot = (np.array(x) for x in zip(*points, strict=True))
        guess = np.exp(np.interp(np.log(s.isl), np.log(isl), np.log(ttft if o.kind == "ttft" else tpot)))
        value = 1e3 / o.value if o.row.metric == "decode_tok_s_user" else o.value
        ours[o.kind].append(abs(error))
        theirs[o.kind].append(abs(math.log(guess / value)))
    print("against aiconfigurator, rows both cover (one request; TPOT also at four): median |error|")
    for kind in sorted(ours):
        print(
            f"  {kind}: ours {np.median(ours[kind]):.1%}, aiconfigurator {np.median(theirs[kind]):.1%} ({len(ours[kind])} rows)"
        )


def check(seen: list[Observation]) -> None:
    fit = Fit(seen, {})
    times = perfmodel.closed_loop(fit.load, rates_of([o.scenario for o in seen], load_calibration()))
    report(fit, np.log(in_metric(fit, times)) - fit.target, "committed constants, on the rows they were fitted to")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=Path, default=Path("../shared/facts"), help="directory with perf-truth.csv")
    parser.add_argument("--check", action="store_true", help="only report how the committed constants do")
    parser.add_argument("--folds", type=int, default=6, help="parts the configurations are left out in")
    parser.add_argument("--dry-run", action="store_true", help="fit and report, write nothing")
    args = parser.parse_args()
    seen = observations(args.facts / "perf-truth.csv")
    if args.check:
        check(seen)
        return
    fit = Fit(seen, kernel_tables(args.facts / "op-70b-gemm-sums.csv"))
    vector = fit.solve(np.ones(len(seen)))
    report(fit, fit.log_prediction(vector) - fit.target, "fitted to all rows")
    errors = left_out(fit, vector, args.folds)
    report(fit, errors, "whole configurations left out")
    compare_peer(fit, errors, args.facts / "aiconfigurator-estimates.csv")
    if args.dry_run:
        return
    BUILT_IN.write_text(
        json.dumps(calibration(fit, vector, errors, args.facts, args.folds), indent=1) + "\n", encoding="utf-8"
    )
    print(f"wrote {BUILT_IN}")


if __name__ == "__main__":
    main()
