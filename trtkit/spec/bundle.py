"""`EngineBundle`: a directory `<name>.engine/` with a manifest `trtkit.json` beside the target's own files.

Layout of an embedded or TensorRT bundle: `checkpoint/` (TensorRT-LLM's config.json and rank{N}.safetensors),
`tokenizer/` (as the model came with), `engine/` (what trtllm-build wrote; tensorrt only). A bundle without a
manifest is unfinished: the manifest is written last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trtkit.spec.codec import digest, read_record, write_record
from trtkit.spec.errors import EngineError, InputError
from trtkit.spec.kv import KVFidelity
from trtkit.spec.plan import BuildPlan

MANIFEST_NAME = "trtkit.json"
MANIFEST_KIND = "bundle"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a bundle: size in bytes and SHA-256."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a bundle is and how it was made. `phases_s` are seconds per build phase."""

    plan: BuildPlan
    fidelity: KVFidelity
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    created_utc: str
    phases_s: Mapping[str, float] = field(default_factory=dict)
    peak_build_bytes: int | None = None
    verification: Mapping[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names the engine: its plan and the content of its files."""
        return digest({"plan": self.plan, "files": self.files})


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineBundle:
    """An engine on disk."""

    path: Path
    manifest: Manifest

    @property
    def checkpoint_dir(self) -> Path:
        """TensorRT-LLM checkpoint."""
        return self.path / "checkpoint"

    @property
    def tokenizer_dir(self) -> Path:
        """Tokenizer files; may be absent."""
        return self.path / "tokenizer"

    @property
    def name(self) -> str:
        """Directory name without the suffix."""
        return self.path.name.removesuffix(".engine")


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file, read in pieces."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            sha.update(chunk)
    return FileEntry(size_bytes=path.stat().st_size, sha256=sha.hexdigest())


def bundle_files(path: Path) -> Iterator[Path]:
    """Every file a manifest lists, sorted: all but the manifest, logs and dotfiles."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        relative = file.relative_to(path)
        if (
            file.name != MANIFEST_NAME
            and file.suffix != ".log"
            and not any(part.startswith(".") for part in relative.parts)
        ):
            yield file


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Finish a bundle."""
    write_record(path / MANIFEST_NAME, MANIFEST_KIND, manifest)


def open_bundle(path: Path, *, check_hashes: bool = False) -> EngineBundle:
    """Read a bundle; sizes are always checked, hashes on request (they read every byte).

    Raises:
        EngineError: no manifest (unfinished or not a bundle), a file is missing, or it has changed.
    """
    manifest_path = path / MANIFEST_NAME
    if not path.is_dir():
        raise EngineError(f"{path}: no such engine directory; build one with `trtkit build`")
    if not manifest_path.is_file():
        raise EngineError(
            f"{path}: no {MANIFEST_NAME}, so the build never finished; run `trtkit build` again, it resumes"
        )
    try:
        manifest = read_record(manifest_path, MANIFEST_KIND, Manifest)
    except InputError as error:
        raise EngineError(f"{path}: cannot read the manifest: {error}; rebuild the engine with this trtkit") from None
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, check_hashes=check_hashes)
    return EngineBundle(path=path, manifest=manifest)


def _check_file(file: Path, entry: FileEntry, *, check_hashes: bool) -> None:
    if not file.is_file():
        raise EngineError(f"{file}: missing from the engine; rebuild it with `trtkit build --force`")
    size = file.stat().st_size
    if size != entry.size_bytes or (check_hashes and file_entry(file).sha256 != entry.sha256):
        raise EngineError(
            f"{file}: has changed since the build ({size} bytes, {entry.size_bytes} recorded); rebuild with --force"
        )
