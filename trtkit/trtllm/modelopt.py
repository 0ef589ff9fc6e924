"""FP8 and INT4-AWQ checkpoints with NVIDIA ModelOpt's public functions, and what its formats mean.

ModelOpt holds the whole model in memory (a 70B one wants 141 GB, or GPUs enough for `device_map="auto"`).
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.spec.atomic import output_errors, write_text
from trtkit.spec.errors import InputError, MissingDependencyError
from trtkit.spec.quant import QuantSpec
from trtkit.trtllm.unified import QUANT_CONFIG_NAME, SCALE_NAME, model_config

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATED = {"FP8": "FP8_DEFAULT_CFG", "W4A16_AWQ": "INT4_AWQ_CFG"}
"""Algorithm -> name of ModelOpt's configuration for it."""

PRE_SCALE = "pre_quant_scale"
SCALES = (SCALE_NAME, PRE_SCALE)
"""What may lie beside a quantised weight."""

WINDOWS, WINDOW_TOKENS = 128, 512
"""At most that much calibration text, as TensorRT-LLM's own defaults (512 tokens a sample)."""

_MIN_TOKENS = 512


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
    from transformers import AutoModelForCausalLM

    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError:
        raise MissingDependencyError(
            f"precision {quant.precision} needs ModelOpt: pip install 'trtkit[quantize]'"
        ) from None
    assert quant.algo is not None
    dtype = getattr(torch, quant.compute.trtllm_name)
    place: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(source_dir, dtype=dtype, local_files_only=True, **place)

    def calibrate(quantised: Any) -> None:  # noqa: ANN401 - a transformers model
        for window in windows:
            quantised(torch.tensor([list(window)], device=quantised.device))

    with _quiet(), torch.no_grad():
        model = mtq.quantize(model, getattr(mtq, CALIBRATED[quant.algo]), calibrate)
    with _quiet(), torch.no_grad(), output_errors(output_dir):
        export_hf_checkpoint(model, dtype=dtype, export_dir=output_dir)
    written = json.loads((output_dir / QUANT_CONFIG_NAME).read_text(encoding="utf-8"))["quantization"]["quant_algo"]
    if written != quant.algo:
        raise InputError(f"ModelOpt wrote {written} where {quant.algo} was asked for; please report the model")
    exported = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    config = model_config(source_dir, quant)
    if "quantization_config" in exported:
        config["quantization_config"] = exported["quantization_config"]
    write_text(output_dir / "config.json", json.dumps(config, indent=2) + "\n")


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
