"""What is missing on a machine is one line with its own exit code, before any work."""

from __future__ import annotations

import dataclasses

import pytest

from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.errors import MissingDependencyError, UnsupportedError
from trtkit.spec.plan import BuildPlan, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import parse_speculation
from trtkit.trtllm.guesses import NGRAM_CLASS
from trtkit.trtllm.installed import Device, Installation
from trtkit.trtllm.requirements import (
    PACKING_FUNCTION,
    choose_target,
    require_builder_device,
    require_guesses,
    require_packing,
    require_runtime,
    require_target,
)

NAMES = {
    "tensorrt_llm.LLM": None,
    "tensorrt_llm._tensorrt_engine.LLM": None,
    "tensorrt_llm.llmapi.SamplingParams": None,
    "tensorrt_llm.llmapi.KvCacheConfig": None,
    "mpi4py.MPI": None,
}
ENGINES = Installation(present=True, version="1.2.1", names=NAMES, trtllm_build="/usr/bin/trtllm-build")
NEWER = dataclasses.replace(
    ENGINES, version="1.3.0rc7", names={k: v for k, v in NAMES.items() if "_tensorrt_engine" not in k}
)
H100 = Device(
    index=0, uuid="GPU-0", name="NVIDIA H100", memory_bytes=gpu_spec("h100-sxm").memory_bytes, sm=90, driver="580"
)
A100 = dataclasses.replace(H100, name="NVIDIA A100", sm=80)


def plan(tp: int = 1) -> BuildPlan:
    return BuildPlan(
        name="p", model=model_preset("llama-3-70b"), model_source="x", gpu="h100-sxm", quant=quant_for("int8"),
        parallel=Parallelism(tp=tp), target="tensorrt",
    )  # fmt: skip


def test_auto_takes_engines_where_they_exist_and_says_why() -> None:
    assert choose_target(ENGINES) == ("tensorrt", "TensorRT-LLM 1.2.1 has the engine backend")
    target, why = choose_target(NEWER)
    assert target == "pytorch"
    assert "engines ended with 1.2" in why
    assert "not installed" in choose_target(Installation(present=False))[1]


def test_without_tensorrt_llm_the_way_out_is_named() -> None:
    with pytest.raises(MissingDependencyError, match=r"docker run .*--target embedded.*--dry-run"):
        require_target("tensorrt", Installation(present=False))


def test_an_import_that_hangs_is_a_line_and_not_a_wait() -> None:
    hanging = Installation(present=True, error="importing it did not end within 300 s (MPI?)")
    with pytest.raises(MissingDependencyError, match="MPI"):
        require_target("tensorrt", hanging)


def test_engines_are_refused_where_they_were_removed() -> None:
    with pytest.raises(
        UnsupportedError, match=r"needs TensorRT-LLM 1\.2\.x .* here is 1\.3\.0rc7; use --target pytorch"
    ):
        require_target("tensorrt", NEWER)
    assert require_target("pytorch", NEWER) is NEWER


def test_an_older_release_is_refused_by_both_targets() -> None:
    older = dataclasses.replace(ENGINES, version="1.1.0")
    for target in ("tensorrt", "pytorch"):
        with pytest.raises(UnsupportedError, match=r"here is 1\.1\.0"):
            require_target(target, older)


def test_a_renamed_class_is_named() -> None:
    renamed = dataclasses.replace(ENGINES, names={k: v for k, v in NAMES.items() if "Sampling" not in k})
    with pytest.raises(UnsupportedError, match="SamplingParams"):
        require_target("tensorrt", renamed)


def test_the_compiler_must_be_on_the_path() -> None:
    with pytest.raises(MissingDependencyError, match="trtllm-build"):
        require_target("tensorrt", dataclasses.replace(ENGINES, trtllm_build=None))


def test_an_engine_is_built_on_the_kind_of_gpu_it_is_for() -> None:
    require_builder_device(plan(tp=2), (H100,))
    with pytest.raises(MissingDependencyError, match=r"capability 9\.0; this machine has NVIDIA A100 \(8\.0"):
        require_builder_device(plan(), (A100,))
    with pytest.raises(MissingDependencyError, match="no NVIDIA GPU"):
        require_builder_device(plan(), ())


def test_every_rank_needs_a_gpu_of_the_plans_kind_and_size() -> None:
    require_runtime(plan(tp=2), ENGINES, (H100, H100))
    small = dataclasses.replace(H100, memory_bytes=40 << 30)
    for devices in ((H100,), (H100, A100), (H100, small)):
        with pytest.raises(MissingDependencyError, match="2 x h100-sxm"):
            require_runtime(plan(tp=2), ENGINES, devices)


def test_ranks_without_mpi_are_refused_and_one_rank_needs_none() -> None:
    without = dataclasses.replace(ENGINES, names={k: v for k, v in NAMES.items() if not k.startswith("mpi4py")})
    require_runtime(plan(), without, (H100,))
    with pytest.raises(MissingDependencyError, match="mpi4py"):
        require_runtime(plan(tp=2), without, (H100, H100))


def test_gptq_wants_the_function_that_packs_it_and_nothing_else_does() -> None:
    require_packing(plan(), ENGINES)
    gptq = dataclasses.replace(plan(), quant=quant_for("int8-gptq"))
    with pytest.raises(UnsupportedError, match=r"1\.2\.1 has no .*mixed_gemm.*--precision int8"):
        require_packing(gptq, ENGINES)
    require_packing(gptq, dataclasses.replace(ENGINES, names={**NAMES, PACKING_FUNCTION: ("tensor",)}))


def test_a_release_that_cannot_guess_is_refused_by_what_it_lacks() -> None:
    guessing = dataclasses.replace(plan(), target="pytorch", speculation=parse_speculation("ngram:4"))
    arguments = ("is_keep_all", "is_public_pool", "is_use_oldest", "max_draft_len", "max_matching_ngram_size")
    found = dataclasses.replace(NEWER, names={**NAMES, NGRAM_CLASS: arguments})
    require_guesses(guessing, found)
    require_guesses(guessing, dataclasses.replace(found, names={NGRAM_CLASS: None}))
    require_guesses(plan(), NEWER)
    with pytest.raises(UnsupportedError, match=r"1\.3\.0rc7 has no .*NGramDecodingConfig.*--speculate off"):
        require_guesses(guessing, NEWER)
    older = dataclasses.replace(found, names={NGRAM_CLASS: ("prompt_lookup_num_tokens", *arguments[:3])})
    with pytest.raises(UnsupportedError, match="without max_draft_len"):
        require_guesses(guessing, older)
