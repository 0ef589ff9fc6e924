"""lm-evaluation-harness on our `Engine` and `Scorer`. Import this module late: it imports lm_eval.

Its own TensorRT-LLM backend reads prompt log-probabilities one position off and cuts long prompts silently; this one
scores through `ContinuationScorer`, so eviction acts, cuts are counted and finished work is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import TemplateLM  # noqa: TID253 - this module is lm-eval's adapter; its importer is late
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: TID253

from trtkit.backends.tokenizer import Tokenizer
from trtkit.quality.generation import Job, generate_texts
from trtkit.quality.scoring import ContinuationScorer, Item
from trtkit.spec.engine import Engine, Sampling
from trtkit.spec.errors import UnsupportedError, UsageError
from trtkit.spec.result import Check

FEWSHOT_DELIMITER = "\n\n"
DEFAULT_GENERATED_TOKENS = 256
_ENCODINGS_KEPT = 1024
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class EngineLM(TemplateLM):  # type: ignore[misc]
    """A `TemplateLM` whose requests run on an engine of ours.

    `question_of` gives the text of a request's own question, without worked examples, or None where it is unknown; the
    part of the context before it is what the "shots" protocol evicts.
    """

    def __init__(
        self,
        engine: Engine,
        scoring: ContinuationScorer,
        tokenizer: Tokenizer,
        *,
        question_of: Callable[[Any], str | None] = lambda _: None,
        self_test: Callable[[Sequence[tuple[int, ...]]], Check] | None = None,
    ) -> None:
        super().__init__()
        self.engine, self.scoring, self.text = engine, scoring, tokenizer
        self.question_of, self.self_test = question_of, self_test
        self.checks: list[Check] = []
        # The choices of one question share its context, the questions of one subject its worked examples.
        self._encode = functools.lru_cache(maxsize=_ENCODINGS_KEPT)(
            lambda string, special: tuple(tokenizer.encode(string, add_special_tokens=special))
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ids = self.engine.info.eos_ids
        if self.text.eos_id is not None:
            return self.text.eos_id
        return ids[0] if ids else 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's request cache."""
        return type(self.text).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of `string`, with the tokenizer's own special tokens unless told otherwise."""
        return list(self._encode(string, True if add_special_tokens is None else add_special_tokens))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs of any loglikelihood task."""
        items = [self._item(request) for request in requests]
        return self._score(items, [request.args for request in requests], "loglikelihood")

    def _item(self, request: Any) -> Item:  # noqa: ANN401 - lm-eval's Instance
        context, continuation = request.args
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids[0] == self.prefix_token_id:
                return Item(context_ids=tuple(ids[:1]), continuation_ids=tuple(ids[1:]))
            return Item(context_ids=(self.prefix_token_id,), continuation_ids=tuple(ids))
        context_ids, continuation_ids = self._encode_pair(context, continuation)
        return Item(
            context_ids=tuple(context_ids),
            continuation_ids=tuple(continuation_ids),
            shots_end=self._shots_end(context, context_ids, self.question_of(request)),
        )

    def _shots_end(self, context: str, context_ids: Sequence[int], question: str | None) -> int:
        """How many tokens come before the question; 0 without worked examples.

        The encoding of the shots alone may end differently from the same text inside the whole (merges across the
        border), so only the common part counts.
        """
        start = context.rfind(question) if question else -1
        if start < 0:
            found = context.rfind(FEWSHOT_DELIMITER)
            start = found + len(FEWSHOT_DELIMITER) if found >= 0 else 0
        if start == 0:
            return 0
        alone = self._encode(context[:start], True)
        same = 0
        while same < min(len(alone), len(context_ids)) and alone[same] == context_ids[same]:
            same += 1
        return same

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: object) -> list[tuple[float, bool]]:
        """Score pairs that are token ids already (perplexity windows)."""
        items = [Item(context_ids=tuple(context), continuation_ids=tuple(cont)) for _, context, cont in requests]
        return self._score(items, [texts for texts, _, _ in requests], "loglikelihood")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in disjoint windows as long as the engine admits."""
        windows: list[Item] = []
        counts = []
        for request in requests:
            parts = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.engine.info.max_seq_len - 1,
                    context_len=1,
                ),
            )
            items = [Item(context_ids=tuple(context), continuation_ids=tuple(cont)) for context, cont in parts]
            windows += items
            counts.append(len(items))
        scores = iter(self._score(windows, [None] * len(windows), "rolling"))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _score(self, items: Sequence[Item], texts: Sequence[object], phase: str) -> list[tuple[float, bool]]:
        if self.self_test is not None and not self.checks and items:
            prompts = dict.fromkeys(item.context_ids for item in items)
            self.checks.append(self.self_test(list(prompts)[:3]))
        answers = self.scoring.score(items, phase)
        for text, answer in zip(texts, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate for any generate_until task."""
        jobs = [self._job(*request.args) for request in requests]
        room = [self.engine.info.max_seq_len - job.max_tokens for job in jobs]
        self.scoring.count_truncated(sum(len(job.prompt_ids) > r for job, r in zip(jobs, room, strict=True)), len(jobs))
        jobs = [replace(job, prompt_ids=job.prompt_ids[-r:]) for job, r in zip(jobs, room, strict=True)]
        done = generate_texts(self.engine, self.text, jobs, self.scoring)
        for request, result in zip(requests, done, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result.text)
        return [result.text for result in done]

    def _job(self, context: str, options: dict[str, Any]) -> Job:
        lengths = [int(options[name]) for name in _LENGTH_NAMES if options.get(name) is not None]
        max_tokens = lengths[0] if lengths else DEFAULT_GENERATED_TOKENS
        until = options.get("until") or []
        stop = tuple([until] if isinstance(until, str) else until)
        if max_tokens >= self.engine.info.max_seq_len:
            raise UsageError(
                f"the task generates up to {max_tokens} tokens, the engine's max_seq_len is "
                f"{self.engine.info.max_seq_len}; build with a larger max_seq_len"
            )
        return Job(
            prompt_ids=tuple(self.tok_encode(context)),
            max_tokens=max_tokens,
            stop=stop,
            stop_ids=(self.eot_token_id,),
            sampling=_sampling(options),
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The model's own chat format.

        Raises:
            UnsupportedError: the tokenizer has none.
        """
        if self.text.chat_template is None:
            raise UnsupportedError("this engine's tokenizer has no chat template; leave out --apply-chat-template")
        return self.text.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """For lm-eval's log."""
        return self.text.chat_template


def _sampling(options: dict[str, Any]) -> Sampling:
    """Greedy unless the task asks to sample."""
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    if temperature == 0:
        return Sampling()
    return Sampling(
        temperature=temperature,
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
        seed=int(options.get("seed") or 0),
    )
