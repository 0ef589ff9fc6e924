"""What INT4 in groups makes of a source's weights, given the scales a checkpoint has.

Which scale of a group has the least error is the converter's choice; the reference takes it as it is stored, once it has
seen that it is no worse than the plain one, max / 7, which a wrong or misplaced scale is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trtkit.backends.reference import Rounding, rounding_to
from trtkit.spec.checkpoint import GROUP_SCALE, layer_prefix
from trtkit.spec.checkpoint_config import read_checkpoint_config
from trtkit.spec.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_SLACK, _EXACT = 1e-3, 1e-6
"""How much worse than the plain scale a stored one may be, as a share of that one's error and of the weights' squares: where
weights lie on a grid already both errors are what float32 leaves."""
_NAMES = {
    "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def chosen_groups(checkpoint_dir: Path, layers: int) -> Callable[[str], Rounding]:
    """The rounding of each matrix of the first `layers`, by its Hugging Face name.

    The rounding raises `InputError` where a group's scale is worse than the plain one.
    """
    compute = rounding_to(read_checkpoint_config(checkpoint_dir)[1].compute)
    scales = _scales(checkpoint_dir, layers)

    def rounding(name: str) -> Rounding:
        return lambda weight: _rounded(weight, scales[name], compute, f"{checkpoint_dir}: {name}")

    return rounding


def _rounded(weight: Tensor, scale: Tensor, compute: Rounding, where: str) -> Tensor:
    grouped = weight.reshape(*scale.shape, -1)
    ours, our_error = _nearest(grouped, scale[:, :, None])
    plain = compute(grouped.abs().amax(dim=2, keepdim=True) / 7)
    _, plain_error = _nearest(grouped, plain)
    worse = our_error > plain_error * (1 + _SLACK) + _EXACT * grouped.square().sum(dim=2)
    if worse.any():
        row, group = (int(index) for index in worse.nonzero()[0])
        raise InputError(
            f"{where} row {row}, group {group}: its scale {float(scale[row, group]):.3g} rounds worse than the plain one, so "
            "this checkpoint does not compute what transformers does on the source; please report this model"
        )
    return ours.reshape(weight.shape)


def _nearest(grouped: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers -8 to 7 times their scale that are nearest, and the squared error of each group."""
    import torch

    steps = torch.round(grouped / torch.where(scale == 0, 1.0, scale)).clamp(-8, 7) * scale
    return steps, (steps - grouped).square().sum(dim=2)


def _scales(checkpoint_dir: Path, layers: int) -> dict[str, Tensor]:
    """Scales [out, groups] in float32 by the names of the matrices."""
    import torch

    from trtkit.engine.ranks import RankReader

    model, _, parallel = read_checkpoint_config(checkpoint_dir)
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    result: dict[str, Tensor] = {}
    with RankReader(checkpoint_dir, model, parallel) as reader:
        for layer in range(layers):
            prefix, block = f"model.layers.{layer}.", layer_prefix(layer)
            qkv = torch.split(reader.tensor(f"{block}attention.qkv.{GROUP_SCALE}"), [q_rows, kv_rows, kv_rows])
            for name, part in zip("qkv", qkv, strict=True):
                result[f"{prefix}self_attn.{name}_proj.weight"] = part.float()
            for ours, theirs in _NAMES.items():
                result[f"{prefix}{theirs}.weight"] = reader.tensor(f"{block}{ours}.{GROUP_SCALE}").float()
    return result
