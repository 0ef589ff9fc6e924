"""Engine bundles: unfinished, damaged and changed ones are refused in one line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from trtkit.spec.bundle import (
    MANIFEST_NAME,
    EngineBundle,
    Manifest,
    bundle_files,
    file_entry,
    open_bundle,
    write_manifest,
)
from trtkit.spec.errors import EngineError
from trtkit.spec.kv import KVFidelity, KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import quant_for

MODEL = ModelSpec(
    name="m",
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    vocab_size=8,
    max_position_embeddings=8,
)
PLAN = BuildPlan(
    name="p", model=MODEL, model_source="m", gpu="cpu", quant=quant_for("fp32"), kv=KVPolicySpec(kind="h2o", budget=8)
)


@pytest.fixture
def bundle(tmp_path: Path) -> EngineBundle:
    """A finished bundle of two files."""
    path = tmp_path / "tiny.engine"
    (path / "checkpoint").mkdir(parents=True)
    (path / "checkpoint" / "config.json").write_text("{}")
    (path / "checkpoint" / "rank0.safetensors").write_bytes(b"weights")
    files = {str(f.relative_to(path)): file_entry(f) for f in bundle_files(path)}
    manifest = Manifest(
        plan=PLAN, fidelity=KVFidelity.EXACT, versions={"trtkit": "0"}, files=files, created_utc="2026-01-02T03:04:05Z"
    )
    write_manifest(path, manifest)
    return EngineBundle(path=path, manifest=manifest)


def test_a_finished_bundle_opens_as_it_was_written(bundle: EngineBundle) -> None:
    opened = open_bundle(bundle.path, check_hashes=True)
    assert opened == bundle
    assert opened.name == "tiny"
    assert opened.checkpoint_dir == bundle.path / "checkpoint"
    assert set(opened.manifest.files) == {"checkpoint/config.json", "checkpoint/rank0.safetensors"}


def test_an_entry_has_the_files_size_and_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000
    (tmp_path / "big").write_bytes(content)
    entry = file_entry(tmp_path / "big")
    assert (entry.size_bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_logs_hidden_files_and_the_manifest_are_not_content(bundle: EngineBundle) -> None:
    before = list(bundle_files(bundle.path))
    (bundle.path / "build.log").write_text("x")
    (bundle.path / ".lock").write_text("x")
    (bundle.path / ".partial").mkdir()
    (bundle.path / ".partial" / "rank1.safetensors").write_text("x")
    assert list(bundle_files(bundle.path)) == before == sorted(before)


def test_the_digest_follows_plan_and_files_but_not_the_build(bundle: EngineBundle) -> None:
    manifest = bundle.manifest
    assert replace(manifest, created_utc="later", phases_s={"convert": 1.0}).digest == manifest.digest
    assert replace(manifest, plan=replace(PLAN, gpu="h100")).digest != manifest.digest
    files = {name: replace(entry, sha256="0" * 64) for name, entry in manifest.files.items()}
    assert replace(manifest, files=files).digest != manifest.digest


def test_a_missing_directory_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine directory; build one with"):
        open_bundle(tmp_path / "absent.engine")


def test_a_bundle_without_a_manifest_never_finished(bundle: EngineBundle) -> None:
    (bundle.path / MANIFEST_NAME).unlink()
    with pytest.raises(EngineError, match="the build never finished"):
        open_bundle(bundle.path)


def test_a_missing_file_is_named(bundle: EngineBundle) -> None:
    (bundle.path / "checkpoint" / "rank0.safetensors").unlink()
    with pytest.raises(EngineError, match=r"rank0\.safetensors: missing from the engine"):
        open_bundle(bundle.path)


def test_a_truncated_file_is_noticed_without_reading_it(bundle: EngineBundle) -> None:
    (bundle.path / "checkpoint" / "rank0.safetensors").write_bytes(b"weigh")
    with pytest.raises(EngineError, match=r"has changed since the build \(5 bytes, 7 recorded\)"):
        open_bundle(bundle.path)


def test_a_changed_byte_is_noticed_by_its_hash(bundle: EngineBundle) -> None:
    (bundle.path / "checkpoint" / "rank0.safetensors").write_bytes(b"weighty")
    assert open_bundle(bundle.path) == bundle
    with pytest.raises(EngineError, match="has changed since the build"):
        open_bundle(bundle.path, check_hashes=True)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"kind": "bench"},
        {"data": {}},
        {"data": []},
    ],
)
def test_a_manifest_of_another_version_is_refused(bundle: EngineBundle, change: dict[str, object]) -> None:
    path = bundle.path / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EngineError, match=r"cannot read the manifest: .*rebuild the engine") as caught:
        open_bundle(bundle.path)
    assert "\n" not in str(caught.value)


def test_a_manifest_with_a_value_no_plan_allows_is_refused(bundle: EngineBundle) -> None:
    path = bundle.path / MANIFEST_NAME
    body = json.loads(path.read_text())
    body["data"]["plan"]["kv"]["budget"] = 0
    path.write_text(json.dumps(body))
    with pytest.raises(EngineError, match="KV budget is 0 tokens"):
        open_bundle(bundle.path)
