"""TensorRT-LLM and GPUs are found by asking other processes; a silent or broken one is an answer too."""

from __future__ import annotations

import pytest
from support.fake_trtllm import fake_environment

from trtkit.trtllm.installed import installation, visible_devices
from trtkit.trtllm.probe_child import look_up, probe


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in fake_environment(FAKE_GPUS="2").items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_release_with_engines_is_recognised_by_its_names(fake: pytest.MonkeyPatch) -> None:
    found = installation(timeout_s=61)
    assert (found.version, found.release, found.has_engines, found.has_pytorch) == ("1.2.1", (1, 2), True, True)
    assert "free_gpu_memory_fraction" in (found.names["tensorrt_llm.llmapi.KvCacheConfig"] or ())
    assert (found.trtllm_build or "").endswith("trtllm-build")


def test_a_release_without_engines_is_too(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_TRTLLM_VERSION", "1.3.0")
    found = installation(timeout_s=62)
    assert (found.release, found.has_engines, found.has_pytorch) == ((1, 3), False, True)
    assert "tensorrt_llm.llmapi.llm_args.TrtLlmArgs" not in found.names


def test_an_import_that_hangs_is_given_up(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_TRTLLM_HANG", "import")
    assert "did not end within 0.5 s" in installation(timeout_s=0.5).error


def test_nothing_is_found_where_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", "/nowhere")
    found = installation(timeout_s=63)
    assert (found.present, found.version, found.trtllm_build, visible_devices()) == (False, None, None, ())


def test_devices_are_those_that_cuda_may_see(fake: pytest.MonkeyPatch) -> None:
    assert [(d.name, d.sm) for d in visible_devices()] == [("NVIDIA H100 80GB HBM3", 90)] * 2
    fake.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [d.index for d in visible_devices()] == [1]
    fake.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000000")
    assert [d.index for d in visible_devices()] == [0]
    fake.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == ()


def test_names_are_looked_up_as_attributes_and_as_modules() -> None:
    assert look_up("json.dumps")[0]
    assert look_up("os.path")[0]
    assert look_up("json.no_such_thing") == (False, None)
    assert "obj" in (look_up("json.dump")[1] or [])


def test_an_import_error_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise OSError("libmpi.so.40: cannot open shared object file\nmore")

    monkeypatch.setattr("trtkit.trtllm.probe_child.importlib.import_module", broken)
    assert probe() == {"version": None, "error": "OSError: libmpi.so.40: cannot open shared object file", "names": {}}
