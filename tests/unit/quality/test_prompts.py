"""A team's own prompts: strict reading with line numbers, and grading that neither hangs nor crashes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fake_scorer import ByteTokenizer

from trtkit.quality.answers import grade, is_json, rouge_l
from trtkit.quality.generation import Generated
from trtkit.quality.prompts import encoded, grade_answers, read_prompts
from trtkit.quality.regex_guard import RegexGuard
from trtkit.spec.errors import InputError, UsageError


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_prompts_are_read_with_their_checks(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "a"},
        "",
        {"id": "x", "prompt": "b", "reference": "yes"},
        {"prompt": "c", "pattern": "^y"},
        {"messages": [{"role": "user", "content": "hi"}], "references": ["1", "2"], "check": "exact", "max_tokens": 5},
    )
    prompts = read_prompts(path)
    assert [(p.id, p.check) for p in prompts.prompts] == [
        ("line-1", None),
        ("x", "rouge-l"),
        ("line-4", "regex"),
        ("line-5", "exact"),
    ]
    assert prompts.prompts[3].token_ids(ByteTokenizer()) == tuple(ByteTokenizer().encode("hi\n"))
    assert prompts.prompts[3].shown == "hi"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"prompts.jsonl:2: not JSON"),
        ("[1]", r":2: a JSON object is expected, found list"),
        ({"promt": "a"}, r":2: unknown key 'promt'"),
        ({"prompt": ""}, r":2: 'prompt' must be a text that is not empty"),
        ({"prompt": 3}, r":2: 'prompt' must be a text"),
        ({}, r":2: give either 'prompt'"),
        ({"prompt": "a", "messages": []}, r":2: give either 'prompt'"),
        ({"messages": []}, r":2: 'messages' must be a list"),
        ({"messages": [{"role": "user"}]}, r":2: 'messages' must be a list"),
        ({"prompt": "a", "check": "bleu"}, r":2: unknown check 'bleu'; allowed are exact"),
        ({"prompt": "a", "check": "exact"}, r":2: check 'exact' needs a 'reference'"),
        ({"prompt": "a", "check": "regex"}, r":2: check 'regex' needs a 'pattern'"),
        ({"prompt": "a", "pattern": "("}, r":2: the pattern is not a regular expression"),
        ({"prompt": "a", "pattern": "a" * 1001}, r":2: the pattern has 1001 characters"),
        ({"prompt": "a", "reference": ["b"]}, r":2: references must be texts"),
        ({"prompt": "a", "reference": "b", "references": ["b"]}, r":2: give either 'reference' or 'references'"),
        ({"prompt": "a", "max_tokens": 0}, r":2: 'max_tokens' is 0"),
        ({"prompt": "a", "max_tokens": True}, r":2: 'max_tokens' is True"),
        ({"id": "first", "prompt": "a"}, r":2: id 'first' is used in line 1 already"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path, {"id": "first", "prompt": "ok"}, row))


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(write(tmp_path, "", "  "))
    with pytest.raises(InputError, match="no such file of prompts"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        read_prompts(tmp_path / "bad.jsonl")


def test_another_file_of_the_same_name_is_another_protocol(tmp_path: Path) -> None:
    first = read_prompts(write(tmp_path, {"prompt": "a"})).protocol
    assert first != read_prompts(write(tmp_path, {"prompt": "b"})).protocol


def test_a_prompt_that_does_not_fit_is_named(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path, {"prompt": "abc"}, {"prompt": "abcdefghij"}))
    assert len(encoded(prompts, ByteTokenizer(), 20, 9)) == 2
    with pytest.raises(
        UsageError, match="line 2: 11 prompt tokens and 10 to generate exceed the engine's max_seq_len 20"
    ):
        encoded(prompts, ByteTokenizer(), 20, 10)


@pytest.fixture(scope="module")
def guard():
    with RegexGuard() as guard:
        yield guard


@pytest.mark.parametrize(
    ("check", "answer", "references", "pattern", "score"),
    [
        ("exact", " four \n", ["4", "four"], None, 1),
        ("exact", "Four", ["four"], None, 0),
        ("contains", "it is  four.", ["is four"], None, 1),
        ("contains", "it is 5", ["four"], None, 0),
        ("regex", "order 123-ab", [], r"\d{3}-[a-z]+", 1),
        ("regex", "order 12", [], r"\d{3}", 0),
        ("json", '```json\n{"a": 1}\n```', [], None, 1),
        ("json", '{"a": 1', [], None, 0),
        ("rouge-l", "the cat sat", ["a dog", "the cat sat"], None, 1),
    ],
)
def test_answers_are_graded(
    guard, check: str, answer: str, references: list[str], pattern: str | None, score: float
) -> None:
    assert grade(check, answer, references, pattern, guard) == score


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" against two candidates.
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("", "x") == 0
    assert rouge_l("unrelated words", "police killed") == 0


@pytest.mark.parametrize(
    ("text", "valid"), [("[1]", True), ("3", False), ('"x"', False), ("", False), ("[" * 100_000, False)]
)
def test_only_objects_and_arrays_are_json_answers(text: str, valid: bool) -> None:
    assert is_json(text) is valid


def test_a_pattern_that_backtracks_for_ever_is_stopped() -> None:
    with RegexGuard(timeout_s=0.3) as guard:
        with pytest.raises(InputError, match=r"took longer than 0\.3 s"):
            guard.search("(a+)+$", "a" * 40 + "b")
        guard._timeout_s = 60.0
        assert guard.search("b", "ab"), "the guard goes on after a kill"


def test_a_slow_pattern_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RegexGuard.__init__, "__defaults__", (0.3,))
    prompts = read_prompts(write(tmp_path, {"prompt": "a"}, {"prompt": "b", "pattern": "(a+)+$"})).prompts
    answers = [Generated(text="a" * 40 + "b", token_ids=(1,))] * 2
    with pytest.raises(InputError, match=r"line 2 of the prompts: the pattern"):
        grade_answers(prompts, answers)
