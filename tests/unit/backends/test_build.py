"""Building embedded engines: the plan from recipe and options, the fit, the bundle, verification, resuming."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from support.packed_sources import write_packed
from support.tiny_checkpoints import write_model

from trtkit.backends import build as build_module
from trtkit.backends import verify as verify_module
from trtkit.backends.build import build_engine
from trtkit.backends.fit import check_fit, sizes
from trtkit.backends.model_source import ModelSource
from trtkit.backends.outline import outline, render, summary
from trtkit.backends.recipe import DEFAULT_MODEL, BuildOptions, engine_name, load_recipe, make_plan, parse_bytes
from trtkit.plan.memory import Placement, plan_memory
from trtkit.plan.work import weight_bytes
from trtkit.spec.bundle import open_bundle
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.errors import (
    CapacityError,
    InputError,
    MissingDependencyError,
    OutputError,
    UnsupportedError,
    UsageError,
)
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import SpeculationSpec

RECIPES = Path(__file__).parents[3] / "builds" / "recipes"


def no_verification(*_: object) -> dict[str, float]:
    return {}


def plan_of(directory: Path, **options: object) -> BuildPlan:
    return make_plan(BuildOptions(model=str(directory), **options))[0]  # type: ignore[arg-type]


def big_plan(**changes: object) -> BuildPlan:
    base = BuildPlan(
        name="big", model=model_preset("llama-3-70b"), model_source="x", gpu="h100-sxm", quant=quant_for("fp16"),
        target="tensorrt",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_gives_a_plan_that_fits(recipe: Path) -> None:
    plan, _ = make_plan(load_recipe(str(recipe)), dry_run=True)
    assert plan.name == recipe.stem
    check_fit(plan)


def test_options_win_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('model = "./m"\nprecision = "int8"\nmax_batch_size = 4\n')
    write_model(tmp_path / "m")
    given = BuildOptions(precision="fp16", kv_memory="1MiB")
    plan, _ = make_plan(given.over(load_recipe(str(tmp_path / "r.toml"))))
    assert (plan.name, plan.quant.precision, plan.limits.max_batch_size) == ("r", "fp16", 4)
    assert (plan.limits.kv_memory_bytes, plan.limits.max_seq_len) == (1 << 20, 128)


def test_an_unknown_recipe_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('modle = "x"\n')
    with pytest.raises(InputError, match="modle"):
        load_recipe(str(tmp_path / "r.toml"))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="tiny-int8-cpu"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize(
    ("kv", "tp", "name"),
    [
        ("full", 1, "llama-int8-cpu"),
        ("h2o:50%", 2, "llama-int8-cpu-tp2-h2o50"),
        ("h2o:2048", 1, "llama-int8-cpu-h2o-b2048"),
        ("h2o:50%,recent=8", 1, "llama-int8-cpu-h2o50-recent8"),
    ],
)
def test_engines_are_named_after_what_decides_them(kv: str, tp: int, name: str) -> None:
    assert engine_name("Llama", quant_for("int8"), "cpu", Parallelism(tp=tp), parse_kv_policy(kv)) == name


@pytest.mark.parametrize(
    ("text", "expected"), [("12GiB", 12 << 30), ("1.5 MiB", 3 << 19), ("8GB", 8 * 10**9), ("7", 7)]
)
def test_sizes_with_units_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text, "kv_memory") == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "12 parsecs", "1e9"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="kv_memory"):
        parse_bytes(text, "kv_memory")


def test_a_context_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    with pytest.raises(UsageError, match="at most 128"):
        plan_of(tmp_path / "m", max_seq_len=129)


def test_llama_3_70b_in_fp16_misses_one_h100_by_the_arithmetic() -> None:
    found = sizes(big_plan())
    assert found.weight_bytes == 70_553_706_496 * 2
    assert found.kv_bytes_per_token == 327_680
    with pytest.raises(
        CapacityError, match=r"2\.50 GiB of KV.*: 59\.24 GiB too much; --precision int8 or --tp 2 would fit"
    ):
        check_fit(big_plan())


def test_a_rank_holds_its_share_of_weights_and_heads() -> None:
    found = sizes(big_plan(parallel=Parallelism(tp=2)))
    assert (found.devices, found.kv_bytes_per_token) == (2, 163_840)
    assert found.weight_bytes == pytest.approx(70_553_706_496, rel=1e-3)


def test_guesses_are_counted_in_what_a_build_needs_to_work() -> None:
    limits = Limits(max_batch_size=8, max_num_tokens=64)
    plain, guessing = (
        sizes(big_plan(target="embedded", limits=limits, speculation=speculation))
        for speculation in (None, SpeculationSpec(max_draft_tokens=4))
    )
    assert guessing.working_bytes - plain.working_bytes == 32 * big_plan().model.vocab_size * 48


def test_a_context_that_would_fit_is_offered() -> None:
    limits = Limits(max_seq_len=100_000)
    with pytest.raises(CapacityError, match=r"--max-seq-len \d+ would fit"):
        check_fit(big_plan(quant=quant_for("int8"), limits=limits))


@pytest.mark.parametrize("max_seq_len", [8192, 20_000, 22_000, 24_000, 30_000, 60_000])
@pytest.mark.parametrize("precision", ["int8", "fp8-rowwise", "int4-awq"])
def test_build_and_plan_agree_on_what_fits_one_h100(precision: str, max_seq_len: int) -> None:
    limits = Limits(max_seq_len=max_seq_len, max_batch_size=4)
    plan = big_plan(quant=quant_for(precision), limits=limits)
    planned = plan_memory(
        Placement(
            model=plan.model, gpu=gpu_spec(plan.gpu), quant=plan.quant, policy=plan.kv, parallel=plan.parallel,
            limits=limits,
        )
    )  # fmt: skip
    assert sizes(plan).missing_bytes == planned.missing_bytes
    if planned.fits:
        check_fit(plan)
        return
    with pytest.raises(CapacityError, match=r"--max-seq-len \d+ would fit") as caught:
        check_fit(plan)
    offered = int(re.findall(r"--max-seq-len (\d+)", str(caught.value))[0])
    check_fit(dataclasses.replace(plan, limits=dataclasses.replace(limits, max_seq_len=offered)))


def test_int4_records_the_groups_that_the_models_widths_and_ranks_have(tmp_path: Path) -> None:
    write_model(tmp_path / "m", hidden_size=128, intermediate_size=384)
    for tp, group in ((1, 128), (2, 64), (4, 32)):
        plan = plan_of(tmp_path / "m", precision="int4", tp=tp)
        assert (plan.quant.group_size, plan.quant.zero_points) == (group, False)
    assert f"int4 in groups of {group}, compute fp16" in render(outline(plan, tmp_path))
    write_model(tmp_path / "narrow")
    with pytest.raises(UnsupportedError, match=r"MLP width 48 on each of 1 rank.*--precision int8") as caught:
        plan_of(tmp_path / "narrow", precision="int4")
    assert "\n" not in str(caught.value)


def test_smaller_groups_are_taken_where_asked_for_and_named(tmp_path: Path) -> None:
    write_model(tmp_path / "m", hidden_size=128, intermediate_size=384)
    plan = plan_of(tmp_path / "m", precision="int4", group_size=64)
    assert (plan.quant.group_size, plan.name) == (64, "m-int4-g64-cpu")
    assert plan_of(tmp_path / "m", precision="int4").name == "m-int4-cpu"
    for precision, size in (("int4", 48), ("int8", 64)):
        with pytest.raises(UsageError, match=f"group_size {size} with precision {precision}.*128, 64, 32"):
            plan_of(tmp_path / "m", precision=precision, group_size=size)


def test_int4_records_what_a_quantised_source_has(tmp_path: Path) -> None:
    write_model(tmp_path / "m", hidden_size=128, intermediate_size=384)
    write_packed(tmp_path / "awq", tmp_path / "m", "awq", group=64)
    plan = plan_of(tmp_path / "awq", precision="int4")
    assert (plan.quant.group_size, plan.quant.zero_points) == (64, True)
    with pytest.raises(UnsupportedError, match="this one is INT4 AWQ: use --precision int4"):
        plan_of(tmp_path / "awq", precision="int8-gptq")


def test_gptqs_groups_are_counted_in_the_form_that_the_target_holds() -> None:
    plan = big_plan(quant=quant_for("int8-gptq"), limits=Limits(max_seq_len=4096))
    targets = ("embedded", "tensorrt")
    embedded, engine = (sizes(dataclasses.replace(plan, target=target)).weight_bytes for target in targets)
    assert embedded == weight_bytes(plan.model, quant_for("int8-gptq").embedded)
    assert engine > embedded + 10**9, "TensorRT-LLM's form has zero points, too"


def test_a_pool_below_one_request_is_refused() -> None:
    limits = Limits(max_seq_len=8192, kv_memory_bytes=1 << 20)
    with pytest.raises(CapacityError, match="one request of 8192 tokens"):
        check_fit(big_plan(quant=quant_for("int8"), limits=limits))


def test_an_evicting_policy_needs_less_for_its_longest_request() -> None:
    limits = Limits(max_seq_len=8192, max_num_tokens=1024)
    full = sizes(big_plan(limits=limits))
    evicting = sizes(big_plan(limits=limits, kv=parse_kv_policy("window:1024")))
    assert (full.min_kv_tokens, evicting.min_kv_tokens) == (8192, 2048)


def test_the_outline_names_sizes_and_steps(tmp_path: Path) -> None:
    text = render(outline(big_plan(parallel=Parallelism(tp=2)), tmp_path))
    assert "(assumed: trtllm-build alone, from published logs" in text
    assert [w for w in ("65.71 GiB", "rank1.safetensors", "big.engine", "70,553,706,496") if w not in text] == []


@pytest.mark.parametrize("target", ["tensorrt", "pytorch"])
def test_targets_without_tensorrt_llm_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(build_module, "BUILDERS", {"embedded": build_module.BUILDERS["embedded"]})
    write_model(tmp_path / "m")
    with pytest.raises(MissingDependencyError, match="TensorRT-LLM"):
        plan_of(tmp_path / "m", target=target)


def test_a_bundle_has_everything_and_its_hashes_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "verify", no_verification)
    write_model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    plan = plan_of(tmp_path / "m", precision="int8", tp=2)
    built = build_engine(plan, tmp_path / "m", tmp_path / "builds")
    bundle = open_bundle(built.path, check_hashes=True)
    assert bundle.manifest.plan == plan
    assert sorted(bundle.manifest.files) == [
        "checkpoint/config.json", "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors",
        "tokenizer/config.json", "tokenizer/tokenizer.json",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "builds").iterdir()] == ["m-int8-cpu-tp2.engine"]


def test_a_build_interrupted_after_conversion_does_not_convert_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    write_model(tmp_path / "m")
    plan = plan_of(tmp_path / "m")
    monkeypatch.setattr(verify_module, "verify", killed)
    with pytest.raises(KeyboardInterrupt):
        build_engine(plan, tmp_path / "m", tmp_path / "builds")
    assert not (tmp_path / "builds" / f"{plan.name}.engine").exists()
    monkeypatch.setattr(verify_module, "verify", no_verification)
    monkeypatch.setattr("trtkit.trtllm.convert.convert", killed)
    assert "convert" not in build_engine(plan, tmp_path / "m", tmp_path / "builds").manifest.phases_s


@pytest.mark.parametrize("same", [True, False])
def test_what_another_calibration_left_is_cleared_with_its_notes(tmp_path: Path, same: bool) -> None:
    write_model(tmp_path / "m")
    plan = plan_of(tmp_path / "m")
    (tmp_path / "p").mkdir()
    build_module._keep_only_same_build(tmp_path / "p", plan, tmp_path / "m", {"calibration": "a"})
    for name in ("checkpoint", ".verified.json", ".lock"):
        (tmp_path / "p" / name).write_text("")
    build_module._keep_only_same_build(tmp_path / "p", plan, tmp_path / "m", {"calibration": "a" if same else "b"})
    left = {path.name for path in (tmp_path / "p").iterdir()}
    assert left == {".lock", ".plan.json"} | ({"checkpoint", ".verified.json"} if same else set())


def test_calibration_text_is_asked_for_and_read_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "builder_of", lambda _: None)
    monkeypatch.setattr(build_module, "require_builder_device", lambda _: None)
    source = ModelSource(model=model_preset("llama-3-70b"), hub_id="never/fetched")
    int8_cache = big_plan(quant=quant_for("int8", kv=DType.INT8))
    for plan, what in ((big_plan(quant=quant_for("fp8")), "precision fp8"), (int8_cache, "int8 KV cache")):
        with pytest.raises(UsageError, match=f"{what} is calibrated on text"):
            build_engine(plan, source, tmp_path / "builds")
        with pytest.raises(InputError, match="cannot be read as text"):
            build_engine(plan, source, tmp_path / "builds", calib_text=tmp_path / "none")
    assert not (tmp_path / "builds").exists()


def test_what_another_plan_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    write_model(tmp_path / "m")
    monkeypatch.setattr(verify_module, "verify", killed)
    with pytest.raises(KeyboardInterrupt):
        build_engine(plan_of(tmp_path / "m", name="x", precision="fp32"), tmp_path / "m", tmp_path)
    monkeypatch.setattr(verify_module, "verify", no_verification)
    bundle = build_engine(plan_of(tmp_path / "m", name="x", precision="fp16"), tmp_path / "m", tmp_path)
    assert json.loads((bundle.checkpoint_dir / "config.json").read_text())["dtype"] == "float16"


def test_a_partial_directory_that_is_not_a_builds_is_left_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "x.engine.partial").mkdir()
    (tmp_path / "x.engine.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="move them away"):
        build_engine(plan_of(tmp_path / "m", name="x"), tmp_path / "m", tmp_path)
    assert (tmp_path / "x.engine.partial" / "thesis.txt").exists()


def test_a_finished_build_tells_the_precisions_own_doing_from_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "verify", lambda *_: {"drift": 4e-7, "quantisation_drift": 0.013})
    write_model(tmp_path / "m")
    bundle = build_engine(plan_of(tmp_path / "m", precision="int8"), tmp_path / "m", tmp_path / "builds")
    assert "verified against transformers to 4e-07 (what int8 itself does: 0.013)" in summary(bundle)


def test_an_existing_engine_is_kept_without_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "verify", no_verification)
    write_model(tmp_path / "m")
    plan = plan_of(tmp_path / "m")
    first = build_engine(plan, tmp_path / "m", tmp_path)
    with pytest.raises(OutputError, match="--force"):
        build_engine(plan, tmp_path / "m", tmp_path)
    again = build_engine(plan, tmp_path / "m", tmp_path, force=True)
    assert again.manifest.files == first.manifest.files


def test_a_gpu_without_a_model_builds_llama_3_70b() -> None:
    plan, _ = make_plan(BuildOptions(precision="int8", gpu="h100"), dry_run=True)
    assert (plan.model.num_params, plan.model_source) == (70_553_706_496, DEFAULT_MODEL)
    assert plan.name == "llama-3-70b-int8-h100-sxm"
    with pytest.raises(UsageError, match="nothing to build"):
        make_plan(BuildOptions(precision="int8"), dry_run=True)
