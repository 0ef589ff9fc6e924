"""TensorRT-LLM checkpoints and bundles on disk, split over ranks by code of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from trtkit.spec.bundle import EngineBundle, Manifest, bundle_files, file_entry, open_bundle, write_manifest
from trtkit.spec.checkpoint_config import checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.kv import KVFidelity, KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.spec.quant import QuantSpec, quant_for


def split_rank(
    tensors: Mapping[str, torch.Tensor], model: ModelSpec, parallel: Parallelism, rank: int
) -> dict[str, torch.Tensor]:
    """One rank's part of an unsplit checkpoint."""
    pp_rank, tp_rank = divmod(rank, parallel.tp)
    per_stage = model.num_layers // parallel.pp
    part: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        pieces = name.split(".")
        local = name
        if name.startswith("transformer.layers."):
            stage, layer = divmod(int(pieces[2]), per_stage)
            if stage != pp_rank:
                continue
            local = ".".join([*pieces[:2], str(layer), *pieces[3:]])
        elif (name == "transformer.vocab_embedding.weight") != (pp_rank == 0) and parallel.pp > 1:
            continue
        part[local] = _tp_slice(name, tensor, model, parallel.tp, tp_rank).contiguous().clone()
    return part


def _tp_slice(name: str, tensor: torch.Tensor, model: ModelSpec, tp: int, rank: int) -> torch.Tensor:
    if ".qkv." in name:
        d = model.head_dim
        q, k, v = tensor.split([model.num_heads * d, model.num_kv_heads * d, model.num_kv_heads * d])
        kv_rank = rank * model.num_kv_heads // tp if tp > model.num_kv_heads else rank
        kv_parts = min(tp, model.num_kv_heads)
        return torch.cat([q.chunk(tp)[rank], k.chunk(kv_parts)[kv_rank], v.chunk(kv_parts)[kv_rank]])
    module, _, what = name.rpartition(".")
    if module.endswith((".dense", ".proj")) and what in ("weight", "per_group_scale", "per_group_zero"):
        return tensor.chunk(tp, dim=1)[rank]
    if ".fc." in name or ".gate." in name:
        return tensor.chunk(tp)[rank]
    if "vocab_embedding" in name or "lm_head" in name:
        rows = -(-tensor.shape[0] // tp) * tp
        padded = torch.zeros(rows, tensor.shape[1], dtype=tensor.dtype)
        padded[: tensor.shape[0]] = tensor
        return padded.chunk(tp)[rank]
    return tensor


def write_checkpoint(
    directory: Path,
    model: ModelSpec,
    tensors: Mapping[str, torch.Tensor],
    quant: QuantSpec | None = None,
    parallel: Parallelism | None = None,
) -> Path:
    """`config.json` and every rank's file."""
    parallel = parallel or Parallelism()
    directory.mkdir(parents=True, exist_ok=True)
    config = checkpoint_config(model, quant or quant_for("fp32"), parallel)
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(parallel.world_size):
        save_file(split_rank(tensors, model, parallel, rank), directory / f"rank{rank}.safetensors")
    return directory


def write_bundle(
    path: Path,
    model: ModelSpec,
    tensors: Mapping[str, torch.Tensor],
    *,
    limits: Limits | None = None,
    kv: KVPolicySpec | None = None,
) -> EngineBundle:
    """A float32 bundle for the embedded engine, without a tokenizer."""
    quant = quant_for("fp32")
    write_checkpoint(path / "checkpoint", model, tensors, quant)
    plan = BuildPlan(
        name=path.name.removesuffix(".engine"),
        model=model,
        model_source="random",
        gpu="cpu",
        quant=quant.with_kv(DType.FP32),
        kv=kv or KVPolicySpec(),
        limits=limits or Limits(max_batch_size=4, max_num_tokens=64, max_seq_len=64, tokens_per_block=4),
    )
    files = {str(file.relative_to(path)): file_entry(file) for file in bundle_files(path)}
    manifest = Manifest(
        plan=plan, fidelity=KVFidelity.EXACT, versions={}, files=files, created_utc="2026-01-01T00:00:00Z"
    )
    write_manifest(path, manifest)
    return open_bundle(path)
