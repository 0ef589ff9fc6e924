"""What H2O costs and gains in the embedded engine: `python bench/h2o_cost.py`, side by side in one run on a CPU.

Step time: decoding with eviction against a full cache of the same live length and against the full length.
Memory and concurrency: the same requests in the same small KV pool, full against a 50% budget.
Rounds alternate between the variants, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from trtkit.benchmark.environment import fingerprint
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.spec.checkpoint import checkpoint_tensors
from trtkit.spec.codec import write_record
from trtkit.spec.dtype import DType
from trtkit.spec.engine import KVStats, Request
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.result import Environment

ROOT = Path(__file__).resolve().parents[1]
KIND = "h2o-cost"
BLOCK = 16
MODEL = ModelSpec(
    name="random-llama-9m",
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=384,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=1024,
    vocab_size=4096,
    max_position_embeddings=4096,
)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Decode steps of one variant, evictions included. Measured.

    `rounds_ms` are each round's mean CPU time of a step on one thread, which a busy machine disturbs less than the
    clock on the wall; `wall_ms` is that clock's median.
    """

    variant: str
    kv: str
    batch: int
    live_tokens: float
    median_ms: float
    rounds_ms: tuple[float, ...]
    wall_ms: float
    eviction_share: float
    kv_bytes: int
    side_bytes: int
    evictions: int


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """Requests of `prompt` and `output` tokens in one fixed pool; `in_flight` is the mean while others wait. Measured."""

    kv: str
    prompt: int
    output: int
    pool_blocks: int
    in_flight: float
    in_flight_peak: int
    preemptions: int
    seconds: float
    useful_tok_s: float
    stats: KVStats


@dataclass(frozen=True, kw_only=True)
class CostRecord:
    """One run. Ratios are of medians; the two gains are those of the first load, whose requests are nearly all prompt."""

    model: ModelSpec
    full_length: int
    budget: int
    interval: int
    steps: tuple[StepTime, ...]
    overhead_at_equal_length: float
    time_of_full_length: float
    pressure: tuple[Pressure, ...]
    concurrency_gain: float
    throughput_gain: float
    environment: Environment


def open_random(kv: str, *, blocks: int, batch: int, length: int) -> EmbeddedEngine:
    """The model with random weights; speed does not depend on their values."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        entry.name: torch.randn(entry.shape, generator=generator) / math.sqrt(entry.shape[-1])
        for entry in checkpoint_tensors(MODEL, quant_for("fp32"))
    }
    limits = Limits(
        max_batch_size=batch,
        max_num_tokens=2048,
        max_seq_len=length,
        tokens_per_block=BLOCK,
        kv_memory_bytes=MODEL.kv_bytes_per_token(DType.FP32) * BLOCK * blocks,
    )
    return open_tensors(MODEL, tensors, limits=limits, kv_policy=parse_kv_policy(kv))


def requests(count: int, prompt: int, output: int, seed: int) -> list[Request]:
    """Equal requests with different tokens."""
    generator = np.random.default_rng(seed)
    return [
        Request(
            request_id=f"{seed}-{i}",
            prompt_ids=tuple(generator.integers(3, MODEL.vocab_size, prompt).tolist()),
            max_tokens=output,
            ignore_eos=True,
        )
        for i in range(count)
    ]


class Share:
    """CPU time spent inside eviction, as a share of the steps it is part of: the least disturbed figure of all."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.inside_ns = self.total_ns = self.counted_ns = 0
        observer = engine._runner.observer
        for name in ("observe", "end_step"):
            setattr(observer, name, self._timed(getattr(observer, name)))

    def _timed(self, call: Callable) -> Callable:
        def timed(*args: object) -> None:
            begun = time.process_time_ns()
            call(*args)
            self.inside_ns += time.process_time_ns() - begun

        return timed


def step_ms(
    engine: EmbeddedEngine, batch: int, prompt: int, steps: int, seed: int, share: Share
) -> tuple[float, float]:
    """Mean CPU time and mean wall time of a decode step once every request decodes."""
    first, last_ns, cpu, wall, inside = set(), 0, [], [], []
    for event in engine.generate(requests(batch, prompt, steps + 1, seed)):
        first.add(event.request_id)
        if len(first) == batch and last_ns != event.time_ns:
            last_ns = event.time_ns
            cpu.append(time.process_time_ns())
            inside.append(share.inside_ns)
            wall.append(last_ns)
    # Requests that began earlier end earlier: only steps with the whole batch count.
    whole = steps - batch
    share.total_ns += cpu[whole] - cpu[0]
    share.counted_ns += inside[whole] - inside[0]
    return tuple(
        statistics.fmean([(b - a) / 1e6 for a, b in itertools.pairwise(times)][:whole]) for times in (cpu, wall)
    )


def measure_steps(args: argparse.Namespace) -> tuple[StepTime, ...]:
    """The three variants, round by round."""
    length, budget, interval, batch = args.length, args.length // 2, args.interval, args.batch
    evicting = f"h2o:{budget},interval={interval}"
    # A full cache grows while it is measured: start it so that its mean length is that of the evicting one.
    mean = budget + interval // 2
    variants = {
        "eviction": (evicting, length - args.steps - 1, mean),
        "full cache, equal live length": ("full", mean - args.steps // 2, mean),
        "full cache, full length": ("full", length - args.steps - 1, length - args.steps / 2),
    }
    blocks = batch * -(-length // BLOCK) + batch
    engines = {
        name: open_random(kv, blocks=blocks, batch=batch, length=length) for name, (kv, _, _) in variants.items()
    }
    rounds: dict[str, list[float]] = {name: [] for name in variants}
    shares = {name: Share(engine) for name, engine in engines.items()}
    walls: dict[str, list[float]] = {name: [] for name in variants}
    held: dict[str, int] = {}
    for number in range(args.rounds + 1):
        for name, (_, prompt, _) in variants.items():
            took, wall = step_ms(engines[name], batch, prompt, args.steps, number, shares[name])
            print(f"round {number}, {name}: {took:.2f} ms CPU, {wall:.2f} ms wall per step", flush=True)
            if number:  # the first round warms up
                rounds[name].append(took)
                walls[name].append(wall)
    for name, (_, prompt, _) in variants.items():
        held[name] = max(_blocks(engines[name], batch, prompt))
    return tuple(
        StepTime(
            variant=name,
            kv=kv,
            batch=batch,
            live_tokens=float(live),
            median_ms=statistics.median(rounds[name]),
            rounds_ms=tuple(rounds[name]),
            wall_ms=statistics.median(walls[name]),
            eviction_share=shares[name].counted_ns / shares[name].total_ns,
            kv_bytes=held[name] * engines[name].kv_stats().block_bytes,
            side_bytes=engines[name].kv_stats().side_bytes,
            evictions=engines[name].kv_stats().evictions,
        )
        for name, (kv, _, live) in variants.items()
    )


def _blocks(engine: EmbeddedEngine, batch: int, prompt: int) -> list[int]:
    """Blocks in use after each event of a short run, once every request decodes."""
    first, used = set(), []
    for event in engine.generate(requests(batch, prompt, 8, 99)):
        first.add(event.request_id)
        if len(first) == batch and event.finish is None:
            used.append(engine.kv_stats().blocks_used)
    return used


def measure_pressure(args: argparse.Namespace, kv: str, output: int, pool_requests: int) -> Pressure:
    """Four times as many requests as the pool holds in full."""
    prompt = args.length - output
    blocks = pool_requests * -(-args.length // BLOCK)
    engine = open_random(kv, blocks=blocks, batch=4 * pool_requests, length=args.length)
    running, tokens = [], 0
    total = 4 * pool_requests
    started = time.monotonic()
    for event in engine.generate(requests(total, prompt, output, 7)):
        tokens += event.token_id is not None
        stats = engine.kv_stats()
        # While others still wait, what runs is what fits.
        if stats.requests_waiting:
            running.append(stats.requests_running)
    seconds = time.monotonic() - started
    stats = engine.kv_stats()
    return Pressure(
        kv=kv,
        prompt=prompt,
        output=output,
        pool_blocks=blocks,
        in_flight=statistics.fmean(running) if running else float(total),
        in_flight_peak=stats.requests_peak,
        preemptions=stats.preemptions,
        seconds=seconds,
        useful_tok_s=tokens / seconds,
        stats=stats,
    )


def main() -> None:
    """Measure, print, write."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--interval", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool-requests", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / f"h2o-cost-{stamp}.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = measure_steps(args)
    evicting, equal, whole = (step.median_ms for step in steps)
    policies = ("full", f"h2o:{args.length // 2},interval={args.interval}")
    loads = ((args.length // 16, args.pool_requests), (args.length // 2, args.pool_requests // 3))
    pressure = tuple(measure_pressure(args, kv, *load) for load in loads for kv in policies)
    record = CostRecord(
        model=MODEL,
        full_length=args.length,
        budget=args.length // 2,
        interval=args.interval,
        steps=steps,
        overhead_at_equal_length=evicting / equal - 1,
        time_of_full_length=evicting / whole,
        pressure=pressure,
        concurrency_gain=pressure[1].in_flight / pressure[0].in_flight,
        throughput_gain=pressure[1].useful_tok_s / pressure[0].useful_tok_s,
        environment=fingerprint(device="cpu", command=["python", "bench/h2o_cost.py"]),
    )
    write_record(args.output, KIND, record)
    for step in steps:
        print(
            f"{step.variant:32} {step.median_ms:8.2f} ms/step  {step.eviction_share:5.1%} evicting  {step.kv_bytes / 2**20:7.1f} MiB KV  {step.rounds_ms}"
        )
    for side in pressure:
        print(
            f"{side.prompt} + {side.output}, {side.kv:20} {side.in_flight:5.2f} in flight  {side.useful_tok_s:7.1f} tok/s  {side.preemptions} preempted"
        )
    print(
        f"eviction costs {record.overhead_at_equal_length:+.1%} at equal live length and takes "
        f"{record.time_of_full_length:.1%} of a full-length step; {record.concurrency_gain:.2f}x in flight, "
        f"{record.throughput_gain:.2f}x tokens/s in the same pool -> {args.output}"
    )


if __name__ == "__main__":
    main()
