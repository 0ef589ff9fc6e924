"""Running `trtllm-build`: its log streamed to a file, progress and peak memory read from it, failures in one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from trtkit.spec.atomic import output_errors
from trtkit.spec.errors import CapacityError, EngineError
from trtkit.spec.plan import BuildPlan
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.units import MB
from trtkit.trtllm.lower import build_argv

ENGINE_DIR = "engine"
LOG_NAME = "build.log"
BUILDING_DIR = "engine.building"
TIMING_NAME = ".timing.cache"
_RANK_DONE = re.compile(r"Total time of building (?!all engines)")
_PEAK = re.compile(r"Build phase peak memory: ([0-9.]+) MB(?:, children: ([0-9.]+) MB)?")
_OUT_OF_MEMORY = re.compile(r"OutOfMemory|out of memory|Requested amount of GPU memory", re.IGNORECASE)
_TAIL_LINES = 4


def rank_engine(rank: int) -> str:
    """File name of one rank's engine."""
    return f"rank{rank}.engine"


def timing_cache(directory: Path, plan: BuildPlan, version: str) -> Path:
    """Where tactic timings are kept between builds: beside the engines, by release and GPU."""
    return directory.parent / ".timing" / f"trtllm-{version}-{plan.gpu}.cache"


def run_trtllm_build(
    plan: BuildPlan, directory: Path, shared_cache: Path, *, progress: Progress = no_progress
) -> int | None:
    """Build `directory/engine` from `directory/checkpoint`; all or nothing.

    Returns:
        Peak memory of the build in bytes as `trtllm-build` reports it, None if it did not say.

    Raises:
        CapacityError: the GPU's memory did not suffice.
        EngineError: it failed or was killed; the log's tail is in the message.
    """
    building, finished = directory / BUILDING_DIR, directory / ENGINE_DIR
    shutil.rmtree(building, ignore_errors=True)
    cache = directory / TIMING_NAME
    if shared_cache.is_file():
        shutil.copyfile(shared_cache, cache)
    argv = build_argv(plan, directory / "checkpoint", building, cache)
    peak = run_logged(argv, directory / LOG_NAME, ranks=plan.parallel.world_size, progress=progress)
    check_engine(building, plan)
    with output_errors(finished):
        building.rename(finished)
        if cache.is_file():
            shared_cache.parent.mkdir(exist_ok=True)
            cache.replace(shared_cache)
    return peak


def run_logged(
    argv: Sequence[str],
    log_path: Path,
    *,
    ranks: int = 1,
    name: str | None = None,
    progress: Progress = no_progress,
) -> int | None:
    """Run a program to its end with everything it prints in `log_path`; it is killed if this process is interrupted.

    `name` is what people see it called, by default the program's.
    """
    name = name or argv[0]
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    memory_ran_out, peak, done = False, None, 0
    tethered = [sys.executable, "-m", "trtkit.trtllm.tether", str(os.getpid()), *argv]
    progress(name, 0, ranks)
    with output_errors(log_path), log_path.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(argv)}\n")
        process = subprocess.Popen(  # noqa: S603 - a fixed program, no shell
            tethered,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.strip():
                    tail.append(line.strip())
                memory_ran_out = memory_ran_out or bool(_OUT_OF_MEMORY.search(line))
                peak = _peak_bytes(line) or peak
                done += bool(_RANK_DONE.search(line))
                progress(name, min(done, ranks), ranks)
            code = process.wait()
        finally:
            _end(process)
    if code:
        raise _failure(name, code, log_path, list(tail), memory_ran_out=memory_ran_out)
    return peak


def _peak_bytes(line: str) -> int | None:
    match = _PEAK.search(line)
    return None if match is None else round((float(match[1]) + float(match[2] or 0)) * MB)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the program and its workers; harmless after a clean end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _failure(program: str, code: int, log: Path, tail: list[str], *, memory_ran_out: bool) -> Exception:
    if memory_ran_out:
        return CapacityError(
            f"{program} ran out of GPU memory; lower --max-num-tokens or --max-batch-size, or raise --tp, and run it "
            f"again (it resumes here); log: {log}"
        )
    ending = f"exit code {code}"
    if code < 0:
        ending = f"{signal.Signals(-code).name} (SIGKILL is usually the host running out of memory)"
    return EngineError(
        f"{program} ended with {ending}; run the same command again, it resumes here; its log ({log}) ends: "
        f"{' | '.join(tail) or 'nothing'}"
    )


def check_engine(directory: Path, plan: BuildPlan) -> str:
    """Is an engine directory complete and the plan's? Returns the TensorRT-LLM version that wrote it.

    Raises:
        EngineError: a file is missing or unreadable, or the engine has other limits than the plan.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        mapping = config["pretrained_config"]["mapping"]
        limits = config["build_config"]
        version = str(config["version"])
        ranks = (mapping["tp_size"], mapping["pp_size"])
        built = {name: int(limits[name]) for name in ("max_batch_size", "max_seq_len")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path}: not an engine's config ({type(error).__name__}: {error}); rebuild it") from None
    for rank in range(plan.parallel.world_size):
        if not (directory / rank_engine(rank)).is_file():
            raise EngineError(f"{directory / rank_engine(rank)}: missing; rebuild the engine")
    if ranks != (plan.parallel.tp, plan.parallel.pp):
        raise EngineError(f"{path}: built for tp, pp = {ranks}, the plan says {plan.parallel.tp}, {plan.parallel.pp}")
    # max_num_tokens is not compared: the builder lowers one that no batch of the other two limits could reach.
    for name, value in built.items():
        if value < getattr(plan.limits, name):
            raise EngineError(f"{path}: {name} is {value}, the plan says {getattr(plan.limits, name)}; rebuild it")
    return version
