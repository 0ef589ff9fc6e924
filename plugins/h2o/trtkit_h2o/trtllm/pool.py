"""What both generations of TensorRT-LLM's KV cache managers show of their pool."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trtkit.spec.errors import UnsupportedError
from trtkit_h2o.trtllm.tracked import Geometry


class ManagerPool:
    """`Pool` over a KV cache manager of the PyTorch backend, V1 or V2.

    Relies on `get_buffers(layer)` being a view, on `get_batch_cache_indices` giving indices into its first axis (both
    are what the Vanilla backend reads with), and on one table for all layers: a single full-attention window. The last is
    looked at once, where the manager gives tables by layer.
    """

    def __init__(self, manager: Any) -> None:  # noqa: ANN401 - a TensorRT-LLM object
        self._manager = manager
        self._layers = list(manager.pp_layers)
        self._compared = False
        self._asks_layout = "kv_layout" in inspect.signature(manager.get_buffers).parameters
        self._by_layer = "layer_idx" in inspect.signature(manager.get_batch_cache_indices).parameters

    def view(self, layer: int) -> Tensor:
        """See `Pool.view`. Inside a block the attention kernels write heads outside tokens, whatever a label says."""
        index = self._layers[layer]
        if self._asks_layout:
            return cast("Tensor", self._manager.get_buffers(index, kv_layout="HND"))
        labelled = self._manager.get_buffers(index)
        blocks, sides, tokens, heads, dim = labelled.shape
        return cast("Tensor", labelled.view(blocks, sides, heads, tokens, dim))

    def blocks(self, request_id: int) -> Sequence[int]:
        """See `Pool.blocks`.

        Raises:
            UnsupportedError: layers have tables of their own.
        """
        if not self._by_layer:
            return cast("Sequence[int]", self._manager.get_batch_cache_indices([request_id])[0])
        first = self._table(request_id, self._layers[0])
        if not self._compared:
            if self._table(request_id, self._layers[-1]) != first:
                raise UnsupportedError(
                    "H2O in TensorRT-LLM: layers have block tables of their own, it needs one for all"
                )
            self._compared = True
        return first

    def _table(self, request_id: int, layer: int) -> list[int]:
        return list(self._manager.get_batch_cache_indices([request_id], layer_idx=layer)[0])

    def geometry(self, max_sequences: int, max_chunk: int | None = None) -> Geometry:
        """This rank's share of the model; see `Geometry` for `max_chunk`.

        Raises:
            UnsupportedError: the pool is shown as a copy, so that compaction would change nothing.
        """
        first = self.view(0)
        if first.data_ptr() != self.view(0).data_ptr():
            raise UnsupportedError("H2O in TensorRT-LLM: get_buffers shows a copy of the KV pool, not the pool")
        return Geometry(
            layers=len(self._layers),
            kv_heads=int(first.shape[2]),
            max_sequences=max_sequences,
            device=torch.device(first.device),
            max_chunk=max_chunk,
        )
