"""`trtkit eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag, emit, note, progress_bars

Engines = Annotated[list[Path] | None, typer.Argument(help="Engine directories, e.g. builds/*.engine.")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks or groups, comma separated, e.g. mmlu.")]
TasksDir = Annotated[Path | None, typer.Option(help="Local tasks, JSON Lines or lm-eval YAML; `shipped`: ours.")]
Shots = Annotated[int | None, typer.Option("--num-fewshot", help="Worked examples (default: the task's own).")]
Limit = Annotated[
    int | None, typer.Option(help="Only the first N documents of every subject (with --text: N windows).")
]
After = Annotated[str, typer.Option("--evict-after", help="shots (query-agnostic) or question (query-aware).")]
Truncated = Annotated[float, typer.Option("--max-truncated", help="Share of contexts that may be cut to fit.")]
Chat = Annotated[bool, typer.Option("--apply-chat-template", help="Put tasks in the model's chat format.")]
Prompts = Annotated[Path | None, typer.Option(help="Your own prompts, JSON Lines.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer to a prompt.")]
Text = Annotated[Path | None, typer.Option(help="Perplexity on a text file or a directory of them; `shipped`: ours.")]
Reference = Annotated[Path | None, typer.Option(help="Engine whose answers to the prompts are the yardstick.")]
Sheet = Annotated[Path | None, typer.Option(help="Write a blind side-by-side HTML sheet against --reference.")]
Grades = Annotated[Path | None, typer.Option(help="Read the grades of --sheet back, instead of evaluating.")]
Output = Annotated[Path, typer.Option("--output-dir", "-o", help="Where records and finished documents go.")]
Label = Annotated[str, typer.Option(help="A name for this configuration in reports.")]


def command(
    engines: Engines = None,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    num_fewshot: Shots = None,
    limit: Limit = None,
    evict_after: After = "shots",
    max_truncated: Truncated = 0.0,
    apply_chat_template: Chat = False,
    prompts: Prompts = None,
    max_tokens: MaxTokens = 128,
    text: Text = None,
    reference: Reference = None,
    sheet: Sheet = None,
    grades: Grades = None,
    output_dir: Output = Path("results"),
    label: Label = "",
    as_json: JsonFlag = False,
) -> None:
    """Judge engines on lm-eval tasks and on your own prompts, so that KV eviction acts on what is scored."""
    from trtkit.benchmark.environment import fingerprint
    from trtkit.quality.request import eval_request, read_sheet_grades
    from trtkit.quality.run import evaluate
    from trtkit.quality.show import preference_text, records_text

    if grades is not None:
        preference = read_sheet_grades(grades, sheet)
        emit(preference, preference_text(preference), as_json=as_json)
        return
    request = eval_request(
        engines, output_dir, tasks=tasks, tasks_dir=tasks_dir, num_fewshot=num_fewshot, limit=limit,
        evict_after=evict_after, max_truncated=max_truncated, apply_chat_template=apply_chat_template, prompts=prompts,
        max_tokens=max_tokens, text=text, reference=reference, sheet=sheet, label=label,
    )  # fmt: skip
    environment = fingerprint(device=request.device, command=sys.argv)
    with progress_bars(quiet=as_json) as progress:
        records = evaluate(request, environment, progress=progress)
    note(f"records: {output_dir}", as_json=as_json)
    emit({"records": records}, records_text(records), as_json=as_json)
