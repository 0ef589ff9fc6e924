"""The fitted constants: which exist, which apply to a scenario, and how wrong they were on data left out of the fit.

`calibration.json` is written by `bench/calibrate.py`; nothing in it was typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from trtkit.plan.perfmodel import (
    POOL_NAMES,
    RATE_NAMES,
    SERVING_NAMES,
    VERSION_NAMES,
    Rates,
    correction_terms,
)
from trtkit.plan.scenario import Scenario
from trtkit.spec.codec import from_plain
from trtkit.spec.errors import UnsupportedError

BUILT_IN = Path(__file__).with_name("calibration.json")
FITTED, OP_TABLES, BORROWED = "fitted", "op tables", "borrowed"
LATEST = "1.2"
CALIBRATED_PARAMS = (50e9, 90e9)
"""Sizes of the models in the fit, roughly; forecasts of others have a wider band."""
FIRST_NEW_SCHEDULER = (0, 15)
"""The release from which published throughput follows today's scheduler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Constants of one (GPU, precision). `basis` is fitted, op tables or borrowed; `rows` were in the fit."""

    rates: Mapping[str, float]
    basis: str
    rows: int
    provenance: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorBand:
    """Errors on configurations left out of the fit: |log(forecast / measured)|, median and 90th percentile."""

    median: float
    p90: float
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Everything `bench/calibrate.py` writes. Group keys are "gpu/precision family", version keys "major.minor"."""

    provenance: Mapping[str, str]
    groups: Mapping[str, Group]
    serving: Mapping[str, Mapping[str, float]]
    versions: Mapping[str, Mapping[str, float]]
    pool: Mapping[str, float]
    corrections: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, ErrorBand]
    reserved_fraction: float
    """Share of a GPU's memory that stacks which reserve their pool ahead were seen to use."""
    highest_shares: Mapping[str, float]
    """By metric class: the largest share of the physical limit that any published measurement needed."""

    def group(self, scenario: Scenario) -> Group:
        """Constants for the scenario's GPU and precision.

        Raises:
            UnsupportedError: there are none; only the floor can be given.
        """
        family = scenario.precision.family
        key = f"{scenario.gpu.name}/{family}"
        if family is None or key not in self.groups:
            families = sorted(
                name.partition("/")[2] for name in self.groups if name.startswith(f"{scenario.gpu.name}/")
            )
            gpus = sorted({name.partition("/")[0] for name in self.groups})
            known = f"on it: {', '.join(families)}" if families else f"GPUs: {', '.join(gpus)}"
            raise UnsupportedError(
                f"no measurements of {scenario.precision.name} on {scenario.gpu.name}: only the floor is known "
                f"(calibrated {known})"
            )
        if scenario.stack not in self.serving:
            raise UnsupportedError(
                f"no measurements of {scenario.stack}: only the floor is known "
                f"(calibrated: {', '.join(sorted(self.serving))})"
            )
        return self.groups[key]

    def version(self, scenario: Scenario) -> str:
        """The fitted release that stands for the scenario's: itself, or the newest one before it."""
        wanted = version_number(scenario.version or LATEST)
        numbers = sorted((version_number(key), key) for key in self.versions)
        older = [key for number, key in numbers if number <= wanted]
        return older[-1] if older else numbers[0][1]

    def band(self, metric: str, scenario: Scenario) -> ErrorBand:
        """How wrong forecasts of this metric were; wider where constants were not fitted on served runs."""
        release = "old" if is_old(scenario) else "new"
        for key in (f"{metric}/{scenario.stack}/{release}", f"{metric}/{scenario.stack}", metric):
            if key in self.errors:
                band = self.errors[key]
                break
        else:
            raise AssertionError(f"no error band for {metric}")
        if not self.caveat(scenario):
            return band
        return ErrorBand(median=2 * band.median, p90=2 * band.p90, rows=band.rows)

    def caveat(self, scenario: Scenario) -> str:
        """What makes a forecast less sure than the left-out errors say; empty if nothing does."""
        basis = self.group(scenario).basis
        if basis != FITTED:
            return f"calibrated from {basis}, not from served runs"
        low, high = CALIBRATED_PARAMS
        return "" if low <= scenario.model.num_params <= high else "calibrated on 70B models only"


@cache
def version_number(text: str) -> tuple[int, int]:
    """(major, minor) of the first release number in a text; (0, 0) without one."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def is_old(scenario: Scenario) -> bool:
    """From a release before today's scheduler."""
    return scenario.version is not None and version_number(scenario.version) < FIRST_NEW_SCHEDULER


@cache
def load_calibration(path: Path = BUILT_IN) -> Calibration:
    """The committed constants."""
    return from_plain(Calibration, json.loads(path.read_text(encoding="utf-8")), path.name)


def rates_of(scenarios: Sequence[Scenario], calibration: Calibration) -> Rates:
    """Constants of each scenario as arrays of shape [len(scenarios)].

    Raises:
        UnsupportedError: one of them is not calibrated.
    """
    groups = [calibration.group(s).rates for s in scenarios]
    servings = [calibration.serving[s.stack] for s in scenarios]
    versions = [calibration.versions[calibration.version(s)] for s in scenarios]
    weights = np.array([calibration.corrections["old" if is_old(s) else "new"] for s in scenarios])
    terms = correction_terms(
        np.array([s.isl for s in scenarios], dtype=float),
        np.array([s.osl for s in scenarios], dtype=float),
        np.array([s.tp for s in scenarios], dtype=float),
    )
    return Rates(
        rate=_columns(groups, RATE_NAMES),
        serving=_columns(servings, SERVING_NAMES),
        version=_columns(versions, VERSION_NAMES),
        pool={name: calibration.pool[name] for name in POOL_NAMES},
        correction=(weights * terms).sum(axis=-1),
    )


def _columns(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows], dtype=float) for name in names}
