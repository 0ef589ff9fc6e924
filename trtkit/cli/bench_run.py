"""What `trtkit bench` does with its flags: targets and protocol, the run with the audit as judge, the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from trtkit.audit.records import check_result
from trtkit.backends.recipe import parse_bytes
from trtkit.benchmark.cells import load_title, plan_cells
from trtkit.benchmark.compat import vllm_view
from trtkit.benchmark.protocol import Changes, changed, load_protocol, parse_numbers, parse_rates, parse_slo
from trtkit.benchmark.run import BenchRun, Settings, run_bench, warmup_count
from trtkit.benchmark.targets import Target, expand, open_targets
from trtkit.cli.common import emit, note, progress_bars
from trtkit.spec.codec import to_plain
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.speculation import parse_speculation, speculation_label
from trtkit.spec.workload import Protocol

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchFlags:
    """The command line, one field per flag."""

    engines: Sequence[str]
    protocol: str
    concurrency: str | None = None
    isl: str | None = None
    osl: str | None = None
    num_requests: int | None = None
    warmup: int | None = None
    request_rate: str | None = None
    dataset: str | None = None
    repeats: int | None = None
    seed: int | None = None
    shared_prefix: int | None = None
    slo: str | None = None
    output_dir: Path | None = None
    label: Sequence[str] | None = None
    kv: str | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    kv_memory: str | None = None
    reuse_prefix: bool | None = None
    speculate: str | None = None
    device: str | None = None
    dry_run: bool = False
    as_json: bool = False


def run(flags: BenchFlags) -> None:
    """Carry out one command."""
    base = load_protocol(flags.protocol)
    protocol = changed(base, _changes(flags))
    targets = open_targets(expand(flags.engines), _overrides(flags), _labels(flags))
    output_dir = flags.output_dir or Path("results") / base.name
    if flags.dry_run:
        emit(*_plan(targets, protocol, output_dir), as_json=flags.as_json)
        return
    with progress_bars(quiet=flags.as_json) as progress:
        settings = Settings(
            output_dir=output_dir,
            judge=check_result,
            progress=progress,
            note=lambda text: note(text, as_json=flags.as_json),
        )
        result = run_bench(targets, protocol, settings)
    emit(payload(result, output_dir), _table(result, output_dir), as_json=flags.as_json)
    result.raise_if_incomplete()


def payload(result: BenchRun, output_dir: Path) -> dict[str, object]:
    """The command's JSON: each cell without its raw samples (those are in its record), with the flat vLLM keys."""
    return {
        "output_dir": str(output_dir),
        "kept": result.kept,
        "refused": list(result.refused),
        "lost": list(result.lost),
        "results": [
            {
                **to_plain(replace(cell, repeats=())),
                "record": str(path),
                "vllm": vllm_view(cell),
            }
            for cell, path in zip(result.results, result.paths, strict=True)
        ],
    }


def _table(result: BenchRun, output_dir: Path) -> str:
    if not result.results:
        return "nothing was measured"
    from trtkit.report.console import render_console

    return f"{render_console(result.results)}\n\nrecords: {output_dir} (trtkit report {output_dir} --format html)"


def _plan(targets: Sequence[Target], protocol: Protocol, output_dir: Path) -> tuple[dict[str, object], str]:
    """What would run."""
    rows = [
        {
            "engine": cell.target.ref.name,
            "load": load_title(cell.workload),
            "requests": protocol.repeats * cell.workload.num_requests,
            "warmup": warmup_count(cell.workload),
            "state": "refused" if cell.refusal else "finished" if cell.done else "to run",
            "reason": cell.refusal,
        }
        for cell in plan_cells(targets, protocol, output_dir)
    ]
    head = f"{protocol.name}: {len(rows)} cells, {protocol.repeats} repeat(s), records in {output_dir}"
    lines = [
        f"  {row['engine']}: {row['load']}: {row['requests']} requests after {row['warmup']} to warm up, {row['state']}"
        for row in rows
    ]
    return {"protocol": to_plain(protocol), "output_dir": str(output_dir), "cells": rows}, "\n".join([head, *lines])


def _changes(flags: BenchFlags) -> Changes:
    def numbers(text: str | None, flag: str) -> list[int] | None:
        return None if text is None else parse_numbers(text, flag)

    return Changes(
        concurrency=numbers(flags.concurrency, "--concurrency"),
        isl=numbers(flags.isl, "--isl"),
        osl=numbers(flags.osl, "--osl"),
        request_rate=_maybe(parse_rates, flags.request_rate),
        num_requests=flags.num_requests,
        warmup_requests=flags.warmup,
        dataset=flags.dataset,
        seed=flags.seed,
        shared_prefix_tokens=flags.shared_prefix,
        slo=_maybe(parse_slo, flags.slo),
        repeats=flags.repeats,
    )


def _overrides(flags: BenchFlags) -> dict[str, object]:
    return {
        "kv": _maybe(parse_kv_policy, flags.kv),
        "max_batch_size": flags.max_batch_size,
        "max_num_tokens": flags.max_num_tokens,
        "max_seq_len": flags.max_seq_len,
        "kv_memory_bytes": None if flags.kv_memory is None else parse_bytes(flags.kv_memory, "--kv-memory"),
        "enable_block_reuse": flags.reuse_prefix,
        "speculation": None if flags.speculate is None else speculation_label(parse_speculation(flags.speculate)),
        "device": flags.device,
    }


def _labels(flags: BenchFlags) -> dict[str, str]:
    """`ENGINE=TEXT`, or one bare text where there is one engine."""
    labels = {}
    names = [path.name.removesuffix(".engine") for path in expand(flags.engines)]
    for text in flags.label or ():
        name, equals, value = text.partition("=")
        if not equals and len(names) > 1:
            raise UsageError(f"--label {text!r}: with {len(names)} engines say which, as ENGINE=TEXT")
        labels[name if equals else names[0]] = value if equals else text
    return labels


def _maybe(parse: Callable[[str], T], text: str | None) -> T | None:
    return None if text is None else parse(text)
