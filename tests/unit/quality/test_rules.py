"""A gate's rules: quantities with units, TOML, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtkit.quality.rules import FORMS, gather_rules, parse_quantity, parse_rule, read_rules
from trtkit.spec.errors import InputError, UsageError


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        ("500ms", "ms", 500),
        ("0.5s", "ms", 500),
        (500, "ms", 500),
        ("78GiB", "bytes", 78 * 2**30),
        ("78 GB", "bytes", 78e9),
        ("2", "points", 2),
        ("2pp", "points", 2),
        ("1.3x", "ratio", 1.3),
        ("98%", "share", 0.98),
        ("1e-3", "nats", 0.001),
    ],
)
def test_quantities_carry_their_unit(value: object, unit: str, expected: float) -> None:
    assert parse_quantity(value, unit, "x") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "unit"),
    [("-1", "ms"), ("fast", "ms"), ("78GiB", "ms"), ("500ms", "bytes"), ("nan", "ms"), ("", "ms"), (True, "ms")],
)
def test_a_wrong_unit_or_no_number_is_refused(value: object, unit: str) -> None:
    with pytest.raises(UsageError, match="expected a number"):
        parse_quantity(value, unit, "x")


def test_every_rule_can_be_written_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "gate.toml"
    path.write_text(
        "\n".join(f"{name} = 1" for name in FORMS) + '\n[max_drop]\ngsm8k = 1.5\n"mmlu/gold_logprob" = 0.02\n'
    )
    rules = read_rules(path)
    assert len(rules) == len(FORMS) + 2
    assert {(r.subject, r.limit) for r in rules if r.text.startswith("max-drop")} == {
        ("gsm8k", 1.5),
        ("mmlu/gold_logprob", 0.02),
    }


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("max_tfft_p99 = 1", UsageError, "unknown rule 'max_tfft_p99'"),
        ("max_ttft_p99 = '3GiB'", UsageError, "max_ttft_p99 is '3GiB'"),
        ("", UsageError, "holds no rule"),
        ("max_ttft_p99 =", InputError, "not TOML"),
    ],
)
def test_a_wrong_rules_file_names_itself_and_the_mistake(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        read_rules(path)
    assert str(path) in str(caught.value)


def test_a_missing_rules_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file of rules"):
        read_rules(tmp_path / "none.toml")


def test_a_flag_replaces_the_files_rule(tmp_path: Path) -> None:
    path = tmp_path / "gate.toml"
    path.write_text("max_mmlu_drop = 2\nmax_vram = '78GiB'\n")
    rules = gather_rules(path, {"max_mmlu_drop": "1", "max_kl": None}, ["gsm8k=3"])
    assert [(r.subject, r.limit) for r in rules] == [("*mmlu*", 1), ("peak_memory", 78 * 2**30), ("gsm8k", 3)]


def test_a_drop_without_a_task_is_refused() -> None:
    with pytest.raises(UsageError, match="expected TASK=POINTS"):
        gather_rules(None, {}, ["2"])


def test_dashes_and_underscores_are_the_same() -> None:
    assert parse_rule("max-ttft-p99", "1s") == parse_rule("max_ttft_p99", "1s")
