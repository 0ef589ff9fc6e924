"""Converter speed and peak memory against `cp` of the same bytes: `python bench/convert_vs_cp.py`.

Writes a synthetic sharded bf16 checkpoint (a few layers of a Llama 3 8B, 4.3 GB by default) to a temporary directory,
then times `cp` and `trtkit convert` (TP=2) in turn, several rounds, each as a fresh process with its start-up counted.
What an earlier command left to be written to the disk is written out before the next one starts. `convert` flushes its
output before it gives it its name and `cp` does not, so `cp` is timed with and without a flush after it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from trtkit.spec.atomic import write_text
from trtkit.spec.checkpoint import CheckpointTensor
from trtkit.spec.dtype import DType
from trtkit.spec.hf import load_model_spec
from trtkit.spec.units import GB, GIB, MIB
from trtkit.trtllm.layout import source_shapes
from trtkit.trtllm.safetensors_file import lay_out

SHARDS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 5,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CASES = {
    "bf16-tp2": ("--precision", "bf16", "--tp", "2"),
    "fp16-tp2": ("--precision", "fp16", "--tp", "2"),
    "int8-tp2": ("--precision", "int8", "--tp", "2"),
}


def write_source(directory: Path, layers: int) -> int:
    """A random checkpoint in `SHARDS` files; returns its bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}), encoding="utf-8")
    shapes = source_shapes(load_model_spec(directory))
    tensors = [CheckpointTensor(name=n, shape=s, dtype=DType.BF16, group="") for n, s in shapes.items()]
    noise = (torch.randn(16 * MIB, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    block = noise.view(torch.uint8).numpy().tobytes()
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        layout = lay_out(tensors[shard::SHARDS])
        weight_map |= dict.fromkeys(layout.entries, name)
        with (directory / name).open("wb") as handle:
            handle.write(layout.header)
            left = layout.num_bytes - len(layout.header)
            while left:
                left -= handle.write(block[: min(left, len(block))])
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(tensor.num_bytes for tensor in tensors)


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds and peak RSS in bytes of a fresh process."""
    started = time.perf_counter()
    with log.open("w") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed: {log.read_text()}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def flush(directory: Path) -> float:
    """Seconds to write out every file of a directory."""
    started = time.perf_counter()
    for path in directory.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - started


def set_cache(source: Path, state: str) -> None:
    """Have the source's pages in memory ("warm") or not ("cold")."""
    for path in source.iterdir():
        with path.open("rb", buffering=0) as handle:
            if state == "cold":
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while handle.read(16 * MIB):
                    pass


def one_round(source: Path, work: Path, case: str, state: str) -> dict[str, float]:
    """`cp`, then `convert`; the output of each is removed and the disk left quiet."""
    out, log = work / "out", work / "log"
    os.sync()
    set_cache(source, state)
    cp_s, _ = run(["cp", "-r", str(source), str(out)], log)
    flush_s = flush(out)
    shutil.rmtree(out)
    os.sync()
    set_cache(source, state)
    command = [sys.executable, "-m", "trtkit", "convert", str(source), str(out), *CASES[case], "--json"]
    convert_s, peak = run(command, log)
    inner_s = json.loads(log.read_text().splitlines()[-1])["seconds"]
    shutil.rmtree(out)
    return {"cp_s": cp_s, "cp_flushed_s": cp_s + flush_s, "convert_s": convert_s, "inner_s": inner_s, "peak": peak}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(case: str, state: str, rounds: list[dict[str, float]]) -> dict[str, object]:
    """Medians and extremes over rounds; shares are cp's seconds over ours within a round."""
    return {
        "case": case,
        "source_cache": state,
        "rounds": rounds,
        "cp_s": spread([r["cp_s"] for r in rounds]),
        "cp_flushed_s": spread([r["cp_flushed_s"] for r in rounds]),
        "convert_s": spread([r["convert_s"] for r in rounds]),
        "convert_without_startup_s": spread([r["inner_s"] for r in rounds]),
        "share_of_cp_speed": spread([r["cp_s"] / r["convert_s"] for r in rounds]),
        "share_of_flushed_cp_speed": spread([r["cp_flushed_s"] / r["convert_s"] for r in rounds]),
        "peak_rss_gib": spread([r["peak"] / GIB for r in rounds]),
    }


@contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="trtkit-convert-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def environment(work: Path) -> dict[str, object]:
    stat = subprocess.run(["stat", "-f", "-c", "%T", str(work)], capture_output=True, text=True, check=True)
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":unknown")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "filesystem": stat.stdout.strip(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def show(rows: list[dict[str, dict[str, float]]], num_bytes: int) -> None:
    print(f"{num_bytes / GB:.2f} GB of bf16 in, TP=2; seconds as median (low-high) over rounds, process start included")
    print(
        f"{'case':9} {'source':6} {'cp':>18} {'cp + flush':>18} {'convert':>18} {'of cp':>6} {'of cp+flush':>11} {'RSS GiB':>8}"
    )
    for row in rows:
        cells = [
            f"{row[k]['median']:.2f} ({row[k]['low']:.2f}-{row[k]['high']:.2f})"
            for k in ("cp_s", "cp_flushed_s", "convert_s")
        ]
        shares = f"{row['share_of_cp_speed']['median']:6.0%} {row['share_of_flushed_cp_speed']['median']:11.0%}"
        print(
            f"{row['case']:9} {row['source_cache']:6} {' '.join(f'{c:>18}' for c in cells)} {shares} {row['peak_rss_gib']['high']:8.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--cases", default="bf16-tp2,fp16-tp2,int8-tp2")
    parser.add_argument("--cache", default="warm,cold", help="source cache states to measure")
    parser.add_argument("--workspace", type=Path, help="directory to work in (default: the system's temporary one)")
    now = datetime.now(timezone.utc)
    default = Path(__file__).parent / "results" / f"convert-cpu-{now:%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    with workspace(args.workspace) as work:
        num_bytes = write_source(work / "source", args.layers)
        described = environment(work)
        rows = []
        for case in args.cases.split(","):
            for state in args.cache.split(","):
                rounds = [one_round(work / "source", work, case, state) for _ in range(args.rounds)]
                rows.append(summarise(case, state, rounds))
    show(rows, num_bytes)
    record = {"created_utc": now.isoformat(timespec="seconds"), "source": "measured", "source_bytes": num_bytes}
    write_text(args.output, json.dumps({**record, "environment": described, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
