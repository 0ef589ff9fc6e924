"""FP8, INT4-AWQ and SmoothQuant checkpoints with NVIDIA ModelOpt's public functions, and what its formats mean.

ModelOpt holds the whole model in memory (a 70B one wants 141 GB, or GPUs enough for `device_map="auto"`).
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.spec.atomic import output_errors, replacing, write_text
from trtkit.spec.checkpoint import CONFIG_NAME, rank_file
from trtkit.spec.checkpoint_config import checkpoint_config
from trtkit.spec.errors import InputError, MissingDependencyError, UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Parallelism
from trtkit.spec.quant import QuantSpec
from trtkit.trtllm.stored import kv_scale_name, kv_scales
from trtkit.trtllm.unified import QUANT_CONFIG_NAME, SCALE_NAME, model_config

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATED = {"FP8": "FP8_DEFAULT_CFG", "W4A16_AWQ": "INT4_AWQ_CFG", "W8A8_SQ_PER_CHANNEL": "INT8_SMOOTHQUANT_CFG"}
"""Algorithm -> name of ModelOpt's configuration for it."""

PRE_SCALE = "pre_quant_scale"
SCALES = (SCALE_NAME, PRE_SCALE)
"""What may lie beside a quantised weight."""

WINDOWS, WINDOW_TOKENS = 128, 512
"""At most that much calibration text, as TensorRT-LLM's own defaults (512 tokens a sample)."""

_MIN_TOKENS = 512
_INT8_MAX = 127
_KEPT = ("group_size", "has_zero_point", "pre_quant_scale", "exclude_modules")
_FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}
"""Architecture -> ModelOpt's name for the decoder it writes."""


def modelopt_version(quant: QuantSpec) -> str:
    """The installed version.

    Raises:
        MissingDependencyError: ModelOpt is not installed.
    """
    try:
        return metadata.version("nvidia-modelopt")
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(
            f"precision {quant.precision} needs ModelOpt: pip install 'trtkit[quantize]'"
        ) from None


def read_windows(model_dir: Path, text: Path) -> list[list[int]]:
    """Token ids of a text, in windows.

    Raises:
        InputError: the text cannot be read, or is too short to calibrate on.
    """
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text}: cannot be read as text ({error})") from None
    ids: list[int] = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)(content, verbose=False)[
        "input_ids"
    ]
    if len(ids) < _MIN_TOKENS:
        raise InputError(f"{text}: {len(ids)} tokens are too few to calibrate on, give at least {_MIN_TOKENS}")
    windows = [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids), WINDOW_TOKENS)]
    return windows[:WINDOWS]


def write_quantised(source_dir: Path, output_dir: Path, quant: QuantSpec, windows: Sequence[Sequence[int]]) -> None:
    """Quantise with ModelOpt and write a unified checkpoint.

    `config.json` is the source's own: with transformers 5 ModelOpt writes RoPE's base under a name that the transformers 4
    of TensorRT-LLM 1.2 does not read, and the model would run with base 10,000.

    Raises:
        InputError: ModelOpt wrote another algorithm than was asked for.
        MissingDependencyError: ModelOpt is not installed.
    """
    import torch

    modelopt_version(quant)
    model = _quantised(source_dir, quant, windows)
    from modelopt.torch.export import export_hf_checkpoint

    dtype = getattr(torch, quant.compute.trtllm_name)
    with _quiet(), torch.no_grad(), output_errors(output_dir):
        export_hf_checkpoint(model, dtype=dtype, export_dir=output_dir)
    _check_algo(json.loads((output_dir / QUANT_CONFIG_NAME).read_text(encoding="utf-8"))["quantization"], quant)
    exported = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    config = model_config(source_dir, quant)
    if "quantization_config" in exported:
        config["quantization_config"] = exported["quantization_config"]
    write_text(output_dir / "config.json", json.dumps(config, indent=2) + "\n")


def write_engine_checkpoint(
    source_dir: Path,
    output_dir: Path,
    plan: BuildPlan,
    windows: Sequence[Sequence[int]],
    kv_scale: Sequence[float] | None = None,
) -> None:
    """Quantise with ModelOpt and write a TensorRT-LLM checkpoint for `trtllm-build`.

    `config.json` is ours with ModelOpt's quantisation in it: with transformers 5 ModelOpt's own lacks RoPE's base and
    scaling, and an engine would run with base 10,000.

    Raises:
        InputError: ModelOpt wrote another algorithm than was asked for.
        MissingDependencyError: ModelOpt is not installed.
        UnsupportedError: ModelOpt cannot split the model so, or trtkit does not know its name for the architecture.
    """
    import torch

    spec, quant, parallel = plan.model, plan.quant, plan.parallel
    scales = kv_scales(quant, spec.num_layers, kv_scale)
    family = _FAMILIES.get(spec.architecture)
    if family is None or spec.attn_qkv_bias or spec.mlp_bias:
        raise UnsupportedError(
            f"{plan.name}: {quant.precision} engines are written for {' and '.join(_FAMILIES)} without biases, this is "
            f"{spec.architecture}{' with biases' if family else ''}; use --target pytorch or --precision int8"
        )
    modelopt_version(quant)
    model = _quantised(source_dir, quant, windows)
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    dtype = getattr(torch, quant.compute.trtllm_name)
    try:
        with _quiet(), torch.no_grad(), output_errors(output_dir):
            export_tensorrt_llm_checkpoint(
                model, family, dtype, output_dir,
                inference_tensor_parallel=parallel.tp, inference_pipeline_parallel=parallel.pp,
            )  # fmt: skip
    except NotImplementedError as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise UnsupportedError(
            f"{plan.name}: ModelOpt cannot write {quant.precision} so: {first}; lower --tp"
        ) from None
    exported = json.loads((output_dir / CONFIG_NAME).read_text(encoding="utf-8"))["quantization"]
    _check_algo(exported, quant)
    config = checkpoint_config(spec, quant, parallel)
    config["quantization"] |= {key: exported[key] for key in _KEPT if key in exported}
    _add_kv_scales(output_dir, spec, parallel, scales)
    write_text(output_dir / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _add_kv_scales(output_dir: Path, model: ModelSpec, parallel: Parallelism, scales: Sequence[float]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    per_stage = model.num_layers // parallel.pp
    for rank in range(parallel.world_size if scales else 0):
        path, first = output_dir / rank_file(rank), rank // parallel.tp * per_stage
        tensors = load_file(path)
        tensors |= {kv_scale_name(layer): torch.tensor([scales[first + layer]]) for layer in range(per_stage)}
        with replacing(path) as temporary:
            save_file(tensors, temporary)


def _quantised(source_dir: Path, quant: QuantSpec, windows: Sequence[Sequence[int]]) -> Any:  # noqa: ANN401 - a model
    """The model in the compute type, its matrices quantised and calibrated."""
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM

    assert quant.algo is not None
    dtype = getattr(torch, quant.compute.trtllm_name)
    place: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(source_dir, dtype=dtype, local_files_only=True, **place)

    def calibrate(quantised: Any) -> None:  # noqa: ANN401 - a transformers model
        for window in windows:
            quantised(torch.tensor([list(window)], device=quantised.device))

    with _quiet(), torch.no_grad():
        return mtq.quantize(model, getattr(mtq, CALIBRATED[quant.algo]), calibrate)


def _check_algo(written: Mapping[str, Any], quant: QuantSpec) -> None:
    if written["quant_algo"] != quant.algo:
        raise InputError(
            f"ModelOpt wrote {written['quant_algo']} where {quant.algo} was asked for; please report the model"
        )


def cache_scales(source_dir: Path, windows: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Each layer's INT8 KV scale: the largest magnitude among its keys (as cached, so rotated) and values, over 127.

    Needs the whole model in memory, like ModelOpt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model: Any = AutoModelForCausalLM.from_pretrained(source_dir, dtype="auto", local_files_only=True, **place)
    largest: list[float] = []
    with torch.inference_mode():
        for window in windows:
            cache = model(torch.tensor([list(window)], device=model.device), use_cache=True).past_key_values
            seen = [max(float(layer.keys.abs().max()), float(layer.values.abs().max())) for layer in cache.layers]
            largest = [max(pair) for pair in zip(largest or seen, seen, strict=True)]
    return tuple(value / _INT8_MAX for value in largest)


def dequantised(weight: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
    """What a stored weight stands for, [out, in] in float32.

    INT8 has one scale a row, FP8 one a tensor, INT4 is packed two rows to a byte (the even row in the low half) with
    one scale for each row and group of columns; AWQ's `pre_quant_scale` multiplies the layer's input, so the columns.
    """
    import torch

    scale = scales.get(SCALE_NAME)
    if scale is None:
        return weight.float()
    if weight.dtype is torch.uint8:
        packed = weight.to(torch.int16)
        rows = torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1, weight.shape[1])
        values = torch.where(rows > 7, rows - 16, rows).float()
        values *= scale.float().repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
    else:
        values = weight.float() * (scale.float() if scale.ndim == 0 else scale.float().reshape(-1, 1))
    before = scales.get(PRE_SCALE)
    return values if before is None else values * before.float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
