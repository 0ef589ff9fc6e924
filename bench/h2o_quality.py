"""What eviction costs in quality: `python bench/h2o_quality.py` (a few minutes on a CPU, no downloads).

Trains two toys (bench/h2o_tasks.py) and runs them and the shipped tiny model on the embedded engine under every policy
and several budgets, then writes a record and a plot. `--seed` changes weights, data and questions alike.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from bench.h2o_tasks import (
    DISTANCE_STAGES,
    PREFIX,
    PROMPT,
    RECALL_STAGES,
    STREAM,
    Examples,
    Toy,
    accuracy,
    distance_examples,
    forced,
    open_toy,
    recall_examples,
    train,
)
from trtkit.backends.tokenizer import load_tokenizer
from trtkit.benchmark.environment import fingerprint
from trtkit.engine import runner as engine_runner
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_checkpoint
from trtkit.quality.heldout import HeldoutRules, read_windows
from trtkit.spec.codec import read_record, write_record
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.result import Environment
from trtkit.trtllm.convert import convert

ROOT = Path(__file__).resolve().parents[1]
KIND = "h2o-quality"
LENGTH = PREFIX + STREAM
BUDGETS = (24, 48, 96)
TEXT_BUDGETS = (64, 128, 256)
TEXT_PROMPT, TEXT_WINDOW, TEXT_WINDOWS = 256, 512, 16
POLICIES = {
    "H2O sum": "h2o:{budget},scorer=sum",
    "H2O mean": "h2o:{budget},scorer=mean",
    "H2O decay": "h2o:{budget},scorer=decay",
    "H2O sum, quarter recent": "h2o:{budget},scorer=sum,recent={quarter}",
    "H2O mean, quarter recent": "h2o:{budget},scorer=mean,recent={quarter}",
    "H2O decay, quarter recent": "h2o:{budget},scorer=decay,recent={quarter}",
    "observation window": "snapkv:{budget},recent={third}",
    "sinks + window": "window:{budget}",
    "random": "random:{budget}",
}
REGIMES = {"after questions": (PROMPT,), "before any question": (PREFIX, PROMPT)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement. `value` is an accuracy, or bits per token for task "text"."""

    task: str
    policy: str
    kv: str
    budget: int
    interval: int
    value: float
    samples: int
    evictions: int


@dataclass(frozen=True, kw_only=True)
class QualityRecord:
    """All cells of one run; `seed` makes them again. Every value is measured."""

    seed: int
    sequences: int
    cells: tuple[Cell, ...]
    training_s: float
    environment: Environment
    notes: tuple[str, ...] = field(default_factory=tuple)


def spelled(policy: str, budget: int, interval: int) -> str:
    """The `--kv` text of a table row."""
    text = POLICIES[policy].format(budget=budget, quarter=budget // 4, third=min(16, budget // 3))
    return f"{text},interval={interval}"


def cell(engine: EmbeddedEngine, task: str, policy: str, budget: int, interval: int, found: tuple[float, int]) -> Cell:
    """One line of the record, printed as it comes."""
    value, samples = found
    evictions = engine.kv_stats().evictions
    if evictions == 0 and not engine.info.kv_policy.is_full:
        raise RuntimeError(f"{task}, {engine.info.kv_policy.label}: nothing was evicted, so nothing was measured")
    line = Cell(
        task=task,
        policy=policy,
        kv=engine.info.kv_policy.label,
        budget=budget,
        interval=interval,
        value=value,
        samples=samples,
        evictions=evictions,
    )
    print(f"{task:32} {policy:24} budget {budget:4} interval {interval:3}  {value:.3f}", flush=True)
    return line


def recall_cell(toy: Toy, examples: Examples, regime: str, policy: str, budget: int, *, interval: int = 1) -> Cell:
    """One policy at one budget on recall."""
    kv = "full" if policy == "full" else spelled(policy, budget, interval)
    with open_toy(toy, kv, sequences=len(examples.ids)) as engine:
        found = accuracy(engine, examples, pieces=REGIMES[regime])
        return cell(engine, f"recall, {regime}", policy, budget, interval, found)


def recall_cells(toy: Toy, seed: int, sequences: int) -> list[Cell]:
    """Every policy, budget and regime; then the price of evicting less often."""
    examples = recall_examples(np.random.default_rng(seed + 1), sequences)
    cells = []
    for regime in REGIMES:
        cells.append(recall_cell(toy, examples, regime, "full", LENGTH))
        cells += [recall_cell(toy, examples, regime, policy, b) for policy in POLICIES for b in BUDGETS]
    for interval in (8, 32):
        cells.append(recall_cell(toy, examples, "after questions", "H2O mean", 48, interval=interval))
    return cells


def noise_cells(toy: Toy, seed: int, sequences: int) -> list[Cell]:
    """Two controls: no policy can know what to keep when every pair is asked about equally often and only once."""
    generator = np.random.default_rng(seed + 2)
    even = recall_examples(generator, sequences, zipf=0.0)
    cells = []
    for policy in ("full", "H2O mean", "random", "sinks + window"):
        kv = "full" if policy == "full" else spelled(policy, 48, 1)
        with open_toy(toy, kv, sequences=sequences) as engine:
            cells.append(cell(engine, "recall, even popularity", policy, 48, 1, accuracy(engine, even)))
    return cells


@contextlib.contextmanager
def desynchronised() -> Iterator[None]:
    """The classic fault, on purpose: tokens rotate at the cache's length instead of at their own position."""
    build = engine_runner.build_batch

    def broken(inputs, cache, dtype):
        batch = build(inputs, cache, dtype)
        for row in batch.rows:
            batch.positions_T[row.start : row.start + row.count] -= row.position - row.cached
        return batch

    engine_runner.build_batch = broken
    try:
        yield
    finally:
        engine_runner.build_batch = build


def distance_cells(distance: Toy, recall: Toy, seed: int, sequences: int) -> list[Cell]:
    """A task that needs exact positions, and what the classic position fault does to it and to recall."""
    examples = distance_examples(np.random.default_rng(seed + 3), sequences)
    asked = recall_examples(np.random.default_rng(seed + 1), sequences)
    cells = []
    for policy in ("full", "H2O mean", "sinks + window", "random"):
        kv = "full" if policy == "full" else spelled(policy, 48, 1)
        with open_toy(distance, kv, sequences=sequences) as engine:
            cells.append(cell(engine, "distance", policy, 48, 1, accuracy(engine, examples)))
    for task, toy, data in (("distance", distance, examples), ("recall", recall, asked)):
        with desynchronised(), open_toy(toy, spelled("H2O mean", 48, 1), sequences=sequences) as engine:
            cells.append(cell(engine, f"{task}, positions broken", "H2O mean", 48, 1, accuracy(engine, data)))
    return cells


def text_cells(model_dir: Path) -> list[Cell]:
    """Bits per token of held-out text on the shipped tiny model, decoded under eviction."""
    rules = HeldoutRules(context=TEXT_PROMPT, scored=TEXT_WINDOW - TEXT_PROMPT, limit=TEXT_WINDOWS)
    windows = read_windows(load_tokenizer(model_dir), rules)
    ids = np.array([window.context_ids + window.scored_ids for window in windows])

    def read(logits: torch.Tensor, rows: np.ndarray) -> list:
        """Bits of the token that really came, one call per step: all rows stand at the same place."""
        places[rows] += 1
        known = np.minimum(places[rows], TEXT_WINDOW - 1)
        wanted = torch.from_numpy(ids[rows, known])
        bits = -logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0] / np.log(2)
        return bits.tolist()

    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        convert(model_dir, checkpoint, quant=quant_for("fp32"))
        rows = [(p, b) for p in POLICIES for b in TEXT_BUDGETS]
        for policy, budget in [("full", TEXT_WINDOW), *rows]:
            kv = "full" if policy == "full" else spelled(policy, budget, 8)
            limits = Limits(max_batch_size=len(ids), max_num_tokens=len(ids) * 64, max_seq_len=TEXT_WINDOW + 1)
            with open_checkpoint(checkpoint, limits=limits, kv_policy=parse_kv_policy(kv)) as engine:
                places = np.full(len(ids), TEXT_PROMPT)  # the first token decoded stands here; the next is wanted
                bits = forced(engine, ids, read, prompt=TEXT_PROMPT, pieces=())
                # The last column predicts past the window, so it is left out.
                found = (float(bits[:, :-1].mean()), bits[:, :-1].size)
                cells.append(cell(engine, "text", policy, budget, 8, found))
    return cells


def plot(record: QualityRecord, path: Path) -> None:
    """Recall in both regimes and text, over the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [*(f"recall, {regime}" for regime in REGIMES), "text"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(15, 4.5))
    for axis, task in zip(axes, tasks, strict=True):
        for policy in POLICIES:
            if "quarter" in policy:
                continue
            points = sorted(
                (c.budget, c.value) for c in record.cells if (c.task, c.policy, c.interval < 9) == (task, policy, True)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=policy)
        full = [c.value for c in record.cells if (c.task, c.policy) == (task, "full")]
        if full:
            axis.axhline(full[0], color="black", linestyle=":", label="full cache")
        axis.set_title(task if task == "text" else f"{task} (of {LENGTH} tokens)")
        axis.set_xlabel("KV budget, tokens per head")
        axis.set_ylabel("bits per token (lower is better)" if task == "text" else "accuracy")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def markdown(record: QualityRecord) -> str:
    """The record as the tables of docs/h2o.md."""
    lines = []
    for task in dict.fromkeys(c.task for c in record.cells):
        cells = [c for c in record.cells if c.task == task]
        columns = sorted({(c.budget, c.interval) for c in cells if c.policy != "full"})
        full = [c for c in cells if c.policy == "full"]
        lines += ["", f"**{task}**" + (f" (full cache: {full[0].value:.3f})" if full else ""), ""]
        lines += ["| policy | " + " | ".join(f"{b}, every {i}" for b, i in columns) + " |"]
        lines += ["|---|" + "---|" * len(columns)]
        for policy in dict.fromkeys(c.policy for c in cells if c.policy != "full"):
            found = {(c.budget, c.interval): f"{c.value:.3f}" for c in cells if c.policy == policy}
            lines.append(f"| {policy} | " + " | ".join(found.get(column, "") for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, write."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-limit-s", type=float, default=900)
    parser.add_argument("--model", type=Path, default=ROOT / "bench" / "tiny_model" / "model")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / f"h2o-quality-{stamp}.json")
    parser.add_argument("--render", type=Path, help="Only draw the plot and print the tables of this record.")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "h2o-quality.svg")
    args = parser.parse_args()
    if args.render is not None:
        record = read_record(args.render, KIND, QualityRecord)
        plot(record, args.plot)
        print(markdown(record))
        return
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    recall = train(RECALL_STAGES, seed=args.seed, limit_s=args.train_limit_s)
    distance = train(DISTANCE_STAGES, seed=args.seed, limit_s=args.train_limit_s)
    training_s = time.monotonic() - started
    cells = recall_cells(recall, args.seed, args.sequences)
    cells += noise_cells(recall, args.seed, args.sequences)
    cells += distance_cells(distance, recall, args.seed, args.sequences)
    cells += text_cells(args.model)
    record = QualityRecord(
        seed=args.seed,
        sequences=args.sequences,
        cells=tuple(cells),
        training_s=training_s,
        environment=fingerprint(device="cpu", command=["python", "bench/h2o_quality.py", "--seed", str(args.seed)]),
    )
    write_record(args.output, KIND, record)
    plot(record, args.plot)
    print(markdown(record))
    print(f"{args.output} and {args.plot} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
