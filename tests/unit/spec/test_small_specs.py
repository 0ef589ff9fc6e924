"""Types, precisions, sources, plans, workloads, units and error codes: the small nouns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trtkit.spec import errors
from trtkit.spec.codec import to_plain
from trtkit.spec.dtype import DType
from trtkit.spec.errors import EXIT_CODES, TrtkitError, UsageError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.measured import Source, weakest
from trtkit.spec.metrics import METRICS, MIN_SAMPLES, PERCENTILES
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.spec.quant import PRECISIONS, quant_for
from trtkit.spec.units import GIB, KIB, MIB, format_count, format_gib
from trtkit.spec.workload import Protocol, Workload

MODEL = ModelSpec(
    name="m",
    architecture="LlamaForCausalLM",
    num_layers=6,
    hidden_size=64,
    num_heads=12,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=96,
    vocab_size=10,
    max_position_embeddings=10,
)


def plan(**changes: object) -> BuildPlan:
    base = BuildPlan(name="p", model=MODEL, model_source="dir", gpu="cpu", quant=quant_for("fp32"))
    return replace(base, **changes)


@pytest.mark.parametrize("member", list(DType))
def test_a_dtype_is_read_in_every_dialect(member: DType) -> None:
    for name in (member.value, member.trtllm_name, f"torch.{member.trtllm_name}", member.safetensors_name, member.name):
        assert DType.parse(name) is member


@pytest.mark.parametrize("name", ["", "float", "int", "fp64", "float64", "tf32"])
def test_an_unknown_dtype_lists_the_known(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown dtype '{name}': allowed are fp32, fp16"):
        DType.parse(name)


def test_bits_are_those_of_the_format() -> None:
    assert {d.value: d.bits for d in DType} == {
        "fp32": 32,
        "fp16": 16,
        "bf16": 16,
        "fp8": 8,
        "int8": 8,
        "int4": 4,
        "int32": 32,
    }


def test_plain_precisions_quantise_nothing() -> None:
    for name in ("fp32", "fp16", "bf16"):
        quant = quant_for(name)
        assert {quant.weights, quant.activations, quant.compute, quant.kv} == {DType.parse(name)}
        assert quant.algo is None
        assert not quant.is_weight_only


def test_weight_only_schemes_are_those_with_narrow_weights() -> None:
    assert {name for name in PRECISIONS if quant_for(name).is_weight_only} == {
        "int8", "int8-gptq", "int4", "int4-awq",
    }  # fmt: skip


def test_the_compute_type_of_a_weight_only_scheme_is_replaced_throughout() -> None:
    quant = quant_for("int8", compute=DType.FP32)
    assert (quant.weights, quant.activations, quant.compute, quant.kv) == (
        DType.INT8,
        DType.FP32,
        DType.FP32,
        DType.FP32,
    )
    both_narrow = quant_for("int8-sq", compute=DType.BF16)
    assert (both_narrow.activations, both_narrow.compute) == (DType.INT8, DType.BF16)
    assert quant_for("fp16", compute=DType.FP32) == quant_for("fp16")


def test_the_cache_type_is_chosen_apart() -> None:
    quant = quant_for("int8", compute=DType.BF16, kv=DType.FP8)
    assert (quant.kv, quant.compute) == (DType.FP8, DType.BF16)


def test_an_unknown_precision_lists_the_known() -> None:
    with pytest.raises(UsageError, match="unknown precision 'int3': allowed are fp32, fp16, bf16, int8"):
        quant_for("int3")


@pytest.mark.parametrize("compute", [DType.FP8, DType.INT8, DType.INT4, DType.INT32])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "fp8-rowwise"])
def test_a_type_that_nothing_is_computed_in_is_refused(precision: str, compute: DType) -> None:
    with pytest.raises(UsageError, match=f"compute type {compute.value}: allowed are fp32, fp16, bf16"):
        quant_for(precision, compute=compute)


def test_the_weaker_source_wins() -> None:
    assert weakest(Source.MEASURED, Source.DATASHEET) is Source.DATASHEET
    assert weakest(Source.MODELED, Source.ASSUMED, Source.MEASURED) is Source.ASSUMED
    assert weakest(Source.MEASURED) is Source.MEASURED
    strengths = [s.strength for s in (Source.MEASURED, Source.MODELED, Source.DATASHEET, Source.ASSUMED)]
    assert strengths == sorted(strengths, reverse=True)


@pytest.mark.parametrize("tp", [1, 2, 4, 12])
def test_ranks_that_share_heads_evenly_are_allowed(tp: int) -> None:
    assert plan(parallel=Parallelism(tp=tp)).parallel.world_size == tp


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 5}, "tp=5 does not divide m's heads"),
        ({"tp": 6}, "tp=6 does not divide m's heads"),
        ({"tp": 24}, "tp=24 does not divide m's heads"),
        ({"pp": 4}, "pp=4 does not divide m's 6 layers"),
        ({"tp": 0}, "must be at least 1"),
        ({"pp": -1}, "must be at least 1"),
    ],
)
def test_uneven_splits_are_refused(parallel: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(parallel=Parallelism(**parallel))


def test_ranks_must_share_the_mlp_evenly() -> None:
    with pytest.raises(UsageError, match="tp=4 does not divide m's MLP width 90"):
        plan(model=replace(MODEL, intermediate_size=90), parallel=Parallelism(tp=4))


def test_block_reuse_with_an_evicting_policy_is_refused() -> None:
    reusing = Limits(enable_block_reuse=True)
    plan(limits=reusing)
    with pytest.raises(UsageError, match=r"block reuse with KV policy 'h2o:budget=8'.*--kv full or --no-reuse-prefix"):
        plan(limits=reusing, kv=KVPolicySpec(kind="h2o", budget=8))


def test_limits_without_block_reuse_are_recorded_as_they_were_before_there_was_any() -> None:
    assert "enable_block_reuse" not in to_plain(Limits())
    assert to_plain(Limits(enable_block_reuse=True))["enable_block_reuse"] is True


def test_an_unknown_target_lists_the_known() -> None:
    with pytest.raises(UsageError, match="unknown target 'onnx': allowed are embedded, tensorrt, pytorch"):
        plan(target="onnx")


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch_size": 0},
        {"max_num_tokens": -1},
        {"max_seq_len": 0},
        {"tokens_per_block": 0},
        {"kv_memory_bytes": 0},
        {"kv_fraction": 0.0},
        {"kv_fraction": 1.1},
        {"kv_fraction": float("nan")},
    ],
)
def test_limits_that_admit_nothing_are_refused(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(UsageError, match=f"{name} is "):
        Limits(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"isl": -1},
        {"osl": 0},
        {"num_requests": 0},
        {"warmup_requests": -1},
        {"concurrency": 0},
        {"concurrency": None},
        {"request_rate": 0.0},
    ],
)
def test_a_workload_without_load_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Workload(**{"isl": 8, "osl": 8, "num_requests": 1, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_prefix_tokens": 8}, "must be above 0 and below --isl 8"),
        ({"shared_prefix_tokens": -1}, "must be above 0 and below --isl 8"),
        ({"shared_prefix_tokens": 4, "dataset": "a.jsonl"}, "only synthetic prompts are made with one"),
    ],
)
def test_a_shared_prefix_that_prompts_cannot_have_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Workload(**{"isl": 8, "osl": 8, "num_requests": 1, **change})


@pytest.mark.parametrize(
    ("change", "reusable"),
    [
        ({"shared_prefix_tokens": 70}, 64),
        ({"shared_prefix_tokens": 64}, 64),
        ({"shared_prefix_tokens": 63}, 32),
        ({}, 0),
        ({"dataset": "a.jsonl"}, 96),
        ({"dataset": "a.jsonl", "isl": 97}, 96),
        ({"dataset": "a.jsonl", "isl": 96}, 64),
        ({"dataset": "a.jsonl", "isl": 0}, 0),
    ],
)
def test_what_may_be_reused_is_whole_blocks_and_never_the_last_token(change: dict[str, object], reusable: int) -> None:
    load = Workload(**{"isl": 100, "osl": 8, "num_requests": 1, **change})
    assert load.reusable_tokens(Limits(enable_block_reuse=True, tokens_per_block=32)) == reusable
    assert load.reusable_tokens(Limits(tokens_per_block=32)) == 0


def test_a_pool_that_sizes_itself_is_bounded_by_what_can_be_used() -> None:
    sizes = {"max_batch_size": 3, "max_seq_len": 65, "tokens_per_block": 32}
    assert Limits(**sizes).most_blocks == 9
    assert Limits(**sizes, enable_block_reuse=True).most_blocks == 18


def test_a_workload_without_a_shared_prefix_keeps_its_digest() -> None:
    load = Workload(isl=8, osl=8, num_requests=1)
    assert "shared_prefix_tokens" not in to_plain(load)
    assert (load.lengths, replace(load, shared_prefix_tokens=4).lengths) == ("ISL 8, OSL 8", "ISL 8 (4 shared), OSL 8")


def test_a_protocol_needs_a_workload_and_a_repeat() -> None:
    load = Workload(isl=8, osl=8, num_requests=1)
    for change in ({"workloads": ()}, {"workloads": (load,), "repeats": 0}):
        with pytest.raises(UsageError, match="protocol 'p' needs at least one workload and one repeat"):
            Protocol(name="p", **change)


def test_a_policy_is_never_both_full_and_budgeted() -> None:
    with pytest.raises(UsageError, match="takes no budget"):
        KVPolicySpec(budget=3)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (1.5 * MIB, "1.50 MiB"),
        (141 * GIB, "141.00 GiB"),
        (-GIB, "-1.00 GiB"),
    ],
)
def test_bytes_are_printed_in_binary_units(num_bytes: float, text: str) -> None:
    assert format_gib(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (12_345, "12,345"), (1_500_000, "1.50M"), (70_553_706_496, "70.55B")]
)
def test_counts_are_printed_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert format_count(count) == text


def test_every_error_has_its_own_documented_exit_code() -> None:
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, TrtkitError) and c is not TrtkitError
    ]
    codes = [cls.exit_code for cls in classes]
    assert len(set(codes)) == len(codes) >= 8
    documented = dict(EXIT_CODES)
    assert len(documented) == len(EXIT_CODES)
    for cls in classes:
        assert cls.exit_code > errors.EXIT_GATE_FAILED
        assert documented[cls.exit_code]


def test_metrics_name_their_unit_and_direction() -> None:
    for key, metric in METRICS.items():
        assert metric.key == key
        assert metric.better in ("higher", "lower")
        if key.endswith("_ms"):
            assert metric.unit == "ms"
    assert set(MIN_SAMPLES) == set(PERCENTILES)


@pytest.mark.parametrize(("name", "percent"), PERCENTILES.items())
def test_a_percentile_needs_enough_samples_for_a_bound(name: str, percent: float) -> None:
    """n samples bound the p-th percentile from above with probability 1 - p**n."""
    p, n = percent / 100, MIN_SAMPLES[name]
    if name == "p50":
        return
    assert 1 - p**n >= 0.95 > 1 - p ** (n - 1)
