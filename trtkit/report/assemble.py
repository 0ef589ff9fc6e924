"""Records to a `Report`: the only place in this package where results meet each other."""

from __future__ import annotations

from trtkit.plan.prices import PriceBook, load_prices
from trtkit.report.cells import Notes, condition
from trtkit.report.columns import Configuration, configurations
from trtkit.report.cost_rows import cost_section
from trtkit.report.facts import check_lines, definitions, environment_facts
from trtkit.report.model import Report
from trtkit.report.quality_rows import quality_section
from trtkit.report.records import Records
from trtkit.report.rows import detail_sections, memory_section, speed_sections
from trtkit.report.series import plots
from trtkit.report.verdict import tiles
from trtkit.spec.kv import KVFidelity
from trtkit.spec.result import BenchResult, tokens_per_step


def assemble(records: Records, prices: PriceBook | None = None, *, title: str = "trtkit comparison") -> Report:
    """Put the records side by side. Without `prices` the built-in price table is used.

    Args:
        records: what was measured; at least one record.
        prices: the price book, as `trtkit.plan.prices.load_prices` reads it.
        title: the page's heading.
    """
    found, superseded = configurations(records.bench, records.quality)
    notes = Notes()
    speed = speed_sections(found, notes)
    memory = memory_section(found, notes)
    cost, assumptions = cost_section(found, load_prices() if prices is None else prices, notes)
    quality = quality_section(found, notes)
    comparison = tuple(section for section in (*speed, memory, cost, quality) if section.rows)
    details = detail_sections(found, notes)
    environment, mixed = environment_facts(found)
    return Report(
        title=title,
        subtitle=_subtitle(found),
        columns=tuple(c.column for c in found),
        tiles=tiles(found, comparison),
        comparison=comparison,
        details=details,
        notes=(*notes.texts, *_fidelity_notes(found), *_reuse_notes(found), *_guess_notes(found), *mixed, *superseded),
        assumptions=assumptions,
        definitions=definitions((*comparison, *details), found),
        checks=check_lines(found),
        environment=environment,
        plots=plots(found, cost),
        problems=records.problems,
    )


def _subtitle(found: tuple[Configuration, ...]) -> str:
    models = dict.fromkeys(c.plan.model.name for c in found)
    devices = dict.fromkeys(c.column.device for c in found)
    started = sorted(r.environment.started_utc for c in found for r in c.records)
    when = started[0][:10] if started[0][:10] == started[-1][:10] else f"{started[0][:10]} to {started[-1][:10]}"
    return f"{', '.join(models)} on {', '.join(devices)}, {when}"


def _reuse_notes(found: tuple[Configuration, ...]) -> tuple[str, ...]:
    """What block reuse saved, for each record of an engine that has it on."""
    return tuple(
        f"{c.column.title}, {condition(result.workload)}: {_reused(result)}"
        for c in found
        if c.plan.limits.enable_block_reuse
        for result in c.bench
        if result.repeats
    )


def _guess_notes(found: tuple[Configuration, ...]) -> tuple[str, ...]:
    """How the guesses did, for each record of an engine that guesses."""
    return tuple(
        f"{c.column.title}, {condition(result.workload)}: speculation {c.plan.speculation.label}: {_guessed(result)}"
        for c in found
        if c.plan.speculation is not None
        for result in c.bench
        if result.repeats
    )


def _guessed(result: BenchResult) -> str:
    drafted = [repeat.kv.draft_tokens for repeat in result.repeats]
    accepted = [repeat.kv.accepted_tokens for repeat in result.repeats]
    if None in drafted or None in accepted:
        return "the runtime does not tell how many guesses were right"
    right, guessed = (sum(n or 0 for n in counts) for counts in (accepted, drafted))
    return f"{right:,} of {guessed:,} guessed tokens were right, {tokens_per_step(result.repeats):.2f} tokens a step"


def _reused(result: BenchResult) -> str:
    told = [repeat.kv.prompt_tokens_reused for repeat in result.repeats]
    found = [tokens for tokens in told if tokens is not None]
    if len(found) < len(told):
        return "prefixes are reused; the runtime does not tell how many prompt tokens were"
    every = sum(sample.prompt_tokens for repeat in result.repeats for sample in repeat.samples)
    return f"{sum(found):,} of {every:,} prompt tokens were found in blocks of earlier prompts and not computed again"


def _fidelity_notes(found: tuple[Configuration, ...]) -> tuple[str, ...]:
    texts = {
        KVFidelity.PREFILL_ONLY.value: "the policy acts after the prompt only; what decoding adds is never evicted",
        KVFidelity.GENERATED_ONLY.value: "all of a prompt is kept and the budget counts generated tokens only",
        KVFidelity.WINDOW_ONLY.value: "only sinks and a recent window are kept; this is not the policy asked for",
    }
    return tuple(
        f"{c.column.title}: KV fidelity {c.column.fidelity}: {texts[c.column.fidelity]}"
        for c in found
        if c.column.fidelity in texts
    )
