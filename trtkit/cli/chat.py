"""`trtkit chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag

Option = typer.Option


def command(
    engine: Annotated[Path, typer.Argument(help="Engine directory.", show_default=False)],
    max_tokens: Annotated[int, Option(min=1, help="Most tokens of one answer.")] = 256,
    temperature: Annotated[float, Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_k: Annotated[int, Option(min=0, help="Sample among this many; 0 is all.")] = 0,
    top_p: Annotated[float, Option(min=0.0, max=1.0, help="Sample within this probability mass.")] = 0.95,
    seed: Annotated[int | None, Option(min=0, help="Same seed, same answers.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Talk to an engine. Ctrl-C ends an answer, /exit leaves. With --json a question per line in, a JSON object per line out."""
    import sys

    from trtkit.cli.generate_run import chat, chat_json
    from trtkit.spec.engine import Sampling

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    talk = chat_json if as_json else chat
    talk(engine, max_tokens=max_tokens, sampling=sampling, read=input, write=write)
