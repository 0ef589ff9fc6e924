"""INT4-AWQ checkpoints as ModelOpt writes them for TensorRT-LLM, read into the engine's own form without loss.

There a matrix is [out / 2, in], two rows to a byte: the even row in the low half, each a number of -8 to 7 in two's
complement. Beside it lie `weights_scaling_factor` [out, groups] and, where no norm could take it up,
`prequant_scaling_factor` [in], which multiplies the layer's input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trtkit.engine.ranks import RankReader
from trtkit.kernels.int4 import pack_int4
from trtkit.spec.checkpoint import GROUP_SCALE, INPUT_SCALE, checkpoint_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import QuantSpec

_THEIR_NAMES = {GROUP_SCALE: "weights_scaling_factor", INPUT_SCALE: "prequant_scaling_factor"}


class AwqReader(RankReader):
    """The same checkpoint by our names and in our packing."""

    def __init__(self, directory: Path, model: ModelSpec, quant: QuantSpec, parallel: Parallelism) -> None:
        """Open every rank's file; `quant` has the groups' size."""
        super().__init__(directory, model, parallel)
        self._group = quant.group_size
        self._packed = {t.name for t in checkpoint_tensors(model, quant) if t.dtype is DType.INT4}

    def has(self, name: str) -> bool:
        """Whether the checkpoint has what `name` stands for."""
        return super().has(_theirs(name))

    def tensor(self, name: str) -> Tensor:
        """One tensor of the unsplit model.

        Raises:
            InputError: see `RankReader.tensor`; or groups that the matrix does not have.
        """
        tensor = super().tensor(_theirs(name))
        if name not in self._packed:
            return tensor
        if tensor.shape[1] % self._group:
            raise InputError(f"{name}: {tensor.shape[1]} inputs do not fall into the config's groups of {self._group}")
        return pack_int4(tensor, self._group)

    def _read(self, rank: int, name: str) -> Tensor:
        tensor = super()._read(rank, name)
        return _unpacked(tensor) if tensor.dtype in (torch.uint8, torch.int8) else tensor


def _theirs(name: str) -> str:
    prefix, _, suffix = name.rpartition(".")
    return f"{prefix}.{_THEIR_NAMES[suffix]}" if suffix in _THEIR_NAMES else name


def _unpacked(packed: Tensor) -> Tensor:
    """int8 [out, in]."""
    codes = packed.view(torch.uint8)
    rows = torch.stack((codes & 0xF, codes >> 4), dim=1).reshape(-1, packed.shape[1]).to(torch.int8)
    return torch.where(rows > 7, rows - 16, rows)
