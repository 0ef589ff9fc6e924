"""Local tasks: the shipped ones are sound, and malformed ones are named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtkit.quality.local_tasks import prepare_tasks
from trtkit.spec.errors import InputError

SHIPPED = Path(__file__).parents[3] / "bench" / "tasks"
ROW = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}


def group(tmp_path: Path, rows: list[object], settings: object = None) -> Path:
    folder = tmp_path / "source" / "g"
    folder.mkdir(parents=True)
    settings = {"style": "letters", "shots": 1, "description": "d", "space": True} if settings is None else settings
    (folder / "group.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    (folder / "s.test.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return tmp_path / "source"


def test_the_shipped_tasks_become_lm_eval_files_with_absolute_paths(tmp_path: Path) -> None:
    out = prepare_tasks(SHIPPED, tmp_path / "out")
    tasks = {path.stem: json.loads(path.read_text()) for path in out.glob("*.yaml")}
    assert set(tasks) >= {"mini_mmlu", "mini_recall", "mini_mmlu_addition", "mini_recall_attribute_far"}
    assert len(tasks["mini_mmlu"]["task"]) == 6
    for name, task in tasks.items():
        if "group" not in task:
            assert all(Path(p).is_file() for p in task["dataset_kwargs"]["data_files"].values()), name
            assert not task["doc_to_text"].endswith(" ")


def test_the_shipped_questions_have_their_answer_among_distinct_choices_and_in_no_fixed_place() -> None:
    for path in SHIPPED.glob("*/*.test.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(len(set(r["choices"])) == 4 for r in rows), path
        assert {r["answer"] for r in rows} == {0, 1, 2, 3}, path
        dev = path.with_name(path.name.replace(".test.", ".dev."))
        shots = {json.loads(line)["question"] for line in dev.read_text().splitlines()}
        assert not shots & {r["question"] for r in rows}, "a test question is one of its own worked examples"


def test_own_lm_eval_files_are_taken_along(tmp_path: Path) -> None:
    source = group(tmp_path, [ROW])
    (source / "own.yaml").write_text("task: own\n")
    out = prepare_tasks(source, tmp_path / "out")
    assert (out / "own" / "own.yaml").is_file()
    assert (out / "g_s.yaml").is_file()


@pytest.mark.parametrize(
    "row",
    ["{", {"question": "x"}, ROW | {"answer": 4}, ROW | {"answer": -1}, ROW | {"choices": list("abcdefghij")}, [1]],
)
def test_a_malformed_question_is_named(tmp_path: Path, row: object) -> None:
    with pytest.raises(InputError, match=r"s\.test\.jsonl:2: expected"):
        prepare_tasks(group(tmp_path, [ROW, row]), tmp_path / "out")


def test_questions_with_different_numbers_of_choices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[3, 4\] choices"):
        prepare_tasks(group(tmp_path, [ROW, ROW | {"choices": ["a", "b", "c"]}]), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "JSON expected"),
        ({"style": "letters"}, "exactly the keys"),
        ({"style": "x", "shots": 1, "description": "", "space": True}, "style 'x' is unknown"),
        ({"style": "letters", "shots": -1, "description": "", "space": True}, "shots is -1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_tasks(group(tmp_path, [ROW], settings), tmp_path / "out")


def test_a_directory_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        prepare_tasks(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="no such directory"):
        prepare_tasks(tmp_path / "none", tmp_path / "out")
