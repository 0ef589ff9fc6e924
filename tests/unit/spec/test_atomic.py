"""Files are there in full or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trtkit.spec.atomic import output_errors, replacing, write_text
from trtkit.spec.errors import OutputError


def write_half(path: Path, error: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_appears_complete_with_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "ünï\n")
    assert path.read_bytes() == "ünï\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(failure):
        write_half(path, failure())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(OutputError, match="the disk is full; free some space"):
        write_half(path, OSError(errno.ENOSPC, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OutputError, match=r"cannot be written .*choose another output") as caught:
        write_text(blocker / "below.txt", "x")
    assert "\n" not in str(caught.value)
    directory = tmp_path / "directory"
    (directory / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(directory, "x")
    assert (directory / "inside").is_dir()


def test_the_content_is_flushed_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    seen: list[bool] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(path.exists()), real(fd)))
    write_text(path, "x")
    assert seen[0] is False


def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="mine"), output_errors(Path("x")):
        raise ValueError("mine")
