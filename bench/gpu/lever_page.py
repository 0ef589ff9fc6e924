"""Tables of docs/gpu.md about levers: what each configuration should cost, and what the tiny model says of its answers.

Speeds are floors by the datasheet and predictions, never measurements; verdicts are measured, on a CPU, with the shipped
tiny model (`bench/levers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu.forecast import Numbers, attainable, cell_numbers, guesses, running_batch, step_seconds
from bench.gpu.memory import fits
from bench.gpu.rows import OSL, ROWS, Scale, plan_of, real_scale
from bench.levers import KIND, Exactness, LeversRecord, Verdict
from trtkit.plan.cost import cost_per_million
from trtkit.plan.prices import load_prices
from trtkit.spec.codec import read_record
from trtkit.spec.errors import UsageError
from trtkit.spec.plan import BuildPlan
from trtkit.spec.units import MS_PER_S
from trtkit.spec.workload import Workload

GPU = "h100-sxm"
RESULTS = Path(__file__).resolve().parents[1] / "results"
LEVER_OF = {
    "int8": "INT8 weights",
    "int8-tuned": "INT8 weights",
    "int8-h2o": "INT8 + H2O",
    "int8-h2o-long": "INT8 + H2O",
    "int8-kv8": "INT8 + FP8 cache",
    "int8-reuse": "INT8 weights",
    "fp8": "FP8 weights and operands",
    "fp8-kv8": "FP8 + FP8 cache",
    "int4": "INT4 weights",
    "int4-kv8": "INT4 + FP8 cache",
    "int4-h2o": "INT4 + H2O",
}
"""Row -> the lever (or stack of them) that bench/levers.py builds with the tiny model."""
NO_RECORD = "not run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """One row under one load: floor and prediction, and what a million output tokens costs at each."""

    row: str
    batch: int
    sheet: Numbers
    predicted: Numbers
    usd_floor: float
    usd_predicted: float


def newest_record(results: Path = RESULTS) -> LeversRecord | None:
    """What bench/levers.py measured last; None where it was never run."""
    found = sorted(results.glob("levers-cpu-*.json"))
    return read_record(found[-1], KIND, LeversRecord) if found else None


def priced_rows(isl: int, scale: Scale | None = None) -> list[Priced]:
    """Every row that fits, as many requests as its batch limit and its cache take, cheapest prediction first."""
    scale = scale or real_scale(GPU)
    price = load_prices().gpu_price(scale.gpu).usd_per_gpu_h
    found = []
    for key in LEVER_OF:
        plan = plan_of(key, scale)
        if not fits(plan):
            continue
        workload = _load(key, plan, isl)
        _, sheet, predicted = cell_numbers(plan, workload, {})
        if sheet is None or predicted is None:
            raise UsageError(f"{scale.gpu}: the catalog has no rates for {key}")
        costs = [cost_per_million(numbers.tps.value, price) for numbers in (sheet, predicted)]
        found.append(
            Priced(
                row=key,
                batch=sheet.batch,
                sheet=sheet,
                predicted=predicted,
                usd_floor=costs[0],
                usd_predicted=costs[1],
            )
        )
    return sorted(found, key=lambda each: each.usd_predicted)


def _load(key: str, plan: BuildPlan, isl: int) -> Workload:
    """A closed round of as many requests as run at once."""
    most = plan.limits.max_batch_size
    whole = Workload(
        isl=isl, osl=OSL, num_requests=most, concurrency=most, shared_prefix_tokens=int(ROWS[key].shared * isl)
    )
    batch = running_batch(plan, whole)
    return replace(whole, num_requests=batch, concurrency=batch)


def lever_table(results: Path = RESULTS) -> str:
    """Price of a million output tokens for every row by floor and by prediction, with the tiny model's verdict."""
    record = newest_record(results)
    parts = []
    for isl in (512, 4096):
        rows = [
            [
                ROWS[each.row].label,
                str(each.batch),
                f"{each.sheet.step_ms.value:.1f}",
                f"{each.predicted.step_ms.value:.1f}",
                f"{each.sheet.tps.value:,.0f}",
                f"{each.predicted.tps.value:,.0f}",
                f"{each.usd_floor:.2f}",
                f"{each.usd_predicted:.2f}",
                verdict_cell(record, each.row),
            ]
            for each in priced_rows(isl)
        ]
        head = [f"{isl:,}/{OSL} tokens", "in flight", "step ms: floor", "predicted", "tok/s: ceiling", "predicted"]
        head += ["USD per 1M output tokens: floor", "predicted", "gate, tiny model on a CPU"]
        parts.append(_markdown(head, rows))
    return "\n\n".join(parts)


def verdict_cell(record: LeversRecord | None, row: str) -> str:
    """The gate's answer for the row's lever in a few words; reuse also says whether its tokens were the same."""
    found = None if record is None else next((v for v in record.verdicts if v.lever == LEVER_OF[row]), None)
    text = NO_RECORD if found is None else f"{found.gate}, {found.difference_nats:+.3f} nats"
    exact = None if record is None else next((e for e in record.exact if e.lever == "prefix reuse"), None)
    if ROWS[row].shared and exact is not None:
        text += f"; reuse: {exact.same:,} of {exact.tokens:,} tokens the same"
    return text


def guess_table() -> str:
    """What checking guesses costs by prediction, from which acceptance it pays, and what one request would see."""
    rows = []
    scale, limits = real_scale(GPU), attainable(GPU)
    for batch in (1, 8):
        plain = plan_of("int8", scale)
        load = Workload(isl=512, osl=OSL, num_requests=batch, concurrency=batch)
        step_s = step_seconds(plain, load, limits, batch)
        for key in ("int8-ngram4", "int8-ngram8"):
            drafts = guesses(plan_of(key, scale), batch)
            checking_s = step_seconds(plain, load, limits, batch, drafts)
            speeds = [f"{(1 + accepted) / checking_s:.0f}" for accepted in (0, 0.5, 1, 2, 3)]
            pays = f"{checking_s / step_s - 1:.2f}"
            steps = [f"{step_s * MS_PER_S:.2f}", f"{checking_s * MS_PER_S:.2f}"]
            rows.append([str(batch), str(drafts), *steps, pays, f"{1 / step_s:.0f}", *speeds])
    head = [
        "requests",
        "guesses",
        "plain step ms",
        "checking step ms",
        "pays from accepted a step",
        "tok/s each, plain",
    ]
    return _markdown([*head, *(f"at {accepted}" for accepted in ("0", "0.5", "1", "2", "3"))], rows)


def verdict_table(results: Path = RESULTS) -> str:
    """Every verdict of the newest record, and the levers that may change no token."""
    record = newest_record(results)
    if record is None:
        return "Not run yet: `python bench/levers.py`."
    rows = [_verdict_row(found) for found in record.verdicts]
    head = ["lever", "gate", "nats per token (95 %)", "perplexity", "KL, nats", "same best token", "why"]
    plain = f"The plain engine ({' '.join(record.reference)}) has a perplexity of {record.perplexity:.3f}."
    exact = [_exact_row(found) for found in record.exact]
    return "\n\n".join([plain, _markdown(head, rows), _markdown(["lever", "tokens the same", "what it did"], exact)])


def _verdict_row(found: Verdict) -> list[str]:
    failed = [o for o in found.outcomes if o.status != "pass"]
    why = "; ".join(f"{o.rule.partition('[')[2].rstrip(']') or o.rule} {o.status}" for o in failed)
    return [
        found.lever,
        found.gate,
        f"{found.difference_nats:+.4f} ({found.low:+.4f} to {found.high:+.4f})",
        f"{found.perplexity:.3f}",
        f"{found.kl_nats:.4f}",
        f"{found.agreement:.1%}",
        why or "every task within its margin",
    ]


def _exact_row(found: Exactness) -> list[str]:
    counted = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in found.counters.items())
    return [found.lever, f"{found.same:,} of {found.tokens:,}", counted or "nothing"]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
