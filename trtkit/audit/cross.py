"""Checks between claims: what one number says about another of the same machine, and of the machine beside it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from trtkit.audit import claims as c
from trtkit.audit.claims import Claim
from trtkit.audit.physics import scenario_of
from trtkit.plan import work
from trtkit.plan.cost import cost_per_million
from trtkit.plan.roofline import prefill_floor_s
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.units import GB, HOURS_PER_MONTH, MILLION, MS_PER_S

RATES = (c.THROUGHPUT, c.DECODE, c.PER_USER)
COST_TOLERANCE = 0.05
IDENTITY_TOLERANCE = 0.10
SAVING_TOLERANCE = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Contradiction:
    """A claim (its row) that does not agree with others, with the arithmetic in one line."""

    row: int
    arithmetic: str


def contradictions(claims: Sequence[Claim]) -> Iterator[Contradiction]:
    """Everything that does not agree, each blamed on the row that says too much."""
    by_machine: defaultdict[tuple[object, ...], list[Claim]] = defaultdict(list)
    for claim in claims:
        by_machine[claim.configuration].append(claim)
    for group in by_machine.values():
        yield from _contexts(group)
        yield from _memory_holds_load(group)
        yield from _cost(group)
        yield from _loop(group)
    yield from _speedups(by_machine.values())


def _of(claims: Iterable[Claim], *kinds: str) -> list[Claim]:
    return [claim for claim in claims if claim.kind in kinds]


def _contexts(group: Sequence[Claim]) -> Iterator[Contradiction]:
    """The longer prompt costs at least the operations it has more: a fixed overhead cannot hide them."""
    times = sorted((t for t in _of(group, c.TTFT) if t.isl), key=lambda t: t.isl or 0)
    for short, long in itertools.pairwise(times):
        if (short.isl or 0) >= (long.isl or 0) or short.concurrency != long.concurrency:
            continue
        extra = _prefill_ms(long) - _prefill_ms(short)
        gap = long.value - short.value
        if gap < extra * 0.999:
            yield Contradiction(
                row=long.row,
                arithmetic=f"TTFT {long.isl}/{short.isl}: ratio {long.value / short.value:.2f}, operations "
                f"{_prefill_ms(long) / _prefill_ms(short):.2f}; {gap:,.0f} ms more for {extra:,.0f} ms of operations",
            )


def _prefill_ms(claim: Claim) -> float:
    return prefill_floor_s(scenario_of(claim)) * MS_PER_S / claim.sparsity


def _memory_holds_load(group: Sequence[Claim]) -> Iterator[Contradiction]:
    """What a claimed peak leaves beside the weights must hold the cache of the claimed load."""
    loads = [r for r in _of(group, *RATES, c.PER_GPU) if r.concurrency and r.isl]
    for peak in _of(group, c.MEMORY):
        quant = peak.precision.quant
        whole = peak.value > peak.gpu.memory_bytes / GB * 1.02 or peak.num_gpus == 1
        total = peak.value * (1 if whole else peak.num_gpus)
        left = total - work.weight_bytes(peak.model, quant) / GB
        if left < 0 or not loads:
            continue
        need, load = max(((_resident_gb(r), r) for r in loads), key=lambda pair: pair[0])
        if need > left:
            yield Contradiction(
                row=peak.row,
                arithmetic=f"{total:.4g} GB leave {left:.2f} GB beside the weights, but {load.concurrency} requests of "
                f"{load.isl} tokens hold {need:.2f} GB of KV",
            )


def _resident_gb(claim: Claim) -> float:
    scenario = scenario_of(claim)
    tokens = min(scenario.isl, scenario.kept_tokens or scenario.isl)
    return (claim.concurrency or 1) * tokens * claim.model.kv_bytes_per_token(claim.precision.quant.kv) / GB


def _cost(group: Sequence[Claim]) -> Iterator[Contradiction]:
    """A price per million tokens is the hour's price over the hour's tokens; a month's is its hours'."""
    rates = _of(group, c.THROUGHPUT, c.DECODE)
    for claim in _of(group, c.COST):
        if claim.usd_per_gpu_h is None:
            continue
        if claim.tokens_per_month:
            month = claim.usd_per_gpu_h * claim.num_gpus * HOURS_PER_MONTH
            value = month / claim.tokens_per_month * MILLION
            text = f"{month:,.0f} USD/month / {claim.tokens_per_month / MILLION:,.0f}M tokens"
        elif rates:
            best = max(rates, key=lambda r: r.value)
            value = cost_per_million(best.value, claim.usd_per_gpu_h, claim.num_gpus)
            text = f"{claim.num_gpus} x {claim.usd_per_gpu_h:g} USD/h / ({best.value:,.4g} tok/s x 3600 s)"
        else:
            continue
        # Less than full load only makes a token dearer, so a higher price may be honest; a lower one cannot be.
        wrong = claim.value < value * (1 - COST_TOLERANCE)
        if wrong or (claim.tokens_per_month and claim.value > value * (1 + COST_TOLERANCE)):
            yield Contradiction(row=claim.row, arithmetic=f"{text} = {value:.3f} USD per 1M, claimed {claim.value:.3f}")
    for claim in _of(group, c.MONTHLY):
        if claim.usd_per_gpu_h is None:
            continue
        value = claim.usd_per_gpu_h * claim.num_gpus * HOURS_PER_MONTH
        if abs(claim.value / value - 1) > COST_TOLERANCE:
            yield Contradiction(
                row=claim.row,
                arithmetic=f"{claim.num_gpus} x {claim.usd_per_gpu_h:g} USD/h x {HOURS_PER_MONTH} h = {value:,.0f} USD "
                f"per month, claimed {claim.value:,.0f}",
            )


def _loop(group: Sequence[Claim]) -> Iterator[Contradiction]:
    """Little's law and the E2E identity, for claims at one concurrency and one pair of lengths."""
    cells: defaultdict[tuple[int, int, int], dict[str, Claim]] = defaultdict(dict)
    for claim in group:
        if claim.concurrency and claim.isl and claim.osl and claim.accept_length == 1:
            cells[claim.concurrency, claim.isl, claim.osl].setdefault(claim.kind, claim)
    for (concurrency, _, osl), cell in cells.items():
        first, step, whole = cell.get(c.TTFT), cell.get(c.TPOT), cell.get(c.E2E)
        if first and step:
            e2e_ms = first.value + (osl - 1) * step.value
            text = f"TTFT {first.value:,.4g} + {osl - 1} x TPOT {step.value:,.4g} = {e2e_ms:,.0f} ms"
            if whole and abs(whole.value / e2e_ms - 1) > IDENTITY_TOLERANCE:
                yield Contradiction(row=whole.row, arithmetic=f"{text}, claimed E2E {whole.value:,.0f} ms")
        elif whole:
            e2e_ms, text = whole.value, f"E2E {whole.value:,.0f} ms"
        else:
            continue
        for rate, tokens in ((cell.get(c.THROUGHPUT), osl), (cell.get(c.REQUESTS), 1)):
            most = concurrency * tokens / e2e_ms * MS_PER_S
            if rate and rate.value > most * (1 + IDENTITY_TOLERANCE):
                yield Contradiction(
                    row=rate.row,
                    arithmetic=f"Little's law: {concurrency} requests in {text} make at most {most:,.4g}/s, "
                    f"claimed {rate.value:,.4g}/s",
                )


def _speedups(groups: Iterable[Sequence[Claim]]) -> Iterator[Contradiction]:
    """Fewer cached bytes explain at most the time that reading them took."""
    rates = [r for group in groups for r in _of(group, *RATES) if r.concurrency]
    full = {_load_key(r): r for r in rates if r.policy.is_full}
    for pruned in rates:
        base = full.get(_load_key(pruned))
        if pruned.policy.is_full or base is None or pruned.value <= base.value:
            continue
        running = pruned.concurrency or 1
        saved_s = running / base.value - running / pruned.value
        saved_gb = saved_s * pruned.num_gpus * pruned.gpu.memory_bandwidth_bytes_s / GB
        held_gb, what = _cache_held_gb(base)
        if saved_gb > held_gb * SAVING_TOLERANCE:
            yield Contradiction(
                row=pruned.row,
                arithmetic=f"{base.value:,.4g} -> {pruned.value:,.4g} tok/s saves {saved_s * MS_PER_S:.2f} ms per step, "
                f"the time to read {saved_gb:.1f} GB; {what} {held_gb:.2f} GB of KV in all",
            )


def _load_key(claim: Claim) -> tuple[object, ...]:
    plain = replace(claim, policy=KVPolicySpec())
    return (*plain.configuration, claim.kind, claim.concurrency, claim.isl, claim.osl, claim.accept_length)


def _cache_held_gb(base: Claim) -> tuple[float, str]:
    """The most cache the unpruned run can have read per step: its load's, and never more than fits."""
    quant = base.precision.quant
    room = (base.num_gpus * base.gpu.memory_bytes - work.weight_bytes(base.model, quant)) / GB
    if base.isl is None:
        return room, "memory beside the weights holds"
    tokens = base.isl + (base.osl or 1)
    held = (base.concurrency or 1) * tokens * base.model.kv_bytes_per_token(quant.kv) / GB
    return (held, f"{base.concurrency} requests of {tokens} tokens hold") if held <= room else (room, "memory holds")
