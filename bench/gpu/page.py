"""The tables of docs/gpu.md: limits, predictions and memory counted now; measured numbers only from records of a GPU.

    python3 bench/gpu/page.py keep OUT_DIR NAME      # put a run's records under bench/results/gpu-NAME-*.json
    python3 bench/gpu/page.py cells OUT_DIR FOLDER   # each cell as a record of its own, for trtkit report and audit

`docs/build.py` puts the tables between the page's markers. Without a record the page says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import lever_page
from bench.gpu.aims import aim_rows
from bench.gpu.forecast import cell_numbers
from bench.gpu.llama70b import FILE_NAME, KIND, Record
from bench.gpu.memory import memory_rows, most_in_flight
from bench.gpu.reading import cells_of, load
from bench.gpu.rows import ROWS, cell_plan, default_rows, plan_of, real_scale
from bench.gpu.summary import STAGE_FILES, cell_values, guess_lines, memory_line, problem
from trtkit.spec.atomic import write_text
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.codec import read_record, write_record
from trtkit.spec.errors import InputError, TrtkitError
from trtkit.spec.result import BENCH_KIND
from trtkit.spec.units import GB

RESULTS = Path(__file__).resolve().parents[1] / "results"
GPUS = ("h100-sxm", "h200")
NOTHING = (
    "**Nothing on this page has been measured on a GPU yet.** No GPU was at hand when this was written; the records that "
    "`bench/gpu/one_call.sh` leaves will replace this sentence."
)
_MARK = re.compile(r"(<!-- begin: ([a-z]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
_COLUMNS = (
    *("TTFT ms", "TTFT predicted", "TTFT of ceiling", "TPOT ms", "step ms", "repeats", "step predicted", "floor ms"),
    *("step of ceiling", "step of datasheet", "tok/s", "tok/s predicted", "USD/1M", "in flight", "evicted", "VRAM GiB"),
    "valid",
)


def filled(text: str) -> str:
    """The page with each marked part made anew.

    Raises:
        KeyError: a marker names a part that does not exist.
    """
    parts = {
        "measured": measured,
        "aims": aims_table,
        "floors": floor_tables,
        "memory": memory_table,
        "levers": lever_page.lever_table,
        "guesses": lever_page.guess_table,
        "verdicts": lever_page.verdict_table,
    }
    return _MARK.sub(lambda match: f"{match[1]}{parts[match[2]]()}\n{match[3]}", text)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def records(results: Path = RESULTS) -> list[tuple[Path, Mapping[str, Any]]]:
    """Committed records of real runs; a rehearsal's is never among them."""
    found = []
    for path in sorted(results.glob("gpu-*.json")):
        record = load(path)
        if record is not None and not record.get("rehearsal", True):
            found.append((path, record))
    return found


def measured(results: Path = RESULTS) -> str:
    """Every committed record: cells as a table, other stages as their own lines."""
    found = records(results)
    if not found:
        return NOTHING
    parts = []
    for path, record in found:
        link = f"[{path.stem}](../bench/results/{path.name})"
        if path.stem.endswith("llama70b"):
            parts.append(f"### {link}\n\n{_where(record)}\n\n{cells_table(record, [other for _, other in found])}")
        else:
            body = "\n".join(record.get("lines") or ["(no lines)"])
            parts.append(f"### {link}\n\n```text\n{body}\n```")
    return "\n\n".join(parts)


def aims_table(results: Path = RESULTS) -> str:
    """What was set out to be reached on one H100, and what its newest records show; a dash is not measured."""
    shown = [record for _, record in records(results) if "h100" in str(record.get("gpu", "")).lower()]
    head = ["aim on one H100, INT8 unless named", "aimed at", "measured", "reached"]
    return markdown(head, aim_rows(sorted(shown, key=_started)))


def _started(record: Mapping[str, Any]) -> str:
    """When the first row was begun; records of items only were begun by the same call as others."""
    rows = [row["environment"] for row in record.get("rows", ()) if "environment" in row]
    return str((rows[0] if rows else record.get("environment", {})).get("started_utc", ""))


def cells_table(record: Mapping[str, Any], beside: Sequence[Mapping[str, Any]] = ()) -> str:
    """Measured cells with their floors and predictions; below it, what was not run or is not valid.

    `beside` are the other records, in which a plain step may lie that one of guesses is held against.
    """
    rows = []
    for row, cell in cells_of(record):
        if cell.get("result"):
            values = cell_values(cell)
            rows.append([row["label"], cell["name"], *(values[key] for key in _COLUMNS)])
    text = markdown(["row", "cell", *_COLUMNS], rows)
    notes = [f"- {row['label']} {cell['name']}: {why}" for row, cell in cells_of(record) if (why := problem(cell))]
    notes += [f"- {line}" for line in guess_lines(record, beside)]
    notes += [f"- {row['label']}: {memory_line(row)}" for row in record.get("rows", ()) if row.get("memory")]
    return "\n".join([text, "", *notes]).rstrip()


def _where(record: Mapping[str, Any]) -> str:
    environment = next((row["environment"] for row in record.get("rows", ())), {})
    gpu, versions = environment.get("gpu", {}), environment.get("versions", {})
    known = [
        f"{gpu.get('name', record.get('gpu'))}, driver {gpu.get('driver', 'unknown')}",
        *(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions),
        f"commit {environment.get('trtkit_commit')}",
        environment.get("started_utc", ""),
    ]
    return f"Measured on {', '.join(filter(None, known))}. Shares and floors are modeled from measured ceilings."


def floor_tables() -> str:
    """Datasheet floors and predictions of every row and cell."""
    parts = []
    for gpu in GPUS:
        scale = real_scale(gpu)
        rows = []
        for key in default_rows(scale):
            plan = plan_of(key, scale)
            for name in sorted(ROWS[key].cells, key=_by_load):
                _, sheet, predicted = cell_numbers(plan, cell_plan(name, scale, key).workload, {})
                assert sheet is not None
                assert predicted is not None
                rows.append(
                    [
                        ROWS[key].label,
                        name,
                        str(sheet.batch),
                        f"{sheet.ttft_ms.value:.0f}" if sheet.ttft_ms else "-",
                        f"{predicted.ttft_ms.value:.0f}" if predicted.ttft_ms else "-",
                        f"{sheet.step_ms.value:.2f}",
                        f"{predicted.step_ms.value:.2f}",
                        f"{sheet.tps.value:,.0f}",
                        f"{predicted.tps.value:,.0f}",
                    ]
                )
        head = ["row", "cell", "in flight (modeled)", "TTFT ms: floor", "predicted", "step ms: floor", "predicted"]
        parts.append(f"### {gpu_spec(gpu).title}\n\n" + markdown([*head, "tok/s: ceiling", "predicted"], rows))
    return "\n\n".join(parts)


def _by_load(name: str) -> tuple[int, int]:
    load, _, length = name.partition("-")
    return int(length[3:]), int(load[1:])


def memory_table() -> str:
    """What `trtkit plan` says each row holds, in GB."""
    rows = []
    for gpu in GPUS:
        scale = real_scale(gpu)
        for key in default_rows(scale):
            plan = plan_of(key, scale)
            found = {name: entry.value / GB for name, entry in memory_rows(plan).items()}
            parts = ("weights", "activations", "runtime", "eviction", "kv_pool", "total")
            sizes = [f"{found[f'plan.{part}']:.2f}" for part in parts]
            rows.append([gpu, ROWS[key].label, *sizes, str(most_in_flight(plan, 4096 + 256))])
    head = ["GPU", "row", "weights (exact)", "activations", "runtime", "H2O's rings and ledgers", "KV pool", "total"]
    return markdown([*head, "requests of 4,352 tokens"], rows)


def keep(out: Path, name: str, results: Path = RESULTS) -> list[Path]:
    """Copy a run's real records into the results folder."""
    kept = []
    for file in sorted(set(STAGE_FILES.values())):
        record = load(out / file)
        if record is not None and not record.get("rehearsal", True):
            target = results / f"gpu-{name}-{file}"
            # Raw token times make a large file; a line for each would double it.
            body = json.loads((out / file).read_text(encoding="utf-8"))
            write_text(target, json.dumps(body, separators=(",", ":"), ensure_ascii=False) + "\n")
            kept.append(target)
    return kept


def export(out: Path, folder: Path) -> list[Path]:
    """Every measured cell as the record that `trtkit bench` would have left, for `trtkit report`, `compare` and `audit`.

    Raises:
        InputError: there is no record, or it is a rehearsal's, whose numbers mean nothing.
    """
    record = read_record(out / FILE_NAME, KIND, Record)
    if record.rehearsal:
        raise InputError(f"{out / FILE_NAME}: a rehearsal; its numbers mean nothing, so it has no cells to give")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for row in record.rows:
        for cell in row.cells:
            if cell.result is not None:
                path = folder / f"{record.gpu}-{row.row}-{cell.name}.json"
                labelled = replace(cell.result, engine=replace(cell.result.engine, label=row.label))
                write_record(path, BENCH_KIND, labelled)
                made.append(path)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["keep", "cells"])
    parser.add_argument("out", type=Path)
    parser.add_argument("name", help="such as h100-202612, or the folder for the cells")
    args = parser.parse_args()
    try:
        made = keep(args.out, args.name) if args.command == "keep" else export(args.out, Path(args.name))
    except TrtkitError as error:
        print(f"page: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(str(path) for path in made) or f"no record of a GPU in {args.out}")
    return 0 if made else 1


if __name__ == "__main__":
    raise SystemExit(main())
