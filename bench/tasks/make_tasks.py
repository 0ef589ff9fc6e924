"""Write the shipped local tasks: `mini_mmlu` (letters, as MMLU) and `mini_recall` (answers that stand in the prompt).

Run `python bench/tasks/make_tasks.py`; the same seed gives the same files. Everything is generated here, so there is
no licence to mind and no hub to reach. `mini_recall` needs the KV cache: the answer is a name that an earlier line of
the same prompt used and the other choices are names that were not, so an engine that drops the wrong tokens loses it.
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
    choices, answer = place(rng, min(words), list(sorted(words)[1:]))
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


def attribute(rng: np.random.Generator, filler: int) -> Question:
    """A class that keeps one attribute, unrelated lines, then the attribute again; the wrong choices never occurred."""
    word, *wrong = pick(rng, 4)
    lines = [f"        total = total + {int(v)}" for v in rng.integers(1, 100, filler)]
    text = (
        f"class Box:\n    def __init__(self, {word}):\n        self.{word} = {word}\n\n"
        "    def run(self):\n        total = 0\n" + "".join(f"{line}\n" for line in lines) + "        return self."
    )
    choices, answer = place(rng, word, list(wrong))
    return text, choices, answer


def attribute_near(rng: np.random.Generator) -> Question:
    return attribute(rng, 1)


def attribute_far(rng: np.random.Generator) -> Question:
    return attribute(rng, 8)


GROUPS: dict[str, tuple[dict[str, object], dict[str, Callable[[np.random.Generator], Question]]]] = {
    "mini_mmlu": (
        {
            "style": "letters",
            "shots": 5,
            "space": True,
            "description": "The following are multiple choice questions (with answers).",
        },
        {f.__name__: f for f in (addition, length, ordering, indexing, membership, comparison)},
    ),
    "mini_recall": (
        {"style": "continuation", "shots": 0, "space": False, "description": ""},
        {f.__name__: f for f in (attribute_near, attribute_far)},
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
