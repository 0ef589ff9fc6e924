"""Building an engine bundle. The embedded target is written here; others register a builder in `BUILDERS`.

A build works in `<name>.engine.partial`. What a killed build finished is kept for the next run of the same plan on the
same source; the manifest is written last, and only then does the directory get its name.
"""

from __future__ import annotations

import importlib
import json
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from trtkit.backends.calibrated import ALGOS
from trtkit.backends.fit import check_fit
from trtkit.backends.model_source import ModelSource
from trtkit.spec.atomic import output_errors, write_text
from trtkit.spec.bundle import (
    MANIFEST_NAME,
    EngineBundle,
    FileEntry,
    Manifest,
    bundle_files,
    file_entry,
    open_bundle,
    write_manifest,
)
from trtkit.spec.checkpoint import CONFIG_NAME
from trtkit.spec.codec import canonical_json, digest
from trtkit.spec.directory import LOCK_NAME, absolute, check_free, publish, working_directory
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, OutputError, UnsupportedError, UsageError
from trtkit.spec.kv import KVFidelity
from trtkit.spec.plan import BuildPlan
from trtkit.spec.progress import Progress, no_progress
from trtkit.trtllm.capabilities import check_plan, kv_fidelity
from trtkit.trtllm.modelopt import modelopt_version
from trtkit.trtllm.packed import read_packing, weights_note
from trtkit.trtllm.policies import check_adapter
from trtkit.trtllm.requirements import require_builder_device, require_guesses, require_packing, require_target
from trtkit.version import __version__

ENGINE_SUFFIX = ".engine"
BUILDERS: dict[str, str] = {
    "embedded": "trtkit.backends.build:build_embedded",
    "tensorrt": "trtkit.backends.build_tensorrt:build_tensorrt",
    "pytorch": "trtkit.backends.build_pytorch:build_pytorch",
}
"""Target -> "module:function"; the function takes a `BuildJob` and fills its directory."""

TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_PLAN_NAME = ".plan.json"
_KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildJob:
    """One build in progress. Builders add to `phases_s`, `peaks_bytes` (of other processes), `verification` and `versions`."""

    plan: BuildPlan
    source_dir: Path
    directory: Path
    fidelity: KVFidelity = KVFidelity.EXACT
    calib_text: Path | None = None
    progress: Progress = no_progress
    phases_s: dict[str, float] = field(default_factory=dict)
    peaks_bytes: dict[str, int] = field(default_factory=dict)
    verification: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase."""
        started = time.monotonic()
        yield
        self.phases_s[name] = time.monotonic() - started


def engine_path(plan: BuildPlan, out_dir: Path) -> Path:
    """Where the plan's engine goes."""
    return absolute(out_dir / f"{plan.name}{ENGINE_SUFFIX}")


def build_engine(  # noqa: PLR0913 - one keyword per decision, all with defaults
    plan: BuildPlan,
    source: ModelSource | Path,
    out_dir: Path,
    *,
    progress: Progress = no_progress,
    force: bool = False,
    allow_approximate: bool = False,
    calib_text: Path | None = None,
) -> EngineBundle:
    """Build the plan's engine from a Hugging Face directory into `out_dir`.

    What can be refused is refused before weights are downloaded or anything is written. `allow_approximate` accepts a
    KV policy that the target carries out only roughly; the manifest then says how. `calib_text` is what precisions that
    need calibration are calibrated on.

    Raises:
        UnsupportedError: the target cannot do what the plan asks.
        UsageError: something is to be calibrated and no text was given.
        CapacityError: weights and the least KV cache do not fit the device.
        InputError: the source is damaged or incomplete, or the finished engine does not compute what it should.
        MissingDependencyError: the target's packages are not installed.
        OutputError: the engine exists (without `force`), cannot be written, or the disk is full.
    """
    builder = builder_of(plan.target)
    path = engine_path(plan, out_dir)
    check_free(path, force=force, marker=MANIFEST_NAME)
    _check_possible(plan)
    fidelity = kv_fidelity(plan, allow_approximate=allow_approximate)
    calibration = _calibration(plan, calib_text)
    if plan.load_format == "dummy":
        return _build_dummy(BuildJob(plan=plan, source_dir=path, directory=path, fidelity=fidelity), path)
    source_dir = source if isinstance(source, Path) else source.fetch()
    notes = calibration | _weights_note(plan, source_dir)
    with working_directory(path) as partial:
        _keep_only_same_build(partial, plan, source_dir, calibration)
        job = BuildJob(
            plan=plan, source_dir=source_dir, directory=partial, fidelity=fidelity,
            calib_text=calib_text, progress=progress,
        )  # fmt: skip
        job.versions.update(notes)
        builder(job)
        with job.phase("manifest"):
            files = {str(file.relative_to(partial)): file_entry(file) for file in bundle_files(partial)}
        write_manifest(partial, _manifest(job, files))
        publish(partial, path)
    return open_bundle(path)


def _check_possible(plan: BuildPlan) -> None:
    """Refuse, before any work, what the device, the target or this machine cannot do."""
    check_fit(plan)
    check_plan(plan)
    check_adapter(plan)
    if plan.target == "tensorrt":
        require_builder_device(plan)
        require_packing(plan)
    if plan.target == "pytorch":
        require_guesses(plan)


def build_embedded(job: BuildJob) -> None:
    """Convert, copy the tokenizer, and check the result against transformers."""
    from trtkit.backends.verify import verify
    from trtkit.trtllm.convert import convert

    checkpoint = job.directory / "checkpoint"
    if not (checkpoint / CONFIG_NAME).is_file():
        with job.phase("convert"):
            plan = job.plan
            convert(
                job.source_dir,
                checkpoint,
                quant=plan.quant,
                parallel=plan.parallel,
                name=plan.model.name,
                progress=job.progress,
            )
    copy_tokenizer(job.source_dir, job.directory / "tokenizer")
    with job.phase("verify"):
        job.verification.update(verify(job.plan.model, job.plan.quant, job.source_dir, checkpoint))


def _weights_note(plan: BuildPlan, source_dir: Path) -> dict[str, str]:
    """How the weights of a source that is quantised already go into the engine; nothing to say of others.

    Raises:
        UnsupportedError: the plan would quantise them with ModelOpt.
    """
    packing = read_packing(source_dir)
    if packing is None:
        return {}
    if plan.quant.algo in ALGOS:
        raise UnsupportedError(
            f"{plan.name}: precision {plan.quant.precision} is calibrated on 16-bit weights, this model is {packing.name}; give "
            "--model the unquantised one"
        )
    return {"weights": weights_note(packing, plan.quant, to_engine=plan.target == "tensorrt")}


def _build_dummy(job: BuildJob, path: Path) -> EngineBundle:
    """A bundle without weights: the engine makes random ones of the true shape when it opens."""
    with working_directory(path) as partial:
        write_manifest(partial, _manifest(job, {}))
        publish(partial, path)
    return open_bundle(path)


def copy_tokenizer(source_dir: Path, directory: Path) -> None:
    """Copy what a tokenizer needs; a model without one gives an engine that takes token ids only.

    Raises:
        OutputError: cannot be written.
    """
    with output_errors(directory):
        directory.mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            if (source_dir / name).is_file():
                shutil.copyfile(source_dir / name, directory / name)


def builder_of(target: str) -> Callable[[BuildJob], None]:
    """The function that builds for a target.

    Raises:
        MissingDependencyError: the target's packages are not installed.
        UnsupportedError: the release that is installed has no such target.
    """
    if target != "embedded":
        require_target(target)
    module, _, function = BUILDERS[target].partition(":")
    builder: Callable[[BuildJob], None] = getattr(importlib.import_module(module), function)
    return builder


def is_calibrated(plan: BuildPlan) -> bool:
    """Whether scales of the plan are found by running the model on text."""
    return plan.quant.algo in ALGOS or plan.quant.kv is DType.INT8


def _calibration(plan: BuildPlan, calib_text: Path | None) -> dict[str, str]:
    """What a calibration is made with and on, for the manifest; empty where there is none.

    Raises:
        InputError: the text cannot be read.
        MissingDependencyError: ModelOpt is not installed.
        UsageError: no text was given.
    """
    if not is_calibrated(plan):
        return {}
    what = f"precision {plan.quant.precision}" if plan.quant.algo in ALGOS else "an int8 KV cache"
    if calib_text is None:
        raise UsageError(f"{plan.name}: {what} is calibrated on text: give --calib-text FILE")
    try:
        made_on = f"{calib_text.name} sha256:{file_entry(calib_text).sha256}"
    except OSError as error:
        raise InputError(f"{calib_text}: cannot be read as text ({error.strerror or error})") from None
    with_modelopt = {"nvidia-modelopt": modelopt_version(plan.quant)} if plan.quant.algo in ALGOS else {}
    return {"calibration": made_on, **with_modelopt}


def _keep_only_same_build(partial: Path, plan: BuildPlan, source_dir: Path, calibration: Mapping[str, str]) -> None:
    """Clear what a build of another plan, another source or another calibration left behind, its notes included.

    Raises:
        OutputError: the directory holds something that no build left.
    """
    stat = {f.name: (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(source_dir.iterdir()) if f.is_file()}
    made_of = {"plan": plan, "source": str(source_dir.absolute()), "files": stat, "calibration": dict(calibration)}
    wanted = digest(made_of | {"trtkit": __version__})
    note = partial / _PLAN_NAME
    left = [entry for entry in partial.iterdir() if not entry.name.startswith(".")]
    if left and not note.is_file():
        raise OutputError(f"{partial}: holds files that no build left there; move them away")
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return
    with output_errors(partial):
        for entry in [entry for entry in partial.iterdir() if entry.name not in (LOCK_NAME, _PLAN_NAME)]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_text(note, canonical_json(wanted))


def _manifest(job: BuildJob, files: Mapping[str, FileEntry]) -> Manifest:
    return Manifest(
        plan=job.plan,
        fidelity=job.fidelity,
        versions=_versions(job.plan) | job.versions,
        files=files,
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        phases_s={name: round(seconds, 3) for name, seconds in job.phases_s.items()},
        peak_build_bytes=max([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB, *job.peaks_bytes.values()]),
        verification=job.verification,
    )


def _versions(plan: BuildPlan) -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors", "numpy")
    found = {"trtkit": __version__, "python": platform.python_version()} | {p: metadata.version(p) for p in packages}
    return found | ({} if plan.target_version is None else {"tensorrt_llm": plan.target_version})
