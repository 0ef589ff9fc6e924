"""Records to canonical JSON and back: versioned, digested, and strict about what it does not know.

A record file is `{"kind": ..., "schema_version": ..., "data": {...}}`. Decoding refuses unknown and missing
keys and wrong types by their path, so a damaged or newer file is a sentence and never a wrong number.

A field that came after the first records is declared `field(default=..., metadata=LATER)`: it is left out while it has
its default, so digests of what does not use it stay what they were, and an older trtkit still reads such a record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from trtkit.spec.atomic import write_text
from trtkit.spec.errors import InputError, UsageError

SCHEMA_VERSION = 1
_LATER = "later"
LATER: Mapping[str, bool] = types.MappingProxyType({_LATER: True})
"""Metadata of a field that is left out of a record while it has its default."""
T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, tuples and mappings as JSON types. Non-finite floats are refused."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if _told(f, value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(to_plain(k)): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot be stored; unknown is None")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot encode {type(value).__name__}")


def _told(field: dataclasses.Field[Any], value: Any) -> bool:
    return not field.metadata.get(_LATER) or getattr(value, field.name) != field.default


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def from_plain(cls: type[T], data: Any, path: str = "") -> T:
    """Build a `cls` from JSON types.

    Raises:
        InputError: a key is unknown or missing, or a value has the wrong type; the message gives its path.
        UsageError: `cls` itself refuses a value of the right type.
    """
    return typing.cast("T", _decode(cls, data, path or cls.__name__))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(hint: Any, data: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(hint, data, path)
    if origin is tuple:
        return _decode_tuple(hint, data, path)
    if origin is not None and issubclass(origin, Mapping):
        key_hint, value_hint = typing.get_args(hint)
        _expect(isinstance(data, dict), path, "an object", data)
        return {_decode(key_hint, k, path): _decode(value_hint, v, f"{path}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(typing.cast("type", hint), data, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(data)
        except ValueError:
            allowed = ", ".join(str(m.value) for m in hint)
            raise InputError(f"{path}: {data!r} is not one of {allowed}") from None
    return _decode_scalar(hint, data, path)


def _decode_union(hint: Any, data: Any, path: str) -> Any:
    options = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if data is None and len(options) < len(typing.get_args(hint)):
        return None
    errors = []
    for option in options:
        try:
            return _decode(option, data, path)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _decode_tuple(hint: Any, data: Any, path: str) -> Any:
    args = typing.get_args(hint)
    _expect(isinstance(data, list), path, "a list", data)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    _expect(len(data) == len(args), path, f"{len(args)} items", data)
    return tuple(_decode(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))


def _decode_dataclass(cls: type, data: Any, path: str) -> Any:
    _expect(isinstance(data, dict), path, "an object", data)
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(fields)}")
    missing = [
        n
        for n, f in fields.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{path}: key {missing[0]!r} is missing")
    return cls(**{name: _decode(hints[name], value, f"{path}.{name}") for name, value in data.items()})


def _decode_scalar(hint: Any, data: Any, path: str) -> Any:
    if hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        _expect(abs(data) <= sys.float_info.max, path, "a finite number", data)
        return float(data)
    if isinstance(data, bool) and hint is not bool:
        _expect(False, path, hint.__name__, data)
    _expect(isinstance(data, hint), path, hint.__name__, data)
    return data


def _expect(condition: bool, path: str, wanted: str, data: Any) -> None:
    if not condition:
        raise InputError(f"{path}: expected {wanted}, found {str(data)[:60]!r}")


def dumps_record(kind: str, record: Any) -> str:
    """A record file's text."""
    body = {"kind": kind, "schema_version": SCHEMA_VERSION, "data": to_plain(record)}
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def write_record(path: Path, kind: str, record: Any) -> None:
    """Store a record atomically, replacing an older one."""
    write_text(path, dumps_record(kind, record))


def read_record(path: Path, kind: str, cls: type[T]) -> T:
    """Load a record file of this kind.

    Raises:
        InputError: not JSON, another kind, a schema this version does not know, or damaged.
    """
    data = read_envelope(path, kind)
    try:
        return from_plain(cls, data, path.name)
    except UsageError as error:
        raise InputError(f"{path}: {error}") from None


def read_envelope(path: Path, kind: str | None = None) -> Any:
    """The `data` of a record file, after checking its kind and schema version."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a record (JSON expected): {error}") from None
    if not isinstance(body, dict) or "kind" not in body or "data" not in body:
        raise InputError(f"{path}: not a trtkit record (no 'kind' and 'data')")
    if kind is not None and body["kind"] != kind:
        raise InputError(f"{path}: is a {body['kind']!r} record, expected {kind!r}")
    version = body.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema version {version}, this trtkit reads {SCHEMA_VERSION}")
    return body["data"]
