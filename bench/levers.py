"""What each lever does to answers, on this CPU: `python bench/levers.py` (a few minutes, no downloads).

Builds the shipped tiny model once for each lever of docs/gpu.md, evaluates each beside the plain fp32 engine (perplexity of
the held-out text, two shipped tasks, drift of answers) and asks `trtkit gate` without a rule of its own. Levers that must
change nothing, guessing and block reuse, are held to it token by token. The record says what this small model says and
nothing about a larger one; the same commands, with a model of one's own, do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trtkit.backends import open_engine
from trtkit.backends.tokenizer import load_tokenizer
from trtkit.benchmark.environment import fingerprint
from trtkit.quality.paired import compare_paired
from trtkit.spec.codec import read_record, write_record
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.result import QUALITY_KIND, Environment, QualityResult

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "bench" / "tiny_model"
KIND = "levers"
REFERENCE = ("--precision", "fp32")
LEVERS: dict[str, tuple[str, ...]] = {
    "INT8 weights": ("--precision", "int8", "--dtype", "fp32"),
    "INT4 weights": ("--precision", "int4", "--dtype", "fp32"),
    "INT4 weights, groups of 32": ("--precision", "int4", "--group-size", "32", "--dtype", "fp32"),
    "FP8 weights and operands": ("--precision", "fp8-rowwise", "--dtype", "fp32"),
    "FP8 cache": ("--precision", "fp32", "--kv-dtype", "fp8"),
    "H2O, half the cache": ("--precision", "fp32", "--kv", "h2o:50%"),
    "INT8 + H2O": ("--precision", "int8", "--dtype", "fp32", "--kv", "h2o:50%"),
    "INT8 + FP8 cache": ("--precision", "int8", "--dtype", "fp32", "--kv-dtype", "fp8"),
    "INT4 + FP8 cache": ("--precision", "int4", "--dtype", "fp32", "--kv-dtype", "fp8"),
    "FP8 + FP8 cache": ("--precision", "fp8-rowwise", "--dtype", "fp32", "--kv-dtype", "fp8"),
    "INT4 + H2O": ("--precision", "int4", "--dtype", "fp32", "--kv", "h2o:50%"),
}
EXACT: dict[str, Mapping[str, Any]] = {
    "n-gram guesses, 4 a step": {"speculation": "ngram:4"},
    "n-gram guesses, 8 a step": {"speculation": "ngram:8"},
    "prefix reuse": {"enable_block_reuse": True},
}
"""Levers that may change no token, as overrides of the plain engine."""
MAX_SEQ_LEN = 1024
PASSAGE, ANSWER = 500, 64
"""Characters of a prompt, tokens of its answer."""
MARGIN_NATS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One of the gate's, as it prints it."""

    rule: str
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One lever against the plain engine, measured on the tiny model.

    `difference_nats` per token of held-out text, candidate less reference (positive is worse), with its 95 % interval over
    `windows`. `kl_nats` and `agreement` are of the reference's own answers, teacher-forced.
    """

    lever: str
    options: tuple[str, ...]
    gate: str
    outcomes: tuple[Outcome, ...]
    perplexity: float
    difference_nats: float
    low: float
    high: float
    windows: int
    kl_nats: float
    agreement: float
    tokens_evicted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exactness:
    """A lever that may change no token: how many of how many came out the same, and what shows that it acted."""

    lever: str
    overrides: Mapping[str, str]
    tokens: int
    same: int
    counters: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class LeversRecord:
    """Everything measured, on the CPU and with the tiny model."""

    model: str
    reference: tuple[str, ...]
    perplexity: float
    verdicts: tuple[Verdict, ...]
    exact: tuple[Exactness, ...]
    environment: Environment
    seconds: float
    notes: tuple[str, ...] = field(default_factory=tuple)


class Workshop:
    """A directory with engines and records, and the commands that fill it."""

    def __init__(self, directory: Path, windows: int, *, tasks: bool = True) -> None:
        """`windows` of the held-out text, 0 for all; `tasks` are the two shipped ones."""
        self.builds, self.results = directory / "builds", directory / "results"
        self.prompts, self.windows, self.tasks = directory / "passages.jsonl", windows, tasks
        lines = [
            json.dumps({"id": f"{path.stem}-{part}", "prompt": text[at : at + PASSAGE]})
            for path in sorted((TINY / "heldout").glob("*.txt"))
            for text in [path.read_text(encoding="utf-8")]
            for part, at in enumerate((len(text) // 5, 3 * len(text) // 5))
        ]
        self.prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def build(self, name: str, options: Sequence[str]) -> Path:
        common = ("--gpu", "cpu", "--target", "embedded", "--max-seq-len", str(MAX_SEQ_LEN), "--name", name)
        trtkit("build", "--model", str(TINY / "model"), *common, *options, "--output", str(self.builds))
        return self.builds / f"{name}.engine"

    def evaluate(self, name: str) -> None:
        """Held-out text and the shipped tasks; of a candidate also how far its answers drift from the reference's."""
        what = ["--text", "shipped"]
        if self.tasks:
            what += ["--tasks", "mini_mmlu,mini_recall", "--tasks-dir", "shipped"]
        if self.windows:
            what += ["--limit", str(self.windows)]
        if name != "reference":
            what += ["--prompts", str(self.prompts), "--reference", str(self.builds / "reference.engine")]
            what += ["--max-tokens", str(ANSWER)]
        trtkit("eval", str(self.builds / f"{name}.engine"), *what, "-o", str(self.results))

    def gate(self, name: str) -> dict[str, Any]:
        sides = [str(self.builds / f"{side}.engine") for side in ("reference", name)]
        return json.loads(trtkit("gate", *sides, "--results", str(self.results), "--json", allowed=(0, 1, 9)))

    def records(self, name: str) -> dict[tuple[str, str], QualityResult]:
        """An engine's records by task and metric."""
        every = [read_record(path, QUALITY_KIND, QualityResult) for path in sorted(self.results.glob("*.json"))]
        return {(record.task, record.metric): record for record in every if record.engine.name == name}


def trtkit(*arguments: str, allowed: Sequence[int] = (0,)) -> str:
    """Run the command that a user would; its standard output.

    Raises:
        RuntimeError: it ended otherwise than `allowed`.
    """
    command = [sys.executable, "-m", "trtkit", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode not in allowed:
        raise RuntimeError(f"trtkit {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def verdict(shop: Workshop, number: int, lever: str) -> Verdict:
    """Build, evaluate and gate one lever."""
    name, options = f"lever{number}", LEVERS[lever]
    shop.build(name, options)
    shop.evaluate(name)
    answer, records, reference = shop.gate(name), shop.records(name), shop.records("reference")
    text = records["heldout", "perplexity"]
    before = {document.document: document.score for document in reference["heldout", "perplexity"].documents}
    scores = [document.score for document in text.documents]
    paired = compare_paired(
        [before[document.document] for document in text.documents], scores, margin=MARGIN_NATS, higher_is_better=False
    )
    drift = {record.metric: record.score for (task, _), record in records.items() if task == shop.prompts.stem}
    return Verdict(
        lever=lever,
        options=options,
        gate=answer["status"],
        outcomes=tuple(Outcome(**outcome) for outcome in answer["gate"]["outcomes"]),
        perplexity=text.score,
        difference_nats=-paired.difference,
        low=-paired.high,
        high=-paired.low,
        windows=len(scores),
        kl_nats=drift["kl"],
        agreement=drift["agreement"],
        tokens_evicted=text.tokens_evicted,
    )


def exactness(engine: Path, lever: str, requests: Sequence[Request], plain: Mapping[str, list[int]]) -> Exactness:
    """The same requests with the lever on, token by token."""
    written, counters = answers(engine, requests, **EXACT[lever])
    pairs = [pair for name, tokens in plain.items() for pair in zip(tokens, written[name], strict=True)]
    return Exactness(
        lever=lever,
        overrides={key: str(value) for key, value in EXACT[lever].items()},
        tokens=len(pairs),
        same=sum(ours == theirs for ours, theirs in pairs),
        counters=counters,
    )


def answers(engine: Path, requests: Sequence[Request], **overrides: Any) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Tokens of each request, and what the engine counted."""
    written: dict[str, list[int]] = {request.request_id: [] for request in requests}
    with open_engine(engine, **overrides) as opened:
        for event in opened.generate(requests):
            if event.error is not None or event.token_id is None:
                raise RuntimeError(f"request {event.request_id}: {event.error}")
            written[event.request_id].append(event.token_id)
        stats = opened.kv_stats()
    names = ("draft_tokens", "accepted_tokens", "prompt_tokens_reused")
    return written, {name: getattr(stats, name) for name in names if getattr(stats, name)}


def exact_requests(seed: int) -> list[Request]:
    """Two passages of each held-out file behind one beginning that all share, greedy and drawn by turns."""
    tokenizer = load_tokenizer(TINY / "model")
    texts = [path.read_text(encoding="utf-8") for path in sorted((TINY / "heldout").glob("*.txt"))]
    shared = tokenizer.encode(texts[0])[:256]
    found = []
    passages = [text[at : at + PASSAGE] for text in texts for at in (len(text) // 4, len(text) // 2)]
    for number, passage in enumerate(passages):
        sampling = Sampling(temperature=0.8, top_k=50, seed=seed + number) if number % 2 else Sampling()
        found.append(
            Request(
                request_id=str(number),
                prompt_ids=(*shared, *tokenizer.encode(passage)),
                max_tokens=ANSWER,
                sampling=sampling,
                ignore_eos=True,
            )
        )
    return found


def measure(
    directory: Path, levers: Sequence[str], exact: Sequence[str], windows: int, seed: int, *, tasks: bool = True
) -> LeversRecord:
    """Everything asked for, one after the other."""
    started, shop = time.monotonic(), Workshop(directory, windows, tasks=tasks)
    reference = shop.build("reference", REFERENCE)
    shop.evaluate("reference")
    verdicts = []
    for number, lever in enumerate(levers):
        verdicts.append(verdict(shop, number, lever))
        print(line(verdicts[-1]), flush=True)
    requests = exact_requests(seed)
    plain, _ = answers(reference, requests)
    found = [exactness(reference, lever, requests, plain) for lever in exact]
    for each in found:
        print(f"{each.lever:28} same tokens: {each.same} of {each.tokens} {dict(each.counters)}", flush=True)
    return LeversRecord(
        model="bench/tiny_model/model",
        reference=REFERENCE,
        perplexity=shop.records("reference")["heldout", "perplexity"].score,
        verdicts=tuple(verdicts),
        exact=tuple(found),
        environment=fingerprint(device="cpu", command=["python", "bench/levers.py", "--seed", str(seed)]),
        seconds=time.monotonic() - started,
    )


def line(found: Verdict) -> str:
    """One verdict in a terminal."""
    span = f"{found.difference_nats:+.4f} nats [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.lever:28} {found.gate:8} {span}, KL {found.kl_nats:.4f}, same best token {found.agreement:.1%}"


def main() -> int:
    stamp = datetime.now(timezone.utc).strftime("%Y%m")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", help=f"separated by semicolons, of: {'; '.join(LEVERS)}")
    parser.add_argument("--exact", help=f"separated by semicolons, of: {'; '.join(EXACT)}")
    parser.add_argument(
        "--windows", type=int, default=0, help="of the held-out text and of each task's subject (0: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn answers")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / f"levers-cpu-{stamp}.json")
    args = parser.parse_args()
    levers = list(LEVERS) if args.levers is None else [name.strip() for name in args.levers.split(";") if name]
    exact = list(EXACT) if args.exact is None else [name.strip() for name in args.exact.split(";") if name]
    unknown = [name for name in levers if name not in LEVERS] + [name for name in exact if name not in EXACT]
    if unknown:
        parser.error(f"unknown lever {unknown[0]!r}")
    with tempfile.TemporaryDirectory(prefix="trtkit-levers-") as work:
        record = measure(Path(work), levers, exact, args.windows, args.seed)
    write_record(args.output, KIND, record)
    print(f"{args.output} in {record.seconds:.0f} s")
    return 0 if all(each.same == each.tokens for each in record.exact) else 1


if __name__ == "__main__":
    raise SystemExit(main())
