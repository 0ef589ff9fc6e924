"""TensorRT-LLM's `LLM`, either backend, as `Engine` and `Scorer`. Lives in the engine's child process.

Requests run in an asyncio loop in a thread of its own, one task each; every token that a response brings becomes an
event with the time at which it got here. A second thread collects the iteration statistics, which is where the block
pool's state comes from.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from typing import Any, Protocol

from trtkit.spec.admission import check_request
from trtkit.spec.engine import (
    EngineInfo,
    FinishReason,
    KVStats,
    Request,
    ScoreRequest,
    ScoreResult,
    TokenEvent,
)
from trtkit.spec.errors import TrtkitError, UnsupportedError
from trtkit.spec.plan import BuildPlan
from trtkit.trtllm.counters import EvictionCounters, unknown
from trtkit.trtllm.lower import sampling_arguments
from trtkit.trtllm.pool import PoolWatch
from trtkit.trtllm.scores import score

_POLL_S = 0.001
_IDLE_S = 0.02
_REASONS = {"cancelled": FinishReason.CANCELLED, "length": FinishReason.LENGTH, "stop": FinishReason.STOP}


class Native(Protocol):
    """What is used of TensorRT-LLM's `LLM`."""

    def generate_async(self, inputs: list[int], sampling_params: Any, *, streaming: bool) -> Any:  # noqa: ANN401
        """A response to follow; made inside a running event loop."""

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """Statistics of the iterations since the last call."""

    def shutdown(self) -> None:
        """End the workers."""


class LlmEngine:
    """`Engine` and `Scorer` over one `LLM`."""

    def __init__(
        self,
        plan: BuildPlan,
        open_llm: Callable[[bool], Native],
        sampling_class: Callable[..., Any],
        *,
        weight_bytes: int,
        counters: EvictionCounters | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Open it.

        Args:
            plan: with run-time overrides already in it.
            open_llm: makes the `LLM`; its argument says whether it must give logits.
            sampling_class: TensorRT-LLM's `SamplingParams`.
            weight_bytes: of one rank, by the checkpoint's arithmetic.
            counters: where the workers of `open_llm` tell what they evict; closed with the engine.
            notes: what it does without, see `EngineInfo.notes`.
        """
        self._plan = plan
        self._open_llm = open_llm
        self._sampling_class = sampling_class
        self._weight_bytes = weight_bytes
        self._counters, self._notes = counters, notes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trtllm-loop", daemon=True)
        self._thread.start()
        self._live: dict[str, Any] = {}
        self._cancelled: set[str] = set()
        self._closed = False
        self._logits = False
        self._llm: Native | None = None
        self._pool: PoolWatch | None = None
        try:
            self._start(logits=False)
        except BaseException:
            self.close()
            raise

    def _start(self, *, logits: bool) -> None:
        self._llm = self._open_llm(logits)
        self._logits = logits
        self._pool = PoolWatch(self._llm, self._plan)
        # One token proves that it computes at all, and brings the statistics that tell the pool's size.
        probe = Request(request_id="warm-up", prompt_ids=(0,), max_tokens=1, ignore_eos=True)
        for event in self._generate([probe]):
            if event.error is not None:
                raise UnsupportedError(f"{self._plan.name}: the engine cannot generate: {event.error}")
        self._pool.wait()
        self._pool.forget_peaks()

    @property
    def info(self) -> EngineInfo:
        """Sizes and limits; the pool's size is what the runtime reports."""
        limits, stats = self._plan.limits, self._watch.stats()
        return EngineInfo(
            target=self._plan.target,
            device="cuda",
            vocab_size=self._plan.model.vocab_size,
            max_seq_len=limits.max_seq_len,
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            weight_bytes=self._weight_bytes,
            kv_pool_bytes=stats.blocks_total * stats.block_bytes,
            kv_policy=self._plan.kv,
            speculation=self._plan.speculation,
            eos_ids=self._plan.model.eos_ids,
            notes=self._notes,
        )

    def generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        """Run requests, as many at once as the batch has room for; see `Engine.generate`."""
        if self._logits:
            self._restart(logits=False)
        return self._generate(requests)

    def _generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        source, running, more = iter(requests), 0, True
        while more or running:
            waiting = False
            while more and running < self._plan.limits.max_batch_size and not waiting:
                try:
                    request = next(source)
                except StopIteration:
                    more = False
                    break
                waiting = request is None
                if request is not None:
                    running += 1
                    self._submit(request, events)
            if not running:
                if waiting:
                    time.sleep(_POLL_S)
                continue
            for event in _waiting(events, _POLL_S if waiting else _IDLE_S):
                running -= event.finish is not None
                yield event

    def _submit(self, request: Request, events: queue.SimpleQueue[TokenEvent]) -> None:
        try:
            if request.kv is not None and request.kv != self._plan.kv:
                raise UnsupportedError(
                    f"KV policy {request.kv.label}: a TensorRT-LLM engine keeps the one it was built with "
                    f"({self._plan.kv.label})"
                )
            max_tokens = check_request(request, self._plan.model.vocab_size, self._plan.limits.max_seq_len)
        except TrtkitError as error:
            events.put(_end(request, 0, FinishReason.ERROR, str(error)))
            return
        parameters = self._sampling_class(**sampling_arguments(request, max_tokens, self._plan.model.eos_ids))
        self._run_soon(self._follow(request, max_tokens, parameters, events))

    async def _follow(
        self,
        request: Request,
        max_tokens: int,
        parameters: Any,  # noqa: ANN401
        events: queue.SimpleQueue[TokenEvent],
    ) -> None:
        """One request from submission to its last event, whatever happens."""
        count = 0
        try:
            result = self._native.generate_async(list(request.prompt_ids), parameters, streaming=True)
            self._live[request.request_id] = result
            async with contextlib.aclosing(self._tokens(request, max_tokens, result)) as tokens:
                async for event in tokens:
                    count += event.token_id is not None
                    events.put(event)
                    if event.finish is not None:
                        return
            events.put(self._unfinished(request, count, result))
        except Exception as error:  # noqa: BLE001 - whatever TensorRT-LLM raises ends this request, with its text
            events.put(_end(request, count, FinishReason.ERROR, f"TensorRT-LLM: {error}".splitlines()[0]))
        finally:
            self._live.pop(request.request_id, None)
            self._cancelled.discard(request.request_id)

    async def _tokens(self, request: Request, max_tokens: int, result: Any) -> AsyncGenerator[TokenEvent, None]:  # noqa: ANN401
        """Events of a response stream; the last token is known by its count or by being a stop token."""
        stops = {*request.stop_ids, *(() if request.ignore_eos else self._plan.model.eos_ids)}
        seen = 0
        async for update in result:
            now_ns = time.monotonic_ns()
            tokens = update.outputs[0].token_ids
            while seen < len(tokens):
                token = int(tokens[seen])
                finish = FinishReason.STOP if token in stops else None
                if finish is None and seen + 1 == max_tokens:
                    finish = FinishReason.LENGTH
                yield TokenEvent(
                    request_id=request.request_id, index=seen, token_id=token, time_ns=now_ns, finish=finish
                )
                seen += 1

    def _unfinished(self, request: Request, count: int, result: Any) -> TokenEvent:  # noqa: ANN401
        reason = str(result.outputs[0].finish_reason)
        if request.request_id in self._cancelled or reason == "cancelled":
            return _end(request, count, FinishReason.CANCELLED, None)
        return _end(request, count, FinishReason.ERROR, f"TensorRT-LLM ended it after {count} tokens ({reason})")

    def cancel(self, request_id: str) -> None:
        """End a request early."""
        result = self._live.get(request_id)
        if result is not None:
            self._cancelled.add(request_id)
            result.abort()

    def kv_stats(self) -> KVStats:
        """The pool after the latest iteration that was reported, and what workers say they have evicted."""
        stats = self._watch.stats()
        if self._plan.kv.is_full:
            return stats
        return unknown(stats) if self._counters is None else self._counters.added_to(stats)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Log-probabilities, from the logits of one next token at a time; see `trtkit.trtllm.scores`."""
        if not self._plan.kv.is_full:
            raise UnsupportedError(
                f"{self._plan.name}: TensorRT-LLM scores given tokens as prompts, which run before anything is evicted "
                f"({self._plan.kv.label}); judge it by generation tasks, or score with --target embedded"
            )
        if not self._logits:
            self._restart(logits=True)
        return score(requests, self._native, self._sampling_class, self._plan, self._wait)

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _run_soon(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _restart(self, *, logits: bool) -> None:
        """Logits cost memory and time, so a benchmark runs without them; scoring opens the engine anew."""
        self._shut_down()
        self._start(logits=logits)

    def _shut_down(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._llm is not None:
            self._llm.shutdown()
        self._pool = self._llm = None

    @property
    def _native(self) -> Native:
        assert self._llm is not None, "closed"
        return self._llm

    @property
    def _watch(self) -> PoolWatch:
        assert self._pool is not None, "closed"
        return self._pool

    def close(self) -> None:
        """Shut the `LLM` and both threads down."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RuntimeError):
            self._shut_down()
        if self._counters is not None:
            self._counters.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> LlmEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _waiting(events: queue.SimpleQueue[TokenEvent], patience_s: float) -> list[TokenEvent]:
    """What has arrived, waiting a moment for the first."""
    found = []
    with contextlib.suppress(queue.Empty):
        found.append(events.get(timeout=patience_s))
        while True:
            found.append(events.get_nowait())
    return found


def _end(request: Request, index: int, finish: FinishReason, error: str | None) -> TokenEvent:
    return TokenEvent(
        request_id=request.request_id,
        index=index,
        token_id=None,
        time_ns=time.monotonic_ns(),
        finish=finish,
        error=error,
    )
