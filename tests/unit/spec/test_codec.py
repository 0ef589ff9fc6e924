"""Records: one spelling per value, and everything that is not exactly right refused by its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from trtkit.spec.codec import (
    LATER,
    SCHEMA_VERSION,
    canonical_json,
    digest,
    dumps_record,
    from_plain,
    read_envelope,
    read_record,
    to_plain,
    write_record,
)
from trtkit.spec.errors import InputError, UsageError


class Colour(str, Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    count: int
    share: float = 1.0
    flag: bool = False
    maybe: int | None = None
    colour: Colour = Colour.RED
    pair: tuple[int, str] = (1, "a")
    items: tuple[Inner, ...] = ()
    by_colour: Mapping[Colour, float] = field(default_factory=dict)
    anything: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UsageError(f"count is {self.count}, must not be negative")


FULL = Record(
    name="ü",
    count=3,
    share=0.1,
    flag=True,
    maybe=7,
    colour=Colour.BLUE,
    pair=(2, "b"),
    items=(Inner(), Inner(number=2.0)),
    by_colour={Colour.RED: 1.5},
    anything=[1, {"a": None}],
)
MINIMAL = {"name": "x", "count": 1}


def test_a_record_comes_back_equal() -> None:
    assert from_plain(Record, json.loads(canonical_json(FULL))) == FULL


def test_defaults_fill_what_is_absent() -> None:
    assert from_plain(Record, MINIMAL) == Record(name="x", count=1)


@dataclass(frozen=True, kw_only=True)
class Grown:
    name: str
    extra: int = field(default=0, metadata=LATER)


def test_a_later_field_leaves_no_trace_while_it_has_its_default() -> None:
    assert to_plain(Grown(name="a")) == {"name": "a"}
    assert digest(Grown(name="a")) == digest({"name": "a"})
    assert from_plain(Grown, {"name": "a"}) == Grown(name="a")


def test_a_later_field_is_told_and_counts_once_it_is_used() -> None:
    used = Grown(name="a", extra=3)
    assert to_plain(used) == {"name": "a", "extra": 3}
    assert from_plain(Grown, to_plain(used)) == used
    assert digest(used) != digest(Grown(name="a"))


def test_an_integer_is_a_float_where_one_is_wanted() -> None:
    value = from_plain(Record, {**MINIMAL, "share": 2}).share
    assert (value, type(value)) == (2.0, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": 1}, r"Record: unknown key 'nmae'; known are name, count"),
        ({"name": None}, r"Record\.name: expected str, found 'None'"),
        ({"name": 3}, r"Record\.name: expected str, found '3'"),
        ({"count": 1.0}, r"Record\.count: expected int, found '1\.0'"),
        ({"count": True}, r"Record\.count: expected int, found 'True'"),
        ({"count": "1"}, r"Record\.count: expected int"),
        ({"share": "1"}, r"Record\.share: expected float"),
        ({"share": True}, r"Record\.share: expected float"),
        ({"share": None}, r"Record\.share: expected float"),
        ({"share": float("nan")}, r"Record\.share: expected a finite number"),
        ({"share": float("inf")}, r"Record\.share: expected a finite number"),
        ({"share": 10**400}, r"Record\.share: expected a finite number"),
        ({"flag": 1}, r"Record\.flag: expected bool"),
        ({"maybe": "1"}, r"Record\.maybe: expected int"),
        ({"colour": "green"}, r"Record\.colour: 'green' is not one of red, blue"),
        ({"pair": [1]}, r"Record\.pair: expected 2 items"),
        ({"pair": {"0": 1}}, r"Record\.pair: expected a list"),
        ({"pair": [1, 2]}, r"Record\.pair\[1\]: expected str"),
        ({"items": [{}, {"number": "x"}]}, r"Record\.items\[1\]\.number: expected float"),
        ({"items": [[]]}, r"Record\.items\[0\]: expected an object"),
        ({"by_colour": [1]}, r"Record\.by_colour: expected an object"),
        ({"by_colour": {"green": 1}}, r"Record\.by_colour: 'green' is not one of"),
        ({"by_colour": {"red": "x"}}, r"Record\.by_colour\.red: expected float"),
    ],
)
def test_what_is_not_right_is_refused_by_its_path(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_plain(Record, {**MINIMAL, **change})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="Record: key 'count' is missing"):
        from_plain(Record, {"name": "x"})
    with pytest.raises(InputError, match="Record: expected an object"):
        from_plain(Record, [1])


def test_a_huge_value_does_not_flood_the_message() -> None:
    with pytest.raises(InputError) as caught:
        from_plain(Record, {**MINIMAL, "count": "9" * 10_000})
    assert len(str(caught.value)) < 200


def test_values_that_json_cannot_hold_are_refused_when_writing() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="unknown is None"):
            to_plain({"a": [value]})
    with pytest.raises(TypeError, match="cannot encode set"):
        to_plain({1, 2})
    with pytest.raises(TypeError, match="cannot encode type"):
        to_plain(Record)


def test_the_digest_ignores_key_order_and_follows_every_value() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1, "b": [1, 2]}) != digest({"a": 1, "b": [2, 1]})
    assert digest({"a": 1}) != digest({"a": None})
    assert len(digest(FULL)) == 16


def test_the_digest_of_a_known_value_never_changes() -> None:
    """Records name each other by digest, so another spelling would orphan every stored one."""
    assert canonical_json({"b": (1, 2.5), "a": Colour.RED, "c": None}) == '{"a":"red","b":[1,2.5],"c":null}'
    assert digest({"b": (1, 2.5), "a": Colour.RED, "c": None}) == "86cba6ea3dc2f1d3"


def test_a_record_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    write_record(path, "thing", FULL)
    assert read_record(path, "thing", Record) == FULL
    assert read_envelope(path) == to_plain(FULL)
    assert path.read_text(encoding="utf-8") == dumps_record("thing", FULL)
    write_record(path, "thing", Record(name="new", count=0))
    assert read_record(path, "thing", Record).name == "new"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a record"),
        (b"{", "not a record"),
        (b"\xff\xfe", "not a record"),
        (b"[" * 100_000, "not a record"),
        (b"[1]", "not a trtkit record"),
        (b'{"kind": "thing"}', "not a trtkit record"),
        (b'{"kind": "other", "schema_version": 1, "data": {}}', "is a 'other' record, expected 'thing'"),
        (b'{"kind": "thing", "schema_version": 2, "data": {}}', "schema version 2, this trtkit reads 1"),
        (b'{"kind": "thing", "data": {}}', "schema version None"),
        (b'{"kind": "thing", "schema_version": 1, "data": {"name": "x"}}', "key 'count' is missing"),
        (b'{"kind": "thing", "schema_version": 1, "data": {"name": "x", "count": -1}}', "count is -1"),
        (b'{"kind": "thing", "schema_version": 1, "data": {"name": "x", "count": 1, "share": NaN}}', "a finite number"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    assert SCHEMA_VERSION == 1
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_record(path, "thing", Record)
    assert "record.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_envelope(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_envelope(tmp_path)
