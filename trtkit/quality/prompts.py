"""A team's own prompts: read strictly, answered greedily, graded by their own checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.backends.tokenizer import Tokenizer
from trtkit.quality.answers import CHECKS, NEEDS_REFERENCE, grade
from trtkit.quality.generation import Generated
from trtkit.quality.regex_guard import RegexGuard, check_pattern
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.result import DocumentOutcome

_KEYS = {"id", "prompt", "messages", "reference", "references", "check", "pattern", "max_tokens", "group"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One line of a prompts file: a text or a conversation, and how its answer is graded (None: not at all)."""

    id: str
    line: int
    text: str | None = None
    messages: tuple[tuple[tuple[str, str], ...], ...] = ()
    references: tuple[str, ...] = ()
    check: str | None = None
    pattern: str | None = None
    max_tokens: int | None = None
    group: str = "prompts"

    def token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The prompt as the engine gets it; a conversation goes through the model's chat format."""
        if self.text is not None:
            return tuple(tokenizer.encode(self.text, add_special_tokens=True))
        return tuple(tokenizer.chat_ids([dict(message) for message in self.messages]))

    @property
    def shown(self) -> str:
        """The prompt for a person to read."""
        return self.text if self.text is not None else "\n\n".join(f"{dict(m)['content']}" for m in self.messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """A prompts file."""

    name: str
    sha256: str
    prompts: tuple[Prompt, ...]

    @property
    def protocol(self) -> str:
        """What two records must share to be compared."""
        return f"prompts {self.name} ({len(self.prompts)}, sha256 {self.sha256[:12]}); greedy"


def read_prompts(path: Path) -> PromptSet:
    """Read a JSON Lines file of prompts.

    Each line has `prompt` (text) or `messages` (a conversation), and may have `id`, `reference` or `references`,
    `check` (one of CHECKS; ROUGE-L where only a reference is given), `pattern` (for regex), `max_tokens`, `group`.

    Raises:
        InputError: the file is missing, empty or malformed; the message names the line.
    """
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of prompts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _prompt(f"{path}:{number}", number, line)
        if prompt.id in seen:
            raise InputError(f"{path}:{number}: id {prompt.id!r} is used in line {seen[prompt.id]} already")
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path}: holds no prompt; one JSON object per line is expected")
    return PromptSet(name=path.stem, sha256=hashlib.sha256(data).hexdigest(), prompts=tuple(prompts))


def _prompt(where: str, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    if ("prompt" in row) == ("messages" in row):
        raise InputError(f"{where}: give either 'prompt' (text) or 'messages' (a conversation)")
    text = row.get("prompt")
    if "prompt" in row and (not isinstance(text, str) or not text.strip()):
        raise InputError(f"{where}: 'prompt' must be a text that is not empty")
    max_tokens = row.get("max_tokens")
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
        raise InputError(f"{where}: 'max_tokens' is {max_tokens!r}, must be a number of at least 1")
    references = _references(where, row)
    check = _check(where, row, references)
    return Prompt(
        id=str(row.get("id", f"line-{number}")),
        line=number,
        text=text,
        messages=_messages(where, row["messages"]) if "messages" in row else (),
        references=references,
        check=check,
        pattern=row.get("pattern"),
        max_tokens=max_tokens,
        group=str(row.get("group", "prompts")),
    )


def _messages(where: str, messages: Any) -> tuple[tuple[tuple[str, str], ...], ...]:  # noqa: ANN401
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(m, dict) and set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values())
        for m in messages
    ):
        raise InputError(f'{where}: \'messages\' must be a list of {{"role": text, "content": text}}')
    return tuple((("role", m["role"]), ("content", m["content"])) for m in messages)


def _references(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    if "reference" in row and "references" in row:
        raise InputError(f"{where}: give either 'reference' or 'references'")
    value = row.get("references", [row["reference"]] if "reference" in row else [])
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise InputError(f"{where}: references must be texts that are not empty")
    return tuple(value)


def _check(where: str, row: dict[str, Any], references: Sequence[str]) -> str | None:
    check = row.get("check", "regex" if "pattern" in row else "rouge-l" if references else None)
    if check is None:
        return None
    if check not in CHECKS:
        raise InputError(f"{where}: unknown check {check!r}; allowed are {', '.join(CHECKS)}")
    if check in NEEDS_REFERENCE and not references:
        raise InputError(f"{where}: check {check!r} needs a 'reference'")
    if check == "regex":
        pattern = row.get("pattern")
        if not isinstance(pattern, str) or not pattern:
            raise InputError(f"{where}: check 'regex' needs a 'pattern'")
        if reason := check_pattern(pattern):
            raise InputError(f"{where}: {reason}")
    return str(check)


def grade_answers(prompts: Sequence[Prompt], answers: Sequence[Generated]) -> dict[str, list[DocumentOutcome]]:
    """Check -> outcomes, in the order of the prompts; prompts without a check are in none.

    Raises:
        InputError: a prompt's pattern took too long (the line is named).
    """
    graded: dict[str, list[DocumentOutcome]] = {}
    with RegexGuard() as guard:
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt.check is None:
                continue
            try:
                score = grade(prompt.check, answer.text, prompt.references, prompt.pattern, guard)
            except InputError as error:
                raise InputError(f"line {prompt.line} of the prompts: {error}") from None
            outcome = DocumentOutcome(document=prompt.id, group=prompt.group, score=score, prediction=answer.text)
            graded.setdefault(prompt.check, []).append(outcome)
    return graded


def encoded(prompts: PromptSet, tokenizer: Tokenizer, max_seq_len: int, default_tokens: int) -> list[tuple[int, ...]]:
    """Token ids of every prompt, refused when one does not fit with its answer.

    Raises:
        UsageError: a prompt and its answer are longer than the engine admits (the line is named).
    """
    ids = [prompt.token_ids(tokenizer) for prompt in prompts.prompts]
    for prompt, tokens in zip(prompts.prompts, ids, strict=True):
        wanted = len(tokens) + (prompt.max_tokens or default_tokens)
        if wanted > max_seq_len:
            raise UsageError(
                f"{prompts.name}, line {prompt.line}: {len(tokens)} prompt tokens and {wanted - len(tokens)} to "
                f"generate exceed the engine's max_seq_len {max_seq_len}; lower --max-tokens or build a larger one"
            )
    return ids
