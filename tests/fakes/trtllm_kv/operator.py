"""The attention operator on a fake pool: dense attention over paged memory, then the in-place compaction of a prompt.

Reads nothing but the tensors TensorRT-LLM's operator is given: block offsets, lengths, the fused projection, and the
indices the hooks returned. What the real one would corrupt silently, this one refuses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class AttentionOperator:
    """One layer. Shapes: T tokens of the step, Hq query heads, H KV heads, D head dim."""

    def __init__(self, layer, num_heads, num_kv_heads, head_dim):
        self.layer, self.num_heads, self.num_kv_heads, self.head_dim = layer, num_heads, num_kv_heads, head_dim

    def __call__(self, qkv, metadata, sparse_kv, sparse_attn):
        assert sparse_attn == (None, None), "decode attention stays dense under H2O"
        out = torch.empty(qkv.shape[0], self.num_heads * self.head_dim)
        start = 0
        for row in range(metadata.num_seqs):
            count = int(metadata.seq_lens[row])
            out[start : start + count] = self._attend(qkv[start : start + count], metadata, row)
            start += count
        assert start == qkv.shape[0]
        if sparse_kv != (None, None):
            self._compact(metadata, *sparse_kv)
        return out

    def _rows(self, metadata, row):
        """(side, slot) -> the memory of one token, as the kernels address it: [slots, 2] of [H, D] views."""
        pool = metadata.kv_cache_manager.impl
        halves = pool.memory.view(-1, pool.kv_heads, pool.tokens_per_block, pool.head_dim)

        def at(side, slot):
            offset = int(metadata.kv_cache_block_offsets[0, row, side, slot // pool.tokens_per_block])
            assert offset >= 0, "a slot past the sequence's last block"
            return halves[offset + 2 * self.layer, :, slot % pool.tokens_per_block]

        return at

    def _attend(self, qkv, metadata, row):
        count, length = qkv.shape[0], int(metadata.kv_lens[row])
        generation = row >= metadata.num_contexts
        assert not generation or count == 1
        if generation:
            assert int(metadata.prompt_lens_cpu[row]) < length, "a prompt longer than the cached sequence"
        heads = qkv.view(count, -1, self.head_dim)
        q = heads[:, : self.num_heads]
        k, v = heads[:, self.num_heads :].chunk(2, dim=1)
        at = self._rows(metadata, row)
        for token in range(count):
            slot = length - count + token
            at(0, slot).copy_(k[token])
            at(1, slot).copy_(v[token])
        keys = torch.stack([at(0, slot) for slot in range(length)], dim=1)
        values = torch.stack([at(1, slot) for slot in range(length)], dim=1)
        assert bool(torch.isfinite(keys).all()), "attention reads memory that was freed or never written"
        group = self.num_heads // self.num_kv_heads
        mask = torch.full((count, length), float("-inf")).triu_(length - count + 1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1), keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0), attn_mask=mask
        )
        return out.transpose(0, 1).reshape(count, -1)

    def _compact(self, metadata, indices, offsets):
        """dst i <- src indices[i], in place and ascending: right only for sorted indices, hence the refusal."""
        assert indices.dtype == torch.int32
        assert offsets.dtype == torch.int32
        assert indices.is_contiguous()
        assert indices.shape[0] == self.num_kv_heads
        assert offsets.shape[0] == metadata.num_contexts + 1
        assert int(offsets[-1]) == indices.shape[1]
        for row in range(metadata.num_contexts):
            kept = indices[:, int(offsets[row]) : int(offsets[row + 1])]
            assert bool((kept[:, 1:] > kept[:, :-1]).all()), "indices must ascend inside a sequence"
            assert int(kept.max()) < int(metadata.kv_lens[row])
            at = self._rows(metadata, row)
            for head in range(self.num_kv_heads):
                for target, source in enumerate(kept[head].tolist()):
                    for side in (0, 1):
                        at(side, target)[head] = at(side, source)[head].clone()
