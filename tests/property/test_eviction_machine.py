"""A state machine over scheduler, pool and eviction's bookkeeping: over 100,000 random operations, no model.

The cache is real (one layer, two heads of two numbers) and holds each token's own name, so that any block that is
lost, doubled, shared or read after it was freed shows as a wrong name. Freed blocks are poisoned at once.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence, SequenceState
from trtkit.engine.slot_moves import move_slots
from trtkit.kv.moves import plan_moves
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.errors import TrtkitError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

HEADS, SIZE, BLOCKS = 2, 4, 24
POISON = -1.0
OPERATIONS = 100_000

MODEL = ModelSpec(
    name="names",
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=4,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=2,
    intermediate_size=4,
    vocab_size=8,
    max_position_embeddings=512,
)


class Machine:
    """Random admissions, steps, evictions, cancellations and forks, with a plain model of who holds what."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.limits = Limits(max_batch_size=6, max_num_tokens=24, max_seq_len=80, tokens_per_block=SIZE)
        self.pool = BlockPool(BLOCKS)
        self.scheduler = Scheduler(self.limits, self.pool)
        self.cache = PagedCache(MODEL, BLOCKS, SIZE, DType.FP32, "cpu")
        self.cache.layers[0][:BLOCKS] = POISON
        self.held: dict[Sequence, list[list[int]]] = {}
        self.done = {"admit": 0, "step": 0, "evict": 0, "cancel": 0, "fork": 0, "preempt": 0, "finish": 0}
        self.names = 0
        original = self.pool.free

        def free(blocks, owner):
            blocks = list(blocks)
            original(blocks, owner)
            self.cache.layers[0][blocks] = POISON

        self.pool.free = free

    @property
    def operations(self) -> int:
        return sum(self.done.values())

    def admit(self, prompt: int | None = None, output: int | None = None) -> None:
        self.names += 1
        prompt = int(self.random.integers(1, 50)) if prompt is None else prompt
        output = int(self.random.integers(1, 30)) if output is None else output
        request = Request(request_id=str(self.names), prompt_ids=(0,) * prompt, max_tokens=output)
        sequence = Sequence(request=request, arrival=self.names, max_new_tokens=output)
        if self.random.random() < 0.7:
            sequence.evicts = True
            sequence.prefill_quantum = int(self.random.integers(1, 17))
            sequence.kv_cap_tokens = int(self.random.integers(1, 30)) + max(8, sequence.prefill_quantum)
        try:
            self.scheduler.add(sequence)
        except TrtkitError:
            return
        self.held[sequence] = [[] for _ in range(HEADS)]
        self.done["admit"] += 1

    def fork(self) -> None:
        """A second request that repeats a first one's known tokens: nothing is shared, so nothing may leak."""
        if self.scheduler.running:
            parent = self.scheduler.running[int(self.random.integers(len(self.scheduler.running)))]
            self.admit(prompt=parent.known_len, output=max(1, parent.max_new_tokens - len(parent.output_ids)))
            self.done["fork"] += 1

    def step(self) -> None:
        step = self.scheduler.schedule()
        for sequence in step.preempted:
            self.held[sequence] = [[] for _ in range(HEADS)]
            self.done["preempt"] += 1
        self.cache.clear(step.new_blocks)
        for feed in step.feeds:
            self._write(feed.sequence, feed.count)
            feed.sequence.advance(feed.count)
            if feed.samples:
                feed.sequence.output_ids.append(0)
            if feed.ends_piece:
                self._maybe_evict(feed.sequence)
        for feed in step.feeds:
            ends = len(feed.sequence.output_ids) == feed.sequence.max_new_tokens
            # Reading everything at every step is most of the time; a wrong byte stays wrong until it is read.
            if ends or self.random.random() < 0.2:
                self._read(feed.sequence)
            if ends:
                self._finish(feed.sequence)
                self.done["finish"] += 1
        self.done["step"] += 1

    def cancel(self) -> None:
        everyone = self.scheduler.running + self.scheduler.waiting
        if everyone:
            self._finish(everyone[int(self.random.integers(len(everyone)))])
            self.done["cancel"] += 1

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self.held[sequence]

    def _name(self, sequence: Sequence, head: int, position: int) -> int:
        return (int(sequence.request_id) * HEADS + head) * 100 + position

    def _write(self, sequence: Sequence, count: int) -> None:
        slots = np.arange(sequence.cache_len, sequence.cache_len + count)
        table = np.asarray(sequence.block_table)
        rows = self.cache.write_rows(table[slots // SIZE], slots % SIZE)
        names = []
        for position in range(sequence.num_tokens, sequence.num_tokens + count):
            for head in range(HEADS):
                self.held[sequence][head].append(self._name(sequence, head, position))
            token = [self._name(sequence, head, position) for head in range(HEADS)]
            names += token + [n + 0.5 for n in token]
        self.cache.rows(0).index_copy_(0, rows, torch.tensor(names)[:, None].expand(-1, 2))

    def _maybe_evict(self, sequence: Sequence) -> None:
        if sequence.kv_cap_tokens is None:
            return
        headroom = max(8, sequence.prefill_quantum or 1)
        budget = sequence.kv_cap_tokens - headroom
        over = sequence.cache_len > budget
        if sequence.num_tokens > sequence.prompt_len:
            over = sequence.cache_len >= sequence.kv_cap_tokens
        if not over:
            return
        length = sequence.cache_len
        keep = np.stack([np.sort(self.random.permutation(length)[:budget]) for _ in range(HEADS)])
        self._read(sequence)
        keys, _ = self.cache.read(0, sequence.block_table, length)
        for head in range(HEADS):
            self.held[sequence][head] = [int(keys[head, slot, 0]) for slot in keep[head]]
        move_slots(self.cache, sequence.block_table, plan_moves(torch.from_numpy(keep), length))
        sequence.cache_len = budget
        self.scheduler.trim(sequence)
        self.done["evict"] += 1

    def _read(self, sequence: Sequence) -> None:
        """What the cache holds is what the plain model says, key and value, head by head, in any order."""
        if sequence.state is not SequenceState.RUNNING:
            return
        keys, values = self.cache.read(0, sequence.block_table, sequence.cache_len)
        for head in range(HEADS):
            seen = keys[head, :, 0].sort().values
            assert torch.equal(seen, torch.tensor(sorted(self.held[sequence][head]), dtype=torch.float32))
            assert torch.equal(values[head, :, 1], keys[head, :, 0] + 0.5), "a value left its key"

    def run(self, operations: int) -> None:
        while self.operations < operations:
            draw = self.random.random()
            if draw < 0.25:
                self.admit()
            elif draw < 0.28:
                self.cancel()
            elif draw < 0.30:
                self.fork()
            elif self.scheduler.has_work:
                self.step()
            if self.operations % 64 == 0:
                self.scheduler.check()
        while self.scheduler.has_work:
            self.step()
        self.scheduler.check()


class Shrinkable(RuleBasedStateMachine):
    """The same machine under hypothesis, which shrinks a failure to its fewest operations."""

    @initialize(seed=st.integers(0, 1 << 16))
    def begin(self, seed: int) -> None:
        self.machine = Machine(seed)

    @rule(prompt=st.integers(1, 49), output=st.integers(1, 29))
    def admit(self, prompt: int, output: int) -> None:
        self.machine.admit(prompt, output)

    @precondition(lambda self: self.machine.scheduler.has_work)
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.machine.scheduler.has_work:
                self.machine.step()

    @rule()
    def fork(self) -> None:
        self.machine.fork()

    @rule()
    def cancel(self) -> None:
        self.machine.cancel()

    @invariant()
    def books_balance(self) -> None:
        self.machine.scheduler.check()


TestShrinkable = Shrinkable.TestCase
TestShrinkable.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def check_machine(seed: int, operations: int) -> Machine:
    machine = Machine(seed)
    machine.run(operations)
    assert machine.pool.num_free == BLOCKS, "blocks are lost once everybody is gone"
    assert not machine.held
    return machine


def test_blocks_are_conserved_and_poison_is_never_read_under_random_operations():
    machine = check_machine(seed=0, operations=2_000)
    assert min(machine.done.values()) > 5, machine.done


@pytest.mark.slow
def test_a_hundred_thousand_random_operations_lose_no_block_and_read_no_poison():
    machines = [check_machine(seed, OPERATIONS // 8) for seed in range(1, 9)]
    total = {name: sum(machine.done[name] for machine in machines) for name in machines[0].done}
    assert sum(total.values()) >= OPERATIONS
    assert min(total.values()) > 500, total
