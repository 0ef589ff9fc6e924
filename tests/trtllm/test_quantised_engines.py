"""Every quantised precision from checkpoint to tokens through the strict fake, which loads what TensorRT-LLM states to load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from support.fake_trtllm import fake_environment
from support.gptq import write_gptq

from trtkit.backends import open_engine
from trtkit.backends.build import build_engine
from trtkit.backends.recipe import BuildOptions, make_plan
from trtkit.backends.twin import write_twin
from trtkit.backends.verify import MAX_DRIFT
from trtkit.engine.open import open_checkpoint
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Engine, Request
from trtkit.spec.errors import EngineError, UnsupportedError, UsageError
from trtkit.spec.plan import Limits
from trtkit.spec.quant import quant_for
from trtkit.trtllm.convert import convert
from trtkit.trtllm.installed import installation
from trtkit.trtllm.requirements import PACKING_FUNCTION

TINY = Path(__file__).parents[2] / "bench" / "tiny_model" / "model"
LIMITS: dict[str, object] = {
    "max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": 64, "tokens_per_block": 8, "kv_memory": "1MiB",
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in fake_environment(FAKE_GPUS="2").items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gptq")
    write_gptq(folder / "groups", TINY, 64)
    write_gptq(folder / "rows", TINY, -1)
    return {name: folder / name for name in ("groups", "rows")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and 2 + 2 = 4. " * 16)
    return str(path)


def build(out: Path, source: Path = TINY, *, calib_text: str | None = None, **options: object) -> EngineBundle:
    given = BuildOptions(model=str(source), gpu="h100", **{"target": "tensorrt", **LIMITS, **options})  # type: ignore[arg-type]
    plan, found = make_plan(given)
    return build_engine(plan, found, out, calib_text=Path(calib_text) if calib_text else None)


def tokens(bundle: EngineBundle) -> list[list[int | None]]:
    with open_engine(bundle.path) as engine:
        return generated(engine)


def tensor_bytes(path: Path) -> int:
    """Of everything in a file, scales and zeros included."""
    with path.open("rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    return path.stat().st_size - 8 - header


def generated(engine: Engine) -> list[list[int | None]]:
    requests = [
        Request(request_id=str(i), prompt_ids=tuple(range(5 + i, 25 + i)), max_tokens=8, ignore_eos=True)
        for i in range(3)
    ]
    found: dict[str, list[int | None]] = {request.request_id: [] for request in requests}
    for event in engine.generate(requests):
        assert event.error is None, event.error
        found[event.request_id].append(event.token_id)
    return list(found.values())


def test_gptq_groups_reach_the_engine_as_they_are(
    fake: pytest.MonkeyPatch, tmp_path: Path, gptq: dict[str, Path]
) -> None:
    bundle = build(tmp_path, gptq["groups"], precision="int8-gptq", tp=2)
    assert set(bundle.manifest.phases_s) == {"convert", "verify", "pack", "trtllm-build", "manifest"}
    assert bundle.manifest.verification["drift"] < MAX_DRIFT
    assert bundle.manifest.verification["quantisation_drift"] == 0.0
    assert "groups of 64" in bundle.manifest.versions["weights"]
    quantization = json.loads((bundle.checkpoint_dir / "config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["group_size"]) == ("W8A16_GPTQ", 64)
    assert quantization["has_zero_point"] is True
    with safe_open(str(bundle.checkpoint_dir / "rank1.safetensors"), framework="pt") as handle:
        packed = handle.get_slice("transformer.layers.0.mlp.proj.weight")
        assert (packed.get_shape(), packed.get_dtype()) == ([192, 64], "F16")
    assert not (bundle.path / "checkpoint.plain").exists()
    # The same numbers in 16 bits, by the same engine: GPTQ's eight bits times a float16 scale.
    convert(gptq["groups"], tmp_path / "plain", quant=quant_for("fp16"))
    limits = Limits(max_batch_size=4, max_num_tokens=64, max_seq_len=64, tokens_per_block=8)
    with open_checkpoint(tmp_path / "plain", limits=limits) as engine:
        expected = generated(engine)
    with open_engine(bundle.path) as engine:
        assert generated(engine) == expected
        assert engine.info.weight_bytes == tensor_bytes(bundle.checkpoint_dir / "rank0.safetensors")


def test_a_killed_packing_keeps_the_verified_conversion(
    fake: pytest.MonkeyPatch, tmp_path: Path, gptq: dict[str, Path]
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtkit.backends.build_tensorrt.pack_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, gptq["rows"], precision="int8-gptq")
    bundle = build(tmp_path, gptq["rows"], precision="int8-gptq")
    assert set(bundle.manifest.phases_s) == {"pack", "trtllm-build", "manifest"}
    assert bundle.manifest.verification["drift"] < MAX_DRIFT


def test_a_release_without_the_packing_function_is_told_in_one_line(
    fake: pytest.MonkeyPatch, tmp_path: Path, gptq: dict[str, Path]
) -> None:
    fake.setattr("trtkit.backends.build_tensorrt.verify", lambda *_: {})
    found = installation()
    without = {name: taken for name, taken in found.names.items() if name != PACKING_FUNCTION}
    assert len(without) == len(found.names) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtkit.trtllm.requirements.installation", lambda: dataclasses.replace(found, names=without))
        with pytest.raises(UnsupportedError, match="which packs GPTQ weights"):
            build(tmp_path, gptq["rows"], precision="int8-gptq")
    assert not list(tmp_path.iterdir())
    fake.setenv("FAKE_TRTLLM_PACK", "missing")
    with pytest.raises(
        EngineError, match=r"packing GPTQ weights ended with exit code 1.*has no preprocess_weights"
    ) as caught:
        build(tmp_path, gptq["rows"], precision="int8-gptq")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.engine"))


def test_a_model_that_gptq_has_not_touched_is_refused_before_the_download(
    fake: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="takes a model that GPTQ has quantised"):
        build(tmp_path, precision="int8-gptq")
    assert not list(tmp_path.iterdir())


def test_an_int8_cache_is_not_calibrated_on_gptq_weights(
    fake: pytest.MonkeyPatch, tmp_path: Path, gptq: dict[str, Path], text: str
) -> None:
    with pytest.raises(UnsupportedError, match="this model is quantised; use --kv-dtype fp8"):
        build(tmp_path, gptq["rows"], precision="int8-gptq", kv_dtype="int8", calib_text=text)


def test_gptq_rows_are_taken_over_by_the_pytorch_backend_and_groups_are_not(
    fake: pytest.MonkeyPatch, tmp_path: Path, gptq: dict[str, Path]
) -> None:
    bundle = build(tmp_path, gptq["rows"], precision="int8-gptq", target="pytorch")
    assert bundle.manifest.verification["quantisation_drift"] == 0.0
    assert "rows" in bundle.manifest.versions["weights"]
    assert len(tokens(bundle)) == 3
    with pytest.raises(UnsupportedError, match="one scale a row"):
        build(tmp_path, gptq["groups"], precision="int8-gptq", target="pytorch")


def test_the_embedded_engine_takes_groups_and_rows_as_they_are_and_the_manifest_says_so(
    tmp_path: Path, gptq: dict[str, Path]
) -> None:
    for form in ("groups", "rows"):
        manifest = build(tmp_path, gptq[form], precision="int8-gptq", target="embedded", name=form).manifest
        assert manifest.verification["quantisation_drift"] == 0.0
        assert manifest.verification["drift"] < MAX_DRIFT / 20
        assert "as they are" in manifest.versions["weights"]
    again = build(tmp_path, gptq["groups"], precision="int8", target="embedded", name="again").manifest
    assert 0 < again.verification["quantisation_drift"] < 0.05
    assert "rounded again" in again.versions["weights"]


def test_what_is_calibrated_wants_weights_that_are_not_quantised_yet(
    tmp_path: Path, gptq: dict[str, Path], text: str, fake: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnsupportedError, match=r"fp8 is calibrated on 16-bit weights, this model is INT8 GPTQ"
    ) as caught:
        build(tmp_path, gptq["rows"], precision="fp8", calib_text=text)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["tensorrt", "pytorch"])
def test_fp8_rows_need_no_calibration_and_compute_what_they_stand_for(
    fake: pytest.MonkeyPatch, tmp_path: Path, target: str
) -> None:
    ranks = {"tp": 2} if target == "tensorrt" else {}
    bundle = build(tmp_path, precision="fp8-rowwise", target=target, **ranks)
    assert bundle.manifest.verification["drift"] < MAX_DRIFT
    assert 0.005 < bundle.manifest.verification["quantisation_drift"] < 0.1
    assert len(tokens(bundle)) == 3


@pytest.mark.slow
def test_the_embedded_engine_runs_modelopts_awq_checkpoint_as_it_is(
    fake: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    bundle = build(tmp_path, precision="int4-awq", calib_text=text)
    (tmp_path / "twin").mkdir()
    write_twin(bundle.checkpoint_dir, tmp_path / "twin", 4)
    limits = Limits(max_batch_size=4, max_num_tokens=64, max_seq_len=64, tokens_per_block=8)
    with open_checkpoint(bundle.checkpoint_dir, limits=limits, dtype=DType.FP32) as packed:
        written = generated(packed)
    with open_checkpoint(tmp_path / "twin", limits=limits) as twin:
        assert generated(twin) == written


@pytest.mark.parametrize("precision", ["fp8", "int4-awq", "int8-sq"])
def test_modelopt_calibrates_engines_whose_numbers_are_next_to_the_sources(
    fake: pytest.MonkeyPatch, tmp_path: Path, text: str, precision: str
) -> None:
    with pytest.raises(UsageError, match="--calib-text"):
        build(tmp_path, precision=precision)
    bundle = build(tmp_path, precision=precision, calib_text=text, pp=2 if precision == "fp8" else 1)
    found = bundle.manifest.verification
    assert found["drift"] < MAX_DRIFT
    assert 0.5 < found["worst_half_steps"] < 1.1
    config = json.loads((bundle.checkpoint_dir / "config.json").read_text())
    assert config["rotary_base"] == 10000.0
    assert "sha256" in bundle.manifest.versions["calibration"]
    assert len(tokens(bundle)) == 3


@pytest.mark.parametrize(("kv", "precision"), [("fp8", "fp16"), ("int8", "int8"), ("fp8", "fp8-rowwise")])
def test_an_8_bit_cache_brings_a_scale_for_every_layer(
    fake: pytest.MonkeyPatch, tmp_path: Path, text: str, kv: str, precision: str
) -> None:
    if kv == "int8":
        with pytest.raises(UsageError, match="int8 KV cache is calibrated"):
            build(tmp_path, precision=precision, kv_dtype=kv)
    bundle = build(tmp_path, precision=precision, kv_dtype=kv, calib_text=text, tp=2)
    quantization = json.loads((bundle.checkpoint_dir / "config.json").read_text())["quantization"]
    assert quantization["kv_cache_quant_algo"] == kv.upper()
    for rank in range(2):
        with safe_open(str(bundle.checkpoint_dir / f"rank{rank}.safetensors"), framework="pt") as handle:
            scales = [
                float(handle.get_tensor(f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"))
                for layer in range(4)
            ]
        assert scales == [1.0] * 4 if kv == "fp8" else all(0.005 < scale < 0.5 for scale in scales)
    arguments = json.loads((bundle.path / "llm_args.json").read_text())
    assert arguments["enable_chunked_prefill"] is False, "these caches switch paged context FMHA off"
    assert len(tokens(bundle)) == 3
