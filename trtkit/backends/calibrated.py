"""Judging weights whose scales a calibration chose: every number is the grid point next to the source's number.

Which scales ModelOpt picks cannot be foreseen, but it rounds to nearest, so no weight may be more than half a step of its
own scale away from the source; a scale that is wrong by a third is found. ModelOpt moves scales between a norm and the
matrices behind it, so what is compared is their product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError
from trtkit.spec.quant import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

ALGOS = ("FP8", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL")
"""Schemes that ModelOpt calibrates."""

MAX_STEPS = 1.25
"""Half steps a weight may be off: one for the rounding, the rest for scales that are themselves rounded to 16 bits."""

_SIXTEEN_BIT = 2.0**-10
"""ModelOpt smooths in 16 bits, which moves a number by about this share of itself before it is rounded."""
_NORMS = {
    "self_attn.o_proj": "",
    "mlp.down_proj": "",
    "self_attn": "input_layernorm",
    "mlp": "post_attention_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A matrix [out, in] with its scales multiplied in, and what one step of its grid is worth at each place."""

    values: Tensor
    steps: Tensor


def check_steps(
    stored: Mapping[str, Stored],
    norms: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    quant: QuantSpec,
    where: str,
) -> float:
    """Hold dequantised matrices against the source's, each with the norm before it.

    Args:
        stored: the matrices by Hugging Face names.
        norms: the checkpoint's norms by Hugging Face names.
        source: all of these as the model came.
        quant: the scheme.
        where: names the checkpoint in the error.

    Returns:
        How many half steps the worst number is off.

    Raises:
        InputError: names the matrix and the row that are too far off.
    """
    import torch

    worst = 0.0
    for name, matrix in sorted(stored.items()):
        plain, ours, steps = source[name].float(), matrix.values.float(), matrix.steps.float().abs()
        if norm := _norm_before(name):
            before = norms[norm].float()
            plain, ours, steps = plain * source[norm].float(), ours * before, steps * before.abs()
        half = plain.abs() / 16 + steps / 1024 if quant.weights is DType.FP8 else steps / 2
        ratio = torch.nan_to_num((ours - plain).abs() / (half + _SIXTEEN_BIT * plain.abs()), nan=float("inf"))
        value, place = ratio.max(), int(ratio.argmax())
        if not float(value) <= MAX_STEPS:
            raise InputError(
                f"{where}: {name} row {place // ratio.shape[1]} is {float(value):.3g} half steps from the source, which "
                f"rounding to {quant.precision} does not explain ({MAX_STEPS:g} are allowed); please report this model"
            )
        worst = max(worst, float(value))
    return worst


def _norm_before(name: str) -> str:
    """The norm whose output a matrix multiplies; empty where there is none."""
    prefix, _, rest = name.removesuffix(".weight").partition("layers.")
    layer, _, module = rest.partition(".")
    norm = _NORMS.get(module, _NORMS.get(module.split(".")[0], ""))
    return norm and f"{prefix}layers.{layer}.{norm}.weight"
