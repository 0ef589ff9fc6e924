"""What operations cannot take is refused in one line, before a kernel could read where it must not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.paged_caches import make_batch, make_layers, randn

from trtkit.kernels import fused, paged, ranking, sampling

BATCH, QUERIES = make_batch((9, 20), heads=2), randn(2, 6, 64)
CASE = make_layers(21)
KEEP = torch.zeros(6, 3, dtype=torch.int32)
LOGITS, ONES = torch.zeros(3, 7), torch.ones(3)
PLACES, COUNTS = LOGITS.int(), ONES.int()
STARTS, CACHED = torch.tensor([0, 1, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
RESIDUAL, WEIGHT = randn(3, 16), randn(16)


def batch_with(**parts):
    return dataclasses.replace(BATCH, **parts)


def decode(queries=QUERIES, batch=BATCH, **more):
    return lambda: paged.paged_decode_attention(queries, batch, **more)


def prefill(starts=STARTS, **more):
    return lambda: paged.paged_prefill_attention(QUERIES, starts, CACHED, BATCH, **{"max_count": 1, **more})


def score(**changed):
    names = ("queries", "lse", "weights", "storage", "table", "length", "positions", "asked")
    arguments = {**dict(zip(names, CASE.arguments, strict=True)), **changed}
    more = {name: arguments.pop(name) for name in ("out", "carry") if name in arguments}
    return lambda: paged.score_layers(*arguments.values(), **more)


def score_named(**changed):
    queries = paged.PagedQueries(heads_RHD=QUERIES, starts_B1=STARTS, positions_R=torch.zeros(2, dtype=torch.int32))
    arguments = {"queries": queries, "lse": torch.zeros(2, 6), "weights": torch.ones(2), "batch": BATCH}
    arguments |= {"positions": torch.zeros(2, 2, 20, dtype=torch.int32), **changed}
    return lambda: paged.score_paged(*arguments.values())


def compact(keep=KEEP, length=21, mass=None, storage=CASE.storage):
    return lambda: paged.compact_layers(storage, CASE.table, keep, length, mass, None)


def rope(**changed):
    integers = torch.zeros(3, dtype=torch.int32)
    arguments = {
        "qkv": randn(3, 10, 16), "positions": integers, "cos": torch.ones(9, 8), "sin": torch.ones(9, 8),
        "cache": torch.zeros(4, 2, 2, 8, 16), "tables": torch.zeros(3, 2, dtype=torch.int32), "rows": None,
        "slots": integers,
    }  # fmt: skip
    more = {"num_heads": 6, **{name: value for name, value in changed.items() if name not in arguments}}
    arguments |= {name: value for name, value in changed.items() if name in arguments}
    return lambda: fused.rope_write(*arguments.values(), **more)


def keep_best(scores=LOGITS, positions=PLACES, *, tokens=2, sinks=0, recent=0):
    return lambda: ranking.keep_best(scores, positions, 7, tokens=tokens, sinks=sinks, recent=recent)


def draw(logits=LOGITS, top_k=COUNTS):
    return lambda: sampling.sample_rows(logits, ONES, top_k, ONES, ONES)


STRIDED = torch.empty(2, 64, 6).transpose(1, 2)
REFUSED = {
    "5 query heads cannot share 2 KV heads": decode(QUERIES[:, :5]),
    "head dim of 32, the cache 64": decode(QUERIES[..., :32]),
    "queries must be float32, float16, bfloat16, not float64": decode(QUERIES.double()),
    "queries must be [rows, query heads, dim], not [2, 384]": decode(QUERIES.flatten(1)),
    "at most 128": decode(randn(2, 258, 64)),
    "head dim of 1024 is too large": decode(randn(1, 2, 1024), make_batch((3,), heads=2, dim=1024)),
    "splits must be at least 1, not 0": decode(splits=0),
    "out must be contiguous": decode(out=STRIDED),
    "out must be of shape [2, 6, 64], not [6, 64]": decode(out=torch.empty(6, 64)),
    "lse must be float32, not float16": decode(lse=torch.empty(2, 6, dtype=torch.float16)),
    "ring_lse and ring_index_B go together": decode(ring_lse=torch.empty(3, 6)),
    "2 sequences need 2 ring places": decode(ring_lse=torch.empty(3, 6), ring_index_B=CACHED[:1]),
    "2 sequences need 2 block tables": decode(batch=batch_with(blocks_BM=BATCH.blocks_BM[:1])),
    "block tables must be int32, int64, not float32": decode(batch=batch_with(blocks_BM=BATCH.blocks_BM.float())),
    "must be contiguous; strides": decode(batch=batch_with(cache=BATCH.cache.transpose(2, 3).contiguous().transpose(2, 3))),
    "float8_e4m3fn, not int8": decode(batch=batch_with(cache=BATCH.cache.to(torch.int8))),
    "a paged cache must be [blocks, 2, heads": decode(batch=batch_with(cache=BATCH.cache[:, :1])),
    "2 sequences need 3 bounds, not [2]": prefill(STARTS[:2]),
    "max_count must not be negative": prefill(max_count=-1),
    "99 slots do not lie in a block table": score(length=99),
    "7 queries need 7 weights": score(weights=torch.ones(3)),
    "do not go with 2 layers of cache": score(storage=CASE.storage[:2]),
    "positions must be of shape [3, 2, 21]": score(positions=CASE.positions),
    "out must have contiguous rows": score(out=torch.empty(3, 21, 2).transpose(1, 2)),
    "nothing to carry": score(carry=0.5),
    "2 queries of 6 heads do not go with": score_named(lse=torch.zeros(2, 5)),
    "positions must be [sequences, 2 KV heads, slots]": score_named(positions=torch.zeros(2, 3, 20).int()),
    "-1 slots do not lie": compact(length=-1),
    "keep must be [3 layers * 2 KV heads, kept], not [5, 3]": compact(KEEP[:5]),
    "keep must be int32, int64, not int16": compact(KEEP.short()),
    "the mass ledger has room for 9 slots, not 21": compact(mass=CASE.mass[..., :9]),
    "[layers, blocks, 2, heads": compact(storage=CASE.storage[0]),
    "moves [moves, 4]": lambda: paged.compact_paged(BATCH.cache, BATCH.blocks_BM, KEEP),
    "not hold 7 query heads": rope(num_heads=7),
    "rotary tables must be [positions, 8], not [9, 4]": rope(cos=torch.ones(9, 4)),
    "3 tokens need 3 positions": rope(slots=CACHED),
    "as many block tables, not [2, 2]": rope(tables=torch.zeros(2, 2).int()),
    "q_norm_D and k_norm_D go together": rope(q_norm_D=torch.ones(16)),
    "ring and ring_index_T go together": rope(ring=torch.zeros(4, 6, 16)),
    "the ring must be of shape [4, 6, 16]": rope(ring=torch.zeros(4, 5, 16), ring_index_T=torch.zeros(3).int()),
    "even head dim], not [3, 10, 15]": rope(qkv=randn(3, 10, 15)),
    "changed in place, must have contiguous rows": lambda: fused.add_rms_norm(None, randn(16, 3).T, WEIGHT, 1e-5),
    "a norm's weight must be [16], not [8]": lambda: fused.add_rms_norm(None, RESIDUAL, WEIGHT[:8], 1e-5),
    "added must be [3, 16] like the residual": lambda: fused.add_rms_norm_fp8(RESIDUAL[:2], RESIDUAL, WEIGHT, 1e-5),
    "gate and up must be [tokens, 2 * inter": lambda: fused.silu_mul(randn(3, 7)),
    "gate and up must be float32": lambda: fused.silu_mul_fp8(randn(3, 8).double()),
    "out must be of shape [3, 4], not [3, 8]": lambda: fused.silu_mul(randn(3, 8), out=randn(3, 8)),
    "token ids must be [tokens]": lambda: fused.embed(KEEP, RESIDUAL),
    "the embedding table must have contiguous rows": lambda: fused.embed(CACHED, randn(16, 3).T),
    "logits must be [rows, vocabulary], not [3, 0]": lambda: sampling.greedy(LOGITS[:, :0]),
    "logits must be float32, float16, bfloat16, float64, not int32": lambda: sampling.greedy(LOGITS.int()),
    "the workspace must have 3 contiguous elements, not 2": lambda: sampling.greedy(
        LOGITS, workspace=torch.zeros(2, dtype=torch.int64)
    ),
    "top_k_R must be [3], one a row, not [2]": draw(top_k=CACHED),
    "8 of 7 slots cannot stay": keep_best(tokens=8),
    "scores and positions must be alike": keep_best(positions=LOGITS[:2].int()),
    "sinks and recent must not be negative": keep_best(sinks=-1),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below, without escapes
        REFUSED[message]()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_right_is_not_refused():
    for call in (decode(), decode(randn(2, 6, 64, dtype=torch.float16)), prefill(), score(), compact(), rope(), draw()):
        call()
    keep_best()()
    score_named()()


@pytest.mark.parametrize(("group", "family"), [(32, "decode"), (33, None)])
def test_groups_too_large_for_the_decode_kernel_are_left_to_its_twin(monkeypatch, group, family):
    asked = []
    monkeypatch.setattr(paged, "use_triton", lambda _, name: asked.append(name))
    paged.paged_decode_attention(randn(2, 2 * group, 64), BATCH)
    assert asked == ([family] if family else [])
