"""Loading checkpoints: ranks merged, names fused, damage refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.engine_models import fp8_rows, make_hf, quantised, spec_of, trtllm_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from trtkit.engine.matmul import onednn_works, plain
from trtkit.engine.weights import ModelWeights, load_weights, weights_from_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for


def _tensors_of(weights: ModelWeights) -> list[torch.Tensor]:
    flat = [weights.embedding, weights.final_norm, weights.lm_head]
    for layer in weights.layers:
        flat += [layer.input_norm, layer.post_norm]
        for linear in (layer.qkv, layer.dense, layer.gate_up, layer.down):
            flat += linear.tensors()
    return flat


def _same(a: ModelWeights, b: ModelWeights) -> bool:
    pairs = zip(_tensors_of(a), _tensors_of(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(plain(x), plain(y)) for x, y in pairs)


@pytest.mark.parametrize(
    "parallel",
    [Parallelism(), Parallelism(tp=2), Parallelism(tp=4), Parallelism(pp=2), Parallelism(tp=2, pp=2)],
    ids=lambda p: f"tp{p.tp}-pp{p.pp}",
)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_any_split_merges_to_the_unsplit_model(tmp_path: Path, kind: str, parallel: Parallelism) -> None:
    """tp 4 has more ranks than KV heads (2), so each head is on two ranks; 97 tokens divide by neither 2 nor 4."""
    hf = make_hf(kind, vocab_size=97)
    model, tensors = spec_of(hf), trtllm_tensors(hf)
    directory = write_checkpoint(tmp_path / "c", model, tensors, parallel=parallel)
    merged, quant = load_weights(directory)
    assert quant.precision == "fp32"
    assert _same(merged, weights_from_tensors(model, tensors, dtype=DType.FP32))


@pytest.mark.parametrize("tp", [1, 2])
def test_int8_stays_int8_in_memory(tmp_path: Path, tp: int) -> None:
    hf = make_hf()
    model, tensors = spec_of(hf), quantised(trtllm_tensors(hf))
    quant = quant_for("int8", compute=DType.FP32)
    merged, _ = load_weights(write_checkpoint(tmp_path / "c", model, tensors, quant, Parallelism(tp=tp)))
    layer = merged.layers[1]
    assert layer.qkv.weight.dtype is layer.gate_up.weight.dtype is layer.down.weight.dtype is torch.int8
    assert layer.gate_up.scale is not None
    assert layer.gate_up.scale.shape == (2 * model.intermediate_size,)
    assert _same(merged, weights_from_tensors(model, tensors, dtype=DType.FP32))
    wide = weights_from_tensors(model, trtllm_tensors(hf), dtype=DType.FP32)
    assert merged.num_bytes < 0.7 * wide.num_bytes


def test_fc_is_the_gated_half() -> None:
    hf = make_hf()
    tensors = trtllm_tensors(hf)
    weights = weights_from_tensors(spec_of(hf), tensors, dtype=DType.FP32)
    gate, up = plain(weights.layers[0].gate_up.weight).chunk(2)
    assert torch.equal(gate, tensors["transformer.layers.0.mlp.fc.weight"])
    assert torch.equal(up, tensors["transformer.layers.0.mlp.gate.weight"])


def test_tied_embeddings_share_memory_and_count_once() -> None:
    hf = make_hf(tie_word_embeddings=True)
    weights = weights_from_tensors(spec_of(hf), trtllm_tensors(hf), dtype=DType.FP32)
    assert weights.lm_head is weights.embedding
    assert weights.num_bytes == spec_of(hf).num_params * 4


def test_an_untied_head_and_packed_matrices_count_their_parameters_once() -> None:
    hf = make_hf(tie_word_embeddings=False)
    weights = weights_from_tensors(spec_of(hf), trtllm_tensors(hf), dtype=DType.FP32)
    assert weights.lm_head.is_mkldnn == weights.layers[0].down.weight.is_mkldnn == onednn_works()
    assert weights.num_bytes == spec_of(hf).num_params * 4


def test_weights_are_copies_of_the_file(tmp_path: Path) -> None:
    hf = make_hf()
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), trtllm_tensors(hf))
    weights, _ = load_weights(directory)
    before = weights.embedding.clone()
    path = directory / "rank0.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(weights.embedding, before)


def test_a_type_override_converts_everything(tmp_path: Path) -> None:
    hf = make_hf()
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), trtllm_tensors(hf))
    weights, _ = load_weights(directory, dtype=DType.BF16)
    assert {t.dtype for t in _tensors_of(weights)} == {torch.bfloat16}


NAME = "transformer.layers.1.mlp.proj.weight"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    hf = make_hf()
    tensors = trtllm_tensors(hf)
    del tensors[NAME]
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), tensors)
    with pytest.raises(InputError, match=f"rank0.safetensors: no usable tensor {NAME}"):
        load_weights(directory)


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    hf = make_hf()
    tensors = trtllm_tensors(hf)
    tensors[NAME] = tensors[NAME][:, :-1]
    with pytest.raises(InputError, match=rf"{NAME}: has shape \(32, 47\), the config asks for \(32, 48\)"):
        weights_from_tensors(spec_of(hf), tensors, dtype=DType.FP32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(bad: float) -> None:
    hf = make_hf()
    tensors = trtllm_tensors(hf)
    tensors[NAME] = tensors[NAME].clone()
    tensors[NAME][3, 4] = bad
    with pytest.raises(InputError, match=f"{NAME}: holds NaN or infinity"):
        weights_from_tensors(spec_of(hf), tensors, dtype=DType.FP32)


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    hf = make_hf()
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), trtllm_tensors(hf))
    path = directory / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"rank0\.safetensors: truncated or not safetensors"):
        load_weights(directory)


def test_a_missing_rank_is_refused(tmp_path: Path) -> None:
    hf = make_hf()
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), trtllm_tensors(hf), parallel=Parallelism(tp=2))
    (directory / "rank1.safetensors").unlink()
    with pytest.raises(InputError, match=r"rank1\.safetensors: missing"):
        load_weights(directory)


def test_ranks_of_two_conversions_are_refused(tmp_path: Path) -> None:
    directories = []
    for seed in (0, 1):
        hf = make_hf(seed=seed)
        parallel = Parallelism(tp=2)
        directories.append(write_checkpoint(tmp_path / str(seed), spec_of(hf), trtllm_tensors(hf), parallel=parallel))
    (directories[1] / "rank1.safetensors").rename(directories[0] / "rank1.safetensors")
    with pytest.raises(InputError, match="mixes two conversions"):
        load_weights(directories[0])


def test_a_scheme_for_gpus_is_refused_by_name(tmp_path: Path) -> None:
    hf = make_hf()
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), trtllm_tensors(hf))
    config = json.loads((directory / "config.json").read_text())
    config["quantization"]["quant_algo"] = "FP8"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="does not run quantisation FP8;"):
        load_weights(directory)


def test_fp8_rows_multiply_as_their_dequantised_matrices() -> None:
    hf = make_hf()
    weights = weights_from_tensors(spec_of(hf), fp8_rows(trtllm_tensors(hf)), dtype=DType.BF16)
    matrix = weights.layers[0].gate_up
    assert matrix.weight.dtype is torch.float8_e4m3fn
    assert matrix.scale is not None
    assert matrix.scale.dtype is torch.float32
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = x.double() @ (matrix.weight.double() * matrix.scale.double()[:, None]).T
    torch.testing.assert_close(matrix(x).double(), exact, rtol=0.01, atol=0.01)


def test_fp8_activations_of_many_tokens_are_rounded_row_by_row() -> None:
    hf = make_hf()
    matrix = weights_from_tensors(spec_of(hf), fp8_rows(trtllm_tensors(hf)), dtype=DType.FP32).layers[0].down
    assert matrix.scale is not None
    x = torch.randn(100, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 100)[:, None]
    exact = x.double() @ (matrix.weight.double() * matrix.scale.double()[:, None]).T
    error = (matrix(x) - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0.005 < float(error.max()) < 0.08, "e4m3 keeps four bits, whatever the row's size"


def test_an_fp8_weight_that_is_not_a_number_is_refused() -> None:
    hf = make_hf()
    tensors = fp8_rows(trtllm_tensors(hf))
    name = "transformer.layers.1.mlp.proj.weight"
    tensors[name].view(torch.uint8)[3, 4] = 0xFF
    with pytest.raises(InputError, match=rf"{name}: holds NaN"):
        weights_from_tensors(spec_of(hf), tensors, dtype=DType.FP32)


def test_gate_and_up_of_different_types_are_refused() -> None:
    hf = make_hf()
    tensors = fp8_rows(trtllm_tensors(hf))
    tensors["transformer.layers.0.mlp.gate.weight"] = trtllm_tensors(hf)["transformer.layers.0.mlp.gate.weight"]
    with pytest.raises(InputError, match="one is FP8 and the other is not"):
        weights_from_tensors(spec_of(hf), tensors, dtype=DType.FP32)


class _Large(TorchDispatchMode):
    """Notes the operators that make tensors of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.names = elements, set[str]()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(keywords or {}))
        given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        large = isinstance(result, torch.Tensor) and result.numel() >= self.elements
        if large and result.untyped_storage().data_ptr() not in given:
            self.names.add(function.__name__.partition(".")[0])
        return result


def test_matrices_are_copied_once_to_where_they_lie() -> None:
    """What is copied on the way leaves holes on a GPU; masks of the check for finite values are the reader's."""
    spec = spec_of(make_hf())
    tensors = quantised(trtllm_tensors(make_hf()))
    with _Large(spec.hidden_size * spec.hidden_size) as large:
        weights_from_tensors(spec, tensors, dtype=DType.BF16)
    assert "empty" in large.names
    assert not large.names & {"cat", "clone"}, large.names
