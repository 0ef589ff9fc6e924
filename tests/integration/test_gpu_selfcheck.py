"""The self-check of a GPU call, and what it does when a kernel takes the CUDA context with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import selfcheck
from bench.gpu.selfcheck import KIND, TYPES, Row, SelfcheckRecord, alone, check_types, print_fatal
from trtkit.kernels.dispatch import FAMILIES, disabled
from trtkit.kernels.selfcheck import CheckRow
from trtkit.spec.codec import read_record, write_record

CPU = torch.device("cpu")
FIRST = next(iter(TYPES))
EMPTY = SelfcheckRecord(rehearsal=True, gpu="cpu", fallen={})


def row(family: str, *, ok: bool) -> Row:
    why = "" if ok else "all: illegal memory access"
    check = CheckRow(family=family, name="all", error=0.0 if ok else None, bound=0.0, ok=ok, message=why, seconds=0.0)
    return Row(types=FIRST, check=check)


def test_a_family_alone_answers_from_a_process_of_its_own():
    rows, lost = alone(FIRST, "sampling", rehearse=True, limit_s=900)
    assert rows
    assert {found.check.family for found in rows} == {"sampling"}
    assert all(found.check.ok for found in rows)
    assert not lost


def test_a_process_that_dies_counts_as_a_lost_context(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selfcheck, "__file__", "/does/not/exist.py")
    rows, lost = alone(FIRST, "sampling", rehearse=True, limit_s=900)
    assert lost
    assert "exit code 2" in rows[0].check.message


def test_after_a_lost_context_each_family_is_tried_alone_and_the_culprit_is_named(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def fake_alone(types: str, family: str, *, rehearse: bool, limit_s: float) -> tuple[tuple[Row, ...], bool]:
        asked.append(f"{types} {family}")
        return (row(family, ok=family != "decode"),), family == "decode"

    monkeypatch.setattr(selfcheck, "in_this_process", lambda *_, **__: (row("matmul", ok=False),))
    monkeypatch.setattr(selfcheck, "context_lost", lambda _: True)
    monkeypatch.setattr(selfcheck, "alone", fake_alone)
    second = list(TYPES)[1]
    record = check_types(CPU, FIRST, EMPTY, deadline_s=float("inf"))
    assert record.fatal == ("decode",)
    assert set(record.fallen or {}) == {"decode"}, "what only failed beside the culprit is not blamed"
    record = check_types(CPU, second, record, deadline_s=float("inf"))
    assert asked == [f"{types} {family}" for types in (FIRST, second) for family in FAMILIES]
    assert "lost the CUDA context, switched off from here on: decode" in selfcheck.lines_of(record)


def test_a_call_that_is_killed_keeps_the_families_that_were_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def until_killed(_device: torch.device, types: str, families: tuple[str, ...], **_: object) -> tuple[Row, ...]:
        if (types, families) == (FIRST, ("sampling",)):
            raise KeyboardInterrupt
        return tuple(row(family, ok=True) for family in families)

    monkeypatch.setattr(selfcheck, "in_this_process", until_killed)
    with pytest.raises(KeyboardInterrupt):
        selfcheck.run(tmp_path / "selfcheck.json", EMPTY, CPU, list(TYPES), 60.0)
    kept = read_record(tmp_path / "selfcheck.json", KIND, SelfcheckRecord)
    assert [found.check.family for found in kept.rows] == list(FAMILIES[: FAMILIES.index("sampling")])
    assert kept.lines[0].startswith(f"{len(kept.rows)} of {len(kept.rows)} checks right")


def test_what_no_time_is_left_for_is_listed(tmp_path: Path):
    selfcheck.run(tmp_path / "selfcheck.json", EMPTY, CPU, list(TYPES), 0.0)
    kept = read_record(tmp_path / "selfcheck.json", KIND, SelfcheckRecord)
    assert (kept.rows, kept.not_run) == ((), tuple(TYPES))


def test_odd_shapes_are_told_apart_and_switch_nothing_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = selfcheck.in_this_process(CPU, selfcheck.ODD, ("ranking", "score"), rehearse=True)
    assert rows
    assert all(found.types == selfcheck.ODD and found.check.name.startswith("odd shapes") for found in rows)
    monkeypatch.setattr(selfcheck, "in_this_process", lambda *_, **__: ())
    monkeypatch.setattr(selfcheck, "context_lost", lambda _: True)
    monkeypatch.setattr(selfcheck, "alone", lambda _types, family, **_: ((row(family, ok=False),), True))
    record = check_types(CPU, selfcheck.ODD, EMPTY, deadline_s=float("inf"))
    assert len(record.rows) == len(FAMILIES)
    assert (record.fatal, record.fallen) == ((), {})


def test_the_thorough_call_checks_odd_shapes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(selfcheck, "run", lambda _out, _record, _device, wanted, _limit_s: asked.append(wanted) or 0)
    for more in ([], ["--thorough"]):
        monkeypatch.setattr(sys, "argv", ["selfcheck.py", "--out", str(tmp_path / "x"), "--rehearse", *more])
        selfcheck.main()
    assert asked == [list(TYPES), [*TYPES, selfcheck.ODD]]


def test_a_whole_context_needs_no_second_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selfcheck, "alone", lambda *_, **__: pytest.fail("no other process was needed"))
    record = check_types(CPU, FIRST, EMPTY, deadline_s=float("inf"))
    assert len(record.rows) > 20
    assert (record.fatal, record.fallen, disabled()) == ((), {}, {})


def test_every_row_of_the_table_has_its_types_checked():
    """Its weights with its compute type, and its compute type with its cache: in one check or in two."""
    from bench.gpu.rows import ROWS, plan_of, real_scale
    from trtkit.spec.dtype import DType

    stored = {
        DType.INT4: torch.uint8,
        DType.INT8: torch.int8,
        DType.FP8: torch.float8_e4m3fn,
        DType.FP16: torch.float16,
    }
    compute = {DType.FP16: torch.float16, DType.BF16: torch.bfloat16, DType.FP8: torch.float8_e4m3fn}
    weights = {(weight, types["dtype"]) for types in TYPES.values() for weight in types["weight_dtypes"]}
    caches = {(types["dtype"], types["kv_dtype"]) for types in TYPES.values()}
    groups = {types.get("weight_group", 0) for types in TYPES.values()}
    for key in ROWS:
        quant = plan_of(key, real_scale("h200")).quant
        assert (stored[quant.weights], compute[quant.compute]) in weights, key
        assert (compute[quant.compute], compute[quant.kv]) in caches, key
        assert quant.group_size in groups, key


def test_int4_is_checked_in_its_groups():
    rows = selfcheck.in_this_process(CPU, "INT4, FP16", ("matmul",), rehearse=True)
    assert any("int4 in groups of 128" in row.check.name for row in rows)
    assert all(row.check.ok for row in rows)


def test_the_families_to_switch_off_are_printed_for_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "selfcheck.json"
    assert (print_fatal(path), capsys.readouterr().out) == (0, "\n")
    write_record(path, KIND, SelfcheckRecord(rehearsal=True, gpu="cpu", fatal=("score", "ranking")))
    assert (print_fatal(path), capsys.readouterr().out) == (0, "score,ranking\n")
