"""What one GPU can do at most, measured: the ceilings that every other record is held against.

    python3 bench/gpu/probe.py --out probe.json [--time-limit-s 60] [--rehearse]

Reading memory (a Triton kernel that only reads, over 8 GiB), copying it, bfloat16 and FP8 matrix products at 8192^3 and
at the shapes of Llama 3 70B with 4,096 and 512 tokens, and what a launch, a graph node and a round trip to the host cost.
Every rate is the median of its samples; the ceiling of a kind is the best shape's. Clocks are noted after each item.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from bench.gpu.common import Clocks, Session, Timing, arguments, clocks, table
from bench.gpu.sources import began_s
from trtkit.spec.dtype import DType
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source

KIND = "gpu-probe"
COPY_BYTES_S = "copy_bytes_s"
GRAPH_NODE_S = "graph_node_s"
LAUNCH_S = "launch_s"
ROUND_TRIP_S = "round_trip_s"
READ_BYTES = 8 << 30
MATRICES = {"qkv": (10240, 8192), "dense": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}
"""Llama 3 70B's block matrices, [out, in]."""
SQUARE = 8192
LAUNCHES = 1000


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """One thing measured. `value` in `unit` is None in a rehearsal; `ok` is False where the result was wrong.

    Raw times are the timing's, or `raw_s` on the host.
    """

    name: str
    value: float | None
    unit: str
    bytes_moved: int | None = None
    flops: float | None = None
    timing: Timing | None = None
    clocks_after: Clocks = field(default_factory=Clocks)
    ok: bool = True
    note: str = ""
    raw_s: tuple[float, ...] = ()


class Probe:
    """The items, each adding its rows and ceilings to the session's record."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.small = session.rehearsal

    def read(self) -> None:
        """Read-only bandwidth, over a buffer no cache holds."""
        if self.small:
            source = self.session.randint(0, 100, (1 << 12,))
            self._row("read", lambda _: source.sum(), bytes_moved=source.numel() * 4)
            return
        from bench.gpu import probe_kernels

        right = probe_kernels.reads_right(self.session.device)
        free, _ = torch.cuda.mem_get_info()
        source = torch.empty(min(READ_BYTES, int(free * 0.8)) // 4, dtype=torch.int32, device=self.session.device)
        source.random_()
        out = torch.empty(source.numel() // 4096, dtype=torch.int32, device=self.session.device)
        for tile, warps, tiles in probe_kernels.READ_SHAPES:
            moved = source.numel() // (tile * tiles) * tile * tiles * 4

            def call(_: int, shape: tuple[int, int, int] = (tile, warps, tiles)) -> None:
                probe_kernels.read_all(source, out, tile=shape[0], warps=shape[1], tiles=shape[2])

            name = f"read, {tiles} tiles of {tile} x 4 B, {warps} warps"
            self._row(name, call, bytes_moved=moved, limit=READ_BYTES_S, ok=right)
        self._row("read, torch.sum", lambda _: source.view(torch.float32).sum(), bytes_moved=source.numel() * 4)

    def copy(self) -> None:
        """Copying, bytes read and written together; and writing alone."""
        count = 1 << 12 if self.small else READ_BYTES // 8
        source = torch.zeros(count, dtype=torch.int32, device=self.session.device)
        target = torch.empty_like(source)
        self._row("copy", lambda _: target.copy_(source), bytes_moved=count * 8, limit=COPY_BYTES_S)
        self._row("write", lambda _: target.zero_(), bytes_moved=count * 4)

    def squares(self, dtype: DType) -> None:
        """A large square product."""
        side = 64 if self.small else SQUARE
        self._product(f"{dtype.value} {side}^3", side, side, side, dtype)

    def shapes(self, dtype: DType, tokens: int) -> None:
        """The block matrices of Llama 3 70B."""
        for name, (outputs, inputs) in MATRICES.items():
            if self.small:
                outputs, inputs, tokens = outputs // 256, inputs // 256, 16
            self._product(f"{dtype.value} {name}, {tokens} tokens", tokens, outputs, inputs, dtype)

    def overheads(self) -> None:
        """What a launch costs the host, a node costs in a replayed graph, and a token's way to the host and back."""
        device = self.session.device
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        if self.small:
            self._row("launch, torch", lambda _: flag.add_(1), unit="s")
            return
        from bench.gpu import probe_kernels

        self._host_time("launch, torch", lambda: flag.add_(1))
        self._host_time("launch, Triton", lambda: probe_kernels.nothing(flag), limit=LAUNCH_S)
        self._row("graph node, Triton", lambda _: probe_kernels.nothing(flag), unit="s", limit=GRAPH_NODE_S)
        self._row("graph node, torch", lambda _: flag.add_(1), unit="s")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LAUNCHES):
                probe_kernels.nothing(flag)
        # One at a time: a full queue would make the host wait for the device.
        self._host_time(f"launch, graph of {LAUNCHES} nodes", graph.replay, calls=1)
        self._round_trip(torch.zeros(64, dtype=torch.int32, device=device))

    def _round_trip(self, values: Tensor) -> None:
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        event = torch.cuda.Event()

        def there_and_back() -> None:
            values.copy_(pinned, non_blocking=True)
            pinned.copy_(values, non_blocking=True)
            event.record()
            event.synchronize()

        self._host_time("round trip, 256 B to the device and back", there_and_back, limit=ROUND_TRIP_S)

    def _product(self, name: str, rows: int, columns: int, inner: int, dtype: DType) -> None:
        session, flops = self.session, 2.0 * rows * columns * inner
        if dtype is not DType.FP8:
            kind = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16}[dtype]
            left, right = session.randn(rows, inner, dtype=kind), session.randn(columns, inner, dtype=kind)
            self._row(name, lambda _: left @ right.T, flops=flops, limit=matmul_key(dtype))
            return
        left = session.randn(rows, inner, dtype=torch.float8_e4m3fn)
        right = session.randn(columns, inner, dtype=torch.float8_e4m3fn)
        for how, scales in fp8_scales(rows, columns, session.device).items():
            call = scaled_product(left, right, *scales)
            self._row(f"{name}, {how}", call, flops=flops, limit=matmul_key(dtype))

    def _row(  # noqa: PLR0917
        self,
        name: str,
        call: Callable[[int], object],
        unit: str = "",
        bytes_moved: int | None = None,
        flops: float | None = None,
        limit: str = "",
        ok: bool = True,
    ) -> None:
        timing = self.session.time(call, budget_s=0.25)
        unit = unit or ("B/s" if bytes_moved else "FLOP/s")
        value = None
        if timing is not None:
            seconds = timing.median_us / 1e6
            value = seconds if unit == "s" else (bytes_moved or flops or 0.0) / seconds
        row = ProbeRow(
            name=name, value=value, unit=unit, bytes_moved=bytes_moved, flops=flops, timing=timing, ok=ok,
            clocks_after=clocks(rehearsal=self.small),
        )  # fmt: skip
        self._keep(row, limit)

    def _host_time(self, name: str, run: Callable[[], object], limit: str = "", calls: int = 100) -> None:
        """Host time of a call, median over rounds of so many; the device is idle before each round."""
        rounds = []
        for _ in range(9):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                run()
            rounds.append((time.perf_counter() - started) / calls)
        torch.cuda.synchronize()
        row = ProbeRow(
            name=name, value=median(rounds), unit="s", clocks_after=clocks(), note="host time", raw_s=tuple(rounds)
        )
        self._keep(row, limit)

    def _keep(self, row: ProbeRow, limit: str) -> None:
        limits = self.session.record.limits
        if limit and row.ok and row.value is not None:
            before = limits.get(limit)
            better = before is None or (row.value < before.value if row.unit == "s" else row.value > before.value)
            if better:
                limits[limit] = Measured(
                    value=row.value, unit=row.unit, source=Source.MEASURED, note=f"{row.name}, median"
                )
        self.session.add(row)


def fp8_scales(rows: int, columns: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Scales of `torch._scaled_mm`: one a tensor, or one a row of each side."""
    one = torch.ones((), device=device)
    return {
        "one scale": (one, one),
        "row-wise": (torch.ones(rows, 1, device=device), torch.ones(1, columns, device=device)),
    }


def scaled_product(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Callable[[int], Tensor]:
    """FP8 product `left @ right.T` to bfloat16, with the fast accumulation everybody serves with."""
    return lambda _: torch._scaled_mm(
        left, right.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def lines_of(session: Session) -> list[str]:
    """The ceilings, one a line."""
    record = session.record
    if record.rehearsal:
        return [f"probe: rehearsal, {len(record.rows)} items ran, no rates"]
    lines = [f"probe on {record.gpu}, clocks before: {_clocks(record.clocks_before)}"]
    rows = [["ceiling", "value", "from"]]
    for key, limit in record.limits.items():
        rows.append([key, _human(limit.value, limit.unit), limit.note])
    lines += table(rows)
    if record.clocks_after is not None:
        lines.append(f"clocks after: {_clocks(record.clocks_after)}")
    worst = sorted({reason for row in record.rows for reason in row.clocks_after.reasons} - {"idle"})
    lines.append(f"clock limits seen: {', '.join(worst) or 'none'}")
    lines += [f"WRONG RESULT: {row.name}" for row in record.rows if not row.ok]
    return lines + [f"failed: {note}"[:200] for note in record.notes] + _missing(record.not_run)


def _missing(names: Sequence[str]) -> list[str]:
    return [f"not run, no time left: {', '.join(names)}"] if names else []


def _human(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e6:.2f} us"
    return f"{value / 1e12:.3f} T{unit}"


def _clocks(found: Clocks) -> str:
    if found.sm_mhz is None:
        return "unknown"
    reasons = ", ".join(found.reasons) or "none"
    return (
        f"SM {found.sm_mhz} of {found.sm_max_mhz} MHz, memory {found.memory_mhz} MHz, {found.temperature_c} C, "
        f"{found.power_w} W, held by: {reasons}"
    )


def items(probe: Probe) -> list[tuple[str, float, Callable[[], object]]]:
    """What to measure, most important first, with the seconds each may need."""
    many, few = 4096, 512
    return [
        ("read", 8, probe.read),
        ("bf16 square", 3, lambda: probe.squares(DType.BF16)),
        ("fp8 square", 3, lambda: probe.squares(DType.FP8)),
        ("overheads", 2, probe.overheads),
        ("bf16 70B, 4096 tokens", 4, lambda: probe.shapes(DType.BF16, many)),
        ("fp8 70B, 4096 tokens", 6, lambda: probe.shapes(DType.FP8, many)),
        ("copy", 3, probe.copy),
        ("bf16 70B, 512 tokens", 4, lambda: probe.shapes(DType.BF16, few)),
        ("fp8 70B, 512 tokens", 6, lambda: probe.shapes(DType.FP8, few)),
        ("fp16 square", 3, lambda: probe.squares(DType.FP16)),
    ]


def main() -> None:
    """Run the items."""
    session = Session(KIND, arguments(__doc__, time_limit_s=60).parse_args(), ProbeRow, began_s=began_s())
    session.items(items(Probe(session)))
    session.finish(lines_of(session))


if __name__ == "__main__":
    main()
