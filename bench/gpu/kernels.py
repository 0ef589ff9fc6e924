"""Every kernel at Llama 3 70B's true shapes: error against float64, share of its ceiling, against torch's own way.

    python3 bench/gpu/kernels.py --out kernels.json [--probe probe.json] [--time-limit-s 120] [--rehearse]

Inputs are drawn fresh (--seed repeats a run). Ceilings come from the probe's record, by default the one beside --out;
without one there are times and errors but no shares. What matters most runs first; what the time limit cut is listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import kernel_attention, kernel_fused, kernel_layer, kernel_products
from bench.gpu.common import Session, arguments, table
from bench.gpu.kernel_bench import (
    LLAMA_70B,
    TINY,
    Bench,
    KernelRow,
    datasheet_limits,
    fallbacks,
    probed_limits,
)
from bench.gpu.sources import began_s

KIND = "gpu-kernels"
KINDS = ("int8", "int4", "fp8", "bf16")
_MOST_ROWS = 17
Item = tuple[str, float, Callable[[], object]]


def main() -> None:
    """Run all items that fit the time."""
    args = parse_args()
    session = Session(KIND, args, KernelRow, began_s=began_s())
    limits = {} if session.rehearsal else probed_limits(args.probe or session.out.with_name("probe.json"))
    bench = Bench(
        session=session,
        scale=TINY if session.rehearsal else LLAMA_70B,
        limits=limits,
        datasheet=datasheet_limits(session.record.gpu),
    )
    session.record.limits.update(limits)
    if not limits and not session.rehearsal:
        session.record.notes.append("no probe record: shares of measured ceilings are unknown")
    session.items(items(bench))
    session.record.notes += fallbacks()
    session.finish(lines_of(session))


def parse_args() -> argparse.Namespace:
    """The common options and where the ceilings are."""
    parser = arguments(__doc__, time_limit_s=120)
    parser.add_argument("--probe", type=Path, help="the probe's record (default: probe.json beside --out)")
    return parser.parse_args()


def items(bench: Bench) -> list[Item]:
    """What to run, most important first, with the seconds each may need (assumed, tuning included)."""
    scale = bench.scale
    few, many = [t for t in scale.tokens if t <= 64], [t for t in scale.tokens if t > 64]
    planned: list[Item] = []
    for tokens in (few[0], few[-2], many[-1]):
        planned += _products(bench, "int8", tokens)
    planned += [item for rows in (scale.batches[0], scale.batches[-1]) for item in _layer(bench, "int8", rows)]
    planned += _prompt(bench, "int8")
    planned += _decode(bench, "fp16", scale.batches[-1], scale.contexts[-1])
    planned += _decode(bench, "fp16", scale.batches[0], scale.contexts[0])
    planned += _prefill(bench, "fp16")
    planned += _round(bench)
    planned += _fused(bench)
    planned += [item for tokens in (many[-1], few[0], few[-2]) for item in _products(bench, "fp8", tokens)]
    planned += _prompt(bench, "fp8")
    planned += [item for tokens in (few[0], few[-2], many[-1]) for item in _products(bench, "int4", tokens)]
    planned += [item for rows in (scale.batches[0], scale.batches[-1]) for item in _layer(bench, "int4", rows)]
    planned += _prompt(bench, "int4")
    for kind in ("fp16", "fp8"):
        for rows in scale.batches:
            for context in scale.contexts:
                planned += _decode(bench, kind, rows, context)
    for kind in KINDS:
        for tokens in scale.tokens:
            planned += _products(bench, kind, tokens)
    planned += _prefill(bench, "fp8")
    planned += _decode(bench, "bf16", scale.batches[-1], scale.contexts[-1]) + _prefill(bench, "bf16")
    planned += [item for kind in ("fp8", "bf16") for rows in scale.batches for item in _layer(bench, kind, rows)]
    return list({item[0]: item for item in planned}.values())


def _products(bench: Bench, kind: str, tokens: int) -> list[Item]:
    """The four matrices, and the head (16-bit whatever the rest is) for as many rows as are sampled at once."""
    found: list[Item] = [
        (f"{kind} {name} T={tokens}", 3.0, partial(kernel_products.product, bench, kind, name, tokens))
        for name in bench.scale.matrices
        if name != "lm_head"
    ]
    if kind == "fp8" and tokens > 64:
        inputs = bench.scale.hidden
        found.append((f"quantise T={tokens}", 1.0, partial(kernel_products.quantise_rows, bench, tokens, inputs)))
    if tokens <= 64:
        wide = "fp16" if kind in ("int4", "int8") else "bf16"
        head = partial(kernel_products.product, bench, wide, "lm_head", tokens)
        found.append((f"{wide} lm_head T={tokens}", 3.0, head))
    return found


def _decode(bench: Bench, kind: str, rows: int, context: int) -> list[Item]:
    run = partial(kernel_attention.decode, bench, kind, rows, context)
    return [(f"decode attention {kind} B={rows} N={context}", 3.0, run)]


def _layer(bench: Bench, kind: str, rows: int) -> list[Item]:
    context = bench.scale.contexts[0]
    run = partial(kernel_layer.decode_layer, bench, kind, rows, context)
    return [(f"decode layer {kind} B={rows} N={context}", 4.0, run)]


def _prompt(bench: Bench, kind: str) -> list[Item]:
    tokens = bench.scale.tokens[-1]
    return [(f"prefill layer {kind} T={tokens}", 6.0, partial(kernel_layer.prefill_layer, bench, kind, tokens))]


def _prefill(bench: Bench, kind: str) -> list[Item]:
    longest, chunk = bench.scale.contexts[-1], bench.scale.contexts[0]
    return [
        (f"prefill attention {kind} {count} after {longest - count}", 4.0, run)
        for count in (longest, chunk)
        for run in [partial(kernel_attention.prefill, bench, kind, count, longest - count)]
    ]


def _round(bench: Bench) -> list[Item]:
    short = bench.scale.budget + bench.scale.interval
    return [
        ("score", 4.0, partial(kernel_attention.score, bench)),
        (f"ranking N={short}", 2.0, partial(kernel_attention.rank, bench, short)),
        ("compaction", 4.0, partial(kernel_attention.compact, bench)),
        (f"ranking N={2 * bench.scale.budget}", 2.0, partial(kernel_attention.rank, bench, 2 * bench.scale.budget)),
    ]


def _fused(bench: Bench) -> list[Item]:
    found: list[Item] = []
    for tokens in (bench.scale.tokens[0], bench.scale.batches[-1], bench.scale.tokens[-1]):
        for name, run in (
            ("norm", kernel_fused.norm),
            ("activation", kernel_fused.activation),
            ("rotation", kernel_fused.rotation),
            ("embedding", kernel_fused.embedding),
        ):
            found.append((f"{name} T={tokens}", 1.5, partial(run, bench, tokens)))
    for rows in (bench.scale.batches[0], bench.scale.batches[-1]):
        found.append((f"greedy R={rows}", 1.5, partial(kernel_fused.greedy, bench, rows)))
    rows = bench.scale.batches[-1]
    found.append((f"rotation fp8 T={rows}", 1.5, partial(kernel_fused.rotation, bench, rows, fp8=True)))
    many = bench.scale.tokens[-1]
    found.append((f"norm to fp8 T={many}", 1.5, partial(kernel_fused.norm_fp8, bench, many)))
    found.append((f"activation to fp8 T={many}", 1.5, partial(kernel_fused.activation_fp8, bench, many)))
    found.append((f"sampling R={rows}", 2.0, partial(kernel_fused.drawing, bench, rows)))
    return found


def lines_of(session: Session) -> list[str]:
    """A short table: products summed over a step, everything else at its largest shape, and what went wrong."""
    record = session.record
    rows: list[KernelRow] = record.rows
    wrong = [f"WRONG: {row.name} {row.shape}: error {row.error}, bound {row.error_bound}" for row in rows if not row.ok]
    if record.rehearsal:
        return [f"kernels: rehearsal, {len(rows)} rows ran, {len(wrong)} wrong, no rates", *wrong]
    lines = [f"kernels on {record.gpu}: {len(rows)} rows, {len(wrong)} wrong"]
    lines += table([["ms of a step's products (of ceiling)", *map(str, LLAMA_70B.tokens)], *_steps(rows)])
    lines += table([["kernel", "us", "of ceiling", "torch / ours"], *(_cells(row) for row in _others(rows))])
    lines += wrong[:3] + [f"failed: {note}"[:160] for note in record.notes[:3]]
    return lines + ([f"not run, no time left: {len(record.not_run)} items"] if record.not_run else [])


def _steps(rows: list[KernelRow]) -> list[list[str]]:
    """By type of the weights and tokens: time of all layers' products, where all four matrices were measured."""
    return [[kind, *(_step(rows, kind, tokens) for tokens in LLAMA_70B.tokens)] for kind in KINDS]


def _step(rows: list[KernelRow], kind: str, tokens: int) -> str:
    names = [f"{kind} {name}" for name in LLAMA_70B.matrices if name != "lm_head"]
    chosen = [row for row in rows if row.name in names and row.shape["T"] == tokens and row.timing]
    if len(chosen) < len(names):
        return "-"
    total_us = sum(row.timing.median_us for row in chosen if row.timing)
    floors = [row.floor_us for row in chosen]
    share = sum(f for f in floors if f) / total_us if all(floors) else None
    return f"{total_us * LLAMA_70B.layers / 1000:.2f} ({_percent(share)})"


def _others(rows: list[KernelRow]) -> list[KernelRow]:
    """The largest measured shape of each kernel, whole layers first."""
    largest: dict[str, KernelRow] = {}
    for row in rows:
        product = row.family == "matmul" and not any(word in row.name for word in ("head", "quant", "layer"))
        if row.timing and not product:
            # A layer is worth a line for every number of sequences.
            key = f"{row.name} {row.shape['B']}" if row.name.startswith("decode layer") else row.name
            if key not in largest or row.bytes_moved > largest[key].bytes_moved:
                largest[key] = row
    ranked = sorted(largest.values(), key=lambda row: (" layer," not in row.name, "attention" not in row.name))
    return ranked[:_MOST_ROWS]


def _cells(row: KernelRow) -> list[str]:
    assert row.timing is not None
    shape = " ".join(f"{key}={value}" for key, value in row.shape.items() if key in {"T", "B", "N", "R", "rows"})
    return [
        f"{row.name}, {shape}",
        f"{row.timing.median_us:.1f}",
        f"{_percent(row.share)} {row.limit_by}".strip(),
        _ratio(row.times_torch),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


if __name__ == "__main__":
    main()
