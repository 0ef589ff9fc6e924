"""The catalog: shapes against published totals, a source and a date on every figure, and users' own entries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtkit.spec import catalog
from trtkit.spec.catalog import gpu_spec, host_memory_bytes, load_catalog, model_entry, model_hub_id, model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError, UsageError
from trtkit.spec.units import GIB, MIB

GPUS = list(load_catalog().gpus)
MODELS = list(load_catalog().models)
OWN_GPU = """
[gpus.lab-gpu]
title = "a card of ours"
memory_mib = 1000
memory_bandwidth_gb_s = 100
peak_tflops = { fp16 = 10 }
"""


def own_catalog(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    entry = model_entry(name)
    assert entry.published_params is not None
    assert entry.spec.num_params == entry.published_params


def test_llama_3_70b_is_pinned() -> None:
    spec = model_preset("llama-3-70b")
    assert spec.num_params == 70_553_706_496
    assert spec.kv_bytes_per_token(DType.FP16) == 327_680
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (80, 64, 8, 128)


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_says_where_it_is_from(name: str) -> None:
    entry = model_entry(name)
    assert entry.hub_ids
    assert entry.hub_ids[0] in entry.source
    assert re.search(r"20\d\d-\d\d-\d\d", entry.source)


def test_what_the_issue_asks_for_is_there() -> None:
    wanted_models = (
        "llama-2-7b llama-2-70b llama-3-8b llama-3-70b llama-3.1-8b llama-3.1-70b llama-3.1-405b llama-3.3-70b"
    )
    wanted_gpus = "a100-40gb-sxm a100-40gb-pcie a100-80gb-sxm a100-80gb-pcie h100-sxm h100-pcie h100-nvl h200 b200 l40s l4 gh200 cpu"
    assert set(wanted_models.split()) <= set(MODELS)
    assert set(wanted_gpus.split()) <= set(GPUS)
    architectures = {model_preset(name).architecture for name in MODELS}
    assert architectures == {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"}


def test_llama_3_1_scales_its_rotary_base_and_llama_3_does_not() -> None:
    assert model_preset("llama-3.1-8b").rope.scaling == "llama3"
    assert model_preset("llama-3.1-8b").rope.factor == 8.0
    assert model_preset("llama-3-8b").rope.scaling == "none"
    assert model_preset("llama-3-8b").rope.theta == 500_000.0


@pytest.mark.parametrize("name", GPUS)
def test_every_figure_of_a_gpu_has_a_source_with_a_date(name: str) -> None:
    gpu = gpu_spec(name)
    figures = {"memory_bytes", "memory_bandwidth_bytes_s"} | {f"peak_flops.{d.value}" for d in gpu.peak_flops}
    figures |= {key for key in ("link_bytes_s", "tdp_w") if getattr(gpu, key) is not None}
    assert set(gpu.sources) == figures
    for key, source in gpu.sources.items():
        assert re.search(r"20\d\d-\d\d-\d\d", source) or (name, key) == ("cpu", "memory_bytes"), key


@pytest.mark.parametrize("name", [name for name in GPUS if name != "cpu"])
def test_figures_of_a_gpu_are_physically_plausible(name: str) -> None:
    gpu = gpu_spec(name)
    assert 20 * GIB < gpu.memory_bytes < 200 * GIB
    assert 2e11 < gpu.memory_bandwidth_bytes_s <= 8e12
    assert gpu.flops(DType.FP16) == gpu.flops(DType.BF16)
    assert gpu.flops(DType.INT8) == pytest.approx(2 * gpu.flops(DType.FP16), rel=0.02)
    assert (DType.FP8 in gpu.peak_flops) == (gpu.sm >= 89)


def test_memory_is_the_drivers_not_the_nominal() -> None:
    assert gpu_spec("h100-sxm").memory_bytes == 81_559 * MIB
    assert gpu_spec("a100-80gb-sxm").memory_bytes == 80 * GIB
    assert gpu_spec("h100-sxm").memory_bandwidth_bytes_s == 3.35e12
    assert gpu_spec("h100-sxm").flops(DType.FP8) == 1978.9e12


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("a100", "a100-80gb-sxm"),
        ("A100_80GB_SXM", "a100-80gb-sxm"),
        ("H100", "h100-sxm"),
        ("h100 nvl", "h100-nvl"),
        ("H200", "h200"),
        ("L40S", "l40s"),
        ("CPU", "cpu"),
    ],
)
def test_gpu_names_match_whatever_their_case_and_separators(name: str, canonical: str) -> None:
    assert gpu_spec(name).name == canonical


@pytest.mark.parametrize(
    ("name", "canonical", "hub_id"),
    [
        ("llama3-70b", "llama-3-70b", "meta-llama/Meta-Llama-3-70B"),
        ("Llama_3.1_8B", "llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Meta-Llama-3-8B-Instruct", "llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("qwen3-8b", "qwen3-8b", "Qwen/Qwen3-8B"),
        ("mistral-7b", "mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3"),
    ],
)
def test_models_are_found_by_name_alias_and_hub_id(name: str, canonical: str, hub_id: str) -> None:
    assert model_preset(name).name == canonical
    assert model_hub_id(name) == hub_id


def test_no_two_entries_share_a_spelling() -> None:
    shipped = load_catalog()
    for table, names in (
        (shipped.gpus, lambda entry: entry.aliases),
        (shipped.models, lambda entry: (*entry.aliases, *entry.hub_ids)),
    ):
        owner: dict[str, str] = {}
        for key, entry in table.items():
            for spelling in catalog._spellings((key, *names(entry))):
                assert owner.setdefault(spelling, key) == key, spelling


def test_an_unknown_name_suggests_near_misses_and_lists_what_is_known() -> None:
    with pytest.raises(UsageError, match=r"unknown GPU 'h10': did you mean h100.*Known are .*l40s") as caught:
        gpu_spec("h10")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"unknown model 'llama-3-7b': did you mean .*llama-3-70b"):
        model_preset("llama-3-7b")
    with pytest.raises(UsageError, match="unknown GPU ''"):
        gpu_spec("")


def test_a_peak_that_is_not_on_record_is_refused_not_guessed() -> None:
    with pytest.raises(UnsupportedError, match="a100-80gb-sxm has no fp8 peak on record"):
        gpu_spec("a100").flops(DType.FP8)


def test_users_add_their_own_gpu(tmp_path: Path) -> None:
    path = own_catalog(tmp_path, OWN_GPU)
    gpu = gpu_spec("LAB GPU", catalogs=[path])
    assert gpu.memory_bytes == 1000 * MIB
    assert gpu.memory_bandwidth_bytes_s == 1e11
    assert gpu.link_bytes_s is None
    assert gpu.sources["memory_bytes"] == "user catalog own.toml"
    assert gpu_spec("h100", catalogs=[path]).name == "h100-sxm"
    with pytest.raises(UsageError, match="unknown GPU"):
        gpu_spec("lab-gpu")


def test_users_entries_win_over_shipped_ones(tmp_path: Path) -> None:
    path = own_catalog(tmp_path, OWN_GPU.replace("lab-gpu", "l4"))
    assert gpu_spec("l4", catalogs=[path]).memory_bytes == 1000 * MIB
    assert gpu_spec("l4").memory_bytes == 23_034 * MIB


def test_users_add_their_own_model(tmp_path: Path) -> None:
    text = """
[models.ours]
architecture = "LlamaForCausalLM"
num_layers = 2
hidden_size = 64
num_heads = 4
num_kv_heads = 2
head_dim = 16
intermediate_size = 128
vocab_size = 100
max_position_embeddings = 512
rope = { theta = 5e5 }
"""
    path = own_catalog(tmp_path, text)
    assert model_preset("ours", catalogs=[path]).rope.theta == 5e5
    with pytest.raises(UsageError, match="'ours' has no hub id"):
        model_hub_id("ours", catalogs=[path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_mib = 1000", "memory_gib = 1"), r"gpus\.lab-gpu: unknown key 'memory_gib'"),
        (("memory_mib = 1000", "memory_mib = 0"), r"gpus\.lab-gpu\.memory_mib: is 0.*must be above 0"),
        (("memory_mib = 1000", "memory_mib = nan"), "finite|above 0"),
        (("memory_bandwidth_gb_s = 100", ""), "'memory_bandwidth_gb_s' is missing"),
        (("{ fp16 = 10 }", "{}"), "at least one type"),
        (("{ fp16 = 10 }", "{ fp17 = 10 }"), "'fp17' is not one of"),
        (("{ fp16 = 10 }", "{ fp16 = -1 }"), r"peak_tflops\.fp16: is -1"),
        (("[gpus.lab-gpu]", "[gpu.lab-gpu]"), "unknown table 'gpu'"),
        (("[gpus.lab-gpu]", "[gpus]"), r"\[gpus\] must hold tables"),
        (("[gpus.lab-gpu]", "[gpus.lab-gpu"), "not a catalog"),
        (("peak_tflops", "sources = { tdp = 'x' }\npeak_tflops"), "'tdp' is no figure"),
    ],
)
def test_a_wrong_catalog_file_is_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = own_catalog(tmp_path, OWN_GPU.replace(*change))
    with pytest.raises(InputError, match=message) as caught:
        gpu_spec("lab-gpu", catalogs=[path])
    assert "own.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_catalog_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_catalog(tmp_path / "absent.toml")


def test_the_cpus_memory_is_this_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(catalog, "_CGROUP_LIMIT", limit)
    physical = host_memory_bytes()
    limit.write_text("max\n")
    assert host_memory_bytes() == physical
    limit.write_text("123456\n")
    assert gpu_spec("cpu").memory_bytes == 123_456
    assert "assumed" in gpu_spec("cpu").sources["memory_bandwidth_bytes_s"]


def test_memory_the_system_does_not_tell_is_an_error_not_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", silent)
    with pytest.raises(UnsupportedError, match="cannot tell this machine's memory"):
        gpu_spec("cpu")
