"""Who holds the device's memory once an engine is open on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.weights import ModelWeights


def device_bytes(device: torch.device) -> dict[str, int]:
    """What is free on a CUDA device and what this process's allocator holds; empty for a CPU. Gives back what is cached."""
    if device.type != "cuda":
        return {}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return {
        "total": total,
        "free": free,
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
    }


def memory_split(
    before: Mapping[str, int],
    after: Mapping[str, int],
    weights: ModelWeights,
    cache: PagedCache,
    activation_bytes: int | None,
) -> dict[str, int]:
    """Bytes by what holds them; `before` and `after` are `device_bytes` around the capture of the decode steps.

    "static" are buffers that never move (rings among them), "context" is CUDA's own and other processes', and
    "activations" the peak of the largest step, which comes and goes in what is "free".
    """
    if not after:
        return {}
    pool = cache.storage.numel() * cache.storage.element_size()
    split = {
        "total": after["total"],
        "weights": weights.num_bytes,
        "kv_pool": pool,
        "static": before["allocated"] - weights.num_bytes - pool,
        "graphs": before["free"] - after["free"],
        "context": after["total"] - after["free"] - after["reserved"],
        "free": after["free"],
    }
    return split if activation_bytes is None else split | {"activations": activation_bytes}
