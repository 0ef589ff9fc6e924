from __future__ import annotations

import platform
from pathlib import Path

import pytest

from trtkit.benchmark import environment
from trtkit.benchmark.environment import REDACTED, fingerprint, redact, source_digest
from trtkit.spec.codec import from_plain, to_plain
from trtkit.spec.result import Environment


@pytest.mark.parametrize(
    "command",
    [
        ["trtkit", "--token", "s3cr3t"],
        ["trtkit", "--hf-token=s3cr3t"],
        ["trtkit", "--api-key", "s3cr3t"],
        ["HF_TOKEN=s3cr3t", "trtkit"],
        ["trtkit", "hf_s3cr3ts3cr3ts3cr3t"],
        ["trtkit", "x=sk-s3cr3ts3cr3t"],
        ["trtkit", "https://user:s3cr3t@host/path"],
        ["trtkit", "--password", "--s3cr3t"],
    ],
)
def test_secrets_are_in_no_record(command: list[str]) -> None:
    assert "s3cr3t" not in redact(command)
    assert REDACTED in redact(command).replace("'", "")


def test_ordinary_flags_stay_as_they_are() -> None:
    command = ["trtkit", "bench", "builds/a.engine", "--max-num-tokens", "8192", "--isl", "512,4096"]
    assert redact(command) == " ".join(command)


def test_the_machine_is_named_without_naming_the_host() -> None:
    found = fingerprint(device="cpu", command=["trtkit"])
    assert platform.node() not in str(to_plain(found)) or len(platform.node()) < 4
    assert len(found.hostname_hash) == 12
    assert found.device == "cpu"
    assert found.cores >= 1
    assert found.memory_bytes > 10**8
    assert {"trtkit", "torch", "numpy"} <= set(found.versions)
    assert from_plain(Environment, to_plain(found)) == found


def test_a_gpu_without_a_driver_is_still_a_record() -> None:
    found = fingerprint(device="cuda:0", device_count=2)
    assert found.device_count == 2
    assert found.device


def test_a_tree_without_history_is_named_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "trtkit" / "benchmark" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1\n")
    monkeypatch.setattr(environment, "__file__", str(module))
    assert fingerprint(device="cpu").trtkit_commit is None
    (tmp_path / "pyproject.toml").write_text("")
    first = fingerprint(device="cpu").trtkit_commit
    assert first == source_digest(tmp_path)
    assert first.startswith("tree:")
    module.write_text("x = 2\n")
    assert fingerprint(device="cpu").trtkit_commit != first
