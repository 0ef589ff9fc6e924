"""What TensorRT-LLM cannot do is refused before the work, with the way out and the source."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trtkit.spec.catalog import model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import parse_speculation
from trtkit.trtllm.capabilities import RULES, adjustments, broken, check_plan, kv_fidelity
from trtkit.trtllm.modelopt import write_engine_checkpoint


def plan(precision: str = "int8", gpu: str = "h100-sxm", target: str = "tensorrt", **changes: object) -> BuildPlan:
    base = BuildPlan(
        name="p", model=model_preset("llama-3-70b"), model_source="x", gpu=gpu, quant=quant_for(precision),
        target=target,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


CASES = {
    "weight-only-blackwell": plan(gpu="b200"),
    "int8-kv-blackwell": plan("fp16", gpu="b200", quant=quant_for("fp16", kv=DType.INT8)),
    "fp8-needs-sm89": plan("fp8", gpu="a100-80gb-sxm", target="pytorch"),
    "int8-kv-paged-context": plan(quant=quant_for("int8", kv=DType.INT8)),
    "fp8-kv-without-fp8": plan(quant=quant_for("int8", kv=DType.FP8)),
    "reuse-without-paged-context": plan(quant=quant_for("int8", kv=DType.FP8), limits=Limits(enable_block_reuse=True)),
    "guesses-in-stages": plan(target="pytorch", parallel=Parallelism(pp=2), speculation=parse_speculation("ngram:4")),
    "int4-groups": plan("int4"),
    "gptq-int8-pytorch": plan("int8-gptq", target="pytorch"),
    "gptq-float16": plan(quant=quant_for("int8-gptq", compute=DType.BF16)),
    "int8-kv-embedded": plan(target="embedded", quant=quant_for("int8", kv=DType.INT8)),
    "int8-kv-pytorch": plan(target="pytorch", quant=quant_for("int8", kv=DType.INT8)),
    "scheme-pytorch": plan("int8-sq", target="pytorch"),
    "int8-bias-pytorch": plan(
        target="pytorch", model=dataclasses.replace(model_preset("llama-3-70b"), attn_qkv_bias=True)
    ),
    "int8-bf16-pytorch": plan(target="pytorch", quant=quant_for("int8", compute=DType.BF16)),
    "fp32-pytorch": plan("fp32", target="pytorch"),
}


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_every_rule_meets_its_case_and_is_refused_or_adjusts(name: str) -> None:
    case = CASES[name]
    rule = next(rule for rule in broken(case) if rule.name == name)
    assert rule.source
    if rule.adjusts:
        assert rule.adjusts in adjustments(case)
        check_plan(case)
        return
    with pytest.raises(UnsupportedError, match=r"; use ") as caught:
        check_plan(case)
    assert rule.says in str(caught.value)


@pytest.mark.parametrize("target", ["tensorrt", "pytorch"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_the_plain_precisions_pass_on_a100_and_h100(precision: str, target: str) -> None:
    for gpu in ("a100-80gb-sxm", "h100-sxm"):
        assert broken(plan(precision, gpu, target)) == []


def test_a_full_cache_is_exact_everywhere() -> None:
    assert kv_fidelity(plan(), allow_approximate=False) is KVFidelity.EXACT


def test_engines_refuse_eviction_unless_a_window_may_stand_in_and_then_say_so() -> None:
    evicting = plan(kv=parse_kv_policy("h2o:50%"))
    with pytest.raises(UnsupportedError, match="--allow-approximate"):
        kv_fidelity(evicting, allow_approximate=False)
    assert kv_fidelity(evicting, allow_approximate=True) is KVFidelity.WINDOW_ONLY


def test_the_pytorch_backend_of_1_2_carries_a_policy_out_and_the_next_one_only_half() -> None:
    evicting = plan(target="pytorch", kv=parse_kv_policy("h2o:50%"), target_version="1.2.1")
    assert kv_fidelity(evicting, allow_approximate=False) is KVFidelity.EXACT
    later = dataclasses.replace(evicting, target_version="1.3.0")
    with pytest.raises(UnsupportedError, match=r"the prompt is pinned.*--allow-approximate"):
        kv_fidelity(later, allow_approximate=False)
    assert kv_fidelity(later, allow_approximate=True) is KVFidelity.GENERATED_ONLY


@pytest.mark.parametrize("precision", ["fp8-rowwise", "fp8"])
def test_fp8_rows_and_tensors_want_the_same_gpu(precision: str) -> None:
    check_plan(plan(precision))
    with pytest.raises(UnsupportedError, match="sm89"):
        check_plan(plan(precision, "a100-80gb-sxm"))


def test_gptq_with_one_scale_a_row_is_all_that_the_pytorch_backend_takes() -> None:
    rows = dataclasses.replace(quant_for("int8-gptq"), group_size=0)
    check_plan(plan(target="pytorch", quant=rows))


@pytest.mark.parametrize(("target", "precision"), [("embedded", "fp8"), ("embedded", "int4-awq")])
def test_what_trtkit_itself_cannot_write_is_refused_before_the_download(target: str, precision: str) -> None:
    with pytest.raises(UnsupportedError, match=f"writes no {precision} checkpoint"):
        check_plan(plan(precision, target=target))


def test_architectures_whose_modelopt_name_is_not_known_are_refused_before_calibration(tmp_path: Path) -> None:
    qwen = dataclasses.replace(model_preset("llama-3-70b"), architecture="Qwen2ForCausalLM", attn_qkv_bias=True)
    with pytest.raises(UnsupportedError, match="engines are written for LlamaForCausalLM"):
        write_engine_checkpoint(tmp_path, tmp_path, plan("fp8", model=qwen), [])
