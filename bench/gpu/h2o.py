"""What H2O costs and gains on one GPU: Llama 3 70B's shape with random INT8 weights, full cache and half of it in turns.

    python3 bench/gpu/h2o.py --out h2o.json [--layers 80] [--time-limit-s 120] [--rehearse]

Both variants decode by turns on the same weights, so a drifting clock meets both. Steps: at equal live length, where the
difference is what eviction costs, and at equal request, where it is what the smaller cache saves. Then the time to the
first token, the blocks a request holds, and how many 4K requests are in flight in equal memory: as many steps as time
allows on the device, and the whole load replayed through the scheduler alone, which counts the same.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import sources
from bench.gpu.common import Session, arguments, table
from bench.gpu.forecast import datasheet_limits
from bench.gpu.h2o_runs import (
    EvictionClock,
    Paced,
    Setup,
    first_token_ms,
    replay_load,
    requests_of,
    round_bytes,
    run_load,
)
from bench.gpu.h2o_scale import Scale, real_scale, rehearsal_scale
from bench.gpu.llama70b import detect_gpu
from trtkit.engine.device.eviction import RING_QUERIES
from trtkit.engine.device.setup import checked_kernels
from trtkit.engine.dummy import dummy_weights
from trtkit.engine.loop import EmbeddedEngine
from trtkit.spec.errors import TrtkitError
from trtkit.spec.limits import READ_BYTES_S
from trtkit.spec.measured import Measured, Source
from trtkit.spec.quant import quant_for
from trtkit.spec.units import GB

KIND = "gpu-h2o"
FULL = "full"
RESERVE_BYTES = int(2.5 * GB)
"""Left free beside weights and pool: activations of a step of 4,096 tokens, widened weights, graphs (assumed)."""
PAIR_BYTES = int(1.0 * GB)
"""What a second engine on the same weights takes besides its pool (assumed)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant in one item. `samples` are the rounds behind the values, in order, and `gaps_ms` every step of them."""

    item: str
    variant: str
    values: dict[str, Measured] = field(default_factory=dict)
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)


class Bench:
    """Items of one run; engines and weights are made when first asked for."""

    def __init__(self, session: Session, scale: Scale) -> None:
        self.session, self.scale = session, scale
        self.rng = np.random.default_rng(session.record.seed)
        self._setup: Setup | None = None
        self._pair: dict[str, EmbeddedEngine] = {}
        self._clock: EvictionClock | None = None

    @property
    def setup(self) -> Setup:
        """Random INT8 weights of the true shape."""
        if self._setup is None:
            quant = quant_for("int8", compute=self.scale.compute)
            device = self.session.device.type
            if not self.session.rehearsal:
                self.session.record.notes += checked_kernels(
                    self.scale.model, quant, quant.kv, self.scale.limits, device
                )
            weights = dummy_weights(self.scale.model, quant, device=device)
            self._setup = Setup(weights=weights, kv_dtype=quant.kv, device=device)
        return self._setup

    def blocks(self) -> int:
        """Blocks of KV memory there is room for beside the weights."""
        if self.session.rehearsal:
            return 240
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - RESERVE_BYTES
        return max(1, free // self.setup.block_bytes(self.scale.limits))

    def pair(self) -> dict[str, EmbeddedEngine]:
        """A full engine and one with half the cache, alive together, each with room for the same batch."""
        if not self._pair:
            scale, size = self.scale, self.scale.limits.tokens_per_block
            whole = -(-(scale.isl + scale.measured_steps) // size)
            half = min(whole, -(-(scale.budget + max(256, scale.budget // 8) + scale.interval) // size))
            room = self.blocks() - PAIR_BYTES * (not self.session.rehearsal) // self.setup.block_bytes(scale.limits)
            self.batch = max(1, min(scale.most_batch, room // (whole + half + 2)))
            limits = replace(scale.limits, max_batch_size=self.batch)
            self._pair = {
                FULL: self.setup.open(FULL, limits, self.batch * (whole + 1)),
                scale.half: self.setup.open(scale.half, limits, self.batch * (half + 1)),
            }
            self._clock = EvictionClock(self._pair[scale.half])
            notes = self.session.record.notes
            notes += sorted({note for engine in self._pair.values() for note in engine.info.notes} - set(notes))
        return self._pair

    def close(self) -> None:
        """Let the pair's memory go."""
        for engine in self._pair.values():
            engine.close()
        self._pair, self._clock = {}, None
        # The clock and the eviction it times hold each other, and with them the cache.
        gc.collect()

    def steps(self, item: str, prompts: dict[str, int]) -> None:
        """Decode in turns; `prompts` are the lengths each variant starts from."""
        scale, output = self.scale, self.scale.measured_steps
        engines = self.pair()
        clock = self._clock
        assert clock is not None, "the pair brings it"
        paced = {
            kv: Paced(engine, requests_of(scale.model, self.batch, prompts[kv], output, self.rng))
            for kv, engine in engines.items()
        }
        clock.take_ms()
        gaps: dict[str, list[float]] = {kv: [] for kv in engines}
        blocks: dict[str, list[float]] = {kv: [] for kv in engines}
        spent: list[float] = []
        before = engines[scale.half].kv_stats().evictions
        for _ in range(scale.rounds):
            for kv, run in paced.items():
                gaps[kv] += run.steps_ms(scale.chunk)
                blocks[kv].append(engines[kv].kv_stats().blocks_used / self.batch)
            spent += clock.take_ms()[-scale.chunk :]
        rounds = engines[scale.half].kv_stats().evictions - before
        for kv, run in paced.items():
            run.close()
            self._add_steps(item, kv, gaps, blocks[kv], rounds if kv == scale.half else 0, spent)

    def _add_steps(
        self, item: str, kv: str, gaps: dict[str, list[float]], blocks: list[float], evictions: int, spent: list[float]
    ) -> None:
        chunk = self.scale.chunk
        means = {
            each: [statistics.fmean(found[at : at + chunk]) for at in range(0, len(found), chunk)]
            for each, found in gaps.items()
        }
        values = {
            "batch": self._counted(self.batch, "requests"),
            "held": self._counted(statistics.fmean(blocks) * self.scale.limits.tokens_per_block, "tokens/request"),
            "kv_bytes": self._counted(
                statistics.fmean(blocks) * self.setup.block_bytes(self.scale.limits), "B/request"
            ),
            "evictions": self._counted(evictions, "rounds"),
        }
        samples: dict[str, tuple[float, ...]] = {}
        if not self.session.rehearsal:
            samples["step_ms"], samples["gaps_ms"] = tuple(means[kv]), tuple(gaps[kv])
            values["step_ms"] = _spread(means[kv], "ms")
            if kv != FULL:
                ratios = [ours / full - 1 for ours, full in zip(means[kv], means[FULL], strict=True)]
                samples["over_full"] = tuple(ratios)
                values["over_full"] = _spread(ratios, "share")
                values["eviction_ms_per_step"] = Measured(
                    value=statistics.fmean(spent), unit="ms", source=Source.MEASURED, note="CUDA events around end_step"
                )
                samples["eviction_ms"] = tuple(spent)
                values |= self._floor()
        self.session.add(Row(item=item, variant=kv, values=values, samples=samples))

    def _floor(self) -> dict[str, Measured]:
        """What eviction must move per step, over the datasheet's rate; nothing for a GPU that the catalog lacks."""
        scale = self.scale
        try:
            rate = datasheet_limits(detect_gpu())[READ_BYTES_S]
        except (TrtkitError, KeyError):
            return {}
        moved = round_bytes(scale.model, scale.budget, scale.interval, RING_QUERIES) * self.batch / scale.interval
        floor = Measured(
            value=moved / rate.value * 1e3, unit="ms", source=Source.DATASHEET, note="bytes over read rate"
        )
        return {"eviction_floor_ms_per_step": floor}

    def equal_live(self) -> None:
        """A full cache as long as the cut one is on average: what is left is eviction's cost."""
        scale = self.scale
        live = scale.budget + scale.interval // 2
        self.steps("equal live length", {FULL: live - scale.measured_steps // 2, scale.half: scale.isl})

    def equal_request(self) -> None:
        """The same requests: what the smaller cache saves."""
        self.steps("equal request", {FULL: self.scale.isl, self.scale.half: self.scale.isl})

    def first_token(self) -> None:
        """Time to the first token of a long prompt, alone, in turns."""
        scale, found = self.scale, {kv: [] for kv in self.pair()}
        for _ in range(1 + scale.rounds):
            for kv, engine in self.pair().items():
                (request,) = requests_of(scale.model, 1, scale.isl, 1, self.rng)
                found[kv].append(first_token_ms(engine, request))
        for kv, times in found.items():
            kept = times[1:]
            values = {"prompt": self._counted(scale.isl, "tokens")}
            if not self.session.rehearsal:
                values["ttft_ms"] = _spread(kept, "ms")
            samples = {} if self.session.rehearsal else {"ttft_ms": tuple(kept)}
            self.session.add(Row(item="first token", variant=kv, values=values, samples=samples))

    def in_flight(self) -> None:
        """The same load in the same memory: rings and ledgers come out of H2O's pool."""
        self.close()
        scale, limits = self.scale, self.scale.limits
        blocks = self.blocks()
        lengths = [(scale.isl, scale.osl)] * scale.load
        for turn, kv in enumerate((FULL, scale.half)):
            side = self.setup.side_bytes(kv, limits)
            pool = blocks - -(-side // self.setup.block_bytes(limits))
            whole = replay_load(scale.model, kv, limits, pool, lengths)
            values = {
                "pool": self._counted(pool, "blocks"),
                "side_bytes": Measured(value=side, unit="B", source=Source.MODELED),
                "in_flight_whole_load": _modeled(whole.mean, "requests"),
                "preemptions_whole_load": _modeled(whole.preemptions, "preemptions"),
            }
            left = self.session.left_s - 8
            if self.session.rehearsal or left > 15 * (2 - turn):
                # A rehearsal is ended by whoever called it; on a slow machine it takes what it takes.
                deadline = math.inf if self.session.rehearsal else time.monotonic() + left / (2 - turn)
                engine = self.setup.open(kv, limits, pool)
                requests = requests_of(scale.model, scale.load, scale.isl, scale.osl, self.rng)
                seen = run_load(engine, requests, deadline)
                engine.close()
                same = replay_load(scale.model, kv, limits, pool, lengths, seen.steps)
                values |= {
                    "in_flight": self._counted(seen.mean or 0.0, "requests"),
                    "most_in_flight": self._counted(seen.most, "requests"),
                    "steps": self._counted(seen.steps, "steps"),
                    "replay_in_flight": _modeled(same.mean, "requests"),
                }
            self.session.add(Row(item="in flight", variant=kv, values=values))

    def _counted(self, value: float, unit: str) -> Measured:
        return Measured(value=float(value), unit=unit, source=Source.MEASURED)


def _modeled(value: float | None, unit: str) -> Measured:
    return Measured(value=float(value or 0), unit=unit, source=Source.MODELED, note="the scheduler, without a GPU")


def _spread(values: list[float], unit: str) -> Measured:
    """Median, with the lowest and the highest of the rounds."""
    return Measured(
        value=statistics.median(values),
        unit=unit,
        source=Source.MEASURED,
        low=min(values),
        high=max(values),
        note="low and high are the rounds'",
    )


def lines_of(session: Session) -> list[str]:
    """A short table: each item's variants side by side."""
    rows = [["item", "variant", "what", "value", "rounds"]]
    for row in session.record.rows:
        for key, value in row.values.items():
            form = ".2%" if value.unit == "share" else ",.4g"
            span = "" if value.low is None else f"{value.low:{form}}..{value.high:{form}}"
            number = f"{value.value:{form}}" + (f" {value.unit}" if value.unit != "share" else "")
            rows.append([row.item, row.variant, f"{key} ({value.source.value})", number, span])
    gain = _gain(session.record.rows)
    lines = table(rows) if len(rows) > 1 else []
    return lines + gain + [f"note: {note}"[:160] for note in session.record.notes[:6]]


def _gain(rows: list[Row]) -> list[str]:
    found = {row.variant == FULL: row.values for row in rows if row.item == "in flight"}
    lines = []
    for key in ("in_flight", "in_flight_whole_load"):
        if len(found) == 2 and all(key in values and values[key].value for values in found.values()):
            ratio = found[False][key].value / found[True][key].value
            lines.append(f"{key}: {ratio:.2f}x ({found[True][key].source.value})")
    return lines


def told(item: Callable[[], None]) -> Callable[[], None]:
    """An item whose refusals are kept as notes like its other failures, so that the next ones run."""

    def run() -> None:
        try:
            item()
        except TrtkitError as error:
            raise RuntimeError(str(error)) from error

    return run


def main() -> int:
    parser = arguments(__doc__, time_limit_s=150.0)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trtkit-path-") as metadata:
        sources.use(Path(metadata))
        session = Session(KIND, args, Row, began_s=sources.began_s())
        scale = rehearsal_scale() if args.rehearse else real_scale(args.layers)
        bench = Bench(session, scale)
        session.items(
            [
                ("equal live length", 45.0, told(bench.equal_live)),
                ("first token", 12.0, told(bench.first_token)),
                ("equal request", 30.0, told(bench.equal_request)),
                ("in flight", 5.0, told(bench.in_flight)),
            ]
        )
        session.finish(lines_of(session))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
