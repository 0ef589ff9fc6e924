"""One cell, one record file: where it lies, whether it is finished, and which cells of a run are still to do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.benchmark.prompts import SHAREGPT
from trtkit.benchmark.targets import Target
from trtkit.spec.atomic import output_errors
from trtkit.spec.codec import digest, read_record
from trtkit.spec.errors import InputError
from trtkit.spec.result import BENCH_KIND, BenchResult
from trtkit.spec.workload import SYNTHETIC, Protocol, Workload

ENGINE_LOST = "engine_lost"
"""Name of the check that marks a cell whose engine died or could not be opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One engine under one workload."""

    target: Target
    workload: Workload
    path: Path
    refusal: str | None = None
    done: BenchResult | None = None

    @property
    def title(self) -> str:
        """Short text for progress and messages."""
        return f"{self.target.ref.label or self.target.ref.name}, {load_title(self.workload)}"


def load_title(workload: Workload) -> str:
    """The workload in a few words."""
    load = f"concurrency {workload.concurrency}" if workload.request_rate is None else f"{workload.request_rate:g}/s"
    return f"{load}, {workload.lengths}"


def plan_cells(targets: Sequence[Target], protocol: Protocol, output_dir: Path) -> list[Cell]:
    """Every cell of a run, engine by engine, each engine's cells by rising load so that their peaks can be told apart."""
    ordered = sorted(protocol.workloads, key=lambda w: ((w.concurrency or 0) * (w.isl + w.osl), w.request_rate or 0.0))
    cells = []
    for target in targets:
        for workload in ordered:
            path = output_dir / cell_name(target, workload, protocol)
            cells.append(
                Cell(
                    target=target,
                    workload=workload,
                    path=path,
                    refusal=refusal(target, workload),
                    done=finished(path),
                )
            )
    return cells


def refusal(target: Target, workload: Workload) -> str | None:
    """Why this engine cannot run this workload at all; None if it can."""
    wanted, longest = workload.isl + workload.osl, target.plan.limits.max_seq_len
    if wanted > longest:
        return (
            f"{target.ref.name}: ISL {workload.isl} + OSL {workload.osl} = {wanted} tokens exceed its max_seq_len "
            f"{longest}; build with --max-seq-len {wanted} or ask for less"
        )
    return None


def cell_name(target: Target, workload: Workload, protocol: Protocol) -> str:
    """File name that changes with whatever makes the measurement another one."""
    identity = digest([target.ref.digest, target.ref.label, workload_digest(workload), protocol.repeats])
    load = f"c{workload.concurrency}" if workload.request_rate is None else f"r{workload.request_rate:g}"
    return f"{_slug(target.ref.name)}-{load}-isl{workload.isl}-osl{workload.osl}-{identity}.json"


def workload_digest(workload: Workload) -> str:
    """The workload and, if its prompts come from a file, that file's content."""
    content = ""
    source = workload.dataset.removeprefix(f"{SHAREGPT}:")
    if workload.dataset not in (SYNTHETIC, SHAREGPT) and Path(source).is_file():
        with Path(source).open("rb") as handle:
            sha = hashlib.sha256()
            while chunk := handle.read(1 << 20):
                sha.update(chunk)
        content = sha.hexdigest()
    return digest([workload, content])


def finished(path: Path) -> BenchResult | None:
    """The record at `path` if it is whole and valid; a damaged, older or invalid one is measured again."""
    if not path.is_file():
        return None
    try:
        record = read_record(path, BENCH_KIND, BenchResult)
    except InputError:
        return None
    return record if record.valid else None


def prepare_output(directory: Path) -> None:
    """Create the directory and prove that files can be written there, before hours are spent.

    Raises:
        OutputError: it cannot be created or written.
    """
    probe = directory / ".writable"
    with output_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.") or "engine"
