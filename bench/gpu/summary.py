"""Records of a GPU run as a short table for a terminal, and as Markdown for docs/gpu.md. No measuring, little arithmetic.

    python3 bench/gpu/summary.py OUT_DIR [--stages core,h2o]

Shares are floors over measured times: of this machine's measured ceilings, and of the datasheet. A rehearsal's record is
named and its numbers are left out. Exit 0 if the core left its first cell; without "core", if every asked stage left a record.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.aims import aim_lines
from bench.gpu.reading import cells_of, load, number, peak, share, spread, stat
from trtkit.spec.codec import from_plain
from trtkit.spec.errors import InputError
from trtkit.spec.limits import READ_BYTES_S
from trtkit.spec.measured import Measured
from trtkit.spec.units import GB, GIB

MOST_LINES = 70
"""Two more follow: what recomputing found, and how the stages ended."""
STAGE_FILES = {
    "probe": "probe.json",
    "selfcheck": "selfcheck.json",
    "kernels": "kernels.json",
    "core": "llama70b.json",
    "h2o": "h2o.json",
    "more": "llama70b.json",
    "levers": "llama70b.json",
    "peers": "peers.json",
}
LINES_EACH = {
    "llama70b.json": 24, "h2o.json": 8, "selfcheck.json": 4, "probe.json": 8, "peers.json": 6, "kernels.json": 8,
}  # fmt: skip
"""Lines each record may always have, most important first; with those of the aims they leave room for no more."""
ENDS_WITH_RESULT = ("h2o.json",)
FIRST_CELL = ("int8", "c1-isl512")
_DASH = "-"


def text(value: float | None, form: str = ".1f") -> str:
    """A number or a dash."""
    return _DASH if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share or a dash."""
    return _DASH if value is None else f"{value:.0%}"


def cell_values(cell: Mapping[str, Any]) -> dict[str, str]:
    """One cell's columns, as text. TTFT is held against its floor only where the request was alone."""
    result = cell["result"]
    ttft, step, tps = stat(cell, "ttft_ms"), stat(cell, "itl_ms"), stat(cell, "tps", "value")
    memory, price = result["memory"], cell.get("usd_per_million") or {}
    counts = [repeat["kv"]["tokens_evicted"] for repeat in result["repeats"]]
    evicted = None if None in counts else sum(counts)
    return {
        "TTFT ms": text(ttft, ".0f"),
        "TTFT of ceiling": percent(share(cell, "floor_measured", "ttft_ms", ttft)),
        "TPOT ms": text(stat(cell, "tpot_ms"), ".2f"),
        "step ms": text(step, ".2f"),
        "repeats": spread(cell, "itl_ms") or _DASH,
        "floor ms": text(number(cell, "floor_measured", "step_ms"), ".2f"),
        "step of ceiling": percent(share(cell, "floor_measured", "step_ms", step)),
        "step of datasheet": percent(share(cell, "floor_datasheet", "step_ms", step)),
        "TTFT predicted": text(number(cell, "prediction", "ttft_ms"), ".0f"),
        "step predicted": text(number(cell, "prediction", "step_ms"), ".2f"),
        "tok/s": text(tps, ",.0f"),
        "tok/s predicted": text(number(cell, "prediction", "tps"), ",.0f"),
        "USD/1M": text(price.get("value"), ".2f"),
        "in flight": text(peak(cell, "requests_peak"), "d"),
        "evicted": text(evicted, ",d"),
        "VRAM GiB": text(memory["peak_bytes"] / GIB if memory["peak_bytes"] else None, ".1f"),
        "valid": "yes" if result["valid"] else "NO",
    }


def problem(cell: Mapping[str, Any]) -> str:
    """Why a cell has no valid number; empty if it has one."""
    if cell.get("not_run"):
        return f"not run: {cell['not_run']}"
    result = cell.get("result")
    if result and not result["valid"]:
        failed = next(check for check in result["checks"] if check["status"] == "fail")
        return f"invalid: {failed['name']}: {failed['detail']}"
    return ""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


_SHORT = (
    *("TTFT ms", "TTFT of ceiling", "TPOT ms", "step ms", "step predicted", "floor ms", "step of ceiling"),
    *("tok/s", "in flight", "VRAM GiB", "valid"),
)
_LEGEND = (
    "TTFT, TPOT, step (medians), tok/s, VRAM (NVML): measured; floor: modeled, a step's bytes and operations over this "
    "card's measured ceilings; of ceiling: floor / measured; predicted: assumed before the run"
)


def llama_lines(record: Mapping[str, Any]) -> list[str]:
    """The rows of llama70b.json for a terminal."""
    done = [(row, cell) for row, cell in cells_of(record) if cell.get("result")]
    lines = [f"llama70b: {record.get('gpu')}, {len(done)} cells"]
    if record.get("rehearsal"):
        states = [f"{row['row']} {cell['name']}" for row, cell in done]
        return [f"llama70b: rehearsal, {len(done)} cells ran, no rates: {', '.join(states)}"[:400], *_problems(record)]
    if done:
        table = [["row", "cell", *_SHORT]]
        table += [[row["row"], cell["name"], *(cell_values(cell)[key] for key in _SHORT)] for row, cell in done]
        lines += [*aligned(table), _LEGEND]
    lines += guess_lines(record)
    for row in record.get("rows", ()):
        lines += [f"{row['row']}: {note}"[:160] for note in row.get("notes", ())[:4]]
        lines += [f"{row['row']}: opened in {row['opened_s']:.0f} s; {memory_line(row)}"] if row.get("opened_s") else []
        lines += [f"{row['row']}: LOST: {row['lost']}"[:300]] if row.get("lost") else []
    return lines + _problems(record)


def guess_lines(record: Mapping[str, Any], beside: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Every measured step that checks guesses beside the plain one: their ratio, and from which acceptance it pays.

    The plain one is in the same record, or in another of the same GPU.
    """
    others = [each for each in (record, *beside) if each.get("gpu") == record.get("gpu")]
    plains = {cell["name"]: cell for each in others for row, cell in cells_of(each) if row["row"] == FIRST_CELL[0]}
    lines = []
    for key, name, cell in [(row["row"], cell["name"], cell) for row, cell in cells_of(record) if cell.get("result")]:
        step, plain = stat(cell, "itl_ms"), stat(plains.get(name, {}), "itl_ms")
        if not key.startswith("int8-ngram") or not step or not plain:
            continue
        pools = [repeat["kv"] for repeat in cell["result"]["repeats"]]
        guessed, right = (sum(kv.get(part) or 0 for kv in pools) for part in ("draft_tokens", "accepted_tokens"))
        pays = max(step / plain - 1, 0.0)
        lines.append(
            f"{key} {name}: step {step:.2f} ms, plain {plain:.2f}: pays from {pays:.2f} accepted a step "
            f"({guessed:,} guessed, {right:,} right by chance; what real text accepts, random weights cannot tell)"
        )
    return lines


def memory_line(row: Mapping[str, Any]) -> str:
    """Modeled and seen memory of one row in GB, how far off the plan is, and the engine's own split."""
    memory = {name: entry["value"] / GB for name, entry in row.get("memory", {}).items()}
    parts = [f"{name} {memory[name]:.2f}" for name in ("plan.total", "seen.total") if name in memory]
    if "seen.total" in memory:
        parts.append(f"the plan is off by {memory['plan.total'] / memory['seen.total'] - 1:+.1%}")
    split = ("weights", "kv_pool", "static", "graphs", "context", "activations", "free")
    told = [f"{name} {memory[f'engine.{name}']:.2f}" for name in split if f"engine.{name}" in memory]
    return "memory GB: " + ", ".join(parts) + (f"; engine: {', '.join(told)}" if told else "")


def _problems(record: Mapping[str, Any]) -> list[str]:
    return [f"{row['row']} {cell['name']}: {why}"[:200] for row, cell in cells_of(record) if (why := problem(cell))]


def generic_lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """Any other stage's record: its own short lines if it has some, else how many entries it has."""
    if record.get("rehearsal"):
        return [f"{name}: rehearsal, no rates"]
    lines = record.get("lines") or record.get("table") or []
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines) and lines:
        return [f"{name}:", *lines]
    rows = record.get("rows") or record.get("results") or []
    return [f"{name}: {len(rows)} entries"]


def probe_limits(path: Path) -> Mapping[str, Measured]:
    """Ceilings from the probe's record under the names of `trtkit.spec.limits`; empty without a real record."""
    record = load(path)
    if record is None or record.get("rehearsal"):
        return {}
    found = {}
    for key, entry in (record.get("limits") or {}).items():
        try:
            found[key] = from_plain(Measured, entry)
        except InputError:
            continue
    return found if READ_BYTES_S in found else {}


def sections(out: Path, stages: Sequence[str]) -> dict[str, list[str]]:
    """The lines of every asked stage, by file, most important first."""
    asked = {STAGE_FILES[stage]: stage for stage in reversed(stages)}
    found = {}
    for name in (file for file in LINES_EACH if file in asked):
        record = load(out / name)
        if record is None:
            found[name] = [f"{asked[name]}: no record"]
        elif name == STAGE_FILES["core"]:
            found[name] = llama_lines(record)
        else:
            found[name] = generic_lines(asked[name], record)
    return found


def lines_of(out: Path, stages: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """The whole summary in at most so many lines: each stage gets its own share, then the rest in order of importance."""
    found = sections(out, stages)
    told = aim_lines(
        [record for name in ("llama70b.json", "h2o.json") if name in found and (record := load(out / name))]
    )
    most -= len(told)
    given = {name: min(len(lines), LINES_EACH[name]) for name, lines in found.items()}
    for name, lines in found.items():
        given[name] += max(0, min(len(lines) - given[name], most - sum(given.values())))
    for name, lines in found.items():
        told += shortened(lines, given[name], last=name in ENDS_WITH_RESULT)
    return told


def complete(out: Path, stages: Sequence[str]) -> bool:
    """The core left its first cell; where it was not asked for, every asked stage left a record (peers may be absent)."""
    records = {stage: load(out / STAGE_FILES[stage]) for stage in stages if stage != "peers"}
    if "core" not in records:
        return all(record is not None for record in records.values())
    core = records["core"] or {}
    return any((row["row"], cell["name"]) == FIRST_CELL and cell.get("result") for row, cell in cells_of(core))


def shortened(lines: Sequence[str], most: int, *, last: bool = False) -> list[str]:
    """At most so many lines, the first or the last ones beside the head, and how many were left out."""
    if len(lines) <= most:
        return list(lines)
    told = f"... {len(lines) - most + 1} more lines are in the record"
    return [lines[0], told, *lines[len(lines) - most + 2 :]] if last else [*lines[: most - 1], told]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", default=",".join(STAGE_FILES))
    args = parser.parse_args()
    stages = [stage for stage in args.stages.split(",") if stage in STAGE_FILES]
    print("\n".join(lines_of(args.out, stages)))
    return 0 if complete(args.out, stages) else 1


if __name__ == "__main__":
    raise SystemExit(main())
