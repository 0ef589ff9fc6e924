"""What `trtkit.kernels.fused`, `sampling` and `ranking` take: one line that names what is wrong, as in `arguments`."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kernels.arguments import FLOATS, check_cache, check_result, check_rows, check_type


def check_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, out: Tensor | None) -> None:
    """Refuse what a norm cannot add up, or cannot change in place.

    Raises:
        ValueError: shapes do not go together, or rows that are written are not contiguous.
    """
    if residual.dim() != 2 or residual.shape[1] == 0:
        raise ValueError(f"the residual must be [tokens, hidden size], not {list(residual.shape)}")
    check_rows("the residual, which is changed in place,", residual, residual.shape)
    check_type("the residual", residual, FLOATS)
    if weight.shape != residual.shape[1:]:
        raise ValueError(f"a norm's weight must be [{residual.shape[1]}], not {list(weight.shape)}")
    if delta is not None and delta.shape != residual.shape:
        raise ValueError(f"what is added must be {list(residual.shape)} like the residual, not {list(delta.shape)}")
    if out is not None:
        check_rows("out", out, residual.shape)


def check_gate(gate_up: Tensor, out: Tensor | None) -> None:
    """Refuse what is no fused projection of gate and up.

    Raises:
        ValueError: it is none, or `out` does not fit.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.shape[1] == 0:
        raise ValueError(f"gate and up must be [tokens, 2 * intermediate size], not {list(gate_up.shape)}")
    check_type("gate and up", gate_up, FLOATS)
    if out is not None:
        check_rows("out", out, (gate_up.shape[0], gate_up.shape[1] // 2))


def check_rope(  # noqa: PLR0913, PLR0917 - what the operation takes
    qkv: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor, cache: Tensor, tables: Tensor, rows: Tensor | None,
    slots: Tensor, num_heads: int, norms: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Refuse a projection, rotary tables and a cache that do not go together.

    Raises:
        ValueError: they do not.
    """
    if qkv.dim() != 3 or qkv.shape[2] % 2 or qkv.shape[2] == 0:
        raise ValueError(f"the projection must be [tokens, heads, even head dim], not {list(qkv.shape)}")
    check_type("the projection", qkv, FLOATS)
    check_cache(cache)
    tokens, heads, dim = qkv.shape
    if heads != num_heads + 2 * cache.shape[2] or dim != cache.shape[4]:
        raise ValueError(
            f"a projection of {heads} heads of {dim} does not hold {num_heads} query heads and keys and values of "
            f"{cache.shape[2]} KV heads of {cache.shape[4]}"
        )
    if cosines.dim() != 2 or cosines.shape != sines.shape or cosines.shape[1] != dim // 2:
        raise ValueError(
            f"rotary tables must be [positions, {dim // 2}], not {list(cosines.shape)} and {list(sines.shape)}: all of "
            f"a head is rotated"
        )
    if positions.shape != (tokens,) or slots.shape != (tokens,) or (rows is not None and rows.shape != (tokens,)):
        raise ValueError(f"{tokens} tokens need {tokens} positions, slots and rows")
    if tables.dim() != 2 or (rows is None and tables.shape[0] < tokens):
        raise ValueError(f"{tokens} tokens without rows need as many block tables, not {list(tables.shape)}")
    if (norms[0] is None) != (norms[1] is None):
        raise ValueError("q_norm_D and k_norm_D go together: give both or neither")


def check_rope_results(
    qkv: Tensor, num_heads: int, q_out: Tensor | None, ring: Tensor | None, ring_index: Tensor | None
) -> None:
    """Refuse where rotated queries cannot go.

    Raises:
        ValueError: shapes or strides are others.
    """
    tokens, _, dim = qkv.shape
    check_result("q_out", q_out, (tokens, num_heads, dim))
    if (ring is None) != (ring_index is None):
        raise ValueError("ring and ring_index_T go together: give both or neither")
    if ring is not None and ring_index is not None:
        check_result("the ring", ring, (ring.shape[0], num_heads, dim))
        if ring_index.shape != (tokens,):
            raise ValueError(f"{tokens} tokens need {tokens} ring places, not {list(ring_index.shape)}")


def check_embed(token_ids: Tensor, table: Tensor, out: Tensor | None) -> None:
    """Refuse token ids that are no list, and a table whose rows are not contiguous.

    Raises:
        ValueError: they are.
    """
    if token_ids.dim() != 1 or table.dim() != 2 or table.shape[0] == 0:
        shapes = f"{list(token_ids.shape)} and {list(table.shape)}"
        raise ValueError(f"token ids must be [tokens] and the table [vocabulary, hidden size], not {shapes}")
    check_rows("the embedding table", table, table.shape)
    if out is not None:
        check_rows("out", out, (token_ids.shape[0], table.shape[1]))


def check_logits(logits: Tensor) -> None:
    """Refuse what is no matrix of logits.

    Raises:
        ValueError: it is none.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [rows, vocabulary], not {list(logits.shape)}")
    check_type("logits", logits, (*FLOATS, torch.float64))


def check_greedy(logits: Tensor, out: Tensor | None, workspace: Tensor | None, needed: int) -> None:
    """Refuse results and scratch that do not fit.

    Raises:
        ValueError: they do not.
    """
    check_logits(logits)
    check_result("out", out, logits.shape[:1], torch.int32)
    if workspace is not None:
        check_type("the workspace", workspace, (torch.int64,))
    if workspace is not None and (workspace.numel() < needed or not workspace.is_contiguous()):
        raise ValueError(f"the workspace must have {needed} contiguous elements, not {workspace.numel()}")


def check_draws(logits: Tensor, **of_rows: Tensor) -> None:
    """Refuse parameters that are not one a row.

    Raises:
        ValueError: they are not.
    """
    check_logits(logits)
    for name, tensor in of_rows.items():
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [{logits.shape[0]}], one a row, not {list(tensor.shape)}")


def check_ranking(scores: Tensor, positions: Tensor, tokens: int, sinks: int, recent: int) -> None:
    """Refuse a budget that a row cannot meet.

    Raises:
        ValueError: it cannot, or scores and positions differ in shape.
    """
    if scores.shape != positions.shape or scores.dim() == 0:
        raise ValueError(
            f"scores and positions must be alike [..., slots], not {list(scores.shape)}, {list(positions.shape)}"
        )
    if not 0 <= tokens <= scores.shape[-1]:
        raise ValueError(f"{tokens} of {scores.shape[-1]} slots cannot stay")
    if sinks < 0 or recent < 0:
        raise ValueError(f"sinks and recent must not be negative, and are {sinks} and {recent}")
