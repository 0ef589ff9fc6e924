"""Which policy a request gets: a share is taken of its own longest context, and a pinned prompt counts as sinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from trtkit.kv.policy import EvictionPolicy
from trtkit.kv.registry import load_policy
from trtkit.spec.errors import UnsupportedError, UsageError
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy


class RequestPolicies:
    """Policies of one KV cache manager, all from one specification; each distinct one is built once."""

    def __init__(self, label: str, *, max_seq_len: int, tokens_per_block: int, pin_prompt: bool = False) -> None:
        """`label` is a policy as `--kv` spells it. With `pin_prompt` its budget counts generated tokens alone.

        Raises:
            UsageError: it keeps everything, is unknown, or contradicts itself.
            UnsupportedError: it needs scores of a prompt that is pinned and therefore never scored.
        """
        self._spec = parse_kv_policy(label)
        self._max_seq_len = max_seq_len
        self.tokens_per_block = tokens_per_block
        self._pin_prompt = pin_prompt
        self._built: dict[KVPolicySpec, EvictionPolicy] = {}
        if self._spec.is_full:
            raise UsageError(f"KV policy {label!r} keeps everything; leave H2O's configuration out")
        self.widest = self._build(self._spec.resolved(max_seq_len))
        if pin_prompt and self.widest.watch.queries == "last":
            raise UnsupportedError(
                f"KV policy {label!r} looks at a prompt's last queries, and a pinned prompt is never scored; use h2o or window"
            )

    @property
    def pins_prompts(self) -> bool:
        """Whether all of a prompt stays, so that it needs no scores."""
        return self._pin_prompt

    def of(self, prompt_len: int, max_new_tokens: int | None) -> EvictionPolicy:
        """The policy of a request; without a limit its context may grow to the longest allowed."""
        new = self._max_seq_len - prompt_len if max_new_tokens is None else max_new_tokens
        policy = self._build(self._spec.resolved(new if self._pin_prompt else prompt_len + new))
        return _pinned(policy, prompt_len) if self._pin_prompt else policy

    def _build(self, spec: KVPolicySpec) -> EvictionPolicy:
        if spec not in self._built:
            policy = load_policy(spec, max_seq_len=self._max_seq_len, default_interval=self.tokens_per_block)
            assert policy is not None, "full was refused"
            self._built[spec] = policy
        return self._built[spec]


def _pinned(policy: EvictionPolicy, prompt_len: int) -> EvictionPolicy:
    """The same policy with the prompt as sinks and its budget on top."""
    old = policy.budget
    budget = replace(old, tokens=prompt_len + old.tokens, sinks=prompt_len + old.sinks)
    anybody: Any = policy
    try:
        return cast("EvictionPolicy", replace(anybody, budget=budget))
    except TypeError:
        raise UnsupportedError(
            f"KV policy {type(policy).__name__} cannot pin a prompt: it is no dataclass with a budget; use h2o"
        ) from None
