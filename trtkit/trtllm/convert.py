"""Hugging Face safetensors to a TensorRT-LLM checkpoint, in pieces of a few megabytes.

Every output tensor's place in its file is known before the first byte is read, so a conversion is a list of
independent pieces: read some rows of one source tensor, cast or quantise and check them, write them to their places in
one or more rank files. Memory does not depend on the model, pieces run on several threads (reading, casting and
writing all release the interpreter), and a killed conversion continues with the pieces its journal does not list.
"""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trtkit.spec.atomic import output_errors, write_text
from trtkit.spec.checkpoint import CONFIG_NAME, rank_file
from trtkit.spec.checkpoint_config import checkpoint_config
from trtkit.spec.codec import digest
from trtkit.spec.directory import absolute, check_free, check_space, publish, working_directory
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.plan import Parallelism
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.quant import GPTQ_INT8, INT4_GROUPS, QuantSpec
from trtkit.trtllm.journal import Journal
from trtkit.trtllm.layout import Slab, slabs
from trtkit.trtllm.packed import source_quant
from trtkit.trtllm.piece import LostWriteError, PieceWorker
from trtkit.trtllm.safetensors_file import FileLayout, lay_out
from trtkit.trtllm.source import SourceCheckpoint, check_orders, open_source
from trtkit.trtllm.stored import (
    GPTQ_GROUP,
    GPTQ_GROUPS,
    check_groups,
    kv_scale_name,
    kv_scales,
    stored_quant,
    stored_tensors,
)
from trtkit.trtllm.threads import in_parallel

FORMAT_VERSION = 4
"""Part of a plan's digest: raise it when the same plan gives other bytes or pieces, so that no old piece is kept."""

PIECE_BYTES = 1 << 20
PACKED_PIECES = {"rows": 16, "groups": 64}
"""Pieces of packed sources are that many times larger, as their rows lie scattered in the source, and in an engine's groups also in the
output, where every input takes a write of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertResult:
    """What a conversion did. `resumed_pieces` of `pieces` were there from an earlier, interrupted run."""

    output: str
    model: str
    quant: QuantSpec
    parallel: Parallelism
    source_bytes: int
    output_bytes: int
    pieces: int
    resumed_pieces: int
    seconds: float


def convert(  # noqa: PLR0913 - one keyword per decision, all but two with defaults
    source_dir: Path,
    output_dir: Path,
    *,
    quant: QuantSpec,
    parallel: Parallelism | None = None,
    target: str = "embedded",
    name: str | None = None,
    force: bool = False,
    kv_scale: Sequence[float] | None = None,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Write `output_dir` (config.json and one safetensors file per rank) from a Hugging Face directory.

    Work happens in `<output_dir>.partial`, which survives a kill; the same call again continues. `name` is the model's,
    by default the source directory's; `kv_scale` is the 8-bit KV cache's scale of each layer.

    Raises:
        InputError: the source is damaged, incomplete or not finite, or overflows the target type.
        OutputError: the output exists (without `force`), cannot be written, or the disk is full.
        UnsupportedError: the architecture, the scheme or the source's types; UsageError: an uneven split.
    """
    started = time.monotonic()
    output, parallel = absolute(output_dir), parallel or Parallelism()
    check_free(output, force=force, marker=CONFIG_NAME)
    source = open_source(source_dir, name=name)
    stored = with_source_groups(stored_quant(quant, target), source, parallel)
    scales = kv_scales(stored, source.model.num_layers, kv_scale)
    pieces = list(_pieces(source, parallel, "groups" if stored.algo == GPTQ_INT8 else "rows"))
    layouts = _layouts(source, stored, parallel)
    plan_digest = _plan_digest(source, stored, parallel, scales)
    output_bytes = sum(layout.num_bytes for layout in layouts)
    with working_directory(output) as partial, Journal(partial, plan_digest) as journal:
        check_space(output, output_bytes - _present_bytes(partial))
        if not journal.finished or not _files_intact(partial, layouts):
            _begin(journal, partial, layouts, scales, parallel)
        _run(source, pieces, partial, layouts, journal, progress)
        write_text(partial / CONFIG_NAME, _config_text(source, stored, parallel))
        publish(partial, output)
    return ConvertResult(
        output=str(output),
        model=source.model.name,
        quant=stored,
        parallel=parallel,
        source_bytes=source.num_bytes,
        output_bytes=output_bytes,
        pieces=len(pieces),
        resumed_pieces=len(journal.finished),
        seconds=time.monotonic() - started,
    )


def _begin(
    journal: Journal, partial: Path, layouts: Sequence[FileLayout], scales: Sequence[float], parallel: Parallelism
) -> None:
    """Start from nothing: empty rank files, and the numbers that do not come from the source."""
    journal.restart()
    _begin_files(partial, layouts)
    _write_kv_scales(partial, layouts, scales, parallel)


def _pieces(source: SourceCheckpoint, parallel: Parallelism, form: str) -> Iterator[Slab]:
    """Everything to do, one source tensor after the other, with the ranks taking turns inside a tensor.

    A file takes one writer at a time, so threads working on the rows of one rank would wait for each other.
    """
    for _, parts in itertools.groupby(slabs(source.model, parallel), key=lambda slab: slab.source):
        for turn in itertools.zip_longest(*(_cut(source, slab, form) for slab in parts)):
            yield from (piece for piece in turn if piece is not None)


def _cut(source: SourceCheckpoint, slab: Slab, form: str) -> Iterator[Slab]:
    """Pieces of at most `PIECE_BYTES` of source, always whole rows; more for packed sources, whose rows lie scattered."""
    tensor = source.tensors[slab.source]
    row_bytes = tensor.entry.num_bytes // tensor.entry.shape[0]
    step = max(1, PIECE_BYTES * (1 if tensor.packed is None else PACKED_PIECES[form]) // row_bytes)
    for begin in range(0, slab.rows, step):
        yield replace(
            slab,
            row=slab.row + begin,
            rows=min(step, slab.rows - begin),
            targets=tuple(replace(target, row=target.row + begin) for target in slab.targets),
        )


def _layouts(source: SourceCheckpoint, stored: QuantSpec, parallel: Parallelism) -> list[FileLayout]:
    return [
        lay_out(stored_tensors(source.model, stored, parallel, pp_rank=rank // parallel.tp))
        for rank in range(parallel.world_size)
    ]


def with_source_groups(stored: QuantSpec, source: SourceCheckpoint, parallel: Parallelism) -> QuantSpec:
    """`stored` with the groups that the source has; one scale a row is repeated for each group of an engine's size.

    Raises:
        UnsupportedError: GPTQ asked for of a source that is not, or groups that an engine's kernel does not take.
    """
    where = str(source.directory)
    stored = source_quant(stored, source.model, source.packing, parallel, where)
    if source.packing is None or stored.weights.bits != source.packing.bits:
        return stored
    kept = stored.precision == "int8-gptq" or stored.algo == INT4_GROUPS
    if kept and stored.compute is DType.BF16 and "F16" in source.scale_dtypes:
        raise UnsupportedError(f"{where}: its scales are float16 numbers, which bf16 would round; use --dtype fp16")
    if stored.input_order:
        check_orders(source)
    if stored.algo != GPTQ_INT8:
        return stored
    group = stored.group_size or GPTQ_GROUP
    if group not in GPTQ_GROUPS:
        raise UnsupportedError(
            f"{where}: GPTQ groups of {group}; TensorRT-LLM's kernel takes {' and '.join(map(str, GPTQ_GROUPS))} "
            "(or one scale a row): use --precision int8, which rounds again"
        )
    stored = replace(stored, group_size=group)
    check_groups(source.model, stored, parallel)
    return stored


def _plan_digest(source: SourceCheckpoint, stored: QuantSpec, parallel: Parallelism, scales: Sequence[float]) -> str:
    return digest(
        {
            "format": FORMAT_VERSION,
            "piece_bytes": PIECE_BYTES,
            "model": source.model,
            "quant": stored,
            "parallel": parallel,
            "kv_scales": list(scales),
            "source": str(source.directory.absolute()),
            "files": source.fingerprint,
        }
    )


def _config_text(source: SourceCheckpoint, stored: QuantSpec, parallel: Parallelism) -> str:
    return json.dumps(checkpoint_config(source.model, stored, parallel), indent=2) + "\n"


def _present_bytes(partial: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in partial.iterdir() if file.is_file())


def _files_intact(partial: Path, layouts: Sequence[FileLayout]) -> bool:
    paths = [partial / rank_file(rank) for rank in range(len(layouts))]
    return all(p.is_file() and p.stat().st_size == layout.num_bytes for p, layout in zip(paths, layouts, strict=True))


def _begin_files(partial: Path, layouts: Sequence[FileLayout]) -> None:
    """Create the rank files with their headers, at full size and full of zeros (vocabulary padding stays so)."""
    for rank, layout in enumerate(layouts):
        path = partial / rank_file(rank)
        with output_errors(path), path.open("wb") as handle:
            handle.write(layout.header)
            handle.truncate(layout.num_bytes)


def _write_kv_scales(
    partial: Path, layouts: Sequence[FileLayout], scales: Sequence[float], parallel: Parallelism
) -> None:
    per_stage = len(scales) // parallel.pp
    for rank, layout in enumerate(layouts if scales else ()):
        path, first = partial / rank_file(rank), rank // parallel.tp * per_stage
        with output_errors(path), path.open("rb+") as handle:
            for layer in range(per_stage):
                handle.seek(layout.entries[kv_scale_name(layer)].offset)
                handle.write(struct.pack("<f", scales[first + layer]))


def _run(
    source: SourceCheckpoint,
    pieces: Sequence[Slab],
    partial: Path,
    layouts: Sequence[FileLayout],
    journal: Journal,
    progress: Progress,
) -> None:
    todo = [index for index in range(len(pieces)) if index not in journal.finished]
    count = itertools.count(len(journal.finished))
    paths = [partial / rank_file(rank) for rank in range(len(layouts))]
    progress("convert", next(count), len(pieces))
    try:
        with PieceWorker.opened(source, paths, layouts) as worker:

            def work(index: int) -> None:
                worker.move(pieces[index])
                journal.note(index)
                progress("convert", next(count), len(pieces))

            in_parallel(work, todo)
    except LostWriteError:
        # Pieces the journal lists may be gone, so the next attempt must not trust it.
        journal.restart()
        raise
