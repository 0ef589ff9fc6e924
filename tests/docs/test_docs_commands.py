"""Every trtkit command line shown in the docs uses commands and options that exist."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trtkit.cli.app import COMMANDS, build_app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("b*/**/README.md")])
GENERATED = {"cli.md", "metrics.md"}
FENCE = re.compile(r"```(?:bash|console|sh|shell)[^\n]*\n(.*?)```", re.DOTALL)


def command_lines(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    commands = (line.strip().removeprefix("$ ") for line in lines)
    return [line for line in commands if line.startswith("trtkit ")]


@cache
def help_of(command: str) -> str:
    return CliRunner().invoke(build_app(requested={command}), [command, "--help"], env={"COLUMNS": "200"}).output


SHOWN = [(page, line) for page in PAGES if page.name not in GENERATED for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=[f"{p.name}: {line[:60]}" for p, line in SHOWN])
def test_command_in_docs_exists_with_its_options(page: Path, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = words[0]
    if command.startswith("-"):
        return
    assert command in COMMANDS, f"{page.name} shows `trtkit {command}`"
    options = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(command)))
    assert options - known == set(), f"{page.name}: {line}"


def test_readme_shows_commands() -> None:
    assert command_lines(ROOT / "README.md")


LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    broken = [t for t in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / t).exists()]
    assert broken == []
