"""How often each of eviction's kernels is compiled while sequences of many lengths come and go, layer by layer and whole.

Needs a process in which Triton's interpreter is off: `python -m support.eviction_variants POLICY ...` prints the counts.
Kernels compile and do not run, so their results are whatever memory held; only host integers matter here.
"""

from __future__ import annotations

import collections
import json
import sys
from dataclasses import dataclass

import torch
from support.compile_only import compile_only
from support.eviction_streams import TabledRow, make_sequence

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.device.eviction import DeviceEviction
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence
from trtkit.kernels import paged, ranking, slots
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

LAYERS, KV_HEADS, HEADS, DIM, BLOCK, LONGEST = 3, 2, 8, 64, 32, 512
MODEL = ModelSpec(
    name="variants",
    architecture="LlamaForCausalLM",
    num_layers=LAYERS,
    hidden_size=HEADS * DIM,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    intermediate_size=64,
    vocab_size=64,
    max_position_embeddings=LONGEST,
)


@dataclass
class Served:
    """Host side of an engine under one policy."""

    kv: str

    def __post_init__(self) -> None:
        limits = Limits(max_batch_size=4, max_num_tokens=256, max_seq_len=LONGEST, tokens_per_block=BLOCK)
        self.scheduler = Scheduler(limits, BlockPool(64))
        self.eviction = DeviceEviction(parse_kv_policy(self.kv), MODEL, self.scheduler, piece=lambda *_: 24)
        storage = torch.zeros(LAYERS, 65, 2, KV_HEADS, BLOCK, DIM, dtype=torch.bfloat16)
        self.tables = torch.zeros(4, LONGEST // BLOCK + 1, dtype=torch.int32)
        self.eviction.attach(storage, 4)

    def serve(self, prompt: int, output: int, row: int) -> int:
        """One request from its prompt to its end; its rounds."""
        sequence = make_sequence(f"{self.kv}-{prompt}", prompt, output, self.kv)
        self.eviction.admit(sequence)
        for count in (prompt, *[1] * (output - 1)):
            self._step(sequence, count, row)
        self.eviction.forget(sequence)
        self.scheduler.pool.free(sequence.block_table, sequence.request_id)
        return sequence.evictions

    def _step(self, sequence: Sequence, count: int, row: int) -> None:
        needed = -(-sequence.capped(sequence.cache_len + count) // BLOCK) - len(sequence.block_table)
        sequence.block_table += self.scheduler.pool.allocate(max(0, needed), sequence.request_id)
        sequence.output_ids[:] = [0] * max(0, sequence.num_tokens + count - sequence.prompt_len)
        laid = TabledRow(
            sequence=sequence,
            start=0,
            count=count,
            position=sequence.num_tokens,
            cached=sequence.cache_len,
            ends_piece=True,
            observed=True,
            table=self.tables[row],
        )
        if count == 1:
            self.eviction.ring_places([laid])
        else:
            queries = torch.zeros(count + 3, HEADS, DIM, dtype=torch.bfloat16)[3:]
            lse = torch.zeros(count + 3, HEADS)[3:]
            segments = self.eviction.segments(laid)
            for layer in range(LAYERS):
                for segment in segments:
                    part = slice(segment.start, segment.start + segment.count)
                    self.eviction.after_segment(layer, laid, segment, queries[part], lse[part])
        sequence.advance(count)
        self.eviction.end_step([laid])


def main() -> None:
    for module in (paged, ranking, slots):
        module.use_triton = lambda *_: True
    counts, rounds = {}, 0
    for kv in sys.argv[1:]:
        served = Served(kv)
        with compile_only(90) as found:
            for row, (prompt, output) in enumerate([(70, 40), (99, 17), (131, 33), (64, 50)]):
                rounds += served.serve(prompt, output, row)
        counts[kv] = collections.Counter(kernel.kernel for kernel in found)
    sys.stdout.write(json.dumps({"counts": counts, "rounds": rounds}) + "\n")


if __name__ == "__main__":
    main()
