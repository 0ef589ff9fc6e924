"""A scripted engine whose times are exact, on a virtual clock in this process or in real time in a child.

One step: newly admitted prompts are prefilled (`prefill_ns_per_token` each), then every running request gets one
token, all at the same moment, `step_ns` later.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trtkit.spec.bundle import Manifest, bundle_files, file_entry, write_manifest
from trtkit.spec.dtype import DType
from trtkit.spec.engine import (
    ContinuationScore,
    EngineInfo,
    FinishReason,
    KVStats,
    Request,
    ScoreRequest,
    ScoreResult,
    TokenEvent,
)
from trtkit.spec.errors import CapacityError
from trtkit.spec.kv import KVFidelity, KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for

SCRIPT = "fake.json"


class VirtualClock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def pass_ns(self, ns: int) -> None:
        self.now_ns += ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


class RealClock:
    """`time.monotonic_ns`, with sleeping."""

    def __call__(self) -> int:
        return time.monotonic_ns()

    def pass_ns(self, ns: int) -> None:
        time.sleep(ns / 1e9)

    sleep = staticmethod(time.sleep)


@dataclass(frozen=True, kw_only=True)
class FakeScript:
    """What the fake does. Counts of tokens are over the whole life of the engine."""

    prefill_ns_per_token: int = 1_000
    step_ns: int = 1_000_000
    max_batch_size: int = 32
    max_seq_len: int = 512
    vocab_size: int = 300
    notes: tuple[str, ...] = ()
    tokens_per_block: int = 16
    blocks_total: int = 4096
    die_at_token: int | None = None
    raise_at_token: int | None = None
    hang_at_token: int | None = None
    refuse_at_open: bool = False
    hang_at_open: bool = False
    noisy: bool = False
    short_by: int = 0
    failing_ids: tuple[str, ...] = ()
    kv: str = "full"
    evicts: bool = True
    together: tuple[int, ...] = ()
    """For each call of `generate`: nobody gets a token before that many requests run, however late they arrive."""


@dataclass
class _Running:
    request: Request
    made: int = 0
    cached: int = 0


@dataclass
class _Counters:
    tokens: int = 0
    blocks_peak: int = 0
    requests_peak: int = 0
    calls: int = 0
    evictions: int = 0
    tokens_evicted: int = 0
    seen: list[Request] = field(default_factory=list)


class FakeEngine:
    """`Engine` and `Scorer`, by script."""

    def __init__(self, script: FakeScript | None = None, *, clock: VirtualClock | RealClock | None = None) -> None:
        self.script = script or FakeScript()
        self.clock = clock or VirtualClock()
        self.counters = _Counters()
        self.closed = 0
        self._running: dict[str, _Running] = {}
        self._cancelled: set[str] = set()

    @property
    def info(self) -> EngineInfo:
        script = self.script
        return EngineInfo(
            target="fake",
            device="cpu",
            vocab_size=script.vocab_size,
            max_seq_len=script.max_seq_len,
            max_batch_size=script.max_batch_size,
            max_num_tokens=8192,
            weight_bytes=1000,
            kv_pool_bytes=script.blocks_total * 64,
            kv_policy=KVPolicySpec(),
            notes=script.notes,
        )

    def generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        source, open_ended = iter(requests), True
        company = self._company()
        while open_ended or self._running:
            admitted: list[_Running] = []
            while open_ended and len(self._running) < self.script.max_batch_size:
                try:
                    request = next(source)
                except StopIteration:
                    open_ended = False
                    break
                if request is None:
                    break
                self.counters.seen.append(request)
                if request.request_id in self.script.failing_ids or len(request.prompt_ids) > self.script.max_seq_len:
                    yield self._end(request.request_id, 0, FinishReason.ERROR, "refused by the script")
                    continue
                running = _Running(request=request, cached=len(request.prompt_ids))
                self._running[request.request_id] = running
                admitted.append(running)
            if open_ended and len(self._running) < company:
                self.clock.pass_ns(100_000)
                continue
            company = 0
            if self._running:
                yield from self._step(admitted)

    def _company(self) -> int:
        """How many requests this call waits for before its first token."""
        self.counters.calls += 1
        together = self.script.together
        return together[self.counters.calls - 1] if self.counters.calls <= len(together) else 0

    def _step(self, admitted: list[_Running]) -> Iterator[TokenEvent]:
        for running in admitted:
            self.clock.pass_ns(self.script.prefill_ns_per_token * len(running.request.prompt_ids))
        self.clock.pass_ns(self.script.step_ns)
        now_ns = self.clock()
        for running in list(self._running.values()):
            running.made += 1
            running.cached += 1
        self.counters.blocks_peak = max(self.counters.blocks_peak, self.kv_stats().blocks_used)
        self.counters.requests_peak = max(self.counters.requests_peak, len(self._running))
        for request_id, running in list(self._running.items()):
            if request_id in self._cancelled:
                del self._running[request_id]
                yield self._end(request_id, running.made - 1, FinishReason.CANCELLED, None)
                continue
            self._misbehave()
            self._evict(running)
            finished = running.made >= running.request.max_tokens - self.script.short_by
            if finished:
                del self._running[request_id]
            yield TokenEvent(
                request_id=request_id,
                index=running.made - 1,
                token_id=(sum(running.request.prompt_ids) + running.made) % self.script.vocab_size,
                time_ns=now_ns,
                finish=FinishReason.LENGTH if finished else None,
            )

    def _misbehave(self) -> None:
        self.counters.tokens += 1
        if self.script.noisy:
            sys.stdout.write("a library chats on standard output\n")
        if self.counters.tokens == self.script.die_at_token:
            os.write(2, b"something terrible\n")
            os._exit(3)
        if self.counters.tokens == self.script.raise_at_token:
            raise CapacityError("the script ran out of blocks; ask for fewer")
        if self.counters.tokens == self.script.hang_at_token:
            time.sleep(3600)

    def _evict(self, running: _Running) -> None:
        if self.script.kv != "full" and self.script.evicts and running.cached > 8:
            self.counters.evictions += 1
            self.counters.tokens_evicted += running.cached - 8
            running.cached = 8

    def _end(self, request_id: str, index: int, finish: FinishReason, error: str | None) -> TokenEvent:
        return TokenEvent(
            request_id=request_id, index=index, token_id=None, time_ns=self.clock(), finish=finish, error=error
        )

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def kv_stats(self) -> KVStats:
        size = self.script.tokens_per_block
        return KVStats(
            tokens_per_block=size,
            block_bytes=64,
            blocks_total=self.script.blocks_total,
            blocks_used=sum(-(-running.cached // size) for running in self._running.values()),
            blocks_peak=self.counters.blocks_peak,
            requests_running=len(self._running),
            requests_peak=self.counters.requests_peak,
            evictions=self.counters.evictions,
            tokens_evicted=self.counters.tokens_evicted,
        )

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Takes every request before it answers the first, as an engine that sorts by length would; in reverse."""
        for request in reversed(list(requests)):
            yield ScoreResult(
                request_id=request.request_id,
                continuations=tuple(
                    ContinuationScore(
                        logprobs=tuple(-float(token) for token in ids),
                        is_greedy=tuple(token == 1 for token in ids),
                        top=tuple(((token, -0.5),) for token in ids) if request.top_logprobs else (),
                    )
                    for ids in request.continuations
                ),
                evictions=len(request.chunk_ends),
            )

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_fake(path: Path, **overrides: object) -> FakeEngine:
    """Opener for a child process: the script lies in the bundle; time is real."""
    script = FakeScript(**{**json.loads((path / SCRIPT).read_text()), **_known(overrides)})
    if script.hang_at_open:
        time.sleep(3600)
    if script.refuse_at_open:
        raise CapacityError(f"{path}: does not fit by 3.00 GiB; the script says so")
    return FakeEngine(script, clock=RealClock())


def _known(overrides: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in overrides.items() if key in FakeScript.__dataclass_fields__ and key != "kv"}


def tiny_model() -> ModelSpec:
    """Dimensions that make arithmetic easy."""
    return ModelSpec(
        name="fake",
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=300,
        max_position_embeddings=512,
        bos_id=1,
        eos_ids=(2,),
    )


def open_willing(path: Path, **overrides: object) -> FakeEngine:
    """Opener of an engine whose script refuses, after the repair."""
    return open_fake(path, refuse_at_open=False, **overrides)


def fake_bundle(
    directory: Path, name: str = "fake", *, script: FakeScript | None = None, kv: KVPolicySpec | None = None
) -> Path:
    """Write `<name>.engine` with a manifest and a script; `open_fake` opens it."""
    path = directory / f"{name}.engine"
    path.mkdir(parents=True)
    script = script or FakeScript()
    (path / SCRIPT).write_text(json.dumps(asdict(script)))
    plan = BuildPlan(
        name=name,
        model=tiny_model(),
        model_source="nowhere",
        gpu="cpu",
        quant=quant_for(DType.FP32.value),
        kv=kv or KVPolicySpec(),
        limits=Limits(max_seq_len=script.max_seq_len, max_batch_size=script.max_batch_size),
    )
    files = {file.name: file_entry(file) for file in bundle_files(path)}
    manifest = Manifest(
        plan=plan, fidelity=KVFidelity.EXACT, versions={}, files=files, created_utc="2026-01-01T00:00:00Z"
    )
    write_manifest(path, manifest)
    return path
