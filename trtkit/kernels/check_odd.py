"""Checks at shapes that the engine at hand does not run: other models' heads, widths and vocabularies, and odd ones.

They say what a GPU makes of kernels that were compiled for it on another machine. A failure is reported and gives
nothing up, for the engine's own shapes have checks of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from trtkit.kernels import check_fused, check_paged, paged, ranking, sampling
from trtkit.kernels.selfcheck import Answers, Check, CheckShape, Draws

_FP8 = torch.float8_e4m3fn
_BASE = CheckShape(hidden_size=64, intermediate_size=64, vocab_size=64)


def _shape(dim: int, group: int, heads: int, block: int, dtype: torch.dtype, stored: torch.dtype) -> CheckShape:
    return replace(
        _BASE, head_dim=dim, num_heads=group * heads, num_kv_heads=heads, tokens_per_block=block, dtype=dtype,
        kv_dtype=stored,
    )  # fmt: skip


SHAPES = (
    _shape(80, 7, 3, 16, torch.float16, torch.float16),
    _shape(96, 1, 5, 128, torch.bfloat16, torch.bfloat16),
    _shape(256, 16, 1, 64, torch.bfloat16, torch.bfloat16),
    _shape(112, 5, 2, 8, torch.bfloat16, _FP8),
    _shape(64, 12, 1, 32, torch.float16, _FP8),
    _shape(128, 3, 2, 24, torch.float32, torch.float32),
    _shape(72, 2, 1, 32, torch.float16, torch.bfloat16),
    _shape(256, 6, 2, 16, torch.float32, torch.bfloat16),
)
"""Head dim, query heads per KV head, KV heads, slots of a block, and what is computed and stored in; likeliest first."""
WIDTHS = ((5000, 18_944, torch.bfloat16), (12_289, 29_567, torch.float16), (7, 1025, torch.float32))
"""Hidden and intermediate size."""
VOCABULARIES = ((32_001, torch.float16), (151_936, torch.bfloat16), (262_144, torch.float32))
ROWS = ((8193, 8000), (20_000, 16_384), (1, 1))
"""Slots that are ranked, and how many stay."""
_LONG = 131_072


def checks(device: torch.device) -> Iterator[Check]:
    """All of them, likeliest shapes first."""
    yield from _of_heads(device, SHAPES[0])
    yield from _of_widths(device)
    yield Check(
        family="decode", name="odd shapes: 131,072 slots in a cache that begins anywhere", on_failure=_nothing_given_up,
        bound=check_paged.BOUNDS[torch.bfloat16], run=partial(_long, device),
    )  # fmt: skip
    for shape in SHAPES[1:]:
        yield from _of_heads(device, shape)


def _nothing_given_up() -> bool:
    return True


def _of_heads(device: torch.device, shape: CheckShape) -> Iterator[Check]:
    """Attention, eviction and rotation for one shape of heads."""
    bound = max(check_paged.BOUNDS[shape.dtype], check_paged.BOUNDS.get(shape.kv_dtype, 0.0))
    cached = 0.07 if shape.kv_dtype is _FP8 else max(
        check_fused.BOUNDS[shape.dtype], check_fused.BOUNDS.get(shape.kv_dtype, 0.0)
    )  # fmt: skip
    size, group = shape.tokens_per_block, shape.num_heads // shape.num_kv_heads
    what = f"head dim {shape.head_dim}, {group} query heads a KV head, blocks of {size}, {_named(shape.dtype)} over"
    odd = partial(Check, on_failure=_nothing_given_up)
    lengths = (size - 1, size, 0, size + 1, 700)
    for family, name, run, most in (
        ("decode", "decode attention", partial(check_paged.decode, device, shape, lengths, others=()), bound),
        ("prefill", "prefill attention", partial(check_paged.prefill, device, shape), bound),
        ("score", "scores", partial(check_paged.scores, device, shape), bound),
        ("compact", "compaction", partial(check_paged.compaction, device, shape), 0.0),
        ("fused", "rotation", partial(check_fused.rotation, device, shape), cached),
    ):
        yield odd(
            family=family, name=f"odd shapes: {name}, {what} {_named(shape.kv_dtype)}", bound=most, run=run
        )  # fmt: skip


def _of_widths(device: torch.device) -> Iterator[Check]:
    """Norms, activations, vocabularies and rows to rank."""
    odd = partial(Check, on_failure=_nothing_given_up)
    for hidden, intermediate, dtype in WIDTHS:
        shape = replace(_BASE, hidden_size=hidden, intermediate_size=intermediate, dtype=dtype)
        bound = check_fused.BOUNDS[dtype]
        name = f"odd shapes: {{}}, {_named(dtype)}"
        run = partial(check_fused.norm, device, shape)
        yield odd(family="fused", name=name.format(f"norm of {hidden}"), bound=bound, run=run)
        run = partial(check_fused.activation, device, shape)
        yield odd(family="fused", name=name.format(f"activation of {intermediate}"), bound=bound, run=run)
    for size, dtype in VOCABULARIES:
        run = partial(check_fused.largest, device, replace(_BASE, vocab_size=size, dtype=dtype))
        yield odd(family="sampling", name=f"odd shapes: greedy of {size}, {_named(dtype)}", bound=0.0, run=run)
        yield odd(
            family="sampling", name=f"odd shapes: drawn of {size}, {_named(dtype)}", bound=0.0,
            run=partial(_drawn, device, size, dtype),
        )  # fmt: skip
    for length, tokens in ROWS:
        yield odd(
            family="ranking", name=f"odd shapes: {tokens} of {length} slots", bound=0.0,
            run=partial(_ranking, device, length, tokens),
        )  # fmt: skip


def _drawn(device: torch.device, vocab_size: int, dtype: torch.dtype) -> Answers:
    """Logits of which a few are far above the rest: half, a quarter, an eighth and an eighth of all mass."""
    logits = torch.full((6, vocab_size), -1e4, dtype=dtype, device=device)
    places = [vocab_size - 1, 0, vocab_size // 2, vocab_size // 2 + 1]
    logits[:, places] = torch.tensor([3.0, 2, 1, 1], device=device).to(dtype)
    heat = 1.4426950408889634  # one step of the logits halves the mass
    found = sampling.sample_rows(
        logits, torch.tensor([heat, heat, heat, heat, heat, 1e-45], dtype=torch.float64, device=device),
        torch.tensor([0, 0, 0, vocab_size, 2, 0], dtype=torch.int32, device=device),
        torch.tensor([1.0, 1.0, 0.6, 1.0, 1.0, 1e-9], dtype=torch.float64, device=device),
        torch.tensor([0.4, 0.8, 0.9, 0.95, 0.9, 0.99], dtype=torch.float64, device=device),
    )  # fmt: skip
    right = [places[0], places[2], places[1], places[3], places[1], places[0]]
    yield found, torch.tensor(right, device=device)


def _ranking(device: torch.device, length: int, tokens: int) -> Answers:
    draws = Draws(device)
    scores = draws.normal(3, length).abs()
    scores[0], scores[1] = 0.25, torch.nan
    positions = torch.stack([draws.order(length) for _ in range(3)])
    budget = {"tokens": tokens, "sinks": min(4, tokens), "recent": min(9, tokens - min(4, tokens))}
    found = ranking.keep_best(scores, positions, length, **budget)
    yield found, ranking.keep_best_twin(scores, positions, length, **budget)


def _long(device: torch.device) -> Answers:
    """A sequence as long as models allow, one element past where memory is aligned."""
    draws, size, dim = Draws(device), 32, 64
    blocks = _LONG // size
    memory = draws.normal(1 + blocks * 2 * size * dim, dtype=torch.bfloat16)
    batch = paged.PagedBatch(
        cache=memory[1:].view(blocks, 2, 1, size, dim), blocks_BM=draws.order(blocks)[None],
        lengths_B=torch.tensor([_LONG], dtype=torch.int32, device=device),
    )  # fmt: skip
    queries = draws.normal(1, 7, dim, dtype=torch.bfloat16)
    out, lse = paged.paged_decode_attention(queries, batch)
    expected, normal = check_paged.dense(queries, batch, 0, _LONG - 1)
    yield out, expected
    yield lse, normal


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
