"""A blind side-by-side sheet: one HTML file in which a person picks A or B, and the grades read back.

Which side is which engine is drawn per prompt from a secret seed and written to a key file beside the sheet, never into
it. The sheet works offline and hands the grades out as a JSON file.
"""

from __future__ import annotations

import hashlib
import html
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtkit.quality.own_prompts import PromptRun
from trtkit.quality.paired import Verdict, decide, documents_needed
from trtkit.quality.prompts import PromptSet
from trtkit.quality.special import sign_test
from trtkit.spec.atomic import write_text
from trtkit.spec.codec import read_record, write_record
from trtkit.spec.errors import InputError

KEY_KIND = "sheet-key"
CHOICES = ("A", "B", "tie")
PREFERENCE_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetKey:
    """Which engine stands on which side: `reference_side` maps a prompt's id to "A" or "B"."""

    sheet: str
    reference: str
    candidate: str
    reference_side: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """What a person preferred: counts, the exact sign test, and the verdict on the candidate."""

    reference: str
    candidate: str
    wins: int
    losses: int
    ties: int
    ungraded: int
    p_value: float
    verdict: Verdict
    needed: int | None


def key_path(sheet: Path) -> Path:
    """Where the key of a sheet is."""
    return sheet.with_suffix(".key.json")


def write_sheet(
    path: Path, prompts: PromptSet, reference: PromptRun, candidate: PromptRun, *, seed: int | None = None
) -> None:
    """Write the sheet and, beside it, its key. Without a `seed` the sides are drawn from the system's randomness."""
    rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
    sides = {prompt.id: "AB"[int(rng.integers(2))] for prompt in prompts.prompts}
    blocks = []
    for number, prompt in enumerate(prompts.prompts):
        texts = [reference.answers[number].text, candidate.answers[number].text]
        if sides[prompt.id] == "B":
            texts.reverse()
        blocks.append(_block(number + 1, prompt.id, prompt.shown, texts[0], texts[1]))
    body = "\n".join(blocks)
    identity = hashlib.sha256(body.encode()).hexdigest()[:16]
    key = SheetKey(
        sheet=identity, reference=reference.engine.name, candidate=candidate.engine.name, reference_side=sides
    )
    write_record(key_path(path), KEY_KIND, key)
    write_text(path, _PAGE.replace("@IDENTITY@", identity).replace("@COUNT@", str(len(blocks))).replace("@BODY@", body))


def _block(number: int, prompt_id: str, prompt: str, left: str, right: str) -> str:
    name = html.escape(prompt_id, quote=True)
    radios = " ".join(
        f'<label><input type="radio" name="q{number}" data-id="{name}" value="{choice}"> {label}</label>'
        for choice, label in zip(CHOICES, ("A is better", "B is better", "no difference"), strict=True)
    )
    answers = "".join(
        f"<section><h3>{side}</h3><pre>{html.escape(text) or '<i>(empty)</i>'}</pre></section>"
        for side, text in (("A", left), ("B", right))
    )
    return (
        f"<article><h2>{number}</h2><pre class=prompt>{html.escape(prompt)}</pre>"
        f"<div class=pair>{answers}</div><fieldset><legend>Which answer is better?</legend>{radios}</fieldset></article>"
    )


def read_grades(grades: Path, key_file: Path) -> Preference:
    """Unblind a grades file with the sheet's key.

    Raises:
        InputError: the file is malformed, belongs to another sheet, or grades a prompt that is not on it.
    """
    key = read_record(key_file, KEY_KIND, SheetKey)
    body = _grades_body(grades)
    if body["sheet"] != key.sheet:
        raise InputError(f"{grades}: belongs to sheet {body['sheet']!r}, the key {key_file} to {key.sheet!r}")
    wins = losses = ties = 0
    for prompt_id, choice in body["grades"].items():
        if prompt_id not in key.reference_side:
            raise InputError(f"{grades}: grades {prompt_id!r}, which is not on the sheet")
        if choice not in CHOICES:
            raise InputError(f"{grades}: {prompt_id!r} is graded {choice!r}; allowed are {', '.join(CHOICES)}")
        ties += choice == "tie"
        losses += choice == key.reference_side[prompt_id]
        wins += choice not in ("tie", key.reference_side[prompt_id])
    return preference(key, wins, losses, ties)


def _grades_body(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of grades") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a grades file (JSON expected): {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("grades"), dict) or "sheet" not in body:
        raise InputError(f"{path}: not a grades file of a side-by-side sheet (keys 'sheet' and 'grades')")
    return body


def preference(key: SheetKey, wins: int, losses: int, ties: int) -> Preference:
    """The verdict on the candidate from a person's choices; ties carry no information on which is better."""
    n = wins + losses
    p_value = sign_test(wins, losses)
    total = max(1, n + ties)
    difference = (wins - losses) / total
    half = 1.96 * (n**0.5) / total
    verdict = decide(difference, difference - half, difference + half, p_value, PREFERENCE_MARGIN)
    if total < 10 and verdict is Verdict.SAME:
        verdict = Verdict.UNDECIDED
    needed = documents_needed(max(n, 1) / total, PREFERENCE_MARGIN) if verdict is Verdict.UNDECIDED else None
    return Preference(
        reference=key.reference,
        candidate=key.candidate,
        wins=wins,
        losses=losses,
        ties=ties,
        ungraded=len(key.reference_side) - n - ties,
        p_value=p_value,
        verdict=verdict,
        needed=needed,
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Side by side</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 72rem; margin: 0 auto; padding: 1rem 1rem 6rem }
article { border-top: 1px solid gray; margin-top: 2rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .7rem; background: #8882; border-radius: .3rem }
.prompt { border-left: .3rem solid gray; background: none }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem }
fieldset { margin-top: 1rem; border: 0; padding: 0 } label { margin-right: 1.2rem }
footer { position: fixed; inset: auto 0 0 0; padding: .7rem 1rem; background: Canvas; border-top: 1px solid gray }
</style></head><body data-sheet="@IDENTITY@">
<h1>Side by side</h1>
<p>Two engines answered the same prompts. For each prompt pick the better answer; you are not told which engine wrote which,
and sides change from prompt to prompt. Then save the grades.</p>
@BODY@
<footer><span id="done">0</span> of @COUNT@ graded <button id="save">Save grades</button></footer>
<script>
const picked = () => [...document.querySelectorAll("input:checked")];
document.addEventListener("change", () => { document.getElementById("done").textContent = picked().length; });
document.getElementById("save").addEventListener("click", () => {
  const grades = Object.fromEntries(picked().map(input => [input.dataset.id, input.value]));
  const text = JSON.stringify({ sheet: document.body.dataset.sheet, grades }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "grades.json";
  link.click();
});
</script></body></html>
"""
