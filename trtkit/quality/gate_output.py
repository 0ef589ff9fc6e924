"""A gate's result for people and for CI: text, Markdown for a job summary, JUnit XML."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from trtkit.quality.gate import GateResult, Outcome, Status
from trtkit.spec.atomic import output_errors, write_text

_MARKS = {Status.PASS: "pass", Status.FAIL: "FAIL", Status.INVALID: "INVALID"}
_CONTROLS = {code: " " for code in range(32) if code not in (9, 10, 13)}


def gate_text(result: GateResult) -> str:
    """One line per rule, then the verdict."""
    lines = [f"{_MARKS[o.status]:<7}  {o.rule}: {o.reason}" for o in result.outcomes]
    return "\n".join((*lines, headline(result)))


def headline(result: GateResult) -> str:
    """The verdict in one line."""
    counts = {status: sum(o.status is status for o in result.outcomes) for status in Status}
    total = ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)
    return f"gate: {_MARKS[result.status]} ({result.candidate} against {result.reference}: {total})"


def gate_markdown(result: GateResult) -> str:
    """A table that a CI service shows on the job's page."""
    rows = [f"| {_MARKS[o.status]} | {_cell(o.rule)} | {_cell(o.reason)} |" for o in result.outcomes]
    return "\n".join((f"### {_cell(headline(result))}", "", "| | rule | reason |", "|---|---|---|", *rows, ""))


def _cell(text: str) -> str:
    """Text that cannot end a table cell or start HTML."""
    return escape(" ".join(text.split())).replace("|", "\\|").replace("`", "'")


def gate_junit(result: GateResult) -> str:
    """JUnit XML: a failed rule is a failure, an invalid measurement an error."""
    failed = sum(o.status is Status.FAIL for o in result.outcomes)
    invalid = sum(o.status is Status.INVALID for o in result.outcomes)
    name = quoteattr(_clean(f"trtkit gate: {result.candidate} against {result.reference}"))
    cases = "".join(_case(outcome) for outcome in result.outcomes)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuite name={name} tests="{len(result.outcomes)}" failures="{failed}" errors="{invalid}">\n'
        f"{cases}</testsuite>\n"
    )


def _case(outcome: Outcome) -> str:
    body = f"<system-out>{escape(_clean(outcome.reason))}</system-out>"
    if outcome.status is not Status.PASS:
        kind = "failure" if outcome.status is Status.FAIL else "error"
        body = f"<{kind} message={quoteattr(_clean(outcome.reason))}/>"
    return f'  <testcase classname="trtkit.gate" name={quoteattr(_clean(outcome.rule))}>{body}</testcase>\n'


def _clean(text: str) -> str:
    """Without control characters, which XML cannot hold."""
    return text.translate(_CONTROLS)


def write_outputs(result: GateResult, *, junit: Path | None, summary: Path | None) -> None:
    """Write the JUnit file, and append to the summary as CI services expect.

    Raises:
        OutputError: a file cannot be written.
    """
    if junit is not None:
        write_text(junit, gate_junit(result))
    if summary is not None:
        with output_errors(summary):
            summary.parent.mkdir(parents=True, exist_ok=True)
            with summary.open("a", encoding="utf-8") as file:
                file.write(gate_markdown(result))
