"""A pool of KV blocks with TensorRT-LLM's layout and its C++ manager's rules; freed memory turns to NaN at once.

Layout: one pool [blocks, layers, 2, H * tokens_per_block * D], heads outside tokens inside a block (HND). Offsets in
block tables count halves of a layer: K is block * layers * 2, V the next one.
"""

from __future__ import annotations

import torch


class BlockPool:
    """The C++ `KVCacheManager` binding, as far as the adapters and the fake runtime use it."""

    def __init__(self, blocks, layers, kv_heads, tokens_per_block, head_dim):
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.tokens_per_block = tokens_per_block
        size = kv_heads * tokens_per_block * head_dim
        self.memory = torch.full((blocks, layers, 2, size), float("nan"))
        self.free = list(range(blocks))
        self.sequences: dict[int, tuple[list[int], int]] = {}

    def add_sequence(self, request_id, input_length, beam_width, llm_request):
        assert beam_width == 1
        assert request_id not in self.sequences, "a sequence is added once"
        self.sequences[request_id] = ([], 0)
        for _ in range(input_length):
            self.add_token(request_id)

    def add_token(self, request_id):
        blocks, tokens = self.sequences[request_id]
        if tokens % self.tokens_per_block == 0:
            if not self.free:
                raise RuntimeError("no free KV cache block")
            blocks.append(self.free.pop())
        self.sequences[request_id] = (blocks, tokens + 1)

    def rewind_kv_cache(self, request_id, count):
        """Remove `count` tokens from the tail; a block whose first token goes is released at once."""
        assert request_id in self.sequences, "releases before 2026 raise for a sequence that has ended"
        blocks, tokens = self.sequences[request_id]
        assert 0 <= count <= tokens, "cannot rewind past the start"
        for _ in range(count):
            tokens -= 1
            if tokens % self.tokens_per_block == 0:
                self._release(blocks.pop())
        self.sequences[request_id] = (blocks, tokens)

    def remove_sequence(self, request_id, llm_request, pin_on_release=False):
        assert not pin_on_release
        blocks, _ = self.sequences.pop(request_id)
        for block in blocks:
            self._release(block)

    def get_batch_cache_block_ids(self, request_ids, window_size):
        return [[list(self.sequences[request_id][0])] for request_id in request_ids]

    def get_primary_pool_data(self, layer_offset):
        return self.memory[:, layer_offset]

    @property
    def used(self):
        return self.memory.shape[0] - len(self.free)

    def num_tokens(self, request_id):
        return self.sequences[request_id][1]

    def check(self):
        """Every block is free or owned by exactly one sequence, and no sequence owns more than its tokens need."""
        owned = [block for blocks, _ in self.sequences.values() for block in blocks]
        assert sorted(owned + self.free) == list(range(self.memory.shape[0]))
        for blocks, tokens in self.sequences.values():
            assert len(blocks) == -(-tokens // self.tokens_per_block)

    def _release(self, block):
        self.memory[block] = float("nan")
        self.free.append(block)
