"""Many rows at once: a CSV in the columns of the ground truth in, the same rows with floor and forecast out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from trtkit.plan.calibration import Calibration, load_calibration
from trtkit.plan.forecast import Answer, answers
from trtkit.plan.roofline import datasheet
from trtkit.plan.rows import TableRow, try_parse
from trtkit.plan.work import weight_bytes
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.measured import Measured, Source

ADDED = ("floor", "forecast", "forecast_low", "forecast_high", "source", "reason")
REQUIRED = ("model", "gpu", "num_gpus", "tp", "precision", "isl", "osl", "metric")
_MEMORY_BAND = 0.02
"""Published memory use of pool-reserving stacks varied by less than this."""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV file.

    Raises:
        InputError: missing, not text, empty, or a column that every question needs is not there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = list(reader.fieldnames or ())
        rows = [{key: value or "" for key, value in row.items() if isinstance(key, str)} for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV table: {error}") from None
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise InputError(f"{path}: column {missing[0]!r} is missing; needed are {', '.join(REQUIRED)}")
    if len(set(header)) != len(header):
        raise InputError(f"{path}: a column name appears twice")
    return header, rows


def forecast_rows(
    rows: Sequence[dict[str, str]], *, calibration: Calibration | None = None, catalogs: Sequence[Path] = ()
) -> list[dict[str, str]]:
    """Each row with the cells of `ADDED`, in the row's own metric and unit; `value` and `notes` are not read.

    A row that cannot be forecast keeps an empty forecast and a reason, and the others are answered all the same.
    """
    constants = calibration or load_calibration()
    parsed = [try_parse(row, catalogs=catalogs) for row in rows]
    cells = [dict.fromkeys(ADDED, "") | {"reason": reason} for _, reason in parsed]
    understood = [(index, row) for index, (row, _) in enumerate(parsed) if row is not None]
    possible = []
    for index, row in understood:
        try:
            row.scenario.precision.gemm_flops_s(row.scenario.gpu)
            row.scenario.precision.attention_flops_s(row.scenario.gpu)
            possible.append((index, row))
        except UnsupportedError as error:
            cells[index]["reason"] = str(error)
    found = answers([row.scenario for _, row in possible], constants) if possible else []
    for (index, row), answer in zip(possible, found, strict=True):
        cells[index] = row_cells(row, answer, constants)
    return [{**kept_cells(row), **added} for row, added in zip(rows, cells, strict=True)]


def kept_name(column: str) -> str:
    """An input column's name in the output: its own, unless an added column has it (`source` becomes `row_source`)."""
    return f"row_{column}" if column in ADDED else column


def kept_cells(row: dict[str, str]) -> dict[str, str]:
    """The input's cells under their names in the output."""
    return {kept_name(column): cell for column, cell in row.items()}


def row_cells(row: TableRow, answer: Answer, constants: Calibration) -> dict[str, str]:
    """The added cells of one row. Numbers keep five digits."""
    floor, forecast = in_metric(row, answer, constants)
    numbers = (floor, *((forecast.value, forecast.low, forecast.high) if forecast else (None, None, None)))
    texts = ["" if number is None else f"{number:.5g}" for number in numbers]
    source = forecast.source.value if forecast else Source.DATASHEET.value
    reason = "" if forecast else answer.reason
    return dict(zip(ADDED, (*texts, source, reason), strict=True))


def in_metric(row: TableRow, answer: Answer, constants: Calibration) -> tuple[float, Measured | None]:
    """(floor, forecast) of a row in its own metric and unit. For a rate the floor is the ceiling nothing exceeds."""
    limits, forecast = answer.floors, answer.forecast
    if row.metric == "mem_gb":
        return _memory(row, constants)
    if row.metric in ("throughput_tok_s_total", "per_gpu"):
        scale = row.replicas / (row.num_gpus if row.metric == "per_gpu" else 1)
        return limits.tok_s.value * scale, scaled(forecast.tok_s, scale) if forecast else None
    if row.metric == "decode_tok_s_user":
        per_user = 1000 / limits.tpot_ms.value
        return per_user, inverted(forecast.tpot_ms) if forecast else None
    key = row.metric
    floor: Measured = limits.tpot_ms if key == "itl_ms" else getattr(limits, key)
    return floor.value, getattr(forecast, key) if forecast else None


def scaled(number: Measured, factor: float) -> Measured:
    """A measured number times a constant."""
    low, high = (None if x is None else x * factor for x in (number.low, number.high))
    return Measured(
        value=number.value * factor, unit=number.unit, source=number.source, low=low, high=high, note=number.note
    )


def inverted(tpot_ms: Measured) -> Measured:
    """Tokens per second of one user from milliseconds per token."""
    low, high = (None if x is None else 1000 / x for x in (tpot_ms.high, tpot_ms.low))
    return Measured(
        value=1000 / tpot_ms.value, unit="tok/s", source=tpot_ms.source, low=low, high=high, note=tpot_ms.note
    )


def _memory(row: TableRow, constants: Calibration) -> tuple[float, Measured]:
    scenario = row.scenario
    weights_gb = weight_bytes(scenario.model, scenario.precision.quant, scenario.parallel) / 1e9
    value = constants.reserved_fraction * scenario.gpu.memory_bytes / 1e9
    used = max(value, weights_gb)
    forecast = Measured(
        value=used,
        unit="GB",
        source=Source.MODELED,
        low=used * (1 - _MEMORY_BAND),
        high=used * (1 + _MEMORY_BAND),
        note="pool reserved ahead",
    )
    return datasheet(weights_gb, "GB").value, forecast


def table_text(header: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    """CSV with the input's columns first, then `ADDED`."""
    out = io.StringIO()
    columns = [kept_name(name) for name in header] + list(ADDED)
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
