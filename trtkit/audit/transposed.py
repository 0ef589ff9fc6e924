"""Tables with a configuration in each column, as blog posts print them: turned into one row per claim.

The first cell of a row names a setting ("GPUs", "weights") or a metric with its load ("TPS, batch 32"); a label such
as "TTFT 512 / 4K" splits cells such as "85 / 340 ms". What the table does not say is left to the caller's defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trtkit.audit.claims import WEIGHTS, kind_of

Row = dict[str, str]

_SETTINGS = {
    "model": "model",
    "gpu": "gpu",
    "gpus": "gpu",
    "hardware": "gpu",
    "num gpus": "num_gpus",
    "number of gpus": "num_gpus",
    "tp": "tp",
    "tensor parallel": "tp",
    "precision": "precision",
    "quantization": "precision",
    "quantisation": "precision",
    "weights": "precision",
    "kv": "kv",
    "kv cache": "kv",
    "kv policy": "kv",
    "kv dtype": "kv_dtype",
    "isl": "isl",
    "input tokens": "isl",
    "prompt tokens": "isl",
    "osl": "osl",
    "output tokens": "osl",
    "concurrency": "concurrency",
    "batch size": "concurrency",
    "price per gpu hour": "price_usd_per_gpu_h",
    "price_usd_per_gpu_h": "price_usd_per_gpu_h",
}
_MANY_GPUS = re.compile(r"(\d+)\s*[x\u00d7]\s*(\S.*)", re.IGNORECASE)
_LOAD = re.compile(r"\b(?:batch(?: size)?|concurrency|bs|b|c)\s*[=:]?\s*(\d+)\b", re.IGNORECASE)
_LENGTH = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?k?)(?![\w%.-])", re.IGNORECASE)
_VALUE = re.compile(r"^[~\u2248]?\s*(\$?)\s*([\d.,]+)\s*([kK]?)\s*(.*)$")
_SHOTS = re.compile(r"\d+[- ]?shot", re.IGNORECASE)
_PER_MILLION = re.compile(r"(per|/)\s*1\s*m\b", re.IGNORECASE)


def is_transposed(header: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    """Whether configurations are columns: no column is a metric, and some row is one, with a number in it."""
    numbers = any(row and _metric(row[0]) and any(map(_is_number, row[1:])) for row in body)
    return len(header) > 1 and numbers and not any(kind_of(name) for name in header[1:])


def turned(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[Row]:
    """One long row per claim, configuration by configuration.

    Args:
        header: a label for the first column (may be empty), then the configurations' names.
        body: rows of cells, the first naming a setting or a metric; short rows leave the rest empty.
    """
    rows: list[Row] = []
    for column, name in enumerate(header[1:], 1):
        cells = [(row[0], row[column].strip() if column < len(row) else "") for row in body if row]
        settings: Row = {}
        for label, cell in cells:
            settings |= _setting(label, cell)
        for label, cell in cells:
            if cell not in ("", "-") and not _setting(label, cell):
                rows += [_claim(name, settings, part) for part in _parts(label, cell)]
    return rows


def _metric(label: str) -> str | None:
    """The metric a label names, without its load and lengths; None where it names none."""
    words = _LENGTH.sub(" ", _LOAD.sub(" ", _SHOTS.sub(" ", label))) if not _PER_MILLION.search(label) else label
    words = re.sub(r"[,/@()\s]+", " ", words).strip().lower()
    return words if kind_of(words) else None


def _is_number(cell: str) -> bool:
    return bool(_VALUE.match(cell.split("/")[0].strip()))


def _setting(label: str, cell: str) -> Row:
    """What a cell says about its configuration; nothing if it is a number of a metric of that name."""
    key = _SETTINGS.get(re.sub(r"[\s_]+", " ", label.strip().lower()))
    if key is None or not cell or (kind_of(label) == WEIGHTS and _VALUE.match(cell)):
        return {}
    many = _MANY_GPUS.fullmatch(cell) if key == "gpu" else None
    if many:
        return {"num_gpus": many[1], "gpu": many[2]}
    return {key: cell.replace(",", "") if key in ("isl", "osl", "concurrency") else cell}


def _parts(label: str, cell: str) -> list[Row]:
    """A cell's claims: one, or one per length where label and cell list as many."""
    load = _LOAD.search(label)
    rest = _LOAD.sub(" ", _SHOTS.sub(" ", label))
    lengths = [] if _PER_MILLION.search(label) else _LENGTH.findall(rest)
    values = [part.strip() for part in cell.split("/")] if len(lengths) > 1 else [cell]
    shared_unit = _VALUE.match(values[-1])
    claims = []
    for index, text in enumerate(values):
        found: Row = {"metric": _metric(label) or label, **_number(text, shared_unit[4] if shared_unit else "")}
        if load:
            found["concurrency"] = load[1]
        if len(values) == len(lengths):
            found["isl"] = _tokens(lengths[index])
        claims.append(found)
    return claims


def _number(text: str, unit: str) -> Row:
    match = _VALUE.match(text)
    if not match:
        return {"value": text, "unit": ""}
    number = match[2].replace(",", "")
    if match[3]:
        number = f"{float(number) * 1000:g}"
    spelt = (match[4] or unit).strip()
    return {"value": number, "unit": "usd" if match[1] and not spelt else spelt}


def _tokens(text: str) -> str:
    """ "4K" is 4,096: prompt lengths are powers of two."""
    plain = text.replace(",", "").lower()
    return str(int(float(plain[:-1]) * 1024)) if plain.endswith("k") else plain


def _claim(name: str, settings: Mapping[str, str], found: Mapping[str, str]) -> Row:
    load = f" c={found['concurrency']}" if "concurrency" in found else ""
    length = f" ISL {found['isl']}" if "isl" in found else ""
    return {**settings, **found, "name": f"{name} {found['metric']}{load}{length}"}
