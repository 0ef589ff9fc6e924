"""Our checkpoints against those ModelOpt really writes for the same model, tensor by tensor.

Where the two differ, the difference is a named test: ModelOpt drops RoPE's base and scaling from config.json (with
transformers 5), and stores INT8 scales as float32 `weights_scaling_factor` where we store `per_channel_scale` in the
compute type. `mlp.fc` is gate_proj and `mlp.gate` is up_proj in both.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trtkit.spec.checkpoint_config import read_checkpoint_config
from trtkit.spec.errors import InputError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm.convert import convert

pytestmark = pytest.mark.slow
PRECISIONS = ("fp16", "int8")
SPLITS = (1, 2)


@dataclass(frozen=True)
class Exports:
    source: Path
    theirs: Path

    def tensors(self, precision: str, tp: int, rank: int) -> dict[str, torch.Tensor]:
        return load_file(self.theirs / f"{precision}-tp{tp}" / f"rank{rank}.safetensors")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    pytest.importorskip("modelopt")
    from modelopt.torch import quantization
    from modelopt.torch.export import export_tensorrt_llm_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("modelopt")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=130,
        rope_theta=500000.0,
        max_position_embeddings=256,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(root / "source")
        for precision in PRECISIONS:
            if precision == "int8":
                model = quantization.quantize(model, quantization.INT8_WEIGHT_ONLY_CFG, forward_loop=None)
            for tp in SPLITS:
                target = str(root / f"{precision}-tp{tp}")
                export_tensorrt_llm_checkpoint(model, "llama", torch.float16, target, inference_tensor_parallel=tp)
    return Exports(source=root / "source", theirs=root)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tp", SPLITS)
def test_every_tensor_equals_modelopts(exports: Exports, tmp_path: Path, precision: str, tp: int) -> None:
    convert(exports.source, tmp_path / "ours", quant=quant_for(precision), parallel=Parallelism(tp=tp))
    for rank in range(tp):
        ours = load_file(tmp_path / "ours" / f"rank{rank}.safetensors")
        theirs = exports.tensors(precision, tp, rank)
        scales = {name for name in theirs if name.endswith("weights_scaling_factor")}
        assert bool(scales) == (precision == "int8")
        renamed = {name.replace("weights_scaling_factor", "per_channel_scale") for name in theirs}
        assert set(ours) == renamed
        for name in set(theirs) - scales:
            assert ours[name].dtype == theirs[name].dtype, name
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("tp", SPLITS)
def test_int8_scales_are_modelopts_rounded_to_the_compute_type(exports: Exports, tmp_path: Path, tp: int) -> None:
    convert(exports.source, tmp_path / "ours", quant=quant_for("int8"), parallel=Parallelism(tp=tp))
    for rank in range(tp):
        ours = load_file(tmp_path / "ours" / f"rank{rank}.safetensors")
        theirs = exports.tensors("int8", tp, rank)
        scales = [name for name in theirs if name.endswith("weights_scaling_factor")]
        assert len(scales) == 10
        for name in scales:
            assert theirs[name].dtype is torch.float32
            assert torch.equal(
                ours[name.replace("weights_scaling_factor", "per_channel_scale")], theirs[name].half()
            ), name


def test_fc_is_gate_proj_in_modelopts_export_too(exports: Exports) -> None:
    source = load_file(exports.source / "model.safetensors")
    theirs = exports.tensors("fp16", 1, 0)
    gate = source["model.layers.0.mlp.gate_proj.weight"].half()
    assert torch.equal(theirs["transformer.layers.0.mlp.fc.weight"], gate)


def test_modelopt_loses_the_rope_base_and_we_refuse_to_read_such_a_checkpoint(exports: Exports, tmp_path: Path) -> None:
    theirs = exports.theirs / "fp16-tp1"
    if "rotary_base" in json.loads((theirs / "config.json").read_text()):
        pytest.skip("this ModelOpt keeps rotary_base")
    with pytest.raises(InputError, match="rotary_base"):
        read_checkpoint_config(theirs)
    convert(exports.source, tmp_path / "ours", quant=quant_for("fp16"))
    model, _, _ = read_checkpoint_config(tmp_path / "ours")
    assert model.rope.theta == 500000.0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_config_values_that_modelopt_writes_are_ours(exports: Exports, tmp_path: Path, precision: str) -> None:
    convert(exports.source, tmp_path / "ours", quant=quant_for(precision), parallel=Parallelism(tp=2))
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    theirs = json.loads((exports.theirs / f"{precision}-tp2" / "config.json").read_text())
    same = (
        "architecture", "dtype", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
        "norm_epsilon", "vocab_size", "max_position_embeddings", "hidden_act", "use_parallel_embedding",
        "embedding_sharding_dim", "head_size", "intermediate_size", "position_embedding_type",
    )  # fmt: skip
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert {k: ours["mapping"][k] for k in ("world_size", "tp_size", "pp_size")} == theirs["mapping"]
    assert ours["quantization"]["quant_algo"] == theirs["quantization"]["quant_algo"]
