"""`trtkit doctor`: what a machine can do, with reasons, for people and for scripts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.fake_trtllm import fake_environment
from typer.testing import CliRunner

from trtkit.backends.doctor import catalog_name, diagnose, render
from trtkit.cli.app import build_app
from trtkit.spec.errors import MissingDependencyError
from trtkit.spec.quant import PRECISIONS
from trtkit.spec.units import MIB
from trtkit.trtllm.installed import Device


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in fake_environment(FAKE_GPUS="2").items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "")


def test_a_machine_with_nothing_can_run_the_embedded_engine(bare: None) -> None:
    found = diagnose()
    assert {f.name: f.ok for f in found.targets} == {"embedded": True, "tensorrt": False, "pytorch": False}
    assert (found.devices, found.names) == ((), ())
    assert "no NVIDIA GPU is visible" in render(found)
    found.require("embedded")
    with pytest.raises(MissingDependencyError, match="not installed here"):
        found.require("tensorrt")


def test_a_gpu_box_with_1_2_can_run_every_target(fake: pytest.MonkeyPatch) -> None:
    found = diagnose()
    assert all(f.ok for f in found.targets)
    assert all(f.ok for f in found.names)
    assert {f.name for f in found.precisions["tensorrt"] if f.ok} == set(PRECISIONS) - {"int4"}
    assert {f.name for f in found.precisions["pytorch"] if f.ok} == {
        "fp16", "bf16", "int8", "fp8-rowwise", "fp8", "int4-awq",
    }  # fmt: skip
    assert "(h100-sxm)" in render(found)


def test_an_a100_has_no_fp8_and_the_reason_names_its_source(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_GPU", "NVIDIA A100-SXM4-80GB, 81920, 8.0")
    (fp8,) = [f for f in diagnose().precisions["pytorch"] if f.name == "fp8"]
    assert not fp8.ok
    assert "sm89" in fp8.detail
    assert "[" in fp8.detail


def test_an_installation_without_a_gpu_runs_nothing_of_its_own(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_GPUS", "0")
    (engine,) = [f for f in diagnose().targets if f.name == "tensorrt"]
    assert (engine.ok, "an NVIDIA GPU is not" in engine.detail) == (False, True)


@pytest.mark.parametrize(
    ("name", "mib", "sm", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, 90, "h100-sxm"),
        ("NVIDIA H100 PCIe", 81559, 90, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 40960, 80, "a100-40gb-sxm"),
        ("Tesla T4", 15360, 75, None),
    ],
)
def test_a_device_is_found_in_the_catalog_by_what_it_is(name: str, mib: int, sm: int, expected: str | None) -> None:
    device = Device(index=0, uuid="", name=name, memory_bytes=mib * MIB, sm=sm, driver="")
    assert catalog_name(device) == expected


MANAGER = "tensorrt_llm._torch.pyexecutor.resource_manager:KVCacheManager"


def h2o(*arguments: str) -> dict[str, tuple[bool, str]]:
    """The plugin's findings as the command's JSON gives them: name -> found, detail."""
    result = CliRunner().invoke(build_app(requested={"doctor"}), ["doctor", "--h2o", "--json", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["plugins"]["h2o"]
    return {finding["name"]: (finding["ok"], finding["detail"]) for finding in found}


def test_h2o_says_which_path_a_release_has_and_lists_every_name_it_leans_on(fake: pytest.MonkeyPatch) -> None:
    found = h2o()
    assert found["verdict"] == (
        True, "runs through v12, sparse-attention hooks and the V1 KV cache manager (1.2.x); fidelity exact",
    )  # fmt: skip
    assert all(ok for name, (ok, _) in found.items() if name.startswith("v12 "))
    assert found[f"v12 {MANAGER}.rewind_kv_cache"] == (True, "freeing blocks: found, takes request, rewind_len")
    assert any(not ok for name, (ok, _) in found.items() if name.startswith("v13 "))


def test_h2o_names_what_a_release_lacks(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_TRTLLM_WITHOUT", f"{MANAGER}.rewind_kv_cache")
    found = h2o()
    ok, verdict = found["verdict"]
    assert not ok
    assert "has no room for H2O: freeing blocks: " in verdict
    assert [name for name, (ok, _) in found.items() if name.startswith("v12 ") and not ok] == [
        f"v12 {MANAGER}.rewind_kv_cache"
    ]
    assert "no   verdict: TensorRT-LLM 1.2.1 has no room for H2O" in render(diagnose(plugins=True))


def test_a_release_that_pins_prompts_says_so(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake.setenv("FAKE_TRTLLM_VERSION", "1.3.0")
    fake.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)]))  # looked at once for each
    assert h2o()["verdict"] == (
        True, "runs through v13, KV cache compression manager (1.3 and later); the prompt is pinned; fidelity generated_only",
    )  # fmt: skip
    (eviction,) = [f for f in diagnose().kv["pytorch"] if f.name == "eviction"]
    assert not eviction.ok
    assert eviction.detail.startswith("TensorRT-LLM 1.3.0 can evict generated tokens only")


def test_h2o_without_tensorrt_llm_is_one_line(bare: None) -> None:
    found = h2o()
    assert list(found) == ["verdict", "tensorrt_llm"]
    assert "cannot be imported" in found["verdict"][1]


def test_the_command_prints_json_and_its_exit_code_is_the_requirement(bare: None) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(build_app(requested={"doctor"}), ["doctor", *arguments])
        return result.exit_code, result.stdout

    code, text = run("--json")
    assert code == 0
    assert {"devices", "installation", "kv", "machine", "precisions", "targets"} <= set(json.loads(text))
    assert run("--require", "embedded")[0] == 0
    assert run("--require", "tensorrt")[0] == 6
    assert run("--require", "vllm")[0] == 2
