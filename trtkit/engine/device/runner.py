"""`DeviceRunner`: a runner that launches steps and collects their tokens later.

Decode-only steps run in static memory, captured as CUDA graphs where there is CUDA; steps with prompts run eagerly
through the same kernels. Tokens stay on the device and are read back one step late, so the host never waits for the
step it launches. On a CPU the kernels' torch twins run: that is how tests prove that it writes the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trtkit.engine.batch import RowInput
from trtkit.engine.device.decode import DecodeBuffers, LastTokens
from trtkit.engine.device.eviction import DeviceEviction
from trtkit.engine.device.graphs import Capture, DecodeGraphs, buckets
from trtkit.engine.device.layout import NOWHERE, DeviceRow, DeviceStep, RowFacts, row_order, send_mixed
from trtkit.engine.device.memory import device_bytes, memory_split
from trtkit.engine.device.model import Parts, forward, logits
from trtkit.engine.device.sampling import draw_into
from trtkit.engine.device.segments import Segment
from trtkit.engine.device.staging import Fence, Field, Layout, Staging, fence, pinned
from trtkit.engine.matmul import plain
from trtkit.engine.observer import EvictionCounters
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.rope import RopeTable
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence, blocks_for
from trtkit.engine.step import Draw, StepInput, one_by_one
from trtkit.engine.weights import Linear, ModelWeights
from trtkit.kernels.dispatch import disabled, num_multiprocessors
from trtkit.kernels.paged import DecodeWorkspace, decode_splits
from trtkit.kernels.sampling import greedy
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.plan import Limits
from trtkit.spec.speculation import decode_rows

DeviceObserverFactory = Callable[[PagedCache, Scheduler], DeviceEviction]


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A launched step: its tokens on their way to the host, and which of them are wanted, in order."""

    tokens: Tensor
    wanted: list[int]
    arrived: Fence


class DeviceRunner:
    """See the module. `max_in_flight` steps may be launched and not yet collected while another one is launched."""

    def __init__(  # noqa: PLR0913 - what is shared, and knobs by keyword
        self,
        weights: ModelWeights,
        cache: PagedCache,
        limits: Limits,
        observer: DeviceEviction | None = None,
        *,
        max_in_flight: int = 1,
        capture: Capture | None = None,
        draft_tokens: int = 0,
        activation_bytes: int | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Reserve static memory and capture the decode steps, if there is a `capture`.

        With `draft_tokens` decode steps have room for that many guesses of each request, as far as 64 rows go.
        `activation_bytes`, the peak of the largest step, is passed on in `memory`, `notes` among `notes`.
        """
        device, model = cache.device, weights.model
        self.weights = plain_weights(weights)
        self.cache = cache
        self.max_in_flight = max_in_flight
        rows = decode_rows(limits.max_batch_size, draft_tokens)
        self.most_rows: int | None = rows
        self._observer = observer
        self._counters = EvictionCounters() if observer is None else observer.counters
        self._places: dict[Sequence, int] = {}
        self._free = list(range(limits.max_batch_size - 1, -1, -1))
        self._no_table: Tensor = torch.zeros(0, dtype=torch.int32, device=device)
        if observer is not None:
            observer.attach(cache.storage, limits.max_batch_size, dtype=weights.dtype)
        rope = RopeTable(model.rope, model.head_dim, limits.max_seq_len, weights.dtype, str(device))
        self._parts = Parts(
            weights=self.weights,
            rope=rope,
            cache=cache,
            workspace=_workspace(weights, rows, device),
            rings=observer.rings if observer is not None and observer.ring_size else None,
            observer=observer,
        )
        columns = blocks_for(limits.max_seq_len, limits.tokens_per_block)
        self._last = LastTokens(limits.max_batch_size, device)
        self._buffers = DecodeBuffers(self._parts, rows, columns, self._last)
        self._staging = Staging(device, rows * (8 + columns) + 8 * limits.max_num_tokens)
        self._answers = [pinned(rows, device) for _ in range(max_in_flight + 2)]
        self._turn = 0
        self._given_notes = notes
        before = device_bytes(device)
        self._graphs = self._captured(buckets(rows), capture)
        self._memory = memory_split(before, device_bytes(device), self.weights, cache, activation_bytes)

    @torch.inference_mode()
    def _captured(self, sizes: tuple[int, ...], capture: Capture | None) -> DecodeGraphs:
        return DecodeGraphs(sizes, self._buffers.work, capture, prepare=self._buffers.rehearse)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the device by what holds them, when the runner was made; empty where nobody can tell (a CPU)."""
        return self._memory

    @property
    def notes(self) -> tuple[str, ...]:
        """What does not run as it should, one line each."""
        fallen = (f"{family} kernels fell back to torch: {why}" for family, why in disabled().items())
        return (*self._given_notes, *self._graphs.notes, *fallen)

    @property
    def observer(self) -> DeviceEviction | None:
        """What evicts, if anything does."""
        return self._observer

    @property
    def counters(self) -> EvictionCounters:
        """Totals of eviction."""
        return self._counters

    @property
    def failures(self) -> list[tuple[Sequence, str]]:
        """Sequences that eviction has to give up, each with its line."""
        return [] if self._observer is None else list(self._observer.failed.items())

    def admit(self, sequence: Sequence, default: KVPolicySpec) -> None:
        """Let eviction prepare a sequence under its own policy, or else the engine's.

        Raises:
            TrtkitError: the policy cannot be carried out here.
        """
        policy = sequence.request.kv or default
        sequence.kv_policy = policy
        if self._observer is not None:
            self._observer.admit(sequence)
            sequence.joins_pieces = sequence.evicts and sequence.prefill_quantum is not None
        elif not policy.is_full:
            raise UnsupportedError(f"KV policy {policy.label!r}: this engine was opened without eviction")

    def forget(self, sequence: Sequence) -> None:
        """A sequence was preempted or has ended."""
        if self._observer is not None:
            self._observer.forget(sequence)
        if sequence in self._places:
            self._free.append(self._places.pop(sequence))

    @torch.inference_mode()
    def launch(self, step: StepInput) -> InFlight:
        """Start a step. Its tokens are on their way before eviction works, which they do not depend on."""
        if any(row.drafts for row in step.rows):
            step = one_by_one(step)
        if all(len(row.token_ids) == 1 for row in step.rows):
            laid, tokens_R, wanted = self._launch_decode(step)
        else:
            laid, tokens_R, wanted = self._launch_mixed(step)
        flight = self._answer(tokens_R, wanted)
        self._advance(laid)
        return flight

    def collect(self, launched: InFlight) -> list[int]:
        """Wait for a step; its tokens, in the order of the rows that draw."""
        launched.arrived.wait()
        if self._observer is not None:
            self._observer.poll()
        tokens: list[int] = launched.tokens.tolist()
        return [tokens[index] for index in launched.wanted]

    def take_back(self, sequence: Sequence, count: int) -> None:
        """Nothing to do: kernels never read a slot that is not live."""

    @torch.inference_mode()
    def run(self, inputs: list[RowInput], new_blocks: list[int]) -> tuple[DeviceStep, Tensor]:
        """One step, eagerly: as laid out, and hidden states before the final norm, [T, E].

        `new_blocks` need no clearing: kernels never read a slot that is not live.
        """
        del new_blocks
        step = send_mixed(inputs, row_order(inputs, self._watched), self._facts(inputs), self._staging)
        residual_TE, delta_TE = forward(self._parts, step, step.token_ids_T)
        self._advance(step)
        return step, residual_TE.add_(delta_TE)

    @torch.inference_mode()
    def logits(self, hidden_TE: Tensor, tokens: list[int]) -> Tensor:
        """Float32 logits of some of the step's tokens, [R, V]."""
        index = torch.tensor(tokens, device=hidden_TE.device)
        return logits(self.weights, hidden_TE.index_select(0, index), None).float()

    def close(self) -> None:
        """Release weights, cache and everything captured. The runner cannot be used afterwards."""
        self.cache.release()
        device = self.cache.device
        del self.weights, self._parts, self._buffers, self._graphs
        self._observer = None
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _launch_decode(self, step: StepInput) -> tuple[DeviceStep, Tensor, list[int]]:
        """A step in static memory."""
        size = self._graphs.bucket(len(step.rows))
        facts = self._facts(step.rows)
        places = self._targets(step.rows, facts)
        layout = self._buffers.layout(size)
        laid = layout.send(step.rows, places, facts, self._staging)
        self._graphs.run(size)
        tokens_B = self._buffers.tokens_B[:size]
        if _any_drawn(step.draws):
            draw_into(tokens_B, self._buffers.logits_BV[:size], step.draws, self._staging)
            self._last.store(tokens_B, layout.targets)
        return laid, tokens_B, [index for index, draw in enumerate(step.draws) if draw is not None]

    def _launch_mixed(self, step: StepInput) -> tuple[DeviceStep, Tensor, list[int]]:
        """A step with prompts in it."""
        facts = self._facts(step.rows)
        laid = send_mixed(step.rows, row_order(step.rows, self._watched), facts, self._staging)
        ids_T = self._last.pick(laid.token_ids_T, laid.sources_T)
        residual_TE, delta_TE = forward(self._parts, laid, ids_T)
        drawn = [index for index, draw in enumerate(step.draws) if draw is not None]
        if not drawn:
            return laid, self._buffers.tokens_B[:0], []
        last = laid.last_tokens
        whole = Field(shape=(len(drawn),))
        sent = self._staging.send(
            Layout({"rows": whole, "places": whole}),
            {
                "rows": [last[index] for index in drawn],
                "places": self._targets([step.rows[index] for index in drawn], facts),
            },
        )
        chosen = (residual_TE.index_select(0, sent["rows"]), delta_TE.index_select(0, sent["rows"]))
        logits_RV = logits(self.weights, *chosen)
        tokens_R = greedy(logits_RV)
        draw_into(tokens_R, logits_RV, [step.draws[index] for index in drawn], self._staging)
        self._last.store(tokens_R, sent["places"])
        return laid, tokens_R, list(range(len(drawn)))

    def _answer(self, tokens_R: Tensor, wanted: list[int]) -> InFlight:
        """Start the copy of a step's tokens to the host."""
        self._turn = (self._turn + 1) % len(self._answers)
        answer = self._answers[self._turn][: tokens_R.shape[0]]
        answer.copy_(tokens_R, non_blocking=True)
        return InFlight(tokens=answer, wanted=wanted, arrived=fence(self.cache.device))

    def _advance(self, step: DeviceStep) -> None:
        for row in step.rows:
            row.sequence.advance(row.count)
        if self._observer is not None:
            self._observer.end_step(step.rows)

    @staticmethod
    def _targets(rows: Seq[RowInput], facts: RowFacts) -> list[int]:
        """Where each row's token is kept; nowhere that is read if it comes after a guess."""
        return [facts.dump if row.ahead else facts.place_of[row.sequence] for row in rows]

    def _facts(self, inputs: list[RowInput]) -> RowFacts:
        for item in inputs:
            if item.sequence not in self._places:
                self._places[item.sequence] = self._free.pop()
        return RowFacts(
            place_of=self._places,
            dump=self._last.dump,
            no_table=self._no_table,
            ring_places=self._ring_places,
            segments=self._segments,
        )

    def _ring_places(self, rows: Seq[DeviceRow]) -> list[int]:
        return [NOWHERE] * len(rows) if self._observer is None else self._observer.ring_places(rows)

    def _segments(self, row: DeviceRow) -> tuple[Segment, ...] | None:
        if self._observer is None or not (row.observed and row.sequence.evicts):
            return None
        return self._observer.segments(row)

    def _watched(self, item: RowInput) -> bool:
        return self._observer is not None and item.observed and item.sequence.evicts


def plain_weights(weights: ModelWeights) -> ModelWeights:
    """The same weights without the CPU engine's packing."""

    def unpacked(matrix: Linear) -> Linear:
        return replace(matrix, weight=plain(matrix.weight))

    layers = tuple(
        replace(
            layer,
            qkv=unpacked(layer.qkv),
            dense=unpacked(layer.dense),
            gate_up=unpacked(layer.gate_up),
            down=unpacked(layer.down),
        )
        for layer in weights.layers
    )
    return replace(weights, layers=layers, lm_head=plain(weights.lm_head))


def _workspace(weights: ModelWeights, most_rows: int, device: torch.device) -> DecodeWorkspace:
    """Scratch for the decode attention of any number of rows."""
    model, processors = weights.model, num_multiprocessors(device)
    most = max(rows * decode_splits(rows, model.num_kv_heads, processors) for rows in range(1, most_rows + 1))
    return DecodeWorkspace.empty(most, model.num_heads, model.head_dim, 1, device)


def _any_drawn(draws: Seq[Draw | None]) -> bool:
    return any(draw is not None and draw.how.temperature > 0 for draw in draws)
