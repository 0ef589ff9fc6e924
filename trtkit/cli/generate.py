"""`trtkit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag

Option = typer.Option


def command(
    engine: Annotated[Path, typer.Argument(help="Engine directory.", show_default=False)],
    prompt: Annotated[str | None, Option(help="Prompt as text (needs the engine's tokenizer).")] = None,
    prompt_ids: Annotated[str | None, Option(help="Prompt as token ids, e.g. 1,2,3.")] = None,
    max_tokens: Annotated[int, Option(min=1, help="Most tokens to generate.")] = 16,
    temperature: Annotated[float, Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, Option(min=0, help="Sample among this many; 0 is all.")] = 0,
    top_p: Annotated[float, Option(min=0.0, max=1.0, help="Sample within this probability mass.")] = 1.0,
    seed: Annotated[int | None, Option(min=0, help="Same seed, same tokens.")] = None,
    stop_ids: Annotated[str | None, Option(help="Stop after any of these token ids, e.g. 2,13.")] = None,
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    kv: Annotated[str | None, Option(help="KV policy instead of the engine's, e.g. h2o:50%.")] = None,
    speculate: Annotated[str | None, Option(help="Speculation instead of the engine's: ngram:4, or off.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Generate from one prompt, given as text or as token ids."""
    from trtkit.cli.common import emit
    from trtkit.cli.generate_run import generate, parse_ids
    from trtkit.spec.engine import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    result = generate(
        engine,
        prompt=prompt,
        prompt_ids=None if prompt_ids is None else parse_ids("--prompt-ids", prompt_ids),
        max_tokens=max_tokens,
        sampling=sampling,
        stop_ids=parse_ids("--stop-ids", stop_ids or ""),
        ignore_eos=ignore_eos,
        kv=kv,
        speculate=speculate,
    )
    emit(result, result.readable, as_json=as_json)
