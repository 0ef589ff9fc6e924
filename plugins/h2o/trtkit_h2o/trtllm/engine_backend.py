"""H2O and TensorRT engines: the C++ runtime has no place for it, and what it offers instead is called by its name."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.kv.policy import resolve_budget
from trtkit.spec.errors import UnsupportedError, UsageError
from trtkit.spec.kv import KVFidelity, KVPolicySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowLowering:
    """Arguments of the engine runtime's `KvCacheConfig` for sinks and a window: tokens kept, of them sinks."""

    max_attention_window: tuple[int, ...]
    sink_token_length: int
    fidelity: KVFidelity = KVFidelity.WINDOW_ONLY


def lower_for_engine(spec: KVPolicySpec, *, max_seq_len: int, approximate: bool) -> WindowLowering | None:
    """What an engine of TensorRT-LLM 1.2.x can do for a KV policy.

    Its KV manager, block tables and lengths live in C++ and show Python no step; tokens of a running sequence are
    dropped by position alone (a cyclic window with sinks), never by score. Sources: facts read in 1.2's
    `evictionPolicy.h` and `kvCacheManager.h`; not run.

    Args:
        spec: the policy; its share, if any, is taken of `max_seq_len`.
        max_seq_len: tokens of the longest sequence.
        approximate: the user allowed less than what was asked for (`--allow-approximate`).

    Returns:
        None for `full`: nothing to lower.

    Raises:
        UnsupportedError: the policy needs scores, and `approximate` is not set.
        UsageError: the budget is not below `max_seq_len`, so no window would ever close.
    """
    if spec.is_full:
        return None
    if not approximate:
        raise UnsupportedError(
            f"KV policy {spec.label!r}: TensorRT engines cannot evict by attention; use --target pytorch or embedded, or "
            "--allow-approximate for sinks and a window of the same size, which is not the policy you named"
        )
    budget = resolve_budget(spec.resolved(max_seq_len))
    if budget.tokens >= max_seq_len:
        raise UsageError(
            f"KV budget {budget.tokens} is not below max_seq_len {max_seq_len}, so nothing would be dropped; use --kv full"
        )
    return WindowLowering(max_attention_window=(budget.tokens,), sink_token_length=budget.sinks)
