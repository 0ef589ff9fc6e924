"""The blind sheet: sides hidden, text escaped, grades unblinded only with the right key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.synthetic_records import engine

from trtkit.quality.generation import Generated
from trtkit.quality.own_prompts import PromptRun
from trtkit.quality.paired import Verdict
from trtkit.quality.prompts import Prompt, PromptSet
from trtkit.quality.sheet import KEY_KIND, SheetKey, key_path, read_grades, write_sheet
from trtkit.spec.codec import read_record
from trtkit.spec.errors import InputError

COUNT = 40


def sheet(tmp_path: Path, text: str = "prompt") -> tuple[Path, SheetKey]:
    path = tmp_path / "sheet.html"
    prompts = PromptSet(
        name="p", sha256="0" * 64, prompts=tuple(Prompt(id=f"q{i}", line=i, text=text) for i in range(COUNT))
    )
    runs = [
        PromptRun(
            engine=engine(name),
            prompt_ids=((1,),) * COUNT,
            answers=tuple(Generated(text=f"{word}-{i}", token_ids=(1,)) for i in range(COUNT)),
        )
        for name, word in (("fp32", "ours"), ("int8", "theirs"))
    ]
    write_sheet(path, prompts, runs[0], runs[1], seed=1)
    return path, read_record(key_path(path), KEY_KIND, SheetKey)


def grades(path: Path, key: SheetKey, choose) -> Path:
    out = path.with_name("grades.json")
    out.write_text(
        json.dumps({"sheet": key.sheet, "grades": {i: choose(side) for i, side in key.reference_side.items()}})
    )
    return out


def other(side: str) -> str:
    return "B" if side == "A" else "A"


def test_the_sheet_does_not_say_which_engine_is_which(tmp_path: Path) -> None:
    path, key = sheet(tmp_path)
    page = path.read_text()
    assert "fp32" not in page
    assert "int8" not in page
    assert set(key.reference_side.values()) == {"A", "B"}
    for i in range(COUNT):
        side = key.reference_side[f"q{i}"]
        first = "ours" if side == "A" else "theirs"
        block = page.split("<article>")[i + 1]
        assert block.index(f"{first}-{i}<") == min(block.index(f"ours-{i}<"), block.index(f"theirs-{i}<"))


def test_the_sheet_escapes_what_models_wrote_and_needs_no_network(tmp_path: Path) -> None:
    page = sheet(tmp_path, "<script>alert(1)</script>")[0].read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_person_who_always_prefers_the_candidate_finds_it_better(tmp_path: Path) -> None:
    path, key = sheet(tmp_path)
    result = read_grades(grades(path, key, other), key_path(path))
    assert (result.wins, result.losses, result.ties, result.verdict) == (COUNT, 0, 0, Verdict.BETTER)
    assert (result.reference, result.candidate) == ("fp32", "int8")


def test_a_person_who_always_prefers_the_reference_finds_it_worse(tmp_path: Path) -> None:
    path, key = sheet(tmp_path)
    assert read_grades(grades(path, key, lambda side: side), key_path(path)).verdict is Verdict.WORSE


def test_always_picking_the_left_side_decides_nothing(tmp_path: Path) -> None:
    path, key = sheet(tmp_path)
    result = read_grades(grades(path, key, lambda _: "A"), key_path(path))
    assert result.verdict is Verdict.UNDECIDED
    assert result.needed is not None


def test_only_ties_are_no_detectable_change(tmp_path: Path) -> None:
    path, key = sheet(tmp_path)
    result = read_grades(grades(path, key, lambda _: "tie"), key_path(path))
    assert (result.ties, result.verdict) == (COUNT, Verdict.SAME)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "JSON expected"),
        ('{"grades": {}}', "not a grades file"),
        ('{"sheet": "other", "grades": {}}', "belongs to sheet 'other'"),
        ('{"sheet": "@", "grades": {"nobody": "A"}}', "'nobody', which is not on the sheet"),
        ('{"sheet": "@", "grades": {"q1": "C"}}', "'q1' is graded 'C'"),
    ],
)
def test_grades_that_do_not_fit_are_refused(tmp_path: Path, body: str, message: str) -> None:
    path, key = sheet(tmp_path)
    out = tmp_path / "grades.json"
    out.write_text(body.replace("@", key.sheet))
    with pytest.raises(InputError, match=message):
        read_grades(out, key_path(path))
    with pytest.raises(InputError, match="no such file"):
        read_grades(tmp_path / "none.json", key_path(path))
