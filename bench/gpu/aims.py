"""What was set out to be reached on one H100 with Llama 3 70B in INT8, and what records of a GPU say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.gpu.reading import cells_of, peak, share, stat

Json = Mapping[str, Any]
FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Cells and items of several records, the newest last: one call brings the core's rows and another the others'."""

    rows: list[Json] = field(default_factory=list)
    items: list[Json] = field(default_factory=list)

    def cell(self, row: str, name: str) -> Json | None:
        """The newest valid result of that cell."""
        found = [
            cell
            for each, cell in cells_of({"rows": self.rows})
            if (each["row"], cell["name"]) == (row, name) and (cell.get("result") or {}).get("valid")
        ]
        return found[-1] if found else None

    def value(self, item: str, key: str, *, full: bool) -> float | None:
        """One number of h2o.json, the newest."""
        found = [
            each["values"][key]["value"]
            for each in self.items
            if each["item"] == item and (each["variant"] == FULL) == full and key in each["values"]
        ]
        return found[-1] if found else None


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One aim. `read` gives what was measured and whether that reaches it; None where nothing was measured."""

    text: str
    bound: str
    read: Callable[[Found], tuple[str, bool] | None]


def together(records: Sequence[Json]) -> Found:
    """Rows of llama70b.json and h2o.json; records of rehearsals count for nothing."""
    found = Found()
    for record in records:
        for row in () if record.get("rehearsal") else record.get("rows", ()):
            (found.rows if "cells" in row else found.items if "item" in row else []).append(row)
    return found


def _share(key: str, metric: str, cell: str, least: float) -> Callable[[Found], tuple[str, bool] | None]:
    """Of the floor by measured ceilings."""

    def read(found: Found) -> tuple[str, bool] | None:
        each = found.cell("int8", cell)
        value = None if each is None else share(each, "floor_measured", key, stat(each, metric))
        return None if value is None else (f"{value:.1%}", value >= least)

    return read


def _fp8_first_token(found: Found) -> tuple[str, bool] | None:
    cell = found.cell("fp8", "c1-isl4096")
    value = None if cell is None else stat(cell, "ttft_ms")
    return None if value is None else (f"{value:.0f} ms", value < 450)


def _eviction(found: Found) -> tuple[str, bool] | None:
    value = found.value("equal live length", "over_full", full=False)
    return None if value is None else (f"{value:+.1%}", value <= 0.02)


def _blocks(found: Found) -> tuple[str, bool] | None:
    half, whole = (found.value("equal request", "held", full=full) for full in (False, True))
    return (f"{half / whole:.0%}", half / whole < 0.55) if half and whole else None


def _in_flight(found: Found) -> tuple[str, bool] | None:
    """Of the protocol's cells; else of H2O's own load, its mean while others waited."""
    cells = [found.cell(row, "c32-isl4096") for row in ("int8-h2o-long", "int8")]
    half, whole = (None if cell is None else peak(cell, "requests_peak") for cell in cells)
    if half and whole:
        return f"{half} of {whole}: {half / whole:.2f}x", half / whole >= 1.8
    mean, before = (found.value("in flight", "in_flight", full=full) for full in (False, True))
    return (f"{mean:.1f} of {before:.1f}: {mean / before:.2f}x", mean / before >= 1.8) if mean and before else None


def _plan(found: Found) -> tuple[str, bool] | None:
    for row in reversed(found.rows):
        memory = row.get("memory", {})
        if row["row"] == "int8" and "seen.total" in memory:
            off = memory["plan.total"]["value"] / memory["seen.total"]["value"] - 1
            return f"{off:+.1%}", abs(off) <= 0.01
    return None


AIMS = (
    Aim(
        text="decode step at batch 1, 512 tokens",
        bound="90% of the measured read rate",
        read=_share("step_ms", "itl_ms", "c1-isl512", 0.9),
    ),
    Aim(
        text="decode step at batch 32, 512 tokens",
        bound="85% of its floor by that rate",
        read=_share("step_ms", "itl_ms", "c32-isl512", 0.85),
    ),
    Aim(
        text="first token of 4,096",
        bound="80% of the measured 16-bit matrix rate",
        read=_share("ttft_ms", "ttft_ms", "c1-isl4096", 0.8),
    ),
    Aim(text="first token of 4,096, FP8", bound="below 450 ms", read=_fp8_first_token),
    Aim(text="step with H2O at equal live length", bound="at most 2% longer than without", read=_eviction),
    Aim(text="cache that a 4K request holds, H2O 50%", bound="half (below 55%)", read=_blocks),
    Aim(text="4K requests in flight, H2O 50%", bound="1.8x those without", read=_in_flight),
    Aim(text="memory in use beside `trtkit plan`", bound="within 1%", read=_plan),
)


def aim_rows(records: Sequence[Json]) -> list[list[str]]:
    """Each aim, its bound, what was measured, and whether that reaches it; a dash is not measured."""
    found = together(records)
    rows = []
    for aim in AIMS:
        told = aim.read(found)
        rows.append([aim.text, aim.bound, *((told[0], "yes" if told[1] else "NO") if told else ("-", "-"))])
    return rows


def aim_lines(records: Sequence[Json]) -> list[str]:
    """The same for a terminal; nothing without a real record."""
    real = [record for record in records if not record.get("rehearsal")]
    if not real:
        return []
    rows = [[f"aim for one H100, on {real[0].get('gpu')}", "aimed at", "measured", "reached"], *aim_rows(real)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
