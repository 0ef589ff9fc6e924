"""Prompts with exact token counts, the same for every engine, none of them twice unless a file asks for it.

Synthetic prompts are random ids; they cost an engine what any prompt of that length costs, and no prefix cache can
help unless the workload gives them a shared prefix. Every phase (warm-up, each repeat) of every cell draws its own, from the seed and the cell's shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trtkit.spec.codec import digest
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.model import ModelSpec
from trtkit.spec.workload import SYNTHETIC, Workload

SHAREGPT = "sharegpt"
_SPECIAL_IDS_FILE = "tokenizer.json"


class Encoder(Protocol):
    """The part of a tokenizer that prompts need."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the model's own BOS in front unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """The prompts of one cell: int32 arrays, one per request."""

    warmup: tuple[np.ndarray, ...]
    repeats: tuple[tuple[np.ndarray, ...], ...]


def build_prompts(
    workload: Workload, model: ModelSpec, tokenizer_dir: Path | None, *, repeats: int, warmup: int
) -> PromptSet:
    """The prompts of one cell.

    Raises:
        InputError: the data set is missing, damaged, or has too few prompts.
        UsageError: the vocabulary has too few distinct prompts of that length.
    """
    allowed = plain_ids(model, tokenizer_dir)
    if workload.dataset == SYNTHETIC:
        counts = [warmup, *[workload.num_requests] * repeats]
        phases = synthetic_phases(
            allowed, workload.isl, counts, cell_seed(workload), shared=workload.shared_prefix_tokens
        )
        return PromptSet(warmup=phases[0], repeats=tuple(phases[1:]))
    if is_sharegpt(workload.dataset):
        return _sharegpt_set(workload, tokenizer_dir, repeats=repeats, warmup=warmup)
    return _jsonl_set(workload, allowed, model, tokenizer_dir, repeats=repeats, warmup=warmup)


def is_sharegpt(dataset: str) -> bool:
    """`sharegpt`, or `sharegpt:FILE` for a local copy."""
    return dataset == SHAREGPT or dataset.startswith(f"{SHAREGPT}:")


def cell_seed(workload: Workload) -> int:
    """Differs between the cells of one protocol, so that they share no prompt; the load's other details do not count."""
    shape = [workload.isl, workload.osl, workload.concurrency, workload.request_rate, workload.seed]
    if workload.shared_prefix_tokens:
        shape.append(workload.shared_prefix_tokens)
    return int(digest(shape), 16)


def plain_ids(model: ModelSpec, tokenizer_dir: Path | None) -> np.ndarray:
    """Vocabulary ids that are no control tokens: neither BOS nor EOS nor what the tokenizer calls special."""
    special = {*model.eos_ids, *([] if model.bos_id is None else [model.bos_id])}
    path = tokenizer_dir / _SPECIAL_IDS_FILE if tokenizer_dir else None
    if path is not None and path.is_file():
        try:
            added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
            special |= {int(token["id"]) for token in added if token.get("special")}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{path}: not a tokenizer file ({error}); copy it from the checkpoint again") from None
    ids = np.setdiff1d(np.arange(model.vocab_size, dtype=np.int32), np.array(sorted(special), dtype=np.int32))
    if ids.size == 0:
        raise InputError(f"model {model.name!r} has no ids besides its special tokens; synthetic prompts need some")
    return ids


def synthetic_phases(
    allowed: np.ndarray, isl: int, counts: Sequence[int], seed: int, *, shared: int = 0
) -> list[tuple[np.ndarray, ...]]:
    """For each count, that many prompts of `isl` random ids; no prompt appears twice in all phases together.

    The first `shared` ids are the same in all of them.
    """
    if isl < 1:
        raise UsageError(f"--isl is {isl}: synthetic prompts need at least 1 token")
    total = sum(counts)
    own = isl - shared
    if own * np.log(allowed.size) < np.log(2.0 * total):
        raise UsageError(
            f"--isl {isl} allows too few distinct prompts ({allowed.size} ids, {own} of them free) for {total} requests; "
            "ask for longer prompts or fewer requests"
        )
    prefix = np.random.default_rng([seed, len(counts)]).choice(allowed, size=shared)
    seen: set[bytes] = set()
    phases = []
    for phase, count in enumerate(counts):
        rng = np.random.default_rng([seed, phase])
        prompts: list[np.ndarray] = []
        while len(prompts) < count:
            prompt = np.concatenate([prefix, rng.choice(allowed, size=own)])
            if (key := prompt.tobytes()) not in seen:
                seen.add(key)
                prompts.append(prompt)
        phases.append(tuple(prompts))
    return phases


def _jsonl_set(
    workload: Workload, allowed: np.ndarray, model: ModelSpec, tokenizer_dir: Path | None, *, repeats: int, warmup: int
) -> PromptSet:
    """A file's prompts in their order, the same in every repeat; warm-up gets random ids of the same lengths."""
    prompts = list(read_jsonl(Path(workload.dataset), model, tokenizer_dir))
    if workload.isl:
        prompts = [prompt[: workload.isl] for prompt in prompts if prompt.size >= workload.isl]
    if len(prompts) < workload.num_requests:
        of_length = f" of at least {workload.isl} tokens" if workload.isl else ""
        raise InputError(
            f"{workload.dataset}: has {len(prompts)} prompts{of_length}, {workload.num_requests} are asked for; "
            f"use --num-requests {max(len(prompts), 1)} or a longer file"
        )
    prompts = prompts[: workload.num_requests]
    rng = np.random.default_rng(cell_seed(workload))
    warm = tuple(rng.choice(allowed, size=prompts[i % len(prompts)].size) for i in range(warmup))
    return PromptSet(warmup=warm, repeats=tuple(tuple(prompts) for _ in range(repeats)))


def read_jsonl(path: Path, model: ModelSpec, tokenizer_dir: Path | None) -> Iterator[np.ndarray]:
    """Prompts of a file with one object a line: `{"prompt_ids": [...]}` or `{"prompt": "text"}`.

    Raises:
        InputError: with the number of the line that is wrong.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; --dataset is synthetic, sharegpt, sharegpt:FILE or a JSONL file")
    encoder: Encoder | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _object(line, where)
        if "prompt_ids" in row:
            yield _checked_ids(row["prompt_ids"], model, where)
        elif isinstance(row.get("prompt"), str):
            encoder = encoder or load_encoder(tokenizer_dir)
            yield _checked_ids(encoder.encode(row["prompt"]), model, where)
        else:
            raise InputError(f"{where}: needs 'prompt_ids' (a list of token ids) or 'prompt' (a text)")


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {str(row)[:40]!r}")
    return row


def _checked_ids(ids: object, model: ModelSpec, where: str) -> np.ndarray:
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise InputError(f"{where}: 'prompt_ids' must be a list of at least one integer")
    if min(ids) < 0 or max(ids) >= model.vocab_size:
        raise InputError(f"{where}: a token id is outside the vocabulary of {model.vocab_size}")
    return np.array(ids, dtype=np.int32)


def load_encoder(tokenizer_dir: Path | None) -> Encoder:
    """The bundle's tokenizer."""
    if tokenizer_dir is None or not tokenizer_dir.is_dir():
        raise InputError("this engine was built without a tokenizer; text prompts need one (or give 'prompt_ids')")
    from trtkit.backends.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_dir)


def _sharegpt_set(workload: Workload, tokenizer_dir: Path | None, *, repeats: int, warmup: int) -> PromptSet:
    from trtkit.benchmark.sharegpt import locate, prompts_of, read_conversations

    path = locate(workload.dataset.partition(":")[2])
    needed = warmup + repeats * workload.num_requests
    source = prompts_of(
        read_conversations(path), load_encoder(tokenizer_dir), workload.isl, np.random.default_rng(cell_seed(workload))
    )
    prompts = [prompt for prompt, _ in zip(source, range(needed), strict=False)]
    if len(prompts) < needed:
        raise InputError(
            f"{path}: its conversations give {len(prompts)} prompts of {workload.isl} tokens when each is used once, "
            f"{needed} are asked for; lower --num-requests, --warmup, --repeats or --isl"
        )
    measured = prompts[warmup:]
    each = workload.num_requests
    return PromptSet(
        warmup=tuple(prompts[:warmup]),
        repeats=tuple(tuple(measured[start : start + each]) for start in range(0, repeats * each, each)),
    )
