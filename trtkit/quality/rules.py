"""A gate's rules: what they limit, and how they are read from TOML and from a command line's texts."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.metrics import METRICS
from trtkit.spec.units import GB, GIB, MIB

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

_SCALES: Mapping[str, Mapping[str, float]] = {
    "ms": {"ms": 1.0, "s": 1000.0, "us": 0.001, "": 1.0},
    "bytes": {"gib": GIB, "mib": MIB, "gb": GB, "": 1},
    "points": {"": 1.0, "pp": 1.0, "points": 1.0, "%": 1.0},
    "ratio": {"": 1.0, "x": 1.0},
    "share": {"": 1.0, "%": 0.01},
    "nats": {"": 1.0, "nats": 1.0},
    "rate": {"": 1.0, "tok/s": 1.0},
}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z/%]*)\s*\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One limit.

    `kind` is "max" or "min" (the candidate's own number), "gain" (candidate over reference, turned so that more is
    better), "drop" (paired loss of a task, in points or in the metric's unit), "kl", "agreement" or "memory".
    `subject` is a metric key or a task, `stat` a percentile.
    """

    kind: str
    subject: str
    limit: float
    stat: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    kind: str
    unit: str
    subject: str
    stat: str = ""


def _latency_forms() -> dict[str, _Form]:
    forms = {}
    for name in ("ttft", "tpot", "itl", "e2e"):
        for stat in ("p50", "p90", "p95", "p99", "mean"):
            forms[f"max_{name}_{stat}"] = _Form(kind="max", unit="ms", subject=f"{name}_ms", stat=stat)
    return forms


FORMS: Mapping[str, _Form] = {
    **_latency_forms(),
    "min_tps": _Form(kind="min", unit="rate", subject="tps", stat="value"),
    "min_tps_gain": _Form(kind="gain", unit="ratio", subject="tps", stat="value"),
    "min_ttft_gain": _Form(kind="gain", unit="ratio", subject="ttft_ms", stat="p50"),
    "min_tpot_gain": _Form(kind="gain", unit="ratio", subject="tpot_ms", stat="p50"),
    "max_vram": _Form(kind="memory", unit="bytes", subject="peak_memory"),
    "max_mmlu_drop": _Form(kind="drop", unit="points", subject="*mmlu*"),
    "max_kl": _Form(kind="kl", unit="nats", subject="kl"),
    "min_agreement": _Form(kind="agreement", unit="share", subject="agreement"),
}
"""Rule name (TOML key; with dashes, the option) -> what it limits."""


def parse_rule(name: str, value: object, where: str = "") -> Rule:
    """One rule from its name and value, such as ("max_ttft_p99", "500ms").

    Raises:
        UsageError: the name is unknown, or the value is no quantity of the right unit.
    """
    key = name.replace("-", "_").lstrip("_")
    if key not in FORMS:
        raise UsageError(f"{where}unknown rule {name!r}: known are {', '.join(FORMS)} and the table max_drop")
    form = FORMS[key]
    return Rule(
        kind=form.kind,
        subject=form.subject,
        stat=form.stat,
        limit=parse_quantity(value, form.unit, f"{where}{key}"),
        text=f"{key.replace('_', '-')} {value}",
    )


def parse_drop(task: str, value: object, where: str = "") -> Rule:
    """A limit on one task's loss: points for accuracies, the metric's own unit for others."""
    limit = parse_quantity(value, "points", f"{where}max_drop.{task}")
    return Rule(kind="drop", subject=task, limit=limit, text=f"max-drop {task}={value}")


def parse_quantity(value: object, unit: str, what: str) -> float:
    """A number that is not negative, with an optional unit, in the unit's base.

    Raises:
        UsageError: not a number, negative, or in another unit.
    """
    scales = _SCALES[unit]
    match = _QUANTITY.match(str(value)) if not isinstance(value, bool) else None
    if match is None or match.group(2).lower() not in scales:
        units = ", ".join(name for name in scales if name) or "none"
        raise UsageError(f"{what} is {value!r}: expected a number that is not negative, with a unit of: {units}")
    return float(match.group(1)) * scales[match.group(2).lower()]


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Read a TOML file of rules; unknown keys are refused.

    Raises:
        InputError: missing or not TOML.
        UsageError: a rule is unknown or its value is wrong.
    """
    try:
        body: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of rules") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    rules = []
    for key, value in body.items():
        if key == "max_drop" and isinstance(value, dict):
            rules += [parse_drop(task, limit, f"{path}: ") for task, limit in value.items()]
        else:
            rules.append(parse_rule(key, value, f"{path}: "))
    if not rules:
        raise UsageError(f"{path}: holds no rule; known are {', '.join(FORMS)} and the table max_drop")
    return tuple(rules)


def gather_rules(file: Path | None, flags: Mapping[str, str | None], drops: Sequence[str]) -> tuple[Rule, ...]:
    """Rules of a file and of flags together; a flag replaces the file's rule of the same kind and subject.

    Raises:
        UsageError: a value is wrong.
        InputError: the file cannot be read.
    """
    rules = list(read_rules(file)) if file is not None else []
    rules += [parse_rule(name, value) for name, value in flags.items() if value is not None]
    for text in drops:
        task, equals, value = text.rpartition("=")
        if not equals or not task:
            raise UsageError(f"--max-drop is {text!r}: expected TASK=POINTS, such as gsm8k=1.5")
        rules.append(parse_drop(task, value))
    return tuple({(rule.kind, rule.subject, rule.stat): rule for rule in rules}.values())


def label_of(rule: Rule) -> str:
    """The metric's printed name."""
    return METRICS[rule.subject].label if rule.subject in METRICS else rule.subject
