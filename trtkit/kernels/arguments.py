"""What the operations of this package take: one line that names what is wrong, before a kernel reads where it must not.

Shapes and types are known to the host, so nothing here waits for a device. Kernels look at few strides; what they do not
look at is checked here or, where tensors are small or the copy is what a caller would do, made contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtkit.kernels.paged_batch import DecodeWorkspace, PagedBatch, PagedQueries

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What is computed with."""
STORED = (*FLOATS, torch.float8_e4m3fn)
"""What a cache may hold."""
MAX_HEAD_DIM = 512
"""Wider heads leave no tile that fits an SM."""
MAX_GROUP = 128
"""Query heads of one KV head that one program takes."""
MAX_GRID = 65_535
"""Programs that CUDA launches along any axis of a grid but the first."""

_WHOLE = (torch.int32, torch.int64)


def check_type(what: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse a type that no kernel was made for.

    Raises:
        ValueError: `tensor` is of another type.
    """
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{what} must be {names}, not {str(tensor.dtype).removeprefix('torch.')}")


def check_result(what: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor to write to that has another shape or type, or whose elements do not lie side by side.

    Raises:
        ValueError: it has.
    """
    if tensor is None:
        return
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{what} must be of shape {list(shape)}, not {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{what} must be contiguous, for its strides are not looked at; strides are {tensor.stride()}")
    if dtype is not None and tensor.dtype is not dtype:
        check_type(what, tensor, (dtype,))


def check_rows(what: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuse a matrix of another shape, or one whose rows are not contiguous.

    Raises:
        ValueError: it is.
    """
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{what} must be of shape {list(shape)}, not {list(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{what} must have contiguous rows; strides are {tensor.stride()}")


def check_cache(cache: Tensor, *, layers: bool = False) -> None:
    """Refuse what is no paged cache of one layer, or of several.

    Raises:
        ValueError: shape, type or strides are others.
    """
    axes = (
        "[layers, blocks, 2, heads, tokens_per_block, dim]" if layers else "[blocks, 2, heads, tokens_per_block, dim]"
    )
    if cache.dim() != 5 + layers or cache.shape[-4] != 2:
        raise ValueError(f"a paged cache must be {axes}, not {list(cache.shape)}")
    if not cache.is_contiguous():
        raise ValueError(f"a paged cache {axes} must be contiguous; strides are {cache.stride()}")
    check_type("a paged cache", cache, STORED)


def check_heads(query_heads: int, dim: int, cache: Tensor) -> None:
    """Refuse queries whose heads do not fit the KV heads of a cache.

    Raises:
        ValueError: KV heads do not divide query heads, head dims differ, or one is too large.
    """
    kv_heads, cached_dim = cache.shape[-3], cache.shape[-1]
    if kv_heads == 0 or query_heads == 0 or query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads cannot share {kv_heads} KV heads: these must divide those")
    if query_heads // kv_heads > MAX_GROUP:
        raise ValueError(f"{query_heads // kv_heads} query heads per KV head are too many: at most {MAX_GROUP}")
    if dim != cached_dim:
        raise ValueError(f"queries have a head dim of {dim}, the cache {cached_dim}")
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"a head dim of {dim} is too large: at most {MAX_HEAD_DIM}")


def check_attention(queries: Tensor, batch: PagedBatch, rows: int) -> None:
    """Refuse queries, caches and tables that do not belong together.

    Raises:
        ValueError: they do not.
    """
    if queries.dim() != 3:
        raise ValueError(f"queries must be [rows, query heads, dim], not {list(queries.shape)}")
    check_type("queries", queries, FLOATS)
    check_cache(batch.cache)
    check_heads(queries.shape[1], queries.shape[2], batch.cache)
    tables = batch.blocks_BM
    if tables.dim() != 2 or tables.shape[0] < rows or batch.lengths_B.shape[0] < rows:
        shapes = f"{list(tables.shape)} and {list(batch.lengths_B.shape)}"
        raise ValueError(f"{rows} sequences need {rows} block tables and lengths, not {shapes}")
    check_type("block tables", tables, _WHOLE)
    check_type("lengths", batch.lengths_B, _WHOLE)
    if rows > MAX_GRID:
        raise ValueError(f"{rows} sequences are too many for one launch: at most {MAX_GRID}")


def check_decode(
    queries: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    splits: int | None,
    ring_lse: Tensor | None,
    ring_index_B: Tensor | None,
) -> None:
    """Refuse results that do not fit, and a number of parts that is none.

    Raises:
        ValueError: they do not.
    """
    rows, heads, _ = queries.shape
    check_result("out", out, queries.shape)
    check_result("lse", lse, (rows, heads), torch.float32)
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, not {splits}")
    if (ring_lse is None) != (ring_index_B is None):
        raise ValueError("ring_lse and ring_index_B go together: give both or neither")
    if ring_lse is not None and ring_index_B is not None:
        check_result("ring_lse", ring_lse, (ring_lse.shape[0], heads), torch.float32)
        if ring_index_B.shape[0] < rows:
            raise ValueError(f"{rows} sequences need {rows} ring places, not {ring_index_B.shape[0]}")


def check_workspace(workspace: DecodeWorkspace, rows: int, query_heads: int, dim: int, splits: int) -> None:
    """Refuse scratch that is too small.

    Raises:
        ValueError: it is.
    """
    parts = rows * splits * query_heads
    if workspace.partial.numel() < parts * dim or workspace.lse.numel() < parts or workspace.arrived.numel() < rows:
        raise ValueError(
            f"the workspace is too small for {rows} sequences in {splits} parts of {query_heads} heads of {dim}"
        )


def side_by_side(tensor: Tensor) -> Tensor:
    """A matrix of small integers with adjacent columns; the tensor itself wherever it has them, as always in an engine."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def check_prefill(
    queries: Tensor, starts_B1: Tensor, cached_B: Tensor, max_count: int, out: Tensor | None, lse: Tensor | None
) -> None:
    """Refuse bounds and results that do not fit.

    Raises:
        ValueError: they do not.
    """
    if starts_B1.shape != (cached_B.shape[0] + 1,):
        raise ValueError(
            f"{cached_B.shape[0]} sequences need {cached_B.shape[0] + 1} bounds, not {list(starts_B1.shape)}"
        )
    if max_count < 0:
        raise ValueError(f"max_count must not be negative, and is {max_count}")
    check_result("out", out, queries.shape)
    check_result("lse", lse, queries.shape[:2], torch.float32)


def check_score(  # noqa: PLR0913, PLR0917 - what the operation takes
    queries: Tensor, lse: Tensor, weights: Tensor, storage: Tensor, table: Tensor, length: int, positions: Tensor,
    asked: Tensor, out: Tensor | None, carry: float,
) -> None:  # fmt: skip
    """Refuse queries, caches and ledgers of several layers that do not belong together.

    Raises:
        ValueError: they do not.
    """
    if queries.dim() != 4:
        raise ValueError(f"queries must be [layers, queries, query heads, dim], not {list(queries.shape)}")
    layers, count, heads, dim = queries.shape
    check_type("queries", queries, FLOATS)
    check_cache(storage, layers=True)
    check_heads(heads, dim, storage)
    check_length(length, table, storage.shape[-2])
    if storage.shape[0] != layers or lse.shape != (layers, count, heads):
        shapes = f"{storage.shape[0]} layers of cache and log-sum-exps {list(lse.shape)}"
        raise ValueError(f"queries {list(queries.shape)} do not go with {shapes}")
    if weights.shape != (count,) or asked.shape != (count,):
        shapes = f"{list(weights.shape)} and {list(asked.shape)}"
        raise ValueError(f"{count} queries need {count} weights and positions, not {shapes}")
    check_rows("positions", positions, (layers, storage.shape[-3], length))
    if out is not None:
        check_rows("out", out, (layers, storage.shape[-3], length))
        check_type("out", out, (torch.float32,))
    elif carry:
        raise ValueError("there is nothing to carry without out")


def check_compaction(
    storage: Tensor, table: Tensor, keep: Tensor, length: int, mass: Tensor | None, positions: Tensor | None
) -> None:
    """Refuse lists of kept slots and ledgers that do not go with a cache.

    Raises:
        ValueError: they do not.
    """
    check_cache(storage, layers=True)
    check_length(length, table, storage.shape[-2])
    layers, kv_heads = storage.shape[0], storage.shape[-3]
    if keep.dim() != 2 or keep.shape[0] != layers * kv_heads:
        raise ValueError(f"keep must be [{layers} layers * {kv_heads} KV heads, kept], not {list(keep.shape)}")
    check_type("keep", keep, _WHOLE)
    for what, ledger in (("the mass ledger", mass), ("the ledger of positions", positions)):
        if ledger is not None and ledger.shape[-1] < length:
            raise ValueError(f"{what} has room for {ledger.shape[-1]} slots, not {length}")
        if ledger is not None:
            check_rows(what, ledger, (layers, kv_heads, ledger.shape[-1]))


def check_length(length: int, table: Tensor, tokens_per_block: int) -> None:
    """Refuse more slots than a table has blocks for.

    Raises:
        ValueError: it has not.
    """
    check_type("the block table", table, _WHOLE)
    if table.dim() != 1 or length < 0 or length > table.shape[0] * tokens_per_block:
        raise ValueError(
            f"{length} slots do not lie in a block table {list(table.shape)} of {tokens_per_block} slots a block"
        )


def check_named_queries(queries: PagedQueries, lse: Tensor, weights: Tensor, positions: Tensor, kv_heads: int) -> None:
    """Refuse queries of several sequences whose parts do not go together.

    Raises:
        ValueError: they do not.
    """
    count, heads, _ = queries.heads_RHD.shape
    if lse.shape != (count, heads) or weights.shape != (count,) or queries.positions_R.shape != (count,):
        shapes = f"{list(lse.shape)}, {list(weights.shape)} and {list(queries.positions_R.shape)}"
        raise ValueError(
            f"{count} queries of {heads} heads do not go with log-sum-exps, weights and positions {shapes}"
        )
    if positions.dim() != 3 or positions.shape[1] != kv_heads:
        raise ValueError(f"positions must be [sequences, {kv_heads} KV heads, slots], not {list(positions.shape)}")
    if queries.starts_B1.shape != (positions.shape[0] + 1,):
        raise ValueError(f"{positions.shape[0]} sequences need one bound more, not {list(queries.starts_B1.shape)}")


def check_moves(cache: Tensor, tables: Tensor, moves_M4: Tensor) -> None:
    """Refuse what is no cache of one layer or no list of moves. The cache may be a view, such as of an engine's pool.

    Raises:
        ValueError: it is none.
    """
    if cache.dim() != 5 or cache.shape[1] != 2 or (cache.shape[4] > 1 and cache.stride(4) != 1):
        raise ValueError(
            f"a paged cache must be [blocks, 2, heads, tokens_per_block, dim] with contiguous slots, not "
            f"{list(cache.shape)} with strides {cache.stride()}"
        )
    if tables.dim() != 2 or moves_M4.dim() != 2 or moves_M4.shape[1] != 4:
        shapes = f"{list(tables.shape)} and {list(moves_M4.shape)}"
        raise ValueError(f"block tables must be [sequences, columns] and moves [moves, 4], not {shapes}")
