"""Every kernel against float64 on this device: what an engine does when it opens, with the answers written down.

    python3 bench/gpu/selfcheck.py --out selfcheck.json [--time-limit-s 60] [--thorough] [--rehearse]

Once for each set of types that the rows of llama70b.py use; --thorough adds other models' shapes and odd ones, which switch
nothing off. The record is written after each family of kernels. Compiled kernels stay in TRITON_CACHE_DIR for the stages that
follow. A kernel that destroys the CUDA context makes everything after it fail: then each family is tried again in a process
of its own, and `--fatal RECORD` prints the families to switch off (TRTKIT_KERNELS_OFF) before anything else runs.
--rehearse checks the torch twins on a CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from bench.gpu.sources import began_s
from trtkit.kernels.dispatch import FAMILIES, disabled, enable
from trtkit.kernels.selfcheck import CheckRow, CheckShape, self_check
from trtkit.spec.codec import read_record, write_record

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
    "INT4, FP16": {
        "dtype": torch.float16, "kv_dtype": torch.float16, "weight_dtypes": (torch.uint8,), "weight_group": 128,
    },
    "BF16, FP8 cache": {
        "dtype": torch.bfloat16, "kv_dtype": torch.float8_e4m3fn, "weight_dtypes": (),
    },
}  # fmt: skip
"""Weights and computation, and the cache where it is another type; most important first."""
ODD = "odd shapes"
"""What --thorough adds, where the others have the name of their types."""
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
    """`fallen` says which families fell back to torch, and why; `fatal` are those that took the CUDA context with them."""

    rehearsal: bool
    gpu: str
    rows: tuple[Row, ...] = ()
    fallen: dict[str, str] | None = None
    fatal: tuple[str, ...] = ()
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
    lines += [f"lost the CUDA context, switched off from here on: {family}" for family in record.fatal]
    return (*lines, *(f"not run: {types}" for types in record.not_run))


def context_lost(device: torch.device) -> bool:
    """Whether the process's CUDA context is beyond use; only a new process has a new one."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def alone(types: str, family: str, *, rehearse: bool, limit_s: float) -> tuple[tuple[Row, ...], bool]:
    """One family's rows from a process of its own, and whether that process lost its context or died."""
    with tempfile.TemporaryDirectory(prefix="trtkit-check-") as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--out", str(out), "--types", types, "--family", family]
        try:
            done = subprocess.run([*command, *(["--rehearse"] if rehearse else [])], timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return (_dead(types, family, f"no answer within {limit_s:.0f} s"),), True
        if not out.is_file():
            return (_dead(types, family, f"its process ended with exit code {done.returncode}"),), True
        record = read_record(out, KIND, SelfcheckRecord)
        return record.rows, bool(record.fatal)


def _dead(types: str, family: str, why: str) -> Row:
    row = CheckRow(family=family, name="all", error=None, bound=0.0, ok=False, message=why, seconds=0.0)
    return Row(types=types, check=row)


def in_this_process(
    device: torch.device, types: str, families: Sequence[str], *, rehearse: bool, limit_s: float = 60.0
) -> tuple[Row, ...]:
    """Rows of some families. No odd shape is begun after `limit_s`."""
    kinds = TYPES[next(iter(TYPES)) if types == ODD else types]
    shape = CheckShape(**kinds, **(TINY if rehearse else {}))  # type: ignore[arg-type]
    with torch.inference_mode():
        found = self_check(device, shape, families=families, thorough=types == ODD, limit_s=limit_s)
    # The plain ones come with the odd ones, and were told under their own types.
    wanted = [row for row in found if row.name.startswith(ODD)] if types == ODD else found
    return tuple(Row(types=types, check=finite(row)) for row in wanted)


def each_alone(types: str, *, rehearse: bool, deadline_s: float) -> Iterator[tuple[str, tuple[Row, ...], bool]]:
    """Every family in a process of its own, as far as the time reaches."""
    for family in FAMILIES:
        left_s = deadline_s - time.monotonic()
        if left_s > 1:
            yield family, *alone(types, family, rehearse=rehearse, limit_s=left_s)


def check_types(
    device: torch.device,
    types: str,
    record: SelfcheckRecord,
    *,
    deadline_s: float,
    saved: Callable[[SelfcheckRecord], None] = lambda _record: None,
) -> SelfcheckRecord:
    """The record with the rows of one set of types, `saved` after each family. Once the context is lost, families run alone."""
    if not record.fatal:
        whole, lost = _together(device, types, record, deadline_s, saved)
        if not lost:
            return whole
        for family in disabled():
            enable(family)
    for family, found, lost in each_alone(types, rehearse=record.rehearsal, deadline_s=deadline_s):
        fallen, fatal = dict(record.fallen or {}), list(record.fatal)
        for row in found:
            # A shape that no engine here runs is told, and switches nothing off.
            if not row.check.ok and types != ODD:
                fallen.setdefault(family, row.check.message)
        if lost and types != ODD and family not in fatal:
            fatal.append(family)
        record = replace(record, rows=(*record.rows, *found), fallen=fallen, fatal=tuple(fatal))
        saved(record)
    return record


def _together(
    device: torch.device,
    types: str,
    record: SelfcheckRecord,
    deadline_s: float,
    saved: Callable[[SelfcheckRecord], None],
) -> tuple[SelfcheckRecord, bool]:
    """The record with the rows of every family, all in this process, and whether one took the context with it."""
    left = list(FAMILIES)
    while left and time.monotonic() < deadline_s:
        limit_s = deadline_s - time.monotonic()
        found = in_this_process(device, types, (left.pop(0),), rehearse=record.rehearsal, limit_s=limit_s)
        if context_lost(device):
            return record, True
        record = replace(record, rows=(*record.rows, *found), fallen={**(record.fallen or {}), **disabled()})
        saved(record)
    if left:
        what = types if len(left) == len(FAMILIES) else f"{types}: {', '.join(left)}"
        record = replace(record, not_run=(*record.not_run, what))
    return record, False


def print_fatal(path: Path) -> int:
    """The families that must not run in any process, joined by commas."""
    print(",".join(read_record(path, KIND, SelfcheckRecord).fatal if path.is_file() else ()))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the record to write")
    parser.add_argument("--fatal", type=Path, metavar="RECORD", help="print what to switch off, and do nothing else")
    parser.add_argument("--types", choices=[*TYPES, ODD], help="only this set of types")
    parser.add_argument("--family", choices=FAMILIES, help="only this family of kernels")
    parser.add_argument("--thorough", action="store_true", help="other models' shapes and odd ones as well, last")
    parser.add_argument("--time-limit-s", type=float, default=60.0)
    parser.add_argument("--rehearse", action="store_true", help="the twins on a CPU, tiny")
    args = parser.parse_args()
    if args.fatal is not None:
        return print_fatal(args.fatal)
    if args.out is None:
        parser.error("--out is needed")
    if not args.rehearse and not torch.cuda.is_available():
        print("selfcheck: no CUDA device here; --rehearse checks the twins on a CPU", file=sys.stderr)
        return 3
    device = torch.device("cpu" if args.rehearse else "cuda")
    record = SelfcheckRecord(
        rehearsal=args.rehearse, gpu="cpu" if args.rehearse else torch.cuda.get_device_name(0), fallen={}
    )
    if args.family is not None:
        types = args.types or next(iter(TYPES))
        rows = in_this_process(device, types, (args.family,), rehearse=args.rehearse)
        lost = (args.family,) if context_lost(device) else ()
        write_record(args.out, KIND, replace(record, rows=rows, fallen=dict(disabled()), fatal=lost))
        return 0
    limit_s = args.time_limit_s - (time.monotonic() - began_s())
    wanted = [args.types] if args.types else [*TYPES, *([ODD] if args.thorough else [])]
    return run(args.out, record, device, wanted, limit_s)


def run(out: Path, record: SelfcheckRecord, device: torch.device, wanted: Sequence[str], limit_s: float) -> int:
    """Every wanted set of types while time lasts; the record is written after each family."""

    def saved(found: SelfcheckRecord) -> None:
        write_record(out, KIND, replace(found, lines=lines_of(found)))

    deadline_s = time.monotonic() + limit_s
    for name in wanted:
        record = check_types(device, name, record, deadline_s=deadline_s, saved=saved)
    saved(record)
    print("\n".join(lines_of(record)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
