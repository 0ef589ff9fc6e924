"""Typed values out of a Hugging Face config; null counts as absent, and a wrong value is an error that names its key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from trtkit.spec.errors import InputError


def positive_integer(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """An integer of at least `least`.

    Raises:
        InputError: anything else, or absent without a default.
    """
    value = _present(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise wrong_value(key, value, f"an integer of at least {least}")
    return value


def positive_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above 0.

    Raises:
        InputError: anything else, or absent without a default.
    """
    value = _present(config, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise wrong_value(key, value, "a finite number above 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """A boolean, False when absent.

    Raises:
        InputError: neither true nor false.
    """
    value = _present(config, key, False)
    if not isinstance(value, bool):
        raise wrong_value(key, value, "true or false")
    return value


def wrong_value(key: str, value: object, wanted: str) -> InputError:
    """The error for a key whose value is not what was `wanted`."""
    shown = str(value) if isinstance(value, float) else repr(value)
    return InputError(f"key {key!r} is {shown if len(shown) <= 60 else shown[:57] + '...'}, expected {wanted}")


def _present(config: Mapping[str, Any], key: str, default: object) -> Any:  # noqa: ANN401 - what JSON holds
    value = config.get(key)
    if value is None and default is None:
        raise InputError(f"key {key!r} is missing")
    return default if value is None else value
