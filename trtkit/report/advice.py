"""The written read as Markdown and as one offline HTML page: words around numbers that `quality.advice` computed."""

from __future__ import annotations

import html
import re

from trtkit.quality.advice import Advice, Lever, Readiness
from trtkit.quality.compare import QualityComparison
from trtkit.report.compare import Block, html_block, html_page, markdown_block
from trtkit.spec.errors import UsageError
from trtkit.spec.units import MILLION

FORMATS = ("md", "html")
TITLE = "What to change, and what not"


def render_advice(advice: Advice, fmt: str) -> str:
    """The read in one of FORMATS.

    Raises:
        UsageError: another format.
    """
    if fmt not in FORMATS:
        raise UsageError(f"unknown format {fmt!r}: allowed are {', '.join(FORMATS)}")
    sections = [(block, _paragraphs(block.title, advice)) for block in _blocks(advice)]
    lists = [("What to do on Monday", monday(advice)), ("When not to", list(advice.cautions))]
    if advice.missing:
        lists.append(("Left out", list(advice.missing)))
    if fmt == "html":
        body = "".join(f"<p>{html.escape(p)}</p>{html_block(block)}" for block, p in sections)
        body += "".join(
            f"<section><h2>{title}</h2><ol>{''.join(f'<li>{_coded(t)}</li>' for t in items)}</ol></section>"
            for title, items in lists
        )
        return html_page(TITLE, body)
    parts = [f"# {TITLE}", ""]
    parts += [f"{p}\n\n{markdown_block(block)}" for block, p in sections]
    for title, items in lists:
        parts += [f"## {title}", "", *(f"{n}. {_plain(text)}" for n, text in enumerate(items, start=1)), ""]
    return "\n".join(parts)


def _coded(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _plain(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False)


def _paragraphs(title: str, advice: Advice) -> str:
    s = advice.situation
    if title.startswith("Today"):
        spend = "unknown" if s.spend_usd_month is None else f"{s.spend_usd_month:,.0f} USD a month"
        return (
            f"Traffic: {s.tokens_month / MILLION:,.4g}M output tokens a month. Bill: {spend}. Machines are assumed busy "
            f"{s.busy:.0%} of the month."
        )
    return "Ranked by readiness, then by saving per unit of friction. Savings are against what runs today."


def _blocks(advice: Advice) -> list[Block]:
    base = advice.baseline
    today = (
        ("configuration", "throughput", "machines", "cost a month"),
        (base.name, f"{base.tok_s:,.4g} tok/s ({base.source.value})", str(base.machines), f"{base.usd_month:,.0f} USD"),
    )
    rows = [("lever", "what changes", "saving a month", "friction", "quality", "verdict")]
    rows += [_row(lever, base.usd_month) for lever in advice.levers]
    arithmetic = tuple(f"{lever.running.name}: {lever.running.arithmetic}" for lever in advice.levers)
    return [
        Block(title="Today", rows=today, remarks=(f"{base.arithmetic}; measured at {base.condition}",)),
        Block(title="Levers", rows=tuple(rows), remarks=arithmetic),
    ]


def _row(lever: Lever, baseline_usd: float) -> tuple[str, str, str, str, str, str]:
    share = lever.saving_usd_month / baseline_usd
    # Prices and the busy share are assumptions, so the saving is assumed however well the throughput was measured.
    saving = f"{lever.saving_usd_month:+,.0f} USD ({share:+.0%}), assumed, from {lever.running.source.value} throughput"
    quality = "; ".join(_quality(q) for q in lever.quality) or "not measured"
    verdict = f"{lever.readiness.value}: {lever.reason}"
    return lever.running.name, "; ".join(lever.changes), saving, lever.friction_word, quality, verdict


def _quality(q: QualityComparison) -> str:
    if q.paired is None:
        return f"{q.task}/{q.metric}: invalid"
    p = q.paired
    return f"{q.task}/{q.metric} {p.difference:+.3g} [{p.low:+.3g}, {p.high:+.3g}]: {p.verdict.value}"


def monday(advice: Advice) -> list[str]:
    """The next steps, in order."""
    base = advice.baseline.name
    ready = [lever for lever in advice.levers if lever.readiness is Readiness.SHIP]
    waiting = [lever for lever in advice.levers if lever.readiness is Readiness.MEASURE]
    steps = []
    if ready:
        best = ready[0]
        steps.append(
            f"Take {best.running.name}: {best.saving_usd_month:,.0f} USD a month less, friction {best.friction_word}. "
            f"Put `trtkit gate {base} {best.running.name} --max-mmlu-drop 2` into CI before it ships."
        )
        steps.append(
            "Evaluate it on about 200 of your own prompts (`trtkit eval --prompts`), with a blind sheet for people."
        )
    steps += [
        f"Decide {lever.running.name} ({lever.saving_usd_month:,.0f} USD a month at stake): {lever.reason}."
        for lever in waiting
    ]
    if not ready and not waiting:
        steps.append(f"Keep {base}: no measured configuration saves money at equal quality.")
    steps.append(
        "Watch TPS, TTFT p50/p95/p99 and utilisation in production, and repeat this read when traffic doubles."
    )
    return steps
