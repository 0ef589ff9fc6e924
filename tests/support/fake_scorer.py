"""An exact, fast engine for quality tests: a bigram table over a small vocabulary, with an optional eviction."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

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
from trtkit.spec.kv import KVPolicySpec

EOS = 0


class BigramEngine:
    """Engine and Scorer whose next-token distribution depends on the previous token and on the cached tokens.

    The logits are `table[previous] + memory * count of each token in the cache`, so what is evicted changes them. With
    a policy the cache keeps the last `budget` tokens after each piece.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 300,
        seed: int = 0,
        memory: float = 0.3,
        kv: KVPolicySpec | None = None,
        max_seq_len: int = 4096,
        shift: int = 0,
        scale: float = 1.0,
    ) -> None:
        self.table = np.random.default_rng(seed).normal(0, 2.0, (vocab_size, vocab_size)) * scale
        self.memory, self.shift, self.kv = memory, shift, kv or KVPolicySpec()
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.evictions = self.tokens_evicted = 0
        self.scored: list[ScoreRequest] = []
        self.batches: list[int] = []
        self.cancelled: set[str] = set()
        self.closed = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            target="embedded",
            device="cpu",
            vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len,
            max_batch_size=8,
            max_num_tokens=8192,
            weight_bytes=0,
            kv_pool_bytes=0,
            kv_policy=self.kv,
            eos_ids=(EOS,),
        )

    def logprobs(self, cache: list[int], previous: int) -> np.ndarray:
        logits = self.table[previous] + self.memory * np.bincount(cache, minlength=self.vocab_size)
        with np.errstate(invalid="ignore"):
            return logits - np.logaddexp.reduce(logits)

    def evicted(self, cache: list[int], kv: KVPolicySpec) -> list[int]:
        if kv.is_full or kv.budget is None or len(cache) <= kv.budget:
            return cache
        self.evictions += 1
        self.tokens_evicted += len(cache) - kv.budget
        return cache[-kv.budget :]

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        batch = list(requests)
        self.batches.append(len(batch))
        for request in batch:
            self.scored.append(request)
            before = (self.evictions, self.tokens_evicted)
            cache: list[int] = []
            start = 0
            for end in (*request.chunk_ends, len(request.context_ids)):
                cache = [*cache, *request.context_ids[start:end]]
                if end in request.chunk_ends:
                    cache = self.evicted(cache, request.kv or self.kv)
                start = end
            scores = tuple(self._continuation(cache, request, c) for c in request.continuations)
            yield ScoreResult(
                request_id=request.request_id,
                continuations=scores,
                evictions=self.evictions - before[0],
                tokens_evicted=self.tokens_evicted - before[1],
            )

    def _continuation(self, cache: list[int], request: ScoreRequest, tokens: tuple[int, ...]) -> ContinuationScore:
        cache, previous = list(cache), request.context_ids[-1]
        logprobs, greedy, tops = [], [], []
        for token in tokens:
            row = self.logprobs(cache, previous)
            logprobs.append(float(row[(token + self.shift) % self.vocab_size]))
            greedy.append(bool(row.argmax() == token))
            order = np.argsort(-row)[: request.top_logprobs]
            tops.append(tuple((int(i), float(row[i])) for i in order))
            cache.append(token)
            previous = token
        return ContinuationScore(
            logprobs=tuple(logprobs), is_greedy=tuple(greedy), top=tuple(tops) if request.top_logprobs else ()
        )

    def generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        for request in requests:
            if request is None:
                continue
            cache, previous = list(request.prompt_ids), request.prompt_ids[-1]
            for index in range(request.max_tokens):
                token = int(self.logprobs(cache, previous).argmax())
                cache.append(token)
                previous = token
                stops = token in request.stop_ids or (token == EOS and not request.ignore_eos)
                last = stops or index + 1 == request.max_tokens
                finish = (FinishReason.STOP if stops else FinishReason.LENGTH) if last else None
                yield TokenEvent(
                    request_id=request.request_id,
                    index=index,
                    token_id=token,
                    time_ns=time.monotonic_ns(),
                    finish=finish,
                )
                if last:
                    break
                if request.request_id in self.cancelled:
                    yield TokenEvent(
                        request_id=request.request_id,
                        index=index + 1,
                        token_id=None,
                        time_ns=time.monotonic_ns(),
                        finish=FinishReason.CANCELLED,
                    )
                    break

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    def kv_stats(self) -> KVStats:
        return KVStats(
            tokens_per_block=32,
            block_bytes=1,
            blocks_total=1,
            blocks_used=0,
            blocks_peak=0,
            evictions=self.evictions,
            tokens_evicted=self.tokens_evicted,
        )

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> BigramEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class ByteTokenizer:
    """Bytes as ids, shifted by three; 0 ends a text, 1 begins one."""

    vocab_size = 300
    eos_id = EOS
    bos_id = 1

    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids = [byte + 3 for byte in text.encode()]
        return [self.bos_id, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        return "".join(f"{m['content']}\n" for m in messages)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode(self.render_chat(messages))
