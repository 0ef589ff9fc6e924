"""A search result for people: the ranking, the levers, why others lost, and a Pareto plot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trtkit.plan.options import SearchResult
from trtkit.plan.search import pareto
from trtkit.spec.atomic import replacing
from trtkit.spec.errors import MissingDependencyError

SHOWN = 12


def search_text(result: SearchResult) -> str:
    """Ranking, levers, rejections and advice as text."""
    lines = ["cheapest first (modeled; prices by the price book):"]
    header = f"  {'option':<52} {'USD/month':>10} {'USD/1M':>8} {'at':>4} {'tok/s':>8} {'TTFT p99':>9} {'TPOT':>7} {'MMLU':>6} {'busy':>5}"
    lines.append(header)
    for option in result.options[:SHOWN]:
        lines.append(
            f"  {option.label:<52} {option.usd_per_month:>10,.0f} {option.usd_per_million:>8.3f} "
            f"{option.concurrency:>4} {option.tok_s:>8,.0f} {option.ttft_p99_ms:>7,.0f}ms {option.tpot_ms:>5.1f}ms "
            f"{-option.mmlu_drop:>6.2f} {option.utilisation:>5.0%}"
        )
    if len(result.options) > SHOWN:
        lines.append(f"  ... and {len(result.options) - SHOWN} more (--json lists all)")
    lines += _lever_lines(result)
    lines.append(f"rejected: {len(result.rejected)}")
    for reason, count in Counter(_family(r.reason) for r in result.rejected).most_common():
        example = next(r for r in result.rejected if _family(r.reason) == reason)
        lines.append(f"  {count:>4} x {example.label}: {example.reason}")
    return "\n".join([*lines, *(f"note: {text}" for text in result.advice)])


def _family(reason: str) -> str:
    return "".join("#" if character.isdigit() else character for character in reason)[:24]


def _lever_lines(result: SearchResult) -> list[str]:
    if not result.levers:
        return []
    lines = ["levers, each against the reference:"]
    for lever in result.levers:
        if lever.usd_per_month is None or lever.saving is None or lever.tok_s_gain is None:
            lines.append(f"  {lever.step:<28} not possible here")
            continue
        lines.append(
            f"  {lever.step:<28} {lever.usd_per_month:>9,.0f} USD/month ({-lever.saving:+.0%}), "
            f"{lever.tok_s_gain:.2f}x per GPU, {-lever.mmlu_points:+.2f} MMLU: {lever.note}"
        )
    return lines


def pareto_plot(result: SearchResult, path: Path) -> None:
    """Monthly cost against time per token for every option, the front joined; PNG or SVG by the file's suffix.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("a plot needs matplotlib: pip install 'trtkit[report]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for precision in dict.fromkeys(option.precision for option in result.options):
        chosen = [option for option in result.options if option.precision == precision]
        axes.scatter([o.usd_per_month for o in chosen], [o.tpot_ms for o in chosen], s=14, label=precision)
    front = pareto(result.options)
    axes.plot([o.usd_per_month for o in front], [o.tpot_ms for o in front], color="black", linewidth=1, label="front")
    for option in front:
        axes.annotate(option.label, (option.usd_per_month, option.tpot_ms), fontsize=6)
    axes.set_xlabel("USD per month")
    axes.set_ylabel("TPOT, ms (modeled)")
    axes.set_xscale("log")
    axes.legend()
    suffix = path.suffix.lstrip(".").lower() or "png"
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg" if suffix == "svg" else "png", dpi=150)
