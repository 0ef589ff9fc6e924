"""Peers on the same GPU, after our own rows: transformers with a static cache beside us, and vLLM where its wheels are.

    python3 bench/gpu/peers/run.py --out peers.json [--time-limit-s 300] [--rehearse] [--only transformers]

Each peer runs in a process of its own, so that what it leaves on the GPU is gone when the next one starts. TRTKIT_PEERS
names the folder into which vLLM's wheels were installed (`split_wheel.py install`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import contextlib

from bench.gpu import sources
from bench.gpu.llama70b import detect_gpu
from bench.gpu.peers import transformers_static, vllm_dummy
from bench.gpu.peers.rounds import PeerCell, PeerRecord, line
from bench.gpu.rows import real_scale, rehearsal_scale
from trtkit.spec.codec import from_plain, to_plain, write_record
from trtkit.spec.errors import InputError, TrtkitError

KIND = "gpu-peers"
PEERS = {"transformers": 0.45, "vllm-fp8": 0.6, "vllm-int8-gptq": 1.0}
"""Each peer and its share of the time then left."""
SITE_VARIABLE = "TRTKIT_PEERS"
VLLM_LOADS = ((1, 512, 256), (32, 512, 256), (1, 4096, 256))
RESERVE_S = 8.0


def one_peer(name: str, limit_s: float, *, rehearse: bool) -> list[PeerCell]:
    """Run one peer in this process."""
    deadline_s = time.monotonic() + limit_s

    def left_s() -> float:
        return deadline_s - time.monotonic()

    scale = rehearsal_scale() if rehearse else real_scale(detect_gpu())
    with tempfile.TemporaryDirectory(prefix="trtkit-peer-") as work:
        if name == "transformers":
            if rehearse:
                return transformers_static.compare(transformers_static.rehearsal_setup(scale.model, Path(work), left_s))
            return transformers_static.compare(transformers_static.gpu_setup(scale.gpu, Path(work), left_s))
        loads = ((1, 8, 4),) if rehearse else VLLM_LOADS
        setup = vllm_dummy.Setup(model=scale.model, loads=loads, work_dir=Path(work), left_s=left_s)
        return vllm_dummy.run(setup, name.removeprefix("vllm-"))


def in_child(name: str, limit_s: float, *, rehearse: bool) -> list[PeerCell]:
    """Run one peer in a child, ended with its whole process group when its time is over."""
    with tempfile.TemporaryDirectory(prefix="trtkit-peers-") as folder:
        answer = Path(folder) / "cells.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--peer", name, "--out", str(answer)]
        command += ["--time-limit-s", str(limit_s), *(["--rehearse"] if rehearse else [])]
        child = subprocess.Popen(command, stdout=sys.stderr, env=_environment(), start_new_session=True)
        try:
            code = child.wait(limit_s + RESERVE_S / 2)
            reason = f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"was ended after {limit_s:.0f} s"
        finally:
            _end(child)
        try:
            return [from_plain(PeerCell, cell) for cell in json.loads(answer.read_text(encoding="utf-8"))]
        except (OSError, ValueError, InputError):
            return [_nothing(name, reason)]


def _end(child: subprocess.Popen) -> None:
    """End the child and what it started; vLLM's engine is a process of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _environment() -> dict[str, str]:
    """The peers' wheels come last on the path: nothing of the machine's own is replaced by them."""
    environment = dict(os.environ)
    site = environment.get(SITE_VARIABLE)
    if site:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), site]))
    return environment


def _nothing(name: str, reason: str) -> PeerCell:
    return PeerCell(who=name, version="", model="", precision="", concurrency=0, isl=0, osl=0, not_run=reason)


def run_all(names: Sequence[str], limit_s: float, out: Path, *, rehearse: bool) -> PeerRecord:
    """Every peer in turn; the record is written after each."""
    deadline_s = time.monotonic() + limit_s
    record = PeerRecord(rehearsal=rehearse)
    for name in names:
        left = deadline_s - time.monotonic() - RESERVE_S
        if left < RESERVE_S:
            cells = [_nothing(name, "no time was left")]
        elif name.startswith("vllm") and not _has_vllm():
            cells = [_nothing(name, f"vLLM is not here; install its wheels and name their folder in {SITE_VARIABLE}")]
        else:
            cells = in_child(name, left * PEERS[name], rehearse=rehearse)
        every = (*record.cells, *cells)
        lines = () if rehearse else tuple(line(cell) for cell in every)
        record = PeerRecord(rehearsal=rehearse, cells=every, lines=lines)
        write_record(out, KIND, record)
        for cell in cells:
            state = f"not run: {cell.not_run}" if cell.not_run else f"{len(cell.rounds)} rounds"
            print(f"{name}: c{cell.concurrency} {cell.isl}/{cell.osl} {cell.who}: {state}", flush=True)
    return record


def _has_vllm() -> bool:
    site = os.environ.get(SITE_VARIABLE)
    from importlib.util import find_spec

    return find_spec("vllm") is not None or bool(site and (Path(site) / "vllm").is_dir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--time-limit-s", type=float, default=300.0)
    parser.add_argument("--rehearse", action="store_true", help="tiny shape on the CPU, no rates")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory(prefix="trtkit-path-") as metadata_dir:
            sources.use(Path(metadata_dir))
            if args.peer:
                cells = one_peer(args.peer, args.time_limit_s, rehearse=args.rehearse)
                args.out.write_text(json.dumps(to_plain(cells)), encoding="utf-8")
                return 0
            names = args.only.split(",") if args.only else list(PEERS)
            unknown = [name for name in names if name not in PEERS]
            if unknown:
                parser.error(f"unknown peer {unknown[0]!r}: there are {', '.join(PEERS)}")
            run_all(names, args.time_limit_s, args.out, rehearse=args.rehearse)
    except TrtkitError as error:
        print(f"peers: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
