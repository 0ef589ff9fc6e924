"""From a command line's options to an `EvalRequest`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtkit.quality.prompts import read_prompts
from trtkit.quality.run import EvalRequest, expand_engines
from trtkit.quality.scoring import ScoringRules
from trtkit.quality.sheet import Preference, key_path, read_grades
from trtkit.quality.tasks import TaskSelection
from trtkit.spec.errors import UsageError


def eval_request(  # noqa: PLR0913 - one parameter per option
    engines: Sequence[Path] | None,
    output_dir: Path,
    *,
    tasks: str | None,
    tasks_dir: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    evict_after: str,
    max_truncated: float,
    apply_chat_template: bool,
    prompts: Path | None,
    max_tokens: int,
    text: Path | None,
    reference: Path | None,
    sheet: Path | None,
    label: str,
) -> EvalRequest:
    """Check the options against each other and read the prompts.

    Raises:
        UsageError: options that do not go together.
        InputError: the prompts file is malformed (the line is named).
    """
    selection = None
    if tasks is not None:
        selection = TaskSelection(
            names=tuple(name.strip() for name in tasks.split(",") if name.strip()),
            directory=tasks_dir,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            rules=ScoringRules(evict_after=evict_after, max_truncated=max_truncated),
        )
    elif tasks_dir is not None:
        raise UsageError("--tasks-dir needs --tasks to say which of its tasks to run")
    return EvalRequest(
        engines=expand_engines(engines or ()),
        output_dir=output_dir,
        tasks=selection,
        prompts=None if prompts is None else read_prompts(prompts),
        max_tokens=max_tokens,
        text=text,
        text_windows=limit or 0,
        reference=reference,
        sheet=sheet,
        label=label,
    )


def read_sheet_grades(grades: Path, sheet: Path | None) -> Preference:
    """What a person preferred, by the grades file and the key beside the sheet.

    Raises:
        UsageError: the sheet is not named.
        InputError: the grades do not belong to it or are malformed.
    """
    if sheet is None:
        raise UsageError("--grades needs --sheet, the HTML file that was graded; its key is beside it")
    return read_grades(grades, key_path(sheet))
