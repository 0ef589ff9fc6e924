"""Every kernel against float64 on this device: what an engine does when it opens, with the answers written down.

    python3 bench/gpu/selfcheck.py --out selfcheck.json [--time-limit-s 60] [--rehearse]

Once for each set of types that the rows of llama70b.py use. Compiled kernels stay in TRITON_CACHE_DIR for the stages that
follow. --rehearse checks the torch twins on a CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from trtkit.kernels.dispatch import disabled
from trtkit.kernels.selfcheck import CheckRow, CheckShape, self_check
from trtkit.spec.codec import write_record

KIND = "gpu-selfcheck"
TYPES = {
    "INT8, FP16": {
        "dtype": torch.float16, "kv_dtype": torch.float16, "weight_dtypes": (torch.int8, torch.float16),
    },
    "FP8, BF16": {
        "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, "weight_dtypes": (torch.float8_e4m3fn, torch.bfloat16),
    },
    "INT8, FP16, FP8 cache": {
        "dtype": torch.float16, "kv_dtype": torch.float8_e4m3fn, "weight_dtypes": (torch.int8,),
    },
}  # fmt: skip
"""Weights and computation, and the cache where it is another type; most important first."""
TINY = {
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256,
    "tokens_per_block": 8, "max_tokens": 64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check under one set of types."""

    types: str
    check: CheckRow


@dataclass(frozen=True, kw_only=True)
class SelfcheckRecord:
    """`fallen` says which families fell back to torch, and why."""

    rehearsal: bool
    gpu: str
    rows: tuple[Row, ...] = ()
    fallen: dict[str, str] | None = None
    not_run: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


def finite(row: CheckRow) -> CheckRow:
    """The row as a record can hold it: an infinite error is no number."""
    if row.error is None or math.isfinite(row.error):
        return row
    return replace(row, error=None, message=row.message or "not finite where it should be")


def lines_of(record: SelfcheckRecord) -> tuple[str, ...]:
    """The result in a few lines: counts, then what failed."""
    good = sum(row.check.ok for row in record.rows)
    seconds = sum(row.check.seconds for row in record.rows)
    failed = [row for row in record.rows if not row.check.ok]
    lines = [f"{good} of {len(record.rows)} checks right against float64, {seconds:.0f} s"]
    lines += [f"FAILED {row.types}: {row.check.family}: {row.check.message}"[:200] for row in failed]
    lines += [f"fell back to torch: {family}: {why}"[:200] for family, why in (record.fallen or {}).items()]
    return (*lines, *(f"not run: {types}" for types in record.not_run))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit-s", type=float, default=60.0)
    parser.add_argument("--rehearse", action="store_true", help="the twins on a CPU, tiny")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("selfcheck: no CUDA device here; --rehearse checks the twins on a CPU", file=sys.stderr)
        return 3
    started, longest_s = time.monotonic(), 0.0
    device = torch.device("cpu" if args.rehearse else "cuda")
    record = SelfcheckRecord(
        rehearsal=args.rehearse, gpu="cpu" if args.rehearse else torch.cuda.get_device_name(0), fallen={}
    )
    for name, types in TYPES.items():
        began = time.monotonic()
        if args.time_limit_s - (began - started) < longest_s:
            record = replace(record, not_run=(*record.not_run, name))
            continue
        shape = CheckShape(**types, **(TINY if args.rehearse else {}))  # type: ignore[arg-type]
        with torch.inference_mode():
            found = tuple(Row(types=name, check=finite(row)) for row in self_check(device, shape))
        longest_s = max(longest_s, time.monotonic() - began)
        record = replace(record, rows=(*record.rows, *found), fallen=dict(disabled()))
        record = replace(record, lines=lines_of(record))
        write_record(args.out, KIND, record)
    write_record(args.out, KIND, replace(record, lines=lines_of(record)))
    print("\n".join(lines_of(record)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
