"""Local multiple-choice tasks without a hub: JSON Lines in, lm-eval task files out.

`<dir>/<group>/group.json` holds `style` ("letters" as in MMLU, or "continuation": the choices themselves are scored),
`shots`, `description` and `space` (whether a space stands between the prompt and a choice); beside it `<subject>.dev.jsonl` (the worked examples) and `<subject>.test.jsonl`, each line
`{"question": ..., "choices": [...], "answer": index}`. lm-eval wants absolute paths in its task files, so they are
written at run time. A directory may hold lm-eval task files of its own beside such groups.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trtkit.spec.errors import InputError

STYLES = ("letters", "continuation")
_LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")
_KEYS = {"style", "shots", "description", "space"}


SHIPPED = "shipped"


def shipped_tasks() -> Path:
    """The project's own tasks: in an installed package, else in the checkout.

    Raises:
        InputError: neither has them.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "data" / "bench" / "tasks", package.parent / "bench" / "tasks"):
        if folder.is_dir():
            return folder
    raise InputError("this installation has no shipped tasks; give a directory with --tasks-dir")


def prepare_tasks(directory: Path, output: Path) -> Path:
    """Write task files for every group under `directory` into `output`, with its own YAML files copied beside them.

    Raises:
        InputError: no task is there, or a line is malformed (file and line are named).
    """
    if str(directory) == SHIPPED:
        directory = shipped_tasks()
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory of tasks")
    groups = sorted(directory.glob("*/group.json"))
    own = sorted((*directory.rglob("*.yaml"), *directory.rglob("*.yml")))
    if not groups and not own:
        raise InputError(f"{directory}: holds neither <group>/group.json nor lm-eval task files (*.yaml)")
    output.mkdir(parents=True, exist_ok=True)
    if own:
        shutil.copytree(directory, output / "own", ignore=shutil.ignore_patterns("group.json", "*.jsonl"))
    for settings_file in groups:
        _write_group(settings_file, output)
    return output


def _write_group(settings_file: Path, output: Path) -> None:
    group = settings_file.parent.name
    settings = _settings(settings_file)
    subjects = sorted(path.name.removesuffix(".test.jsonl") for path in settings_file.parent.glob("*.test.jsonl"))
    if not subjects:
        raise InputError(f"{settings_file.parent}: no <subject>.test.jsonl beside group.json")
    names = []
    for subject in subjects:
        files = {split: settings_file.parent / f"{subject}.{split}.jsonl" for split in ("dev", "test")}
        counts = {_check_questions(path) for path in files.values() if path.is_file()}
        if len(counts) != 1:
            raise InputError(f"{files['test']}: the questions of one subject must all have the same number of choices")
        task = _task(group, subject, settings, {k: p for k, p in files.items() if p.is_file()}, counts.pop())
        names.append(task["task"])
        _write(output / f"{task['task']}.yaml", task)
    body = {
        "group": group,
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 1},
    }
    _write(output / f"{group}.yaml", body)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: JSON expected: {error}") from None
    if not isinstance(settings, dict) or set(settings) != _KEYS:
        raise InputError(f"{path}: exactly the keys {', '.join(sorted(_KEYS))} are expected")
    if settings["style"] not in STYLES:
        raise InputError(f"{path}: style {settings['style']!r} is unknown; allowed are {', '.join(STYLES)}")
    if not isinstance(settings["shots"], int) or settings["shots"] < 0:
        raise InputError(f"{path}: shots is {settings['shots']!r}, must be a number that is not negative")
    return settings


def _check_questions(path: Path) -> int:
    """The number of choices every question of a file has."""
    counts = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        choices = _choices_in(line)
        if choices is None:
            raise InputError(f'{path}:{number}: expected {{"question": text, "choices": [...], "answer": index}}')
        counts.add(choices)
    if len(counts) != 1:
        raise InputError(f"{path}: holds questions with {sorted(counts)} choices; one number of choices is needed")
    return counts.pop()


def _choices_in(line: str) -> int | None:
    """How many choices a well-formed question has, None for any other line."""
    try:
        row = json.loads(line)
        question, choices, answer = row["question"], row["choices"], row["answer"]
        good = isinstance(question, str) and 0 <= answer < len(choices) <= len(_LETTERS)
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return len(choices) if good else None


def _task(group: str, subject: str, settings: dict[str, Any], files: dict[str, Path], choices: int) -> dict[str, Any]:
    letters = settings["style"] == "letters"
    listed = "".join(f"\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(_LETTERS[:choices]))
    task: dict[str, Any] = {
        "task": f"{group}_{subject}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
        "test_split": "test",
        "num_fewshot": settings["shots"] if "dev" in files else 0,
        "output_type": "multiple_choice",
        "description": settings["description"] + "\n\n" if settings["description"] else "",
        "doc_to_text": "{{question}}" + (listed + "\nAnswer:" if letters else ""),
        "doc_to_choice": list(_LETTERS[:choices]) if letters else "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " " if letters or settings["space"] else "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    if "dev" in files:
        task |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    return task


def _write(path: Path, body: dict[str, Any]) -> None:
    # JSON is YAML too, and needs no YAML library.
    path.write_text(json.dumps(body, indent=1), encoding="utf-8")
