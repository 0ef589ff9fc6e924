"""What trtkit asks before it builds or opens a bundle of the PyTorch backend: can this plan run, and with which arguments.

Serves any policy of `trtkit.kv_policies` that is a pure function of positions and attention mass; it is registered for
each by name in `trtkit.trtllm_policies`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtkit.kv.policy import Budget
from trtkit.spec.errors import CapacityError, UnsupportedError
from trtkit.spec.plan import BuildPlan
from trtkit_h2o.trtllm.install import h2o_llm_arguments
from trtkit_h2o.trtllm.policies import RequestPolicies

NO_EVICT, MAX_UTILIZATION = "GUARANTEED_NO_EVICT", "MAX_UTILIZATION"
_LEAST_KV_BITS = 16


class PagedAdapter:
    """See `trtkit.trtllm.policies.PolicyAdapter`, whose shape this has without importing it."""

    def check(self, plan: BuildPlan, *, pool_tokens: int | None) -> tuple[str, ...]:
        """Notes on how the policy would run.

        Raises:
            UnsupportedError: something that eviction cannot live with.
            UsageError: the policy contradicts itself or the plan's limits.
            CapacityError: the longest prompt would never be admitted.
        """
        _refuse(plan)
        longest = plan.limits.max_seq_len
        if pool_tokens is not None and pool_tokens < longest and not _pins(plan):
            raise CapacityError(
                f"{plan.name}: TensorRT-LLM admits a prompt only when the KV pool could hold all of it, evicted or not; the pool "
                f"has room for {pool_tokens} tokens (modeled), max_seq_len is {longest}: lower it or give more KV memory"
            )
        if _pins(plan):
            return ("prompts are kept whole; the budget counts generated tokens",)
        return _prompt_note(plan), _capacity_note(plan, pool_tokens)

    def arguments(
        self, plan: BuildPlan, *, pool_tokens: int | None, pin_prompt: bool, counters_dir: Path | None
    ) -> dict[str, Any]:
        """Arguments of `LLM`.

        Raises:
            TrtkitError: what `check` and `h2o_llm_arguments` raise.
        """
        _refuse(plan)
        arguments = h2o_llm_arguments(plan.kv, pin_prompt=pin_prompt, counters_dir=counters_dir)
        if not pin_prompt:
            arguments["scheduler_config"] = {"capacity_scheduler_policy": capacity_policy(plan, pool_tokens)}
            arguments["enable_chunked_prefill"] = in_chunks(plan)
        return arguments


def in_chunks(plan: BuildPlan) -> bool:
    """Whether prompts must come in chunks: the longest does not fit into one step.

    Where it does, prompts come whole, because where chunks end depends on what else runs.
    """
    return plan.limits.max_num_tokens < plan.limits.max_seq_len - 1


def held_tokens(plan: BuildPlan) -> int:
    """The most room one request keeps from one step to the next: its cache before a round, or a prompt between chunks."""
    budget = _budget(plan)
    decoding = budget.tokens + budget.interval + 1
    between = min(plan.limits.max_seq_len, budget.tokens + plan.limits.max_num_tokens) if in_chunks(plan) else 0
    return max(decoding, between)


def capacity_policy(plan: BuildPlan, pool_tokens: int | None) -> str:
    """TensorRT-LLM's admission policy for a plan.

    A paused request starts again with what it generated as part of its prompt, so its cuts fall elsewhere and its tokens
    may differ. MAX_UTILIZATION, which lets freed blocks admit others, is therefore chosen only where a full batch of
    evicting requests fits, so that nobody is ever paused.
    """
    block = plan.limits.tokens_per_block
    blocks_each = -(-held_tokens(plan) // block)
    fits = pool_tokens is not None and plan.limits.max_batch_size * blocks_each <= pool_tokens // block
    return MAX_UTILIZATION if fits else NO_EVICT


def _pins(plan: BuildPlan) -> bool:
    """Whether the release the plan was made for can evict generated tokens only; False where none is installed."""
    return plan.target_version is not None and not plan.target_version.startswith("1.2.")


def _budget(plan: BuildPlan) -> Budget:
    limits = plan.limits
    policies = RequestPolicies(
        plan.kv.label,
        max_seq_len=limits.max_seq_len,
        tokens_per_block=limits.tokens_per_block,
        pin_prompt=_pins(plan),
    )
    return policies.widest.budget


def _refuse(plan: BuildPlan) -> None:
    limits, window = plan.limits, plan.model.sliding_window
    refusals = (
        (
            plan.parallel.pp != 1,
            "its executor updates a batch after the next has started under pipeline parallelism; use tp",
        ),
        (
            plan.quant.kv.bits < _LEAST_KV_BITS,
            f"it scores keys of 16 bits, the KV cache is {plan.quant.kv.value}; use a 16-bit one",
        ),
        (
            window is not None and window < limits.max_seq_len,
            f"the model's sliding window ({window} tokens) drops tokens itself; lower max_seq_len to it",
        ),
        (
            in_chunks(plan) and not limits.enable_chunked_prefill,
            f"prompts of up to {limits.max_seq_len - 1} tokens do not fit a step of max_num_tokens {limits.max_num_tokens}; "
            "raise it or enable chunked prefill",
        ),
    )
    for wrong, line in refusals:
        if wrong:
            raise UnsupportedError(f"{plan.name}: KV policy {plan.kv.label} in TensorRT-LLM: {line}")
    _budget(plan)


def _prompt_note(plan: BuildPlan) -> str:
    limits, tokens = plan.limits, _budget(plan).tokens
    if in_chunks(plan):
        return (
            f"prompts come in chunks of up to {limits.max_num_tokens} tokens and are cut to {tokens} after each: one holds at "
            f"most {held_tokens(plan)} tokens, and where chunks end depends on what else runs"
        )
    return (
        f"prompts come whole (max_num_tokens {limits.max_num_tokens}) and are cut to {tokens} at their end; a smaller "
        "max_num_tokens cuts them in chunks"
    )


def _capacity_note(plan: BuildPlan, pool_tokens: int | None) -> str:
    batch, each = plan.limits.max_batch_size, held_tokens(plan)
    room = "unknown" if pool_tokens is None else f"about {pool_tokens} tokens (modeled)"
    if capacity_policy(plan, pool_tokens) == MAX_UTILIZATION:
        return f"a batch of {batch} x {each} tokens fits the KV pool of {room}: freed blocks admit further requests"
    return (
        f"a batch of {batch} x {each} tokens may not fit the KV pool ({room}), and a paused request's tokens would change: "
        f"blocks are reserved in full ({NO_EVICT}); lower max_batch_size to let eviction admit more"
    )


ADAPTER = PagedAdapter()
"""What the entry points name."""
