"""Operations on a paged KV cache: the choice between a torch twin, which defines each, and its Triton kernel on CUDA.

Shapes: B sequences, R queries of all sequences together (`starts_B1` bounds them), Hq query heads, H KV heads,
G = Hq / H query heads per KV head, D head dim, M table columns, L layers, N live slots, C slots a ledger has room
for. The cache of one layer is TensorRT-LLM's HND block layout [blocks, 2, H, tokens_per_block, D], index 0 keys and 1
values; keys are rotated. Caches may be fp32, fp16, bf16 or float8_e4m3fn (scale 1, its NaN is read as 480 by
kernels). Arguments that do not go together are refused in one line (ValueError). Nothing here waits for the device
where kernels run, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from torch import Tensor

from trtkit.kernels.arguments import (
    check_attention,
    check_compaction,
    check_decode,
    check_moves,
    check_named_queries,
    check_prefill,
    check_score,
)
from trtkit.kernels.dispatch import use_triton
from trtkit.kernels.paged_batch import DecodeWorkspace, PagedBatch, PagedQueries, decode_splits, gather_sequence
from trtkit.kernels.paged_twins import (
    compact_layers_twin,
    compact_twin,
    decode_attention_twin,
    lse_twin,
    prefill_attention_twin,
    score_layers_twin,
    score_twin,
)

__all__ = [
    "DecodeWorkspace",
    "PagedBatch",
    "PagedQueries",
    "compact_layers",
    "compact_layers_twin",
    "compact_paged",
    "compact_twin",
    "decode_attention_twin",
    "decode_splits",
    "gather_sequence",
    "lse_twin",
    "paged_decode_attention",
    "paged_prefill_attention",
    "prefill_attention_twin",
    "score_layers",
    "score_layers_twin",
    "score_paged",
    "score_twin",
    "use_triton",
]


_MAX_DECODE_GROUP = 32
"""Query heads per KV head beyond which the twin decodes: with 71 the kernel spills and takes minutes to compile."""


def paged_decode_attention(  # noqa: PLR0913 - outputs the caller may own, all by keyword
    queries_BHD: Tensor,
    batch: PagedBatch,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
    workspace: DecodeWorkspace | None = None,
    ring_lse: Tensor | None = None,
    ring_index_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence over all its live slots.

    Args:
        queries_BHD: [B, Hq, D].
        batch: the cache and where the sequences lie in it; a sequence of no length gives zeros and -inf.
        out: where the output goes, [B, Hq, D].
        lse: where the log-sum-exp goes, fp32 [B, Hq].
        splits: parts a sequence is cut into, a property of the launch and not of its lengths; chosen from B if None.
        workspace: scratch for more than one split; allocated if None.
        ring_lse: fp32 [places, Hq]; the log-sum-exp of row b is also written to place `ring_index_B[b]`.
        ring_index_B: int32 or int64 [B]; a negative place is skipped.

    Returns:
        Output [B, Hq, D] in the queries' type and the natural log-sum-exp of the scaled logits, fp32 [B, Hq].
    """
    check_attention(queries_BHD, batch, queries_BHD.shape[0])
    check_decode(queries_BHD, out, lse, splits, ring_lse, ring_index_B)
    few_heads = queries_BHD.shape[1] // batch.cache.shape[2] <= _MAX_DECODE_GROUP
    if few_heads and use_triton(queries_BHD, "decode"):
        from trtkit.kernels import triton_decode

        return triton_decode.paged_decode_attention(
            queries_BHD,
            batch,
            out=out,
            lse=lse,
            splits=splits,
            workspace=workspace,
            ring_lse=ring_lse,
            ring_index_B=ring_index_B,
        )
    out, lse = decode_attention_twin(queries_BHD, batch, out=out, lse=lse)
    if ring_lse is not None and ring_index_B is not None:
        wanted = ring_index_B >= 0
        ring_lse[ring_index_B[wanted].long()] = lse[wanted]
    return out, lse


def paged_prefill_attention(  # noqa: PLR0913 - outputs the caller may own, by keyword
    queries_RHD: Tensor,
    starts_B1: Tensor,
    cached_B: Tensor,
    batch: PagedBatch,
    *,
    max_count: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of several consecutive queries per sequence, whose own keys and values are in the cache already.

    Query i of sequence b sees the slots below `cached_B[b] + i + 1`: all that was cached before, whatever it is, and
    its own tokens causally.

    Args:
        queries_RHD: [R, Hq, D], sequence after sequence.
        starts_B1: int32 [B + 1], bounds of each sequence's queries.
        cached_B: int32 [B], live slots before these queries' tokens were written.
        batch: the cache after they were; its lengths are `cached_B` plus the counts.
        max_count: queries of the sequence that has most; known to the host, because it sizes the grid.
        out: where the output goes, [R, Hq, D].
        lse: where the log-sum-exp goes, fp32 [R, Hq].

    Returns:
        Output [R, Hq, D] in the queries' type and the natural log-sum-exp of the scaled logits, fp32 [R, Hq].
    """
    check_attention(queries_RHD, batch, cached_B.shape[0])
    check_prefill(queries_RHD, starts_B1, cached_B, max_count, out, lse)
    if use_triton(queries_RHD, "prefill"):
        from trtkit.kernels import triton_prefill

        return triton_prefill.paged_prefill_attention(
            queries_RHD, starts_B1, cached_B, batch, max_count=max_count, out=out, lse=lse
        )
    return prefill_attention_twin(queries_RHD, starts_B1, cached_B, batch, out=out, lse=lse)


def score_paged(
    queries: PagedQueries, lse_RH: Tensor, weights_R: Tensor, batch: PagedBatch, positions: Tensor
) -> Tensor:
    """Attention mass each live key receives from `queries`, summed over the query heads of its KV head.

    Args:
        queries: the queries, with their positions.
        lse_RH: fp32 [R, Hq], log-sum-exp of each query's scaled logits, as attention emitted it.
        weights_R: fp32 [R], what each query's mass counts.
        batch: the cache after the queries' own tokens were written.
        positions: int32 [B, H, N], original position of every live slot.

    Returns:
        fp32 [B, H, N]; zero past a sequence's length.
    """
    check_attention(queries.heads_RHD, batch, positions.shape[0])
    check_named_queries(queries, lse_RH, weights_R, positions, batch.cache.shape[2])
    if use_triton(lse_RH, "score"):
        from trtkit.kernels import triton_paged

        return triton_paged.score_paged(queries, lse_RH, weights_R, batch, positions)
    return score_twin(queries, lse_RH, weights_R, batch, positions)


def score_layers(  # noqa: PLR0913, PLR0917 - queries, keys and ledger of one sequence
    queries_LRHD: Tensor,
    lse_LRH: Tensor,
    weights_R: Tensor,
    storage: Tensor,
    table_M: Tensor,
    length: int,
    positions_LHN: Tensor,
    query_positions_R: Tensor,
    *,
    layers: slice | None = None,
    out: Tensor | None = None,
    carry: float = 0.0,
) -> Tensor:
    """Attention mass the live keys of one sequence receive in several layers, keys read once for all queries.

    Leading axes may be strided views, such as a sequence's places in a ring; the order of the queries is free.

    Args:
        queries_LRHD: rotated queries of the chosen layers, [L, R, Hq, D].
        lse_LRH: fp32 [L, R, Hq], log-sum-exp of each query's scaled logits, as attention emitted it.
        weights_R: fp32 [R], what each query's mass counts.
        storage: all layers' caches, [layers, blocks, 2, H, tokens_per_block, D], contiguous.
        table_M: int32 [M], the sequence's block table.
        length: its live slots N.
        positions_LHN: int32 [L, H, N], original positions of the live slots, last axis contiguous.
        query_positions_R: int32 [R]; a query sees the keys at its own position and before.
        layers: which layers of `storage` the L are; all if None.
        out: fp32 [L, H, N], last axis contiguous; where the result goes.
        carry: what is in `out` times this is added; at 0 it is not read.

    Returns:
        fp32 [L, H, N].
    """
    chosen = storage if layers is None else storage[layers]
    arguments = (queries_LRHD, lse_LRH, weights_R, chosen, table_M, length, positions_LHN, query_positions_R)
    check_score(*arguments, out, carry)
    if use_triton(storage, "score"):
        from trtkit.kernels import triton_score

        return triton_score.score_layers(*arguments, out=out, carry=carry)
    return score_layers_twin(*arguments, out=out, carry=carry)


def compact_paged(cache: Tensor, blocks_BM: Tensor, moves_M4: Tensor) -> None:
    """Copy keys and values inside one layer's cache, in place.

    Args:
        cache: [blocks, 2, H, tokens_per_block, D].
        blocks_BM: int32 block tables.
        moves_M4: int32 [moves, 4]: sequence, KV head, source slot, target slot; no target is any move's source.
    """
    check_moves(cache, blocks_BM, moves_M4)
    if use_triton(cache, "compact"):
        from trtkit.kernels import triton_paged

        triton_paged.compact_paged(cache, blocks_BM, moves_M4)
        return
    compact_twin(cache, blocks_BM, moves_M4)


def compact_layers(
    storage: Tensor,
    table_M: Tensor,
    keep_RK: Tensor,
    length: int,
    mass_LHC: Tensor | None,
    positions_LHC: Tensor | None,
) -> None:
    """Leave the kept slots of one sequence in front, in every layer of `storage` and in its ledger, in place.

    Holes in front are filled from behind, both in ascending order, so no more tokens move than are evicted.

    Args:
        storage: [L, blocks, 2, H, tokens_per_block, D]; pass `storage[l : l + 1]` for one layer.
        table_M: int32 [M], the sequence's block table.
        keep_RK: int32 or int64 [L * H, kept], ascending slots of each (layer, KV head). Slots out of range move
            nothing; nothing outside the sequence is ever touched.
        length: live slots before; afterwards `kept` are.
        mass_LHC: fp32 ledger that moves along, last axis contiguous, if any.
        positions_LHC: int32 ledger that moves along, last axis contiguous, if any.
    """
    check_compaction(storage, table_M, keep_RK, length, mass_LHC, positions_LHC)
    if use_triton(storage, "compact"):
        from trtkit.kernels import triton_compact

        triton_compact.compact_layers(storage, table_M, keep_RK, length, mass_LHC, positions_LHC)
        return
    compact_layers_twin(storage, table_M, keep_RK, length, mass_LHC, positions_LHC)
