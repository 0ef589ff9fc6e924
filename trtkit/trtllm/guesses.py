"""N-gram speculation in TensorRT-LLM's words: `NGramDecodingConfig` of the PyTorch backend, and what it costs.

Names and defaults are those of `llm_args.py` before and after 1.2 (they agree). The pool of guesses is one for each
request: a common pool is never emptied (a TODO in upstream's `ngram.py`), and a repeated prompt would find its answer in
it, as in a warm cache. Drafting needs a loop without overlap and without pipeline stages (`py_executor.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtkit.spec.plan import BuildPlan

NGRAM_CLASS = "tensorrt_llm.llmapi.NGramDecodingConfig"
KIND = "decoding_type"
"""Names the class in plain data, as in the files that `trtllm-serve --config` takes; no argument of the class itself."""


def guess_arguments(plan: BuildPlan) -> dict[str, Any]:
    """Keyword arguments of `LLM`, nested ones as plain data; none for a plan that guesses nothing."""
    if plan.speculation is None:
        return {}
    config = {
        KIND: "NGram",
        "max_draft_len": plan.speculation.max_draft_tokens,
        "max_matching_ngram_size": plan.speculation.max_ngram,
        "is_keep_all": True,
        "is_use_oldest": True,
        "is_public_pool": False,
    }
    return {"speculative_config": config, "disable_overlap_scheduler": True}


def guess_handicaps(plan: BuildPlan) -> tuple[str, ...]:
    """What TensorRT-LLM does without because it guesses, in lines to keep beside every number."""
    if plan.speculation is None:
        return ()
    lines = ["the overlap scheduler is off"]
    if plan.speculation.adaptive:
        lines.append("every step guesses: TensorRT-LLM does not pause for a request whose guesses are wrong")
    return tuple(f"speculation {plan.speculation.label}: {line}" for line in lines)


def native_guesses(config: Mapping[str, Any], api: Any) -> Any:  # noqa: ANN401 - tensorrt_llm.llmapi
    """TensorRT-LLM's own object for plain `speculative_config`."""
    maker = getattr(api, f"{config[KIND]}DecodingConfig")
    return maker(**{name: value for name, value in config.items() if name != KIND})


def guess_counts(entry: Mapping[str, Any], before: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """Guessed and accepted tokens after one more iteration's statistics; None as long as none has told."""
    told = entry.get("specDecodingStats") or {}
    if "numDraftTokens" not in told or "numAcceptedTokens" not in told:
        return before
    drafted, accepted = (count or 0 for count in before)
    return drafted + int(told["numDraftTokens"]), accepted + int(told["numAcceptedTokens"])
