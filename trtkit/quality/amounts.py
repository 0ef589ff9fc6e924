"""Amounts as people write them: 200M/month, 5M/day, $47K."""

from __future__ import annotations

import re

from trtkit.spec.errors import UsageError

_AMOUNT = re.compile(r"\s*\$?\s*([0-9][0-9,]*\.?[0-9]*)\s*([kKmMbB]?)\s*(?:USD)?\s*(?:/\s*(day|month))?\s*\Z")
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_PER_MONTH = {None: 1.0, "month": 1.0, "day": 365 / 12}


def tokens_per_month(text: str) -> float:
    """Tokens a month from "200M", "200M/month" or "5M/day".

    Raises:
        UsageError: not such an amount.
    """
    return _amount(text, "traffic", "200M/month or 5M/day")


def usd_per_month(text: str) -> float:
    """USD a month from "47000", "47K" or "$47K/month".

    Raises:
        UsageError: not such an amount.
    """
    return _amount(text, "spend", "47000 or 47K/month")


def _amount(text: str, what: str, example: str) -> float:
    match = _AMOUNT.match(text)
    value = 0.0 if match is None else float(match.group(1).replace(",", "")) * _SCALES[match.group(2).lower()]
    if match is None or value <= 0:
        raise UsageError(f"{what} is {text!r}: expected a positive amount such as {example}")
    return value * _PER_MONTH[match.group(3)]
