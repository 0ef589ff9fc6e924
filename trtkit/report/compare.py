"""Comparisons as console text, Markdown and one offline HTML page. No arithmetic beyond choosing digits."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trtkit.quality.compare import Comparison, QualityComparison, RatioResult, difference_unit
from trtkit.quality.paired import ALPHA, PairedResult, Verdict
from trtkit.quality.table import table
from trtkit.spec.metrics import METRICS
from trtkit.spec.units import format_gib

FORMATS = ("console", "md", "html")
_NO_INTERVAL = "no interval"


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A titled table with remarks below it; the first row is the header."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...] = ()


def render_comparisons(comparisons: Sequence[Comparison], costs: Sequence[Block], fmt: str) -> str:
    """All comparisons in one of FORMATS; `costs` are tables of prices, made elsewhere."""
    blocks = [block for comparison in comparisons for block in comparison_blocks(comparison)]
    blocks += costs
    if fmt == "md":
        return "\n".join(markdown_block(block) for block in blocks)
    return _html(blocks) if fmt == "html" else "\n\n".join(_console(block) for block in blocks)


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """Performance, quality and drift of one candidate."""
    title = f"{comparison.candidate} against {comparison.reference}"
    blocks = []
    if comparison.ratios:
        blocks.append(_performance(title, comparison))
    if comparison.quality:
        blocks.append(_quality(title, comparison.quality))
    if comparison.drift:
        rows: list[tuple[str, ...]] = [("task", "metric", "value", "+- s.e.", "prompts")]
        rows += [
            (d.task, d.metric, f"{d.score:.4g} {d.unit}", _or_na(d.stderr, ".2g"), str(len(d.documents)))
            for d in comparison.drift
        ]
        remark = "measured on the reference's own continuations; KL is a lower bound"
        blocks.append(Block(title=f"Drift: {title}", rows=tuple(rows), remarks=(remark,)))
    if comparison.remarks and blocks:
        last = blocks[-1]
        blocks[-1] = Block(title=last.title, rows=last.rows, remarks=(*last.remarks, *comparison.remarks))
    return blocks


def _performance(title: str, comparison: Comparison) -> Block:
    rows: list[tuple[str, ...]] = [
        ("condition", "metric", comparison.reference, comparison.candidate, "ratio [95 %]", "noise", "verdict")
    ]
    rows += [_ratio_row(ratio) for ratio in comparison.ratios]
    remarks = dict.fromkeys(r.reason for r in comparison.ratios if r.reason)
    return Block(title=f"Performance: {title}", rows=tuple(rows), remarks=tuple(remarks))


def _ratio_row(r: RatioResult) -> tuple[str, ...]:
    definition = METRICS.get(r.metric)
    label = f"{definition.label if definition else 'peak memory'} {'' if r.stat == 'value' else r.stat}".strip()
    values = [format_gib(v) if r.unit == "bytes" else f"{v:.4g} {r.unit}" for v in (r.reference, r.candidate)]
    interval = _NO_INTERVAL if r.low is None or r.high is None else f"{r.low:.3f}, {r.high:.3f}"
    ratio = "n/a" if r.ratio is None else f"{r.ratio:.3f} [{interval}]"
    noise = "unknown" if r.noise is None else f"{r.noise:.1%}"
    return (r.condition, f"{label} ({r.source.value})", *values, ratio, noise, r.verdict.value)


def _quality(title: str, found: Sequence[QualityComparison]) -> Block:
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "reference", "candidate", "difference [95 %]", "p (test)", "documents", "verdict")
    ]
    remarks = []
    for q in found:
        scores = (f"{q.reference:.4g} {q.unit}", f"{q.candidate:.4g} {q.unit}")
        if q.paired is None:
            rows.append((q.task, q.metric, *scores, "n/a", "n/a", "n/a", "INVALID"))
            remarks.append(q.invalid)
            continue
        p = q.paired
        difference = f"{p.difference:+.4g} [{p.low:+.4g}, {p.high:+.4g}] {difference_unit(q.unit)}"
        rows.append(
            (
                q.task,
                q.metric,
                *scores,
                difference,
                f"{p.p_value:.2g} ({p.test})",
                str(p.n),
                _verdict(q, p),
            )
        )
        remarks += _subjects(q)
    remarks.append("differences are paired by document; positive is better for the candidate")
    return Block(title=f"Quality: {title}", rows=tuple(rows), remarks=tuple(dict.fromkeys(remarks)))


def _verdict(q: QualityComparison, p: PairedResult) -> str:
    word = p.verdict.value
    if q.better == "neither":
        word = {Verdict.BETTER: "more", Verdict.WORSE: "less"}.get(p.verdict, word)
    return word if p.needed is None else f"{word} (about {p.needed} documents would decide)"


def _subjects(q: QualityComparison) -> Iterable[str]:
    """Subjects that changed after Holm's correction, or that none did."""
    changed = [g for g in q.groups if g.adjusted_p < ALPHA]
    for g in changed:
        yield f"{q.task}/{q.metric}: subject {g.group} is {g.verdict.value} ({g.difference:+.4g}, Holm p = {g.adjusted_p:.2g})"
    if q.groups and not changed:
        yield f"{q.task}/{q.metric}: none of {len(q.groups)} subjects changed detectably (Holm)"


def _or_na(value: float | None, spec: str) -> str:
    return "n/a" if value is None else format(value, spec)


def _console(block: Block) -> str:
    return "\n".join((block.title, table(block.rows), *(f"  {remark}" for remark in block.remarks)))


def markdown_block(block: Block) -> str:
    """One table as Markdown, everything escaped."""
    lines = [f"| {' | '.join(_md(cell) for cell in row)} |" for row in block.rows]
    lines.insert(1, "|" + "---|" * len(block.rows[0]))
    return "\n".join((f"## {_md(block.title)}", "", *lines, "", *(f"- {_md(remark)}" for remark in block.remarks), ""))


def _md(text: str) -> str:
    """Text that can neither end a cell nor start HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _html(blocks: Sequence[Block]) -> str:
    return html_page("trtkit compare", "\n".join(html_block(block) for block in blocks))


def html_block(block: Block) -> str:
    """One table as HTML, everything escaped."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in block.rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows[1:]
    )
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in block.remarks)
    return (
        f"<section><h2>{html.escape(block.title)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div><ul>{remarks}</ul></section>"
    )


def html_page(title: str, body: str) -> str:
    """A page that needs no network."""
    return _PAGE.replace("@TITLE@", html.escape(title)).replace("@BODY@", body)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 80rem; margin: 0 auto; padding: 1rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8885; vertical-align: top }
</style></head><body>
<h1>@TITLE@</h1>
@BODY@
</body></html>
"""
