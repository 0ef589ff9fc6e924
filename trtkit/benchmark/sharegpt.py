"""ShareGPT as a source of prompts of any length: conversations joined end to end and cut at exactly the length asked.

Other readers filter: they keep what happens to be short, so a "4,096-token" run measures something else. Here a prompt
is filled with whole conversations, turn by turn, and only its end is cut; each conversation is used once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trtkit.spec.errors import InputError, UsageError

if TYPE_CHECKING:
    from trtkit.benchmark.prompts import Encoder

HUB_REPO = "anon8231489123/ShareGPT_Vicuna_unfiltered"
HUB_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
_TURN_SEPARATOR = "\n\n"


def locate(local: str) -> Path:
    """A local file, or the hub's copy (from its cache when offline).

    Raises:
        InputError: neither is to be had.
    """
    if local:
        path = Path(local)
        if not path.is_file():
            raise InputError(f"{path}: no such file; --dataset sharegpt:FILE wants ShareGPT's JSON")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(HUB_REPO, HUB_FILE, repo_type="dataset"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"ShareGPT cannot be fetched from the hub ({type(error).__name__}); download {HUB_FILE} of {HUB_REPO} "
            "and give --dataset sharegpt:FILE, or use --dataset synthetic"
        ) from None


def read_conversations(path: Path) -> list[tuple[str, ...]]:
    """The turns' texts of each conversation that has any.

    Accepts ShareGPT's own JSON (a list of `{"conversations": [{"from": ..., "value": ...}]}`) and the same objects
    one a line.

    Raises:
        InputError: the file is something else.
    """
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(row) for row in text.splitlines()]
        conversations = [tuple(turn["value"] for turn in row["conversations"] if turn["value"].strip()) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not ShareGPT's format (conversations of turns with 'value'): {error!r}") from None
    return [turns for turns in conversations if turns]


def prompts_of(
    conversations: Sequence[tuple[str, ...]], encoder: Encoder, isl: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Prompts of exactly `isl` ids, from conversations in an order drawn from `rng`, until they run out."""
    if isl < 1:
        raise UsageError("--dataset sharegpt needs --isl")
    ids: list[int] = []
    for index in rng.permutation(len(conversations)):
        for turn in conversations[index]:
            ids.extend(encoder.encode(turn + _TURN_SEPARATOR, add_special_tokens=not ids))
            if len(ids) >= isl:
                yield np.array(ids[:isl], dtype=np.int32)
                ids = []
                break
