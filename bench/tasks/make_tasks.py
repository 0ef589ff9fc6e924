"""Write the shipped local tasks: `mini_mmlu` (letters, as MMLU) and `mini_recall` (answers that stand in the prompt).

Run `python bench/tasks/make_tasks.py`; the same seed gives the same files. Everything is generated here, so there is
no licence to mind and no hub to reach. `mini_recall` needs the KV cache: the answer is a value that an earlier line of
the same prompt assigned, so an engine that drops the wrong tokens loses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SHOTS, QUESTIONS = 5, 40
Question = tuple[str, list[str], int]
WORDS = [
    "anchor",
    "basket",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "marble",
    "needle",
    "orange",
    "pepper",
    "quartz",
    "ribbon",
    "saddle",
    "temple",
    "urchin",
    "velvet",
    "window",
    "yellow",
    "zipper",
]


def place(rng: np.random.Generator, right: object, wrong: list[object]) -> tuple[list[str], int]:
    """Four choices with the right one at a random place."""
    others = [str(w) for w in dict.fromkeys(wrong) if str(w) != str(right)][:3]
    answer = int(rng.integers(4))
    others.insert(answer, str(right))
    assert len(set(others)) == 4, others
    return others, answer


def pick(rng: np.random.Generator, count: int) -> list[str]:
    return [str(w) for w in rng.choice(WORDS, size=count, replace=False)]


def addition(rng: np.random.Generator) -> Question:
    a, b = (int(v) for v in rng.integers(2, 60, 2))
    choices, answer = place(rng, a + b, [a + b + 1, a + b - 2, a + b + 10])
    return f"What is {a} + {b}?", choices, answer


def length(rng: np.random.Generator) -> Question:
    words = pick(rng, int(rng.integers(2, 7)))
    choices, answer = place(rng, len(words), [len(words) + d for d in (1, 2, -1)])
    return f"What does len({words!r}) return?", choices, answer


def ordering(rng: np.random.Generator) -> Question:
    words = pick(rng, 4)
    choices, answer = place(rng, min(words), sorted(words)[1:])
    return f"Which of the words {', '.join(words)} comes first in the alphabet?", choices, answer


def indexing(rng: np.random.Generator) -> Question:
    words, index = pick(rng, 5), int(rng.integers(0, 4))
    choices, answer = place(rng, words[index], [w for i, w in enumerate(words) if i != index])
    return f"With names = {words!r}, what is names[{index}]?", choices, answer


def membership(rng: np.random.Generator) -> Question:
    words = pick(rng, 7)
    choices, answer = place(rng, words[6], words[:3])
    return f"Which word is not in the list {words[:6]!r}?", choices, answer


def comparison(rng: np.random.Generator) -> Question:
    values = [int(v) for v in rng.choice(np.arange(100, 1000), size=4, replace=False)]
    choices, answer = place(rng, max(values), sorted(values)[:3])
    return f"Which is the largest of {', '.join(map(str, values))}?", choices, answer


def assignments(rng: np.random.Generator, lines: int) -> tuple[str, Question]:
    """Assignments in a random order, one of them asked for again."""
    names = pick(rng, lines)
    values = [str(v) for v in rng.choice(np.arange(100, 1000), size=lines, replace=False)]
    asked = int(rng.integers(lines))
    text = "\n".join(f"self.{n} = {v}" for n, v in zip(names, values, strict=True))
    wrong: list[object] = [v for i, v in enumerate(values) if i != asked]
    choices, answer = place(rng, values[asked], [wrong[int(i)] for i in rng.permutation(len(wrong))])
    return text, (f"{text}\nself.{names[asked]} =", choices, answer)


def recall_short(rng: np.random.Generator) -> Question:
    return assignments(rng, 5)[1]


def recall_long(rng: np.random.Generator) -> Question:
    return assignments(rng, 10)[1]


GROUPS: dict[str, tuple[dict[str, object], dict[str, Callable[[np.random.Generator], Question]]]] = {
    "mini_mmlu": (
        {"style": "letters", "shots": 5, "description": "The following are multiple choice questions (with answers)."},
        {f.__name__: f for f in (addition, length, ordering, indexing, membership, comparison)},
    ),
    "mini_recall": (
        {"style": "continuation", "shots": 2, "description": ""},
        {f.__name__: f for f in (recall_short, recall_long)},
    ),
}


def write(path: Path, questions: list[Question]) -> None:
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in questions]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def distinct(make: Callable[[np.random.Generator], Question], rng: np.random.Generator, count: int) -> list[Question]:
    """Questions without a repetition, so that a test question is never one of its own worked examples."""
    found: dict[str, Question] = {}
    while len(found) < count:
        question = make(rng)
        found.setdefault(question[0], question)
    return list(found.values())


def main() -> None:
    for group, (settings, subjects) in GROUPS.items():
        folder = HERE / group
        folder.mkdir(exist_ok=True)
        (folder / "group.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        for index, (subject, make) in enumerate(subjects.items()):
            rng = np.random.default_rng([20261, len(group), index])
            questions = distinct(make, rng, SHOTS + QUESTIONS)
            write(folder / f"{subject}.dev.jsonl", questions[:SHOTS])
            write(folder / f"{subject}.test.jsonl", questions[SHOTS:])


if __name__ == "__main__":
    main()
