"""What TensorRT-LLM cannot do with a plan, and where we know it from. Checked before anything starts.

One table for `build`, `--dry-run` and `doctor`. A rule either refuses the plan or changes one setting of its
lowering; nothing is tried out on the user's time. The sources were read, none of this was run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trtkit.spec.catalog import gpu_spec
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVFidelity
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import FP8_ROWWISE, GPTQ_INT8, INT4_GROUPS, PRECISIONS

ENGINE_RELEASES = ((1, 2),)
"""Releases whose engine backend trtkit drives; 1.3 removed it."""

PYTORCH_SINCE = (1, 2)
BUILDABLE: dict[str, tuple[str | None, ...]] = {
    "embedded": (None, "W8A16", GPTQ_INT8, FP8_ROWWISE, INT4_GROUPS),
    "tensorrt": (None, "W8A16", GPTQ_INT8, FP8_ROWWISE, "FP8", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"),
    "pytorch": (None, "W8A16", GPTQ_INT8, FP8_ROWWISE, "FP8", "W4A16_AWQ"),
}
"""Algorithms whose checkpoints trtkit writes, by target; FP8, INT4-AWQ and SmoothQuant with ModelOpt."""

_WEIGHT_ONLY = ("W8A16", GPTQ_INT8, "W4A16_AWQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One thing a target does not do. `adjusts` names the setting that is switched off instead of refusing.

    `target` "any" stands for both of TensorRT-LLM's.
    """

    name: str
    target: str
    applies: Callable[[BuildPlan, int], bool]
    says: str
    instead: str
    source: str
    adjusts: str = ""


def _eviction(plan: BuildPlan, _sm: int) -> bool:
    return not plan.kv.is_full


def _no_paged_context(plan: BuildPlan) -> bool:
    """Whether an engine's cache type switches paged context FMHA off, as the rules below say."""
    return plan.quant.kv is DType.INT8 or (plan.quant.kv is DType.FP8 and plan.quant.algo != "FP8")


RULES: tuple[Rule, ...] = (
    Rule(
        name="weight-only-blackwell",
        target="tensorrt",
        applies=lambda plan, sm: 100 <= sm < 120 and plan.quant.algo in _WEIGHT_ONLY,
        says="engines with INT8 or INT4 weights are refused on sm100 to sm119",
        instead="--precision fp8",
        source="TensorRT-LLM builder.py (0.21/1.0): RuntimeError in the weight-only check",
    ),
    Rule(
        name="int8-kv-blackwell",
        target="tensorrt",
        applies=lambda plan, sm: 100 <= sm < 120 and plan.quant.kv is DType.INT8,
        says="engines with an INT8 KV cache are refused on sm100 to sm119",
        instead="a 16-bit KV cache",
        source="TensorRT-LLM builder.py (0.21/1.0): RuntimeError in the weight-only check",
    ),
    Rule(
        name="fp8-needs-sm89",
        target="any",
        applies=lambda plan, sm: 0 < sm < 89 and plan.quant.algo in ("FP8", FP8_ROWWISE),
        says="FP8 needs an Ada or Hopper GPU (sm89) or newer",
        instead="--precision int8 (weight-only)",
        source="TensorRT-LLM docs, supported hardware; release 1.2",
    ),
    Rule(
        name="int8-kv-paged-context",
        target="tensorrt",
        applies=lambda plan, _sm: plan.quant.kv is DType.INT8,
        says="an INT8 KV cache switches paged context FMHA off: no chunked prefill and no block reuse",
        instead="",
        source="TensorRT-LLM builder.py (0.21/1.0), issue 2166",
        adjusts="use_paged_context_fmha",
    ),
    Rule(
        name="fp8-kv-without-fp8",
        target="tensorrt",
        applies=lambda plan, _sm: plan.quant.kv is DType.FP8 and plan.quant.algo != "FP8",
        says="an FP8 KV cache beside weights other than per-tensor FP8 switches paged context FMHA off",
        instead="",
        source="TensorRT-LLM builder.py (0.21/1.0)",
        adjusts="use_paged_context_fmha",
    ),
    Rule(
        name="reuse-without-paged-context",
        target="tensorrt",
        applies=lambda plan, _sm: plan.limits.enable_block_reuse and _no_paged_context(plan),
        says="block reuse needs paged context FMHA, which this KV cache type switches off",
        instead="--no-reuse-prefix, or a 16-bit KV cache",
        source="TensorRT-LLM builder.py (0.21/1.0); tensorrtllm_backend issues 251 and 271",
    ),
    Rule(
        name="guesses-in-stages",
        target="pytorch",
        applies=lambda plan, _sm: plan.speculation is not None and plan.parallel.pp > 1,
        says="n-gram speculation does not run on pipeline stages",
        instead="--tp instead of --pp, or --speculate off",
        source="TensorRT-LLM py_executor.py (1.0 to 1.3): NotImplementedError; issue 9009; feature-combination-matrix.md",
    ),
    Rule(
        name="gptq-int8-pytorch",
        target="pytorch",
        applies=lambda plan, _sm: plan.quant.algo == GPTQ_INT8 and plan.quant.group_size > 0,
        says="the PyTorch backend's INT8 layer has one scale a row, GPTQ with groups has many",
        instead="--target tensorrt, or --precision int8 (rounds again)",
        source="TensorRT-LLM linear.py (1.1/1.2): WeightOnlyQuantLinearMethod; no method for W8A16_GPTQ",
    ),
    Rule(
        name="gptq-float16",
        target="any",
        applies=lambda plan, _sm: plan.quant.algo == GPTQ_INT8 and plan.quant.compute is not DType.FP16,
        says="GPTQ's scales are float16 numbers, and its weights are packed for float16",
        instead="--dtype fp16",
        source="TensorRT-LLM functional.py (1.1): postprocess_weight_only_groupwise",
    ),
    Rule(
        name="int8-kv-embedded",
        target="embedded",
        applies=lambda plan, _sm: plan.quant.kv is DType.INT8,
        says="the embedded engine has no INT8 KV cache",
        instead="a 16-bit KV cache or --kv-dtype fp8",
        source="trtkit: engine/paged_cache.py",
    ),
    Rule(
        name="int8-kv-pytorch",
        target="pytorch",
        applies=lambda plan, _sm: plan.quant.kv is DType.INT8,
        says="the PyTorch backend has no INT8 KV cache",
        instead="a 16-bit KV cache",
        source="TensorRT-LLM llm_args.py: KvCacheConfig.dtype is auto or fp8",
    ),
    Rule(
        name="int4-groups",
        target="any",
        applies=lambda plan, _sm: plan.quant.algo == INT4_GROUPS,
        says="INT4 groups that are rounded to nearest are the embedded engine's own form",
        instead="--precision int4-awq with --calib-text, which TensorRT-LLM reads, or --target embedded",
        source="TensorRT-LLM quantize.py (1.1): its W4A16 has one scale a row, its groups are AWQ's and GPTQ's",
    ),
    Rule(
        name="scheme-pytorch",
        target="pytorch",
        applies=lambda plan, _sm: plan.quant.algo not in BUILDABLE["pytorch"],
        says="the PyTorch backend does not list this scheme",
        instead="--precision int8, fp8, fp8-rowwise or int4-awq",
        source="TensorRT-LLM docs/source/features/quantization.md",
    ),
    Rule(
        name="int8-bias-pytorch",
        target="pytorch",
        applies=lambda plan, _sm: plan.quant.algo == "W8A16" and (plan.model.attn_qkv_bias or plan.model.mlp_bias),
        says="the PyTorch backend's INT8 linear layer ignores biases, and this model has some",
        instead="--target tensorrt, or --precision fp16",
        source="TensorRT-LLM linear.py (1.1/1.2): WeightOnlyQuantLinearMethod.apply",
    ),
    Rule(
        name="int8-bf16-pytorch",
        target="pytorch",
        applies=lambda plan, _sm: plan.quant.algo == "W8A16" and plan.quant.compute is not DType.FP16,
        says="the PyTorch backend packs INT8 weights for float16 activations only",
        instead="--dtype fp16",
        source="TensorRT-LLM linear.py (1.1/1.2): preprocess_weights_for_mixed_gemm",
    ),
    Rule(
        name="fp32-pytorch",
        target="pytorch",
        applies=lambda plan, _sm: plan.quant.compute is DType.FP32,
        says="the PyTorch backend serves 16-bit models",
        instead="--precision fp16 or bf16",
        source="assumed: its attention kernels take 16 and 8 bits (not run)",
    ),
)


def adjustments(plan: BuildPlan) -> frozenset[str]:
    """Settings that the plan switches off."""
    return frozenset(rule.adjusts for rule in broken(plan) if rule.adjusts)


def broken(plan: BuildPlan) -> list[Rule]:
    """Rules that apply to a plan."""
    sm = gpu_spec(plan.gpu).sm
    of_target = ("embedded",) if plan.target == "embedded" else ("any", plan.target)
    return [rule for rule in RULES if rule.target in of_target and rule.applies(plan, sm)]


def check_plan(plan: BuildPlan) -> None:
    """Refuse what the target cannot do.

    Raises:
        UnsupportedError: names the rule, the way out and the source.
    """
    for rule in broken(plan):
        if not rule.adjusts:
            raise UnsupportedError(
                f"{plan.name}: {rule.says} (target {plan.target}, {plan.gpu}); use {rule.instead} [{rule.source}]"
            )
    reason = unbuildable(plan)
    if reason is not None:
        raise UnsupportedError(f"{plan.name}: {reason}; use --precision int8")


def unbuildable(plan: BuildPlan) -> str | None:
    """What trtkit itself lacks for a precision, whatever TensorRT-LLM can do; None if nothing."""
    if plan.quant.algo in BUILDABLE[plan.target]:
        return None
    known = ", ".join(name for name, quant in PRECISIONS.items() if quant.algo in BUILDABLE[plan.target])
    return f"trtkit writes no {plan.quant.precision} checkpoint for target {plan.target} (it writes {known})"


def kv_fidelity(plan: BuildPlan, *, allow_approximate: bool) -> KVFidelity:
    """How closely the target carries out the plan's KV policy.

    The engine backend's runtime never drops single tokens of a live request; a cyclic window with sinks is all it has.
    On the PyTorch backend a policy's own adapter carries it out; whether there is one is asked in `trtkit.trtllm.policies`.

    Raises:
        UnsupportedError: it would be an approximation and nobody allowed one, or it cannot be done at all.
    """
    if plan.kv.is_full or plan.target == "embedded":
        return KVFidelity.EXACT
    if plan.target == "pytorch":
        if plan.target_version is None or plan.target_version.startswith("1.2."):
            return KVFidelity.EXACT
        if allow_approximate:
            return KVFidelity.GENERATED_ONLY
        raise UnsupportedError(
            f"{plan.name}: TensorRT-LLM {plan.target_version} can evict generated tokens only (the prompt is pinned), "
            f"which is not {plan.kv.label}; use 1.2.x, --target embedded, or accept it with --allow-approximate "
            f"(recorded as {KVFidelity.GENERATED_ONLY.value})"
        )
    if not allow_approximate:
        raise UnsupportedError(
            f"{plan.name}: TensorRT-LLM's engine runtime offers no place where KV policy {plan.kv.label} could evict tokens; "
            "use --target embedded or pytorch, or accept sinks + recent window instead with --allow-approximate "
            "(recorded as window_only)"
        )
    return KVFidelity.WINDOW_ONLY
