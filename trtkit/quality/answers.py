"""Is an answer right? Exact, contains, regular expression, valid JSON, ROUGE-L; each gives a score from 0 to 1."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from trtkit.quality.regex_guard import RegexGuard

CHECKS = ("exact", "contains", "regex", "json", "rouge-l")
NEEDS_REFERENCE = ("exact", "contains", "rouge-l")
MAX_ROUGE_WORDS = 2000
_WORD = re.compile(r"[a-z0-9]+")


def grade(check: str, answer: str, references: Sequence[str], pattern: str | None, guard: RegexGuard) -> float:
    """Score one answer; of several references the best one counts."""
    if check == "exact":
        return float(any(_squeezed(answer) == _squeezed(reference) for reference in references))
    if check == "contains":
        return float(any(_squeezed(reference) in _squeezed(answer) for reference in references))
    if check == "regex":
        assert pattern is not None, "read_prompts refuses a regex check without its pattern"
        return float(guard.search(pattern, answer))
    if check == "json":
        return float(is_json(answer))
    assert check == "rouge-l", f"unknown check {check}"
    return max(rouge_l(answer, reference) for reference in references)


def _squeezed(text: str) -> str:
    """Case kept, runs of white space one space, none at the ends."""
    return " ".join(text.split())


def is_json(answer: str) -> bool:
    """Whether the answer is one JSON object or array; a Markdown code fence around it is forgiven."""
    text = answer.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3]
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(value, (dict, list))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words (Lin 2004), no stemming; long texts are cut."""
    a, b = (_WORD.findall(text.lower())[:MAX_ROUGE_WORDS] for text in (answer, reference))
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    common = row[-1]
    if common == 0:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)
