"""Any plan and policy survive the record format, and the digest follows content alone."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from trtkit.spec.codec import canonical_json, digest, from_plain
from trtkit.spec.dtype import DType
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.measured import Measured, Source
from trtkit.spec.model import ModelSpec, RopeSpec
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import PRECISIONS, quant_for

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def policies(draw: st.DrawFn) -> KVPolicySpec:
    if draw(st.booleans()):
        return KVPolicySpec()
    recent = draw(st.none() | st.integers(0, 500))
    sinks = draw(st.none() | st.integers(0, 16))
    least = max(1, (recent or 0) + (sinks or 0))
    budget = draw(st.none() | st.integers(least, least + 10_000))
    fraction = None if budget is not None else draw(st.floats(0, 1, exclude_min=True))
    return KVPolicySpec(
        kind=draw(st.sampled_from(["h2o", "window", "snapkv", "random"])),
        budget=budget,
        budget_fraction=fraction,
        recent=recent,
        sinks=sinks,
        scorer=draw(st.sampled_from([None, "sum", "mean", "decay"])),
        interval=draw(st.none() | st.integers(1, 256)),
    )


@st.composite
def plans(draw: st.DrawFn) -> BuildPlan:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    model = ModelSpec(
        name=draw(NAMES),
        architecture="LlamaForCausalLM",
        num_layers=draw(st.integers(1, 100)),
        hidden_size=draw(st.integers(1, 10_000)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 256)),
        intermediate_size=draw(st.integers(1, 50_000)),
        vocab_size=draw(st.integers(1, 200_000)),
        max_position_embeddings=draw(st.integers(1, 1 << 20)),
        norm_epsilon=draw(st.floats(1e-12, 1)),
        rope=RopeSpec(theta=draw(st.floats(1, 1e9)), factor=draw(st.floats(1, 64))),
        eos_ids=tuple(draw(st.lists(st.integers(0, 10), max_size=3))),
        sliding_window=draw(st.none() | st.integers(1, 10_000)),
    )
    limits = Limits(
        max_batch_size=draw(st.integers(1, 4096)),
        kv_memory_bytes=draw(st.none() | st.integers(1, 1 << 45)),
        kv_fraction=draw(st.floats(0, 1, exclude_min=True)),
    )
    return BuildPlan(
        name=draw(NAMES),
        model=model,
        model_source=draw(NAMES),
        gpu="cpu",
        quant=quant_for(draw(st.sampled_from(sorted(PRECISIONS)))),
        kv=draw(policies()),
        limits=limits,
    )


@given(plans())
def test_a_plan_survives_json(plan: BuildPlan) -> None:
    back = from_plain(BuildPlan, json.loads(canonical_json(plan)))
    assert back == plan
    assert digest(back) == digest(plan)


@given(plans())
def test_another_plan_has_another_digest(plan: BuildPlan) -> None:
    assert digest(replace(plan, name=plan.name + "x")) != digest(plan)
    assert digest(replace(plan, quant=plan.quant.with_kv(DType.FP8))) != digest(plan)


@given(policies())
def test_a_policys_label_reads_back_as_the_policy(policy: KVPolicySpec) -> None:
    assert parse_kv_policy(policy.label) == policy


@given(policies(), st.integers(1, 1 << 20))
def test_a_resolved_share_never_exceeds_the_context(policy: KVPolicySpec, context: int) -> None:
    if policy.budget_fraction is None:
        assert policy.resolved(context) is policy
        return
    bare = replace(policy, recent=None, sinks=None).resolved(context)
    assert bare.budget is not None
    assert 1 <= bare.budget <= context
    assert bare.budget_fraction is None
    assert abs(bare.budget - policy.budget_fraction * context) <= 1


@given(value=FINITE, low=st.none() | FINITE, source=st.sampled_from(Source), note=NAMES)
def test_a_measured_number_survives_json_to_the_bit(value: float, low: float | None, source: Source, note: str) -> None:
    number = Measured(value=value, unit="ms", source=source, low=low, note=note)
    assert from_plain(Measured, json.loads(canonical_json(number))) == number


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | FINITE | NAMES, lambda s: st.lists(s) | st.dictionaries(NAMES, s)
    )
)
def test_canonical_json_is_a_fixed_point(value: object) -> None:
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text
