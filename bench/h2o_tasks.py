"""Two made-up tasks and a model small enough to learn them in minutes on a CPU; no downloads, one seed.

Recall: key-value pairs (a token each, the sum of its key's and its value's embedding) scattered in noise, then a stream that asks for values of keys, some far more often than
others (Zipf). What is asked often draws attention, so a policy that keeps what draws attention should answer.
Distance: a marker asks for the token k places back. It needs exact positions, which recall does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from trtkit.engine.batch import RowInput
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.engine.sequence import Sequence
from trtkit.spec.checkpoint import LM_HEAD, VOCAB_EMBEDDING, checkpoint_tensors, layer_prefix
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.quant import quant_for

NAMES = 64
BOS, KEY, ASK, VALUE, NOISE = 0, 1, 1 + NAMES, 1 + 2 * NAMES, 1 + 3 * NAMES
PAIR = 1 + 4 * NAMES
VOCAB = PAIR + NAMES * NAMES
PAIRS = 16
PREFIX, STREAM = 128, 256
PROMPT = PREFIX + STREAM // 4
ZIPF = 1.5
BACK = (1, 3, 6, 11)
IGNORE = -100

MODEL = ModelSpec(
    name="toy",
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=VOCAB,
    max_position_embeddings=512,
)


@dataclass(frozen=True)
class Examples:
    """Token ids [n, length] and, where an answer is due, its id in `targets` (IGNORE elsewhere)."""

    ids: np.ndarray
    targets: np.ndarray


def recall_examples(
    generator: np.random.Generator,
    n: int,
    *,
    pairs: int = PAIRS,
    prefix: int = PREFIX,
    stream: int = STREAM,
    zipf: float = ZIPF,
) -> Examples:
    """Pairs in noise, then half questions and half noise. The answer is never fed back."""
    ids = NOISE + generator.integers(0, NAMES, (n, prefix + stream))
    targets = np.full(ids.shape, IGNORE)
    ids[:, 0] = BOS
    weight = np.arange(1, pairs + 1) ** -zipf
    for row in range(n):
        keys = generator.choice(NAMES, pairs, replace=False)
        values = generator.choice(NAMES, pairs, replace=False)
        places = 1 + generator.choice(prefix - 1, pairs, replace=False)
        ids[row, places] = PAIR + keys * NAMES + values
        asked = prefix + np.flatnonzero(generator.random(stream) < 0.5)
        which = generator.choice(pairs, len(asked), p=weight / weight.sum())
        ids[row, asked], targets[row, asked] = ASK + keys[which], VALUE + values[which]
    return Examples(ids, targets)


def distance_examples(generator: np.random.Generator, n: int, *, length: int = PREFIX + STREAM) -> Examples:
    """Noise with markers that ask for the token BACK[i] places before them."""
    ids = NOISE + generator.integers(0, NAMES, (n, length))
    ids[:, 0] = BOS
    kind = generator.integers(0, len(BACK), ids.shape)
    wanted = np.maximum(np.arange(length) - np.asarray(BACK)[kind], 0)
    asks = generator.random(ids.shape) < 0.3
    asks &= (wanted > 0) & ~np.take_along_axis(asks, wanted, axis=1)
    targets = np.where(asks, np.take_along_axis(ids, wanted, axis=1), IGNORE)
    # A place whose target became a marker after all is asked about too: its question is simply dropped.
    targets[np.take_along_axis(asks, wanted, axis=1)] = IGNORE
    return Examples(np.where(asks, KEY + kind, ids), targets)


class Toy(torch.nn.Module):
    """A Llama under TensorRT-LLM's tensor names. A question's embedding is its key's plus one shared flag, a pair's its
    key's plus its value's; only single names are learnt and can be answered."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.ParameterDict()
        for entry in checkpoint_tensors(MODEL, quant_for("fp32")):
            rows = PAIR if entry.shape[0] == VOCAB else entry.shape[0]
            entry_shape = (rows, *entry.shape[1:])
            scale = 1 / math.sqrt(MODEL.hidden_size) if entry.group != "embedding" else 0.5
            start = (
                torch.ones(entry.shape)
                if entry.group == "norm"
                else torch.randn(entry_shape, generator=generator) * scale
            )
            self.weights[entry.name.replace(".", "|")] = torch.nn.Parameter(start)
        self.flag = torch.nn.Parameter(torch.randn(MODEL.hidden_size, generator=generator) * 0.5)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint, with the embeddings of questions and pairs filled in."""
        named = {name.replace("|", "."): weight for name, weight in self.weights.items()}
        table = named[VOCAB_EMBEDDING]
        keys, values = table[KEY : KEY + NAMES], table[VALUE : VALUE + NAMES]
        joined = (keys[:, None] + values[None]).flatten(0, 1)
        named[VOCAB_EMBEDDING] = torch.cat([table[:ASK], keys + self.flag, table[VALUE:], joined])
        named[LM_HEAD] = F.pad(named[LM_HEAD], (0, 0, 0, VOCAB - PAIR))
        return named

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, length, E] after the final norm."""
        named = self.tensors()
        x = F.embedding(ids, named[VOCAB_EMBEDDING])
        rotation = _rotation(ids.shape[1])
        for layer in range(MODEL.num_layers):
            at = layer_prefix(layer)
            h = F.rms_norm(x, x.shape[-1:], named[f"{at}input_layernorm.weight"], MODEL.norm_epsilon)
            x = x + _attention(h, named, at, rotation)
            h = F.rms_norm(x, x.shape[-1:], named[f"{at}post_layernorm.weight"], MODEL.norm_epsilon)
            gated = F.silu(h @ named[f"{at}mlp.fc.weight"].T) * (h @ named[f"{at}mlp.gate.weight"].T)
            x = x + gated @ named[f"{at}mlp.proj.weight"].T
        return F.rms_norm(x, x.shape[-1:], named["transformer.ln_f.weight"], MODEL.norm_epsilon)


def _rotation(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = MODEL.head_dim // 2
    angle = torch.arange(length)[:, None] / MODEL.rope.theta ** (torch.arange(half) / half)
    return angle.cos(), angle.sin()


def _attention(h: torch.Tensor, named: dict[str, torch.Tensor], at: str, rotation: tuple) -> torch.Tensor:
    n, length, _ = h.shape
    heads = (h @ named[f"{at}attention.qkv.weight"].T).view(n, length, -1, MODEL.head_dim).transpose(1, 2)
    q, k, v = heads.split([MODEL.num_heads, MODEL.num_kv_heads, MODEL.num_kv_heads], dim=1)
    out = F.scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(n, length, -1) @ named[f"{at}attention.dense.weight"].T


def _rotate(x: torch.Tensor, rotation: tuple) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


Stage = tuple[int, Callable[[np.random.Generator, int], Examples]]
"""Examples per step, and their maker."""

RECALL_STAGES: tuple[Stage, ...] = (
    (64, lambda g, n: recall_examples(g, n, pairs=4, prefix=9, stream=8, zipf=0.0)),
    (64, lambda g, n: recall_examples(g, n, pairs=8, prefix=24, stream=24, zipf=0.0)),
    (32, lambda g, n: recall_examples(g, n, prefix=64, stream=64, zipf=0.0)),
    (16, lambda g, n: recall_examples(g, n, zipf=0.0)),
)
DISTANCE_STAGES: tuple[Stage, ...] = (
    (64, lambda g, n: distance_examples(g, n, length=64)),
    (16, lambda g, n: distance_examples(g, n)),
)


def train(
    stages: tuple[Stage, ...], *, seed: int, limit_s: float, goal: float = 0.995, report: Callable = print
) -> Toy:
    """Climb the stages: the next begins when the last 20 steps' accuracy passes 0.9, the last ends at `goal`.

    Raises:
        RuntimeError: `limit_s` seconds were not enough.
    """
    generator = np.random.default_rng(seed)
    toy = Toy(seed)
    optimiser = torch.optim.AdamW(toy.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    started = time.monotonic()
    for number, (size, make) in enumerate(stages):
        smooth, step, needed = 0.0, 0, goal if number == len(stages) - 1 else 0.9
        while smooth < needed:
            batch = make(generator, size)
            ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)
            asked = targets != IGNORE
            logits = toy(ids)[asked] @ toy.weights[LM_HEAD.replace(".", "|")].T
            loss = F.cross_entropy(logits, targets[asked])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
            optimiser.step()
            accuracy = float((logits.argmax(-1) == targets[asked]).float().mean())
            smooth += (accuracy - smooth) / 20
            step += 1
            if time.monotonic() - started > limit_s:
                raise RuntimeError(f"stage {number} stands at accuracy {smooth:.3f} after {limit_s:.0f} s")
        report(f"stage {number}: {step} steps, accuracy {smooth:.3f}, {time.monotonic() - started:.0f} s")
    return toy


def open_toy(toy: Toy, kv: str, *, sequences: int) -> EmbeddedEngine:
    """The engine on the toy's weights, with room for every sequence in full."""
    limits = Limits(
        max_batch_size=sequences,
        max_num_tokens=sequences * (PREFIX + STREAM),
        max_seq_len=PREFIX + STREAM,
        tokens_per_block=8,
        kv_memory_bytes=MODEL.kv_bytes_per_token(DType.FP32) * (PREFIX + STREAM + 8) * sequences,
    )
    tensors = {name: tensor.detach() for name, tensor in toy.tensors().items()}
    return open_tensors(MODEL, tensors, limits=limits, kv_policy=parse_kv_policy(kv))


def forced(
    engine: EmbeddedEngine,
    ids: np.ndarray,
    read: Callable[[torch.Tensor, np.ndarray], list],
    *,
    prompt: int,
    pieces: tuple[int, ...],
) -> np.ndarray:
    """Feed given tokens through the engine's own scheduler, cache and eviction, as if it had generated them.

    `read(logits [R, V], rows [R])` turns the logits after some tokens of given rows into numbers, for every token
    from `prompt` on; the result is [n, length - prompt]. `pieces` are where the prompt is cut, () for the engine's own.
    """
    scheduler, runner = engine._scheduler, engine._runner
    for number, row in enumerate(ids.tolist()):
        request = Request(request_id=str(number), prompt_ids=tuple(row[:prompt]), max_tokens=len(row) - prompt + 1)
        sequence = Sequence(request=request, arrival=number, max_new_tokens=len(row) - prompt + 1, chunk_ends=pieces)
        runner.admit(sequence, engine.info.kv_policy)
        scheduler.add(sequence)
    result = np.zeros((len(ids), ids.shape[1] - prompt))
    with torch.inference_mode():
        while scheduler.has_work:
            step = scheduler.schedule()
            for sequence in step.preempted:
                runner.forget(sequence)
            inputs = [
                RowInput(sequence=f.sequence, token_ids=f.sequence.token_slice(f.count), ends_piece=f.ends_piece)
                for f in step.feeds
            ]
            batch, hidden = runner.run(inputs, step.new_blocks)
            places = np.array([(f.sequence.arrival, f.sequence.num_tokens - 1 - prompt) for f in step.feeds])
            due = np.flatnonzero(places[:, 1] >= 0)
            if len(due):
                rows, columns = places[due].T
                last = [batch.last_tokens[i] for i in due]
                result[rows, columns] = read(runner.logits(hidden, last), rows)
            for sequence in (feed.sequence for feed in step.feeds if not feed.sequence.pending):
                if sequence.known_len < ids.shape[1]:
                    sequence.output_ids.append(int(ids[sequence.arrival, sequence.known_len]))
                else:
                    scheduler.finish(sequence)
                    runner.forget(sequence)
    return result


def accuracy(
    engine: EmbeddedEngine, examples: Examples, *, prompt: int = PROMPT, pieces: tuple[int, ...] = (PROMPT,)
) -> tuple[float, int]:
    """Share of answers that are right after the prompt, and how many were due."""
    due = examples.targets[:, prompt:]
    asked = due != IGNORE
    given = forced(
        engine, examples.ids, lambda logits, _: logits[:, :PAIR].argmax(-1).tolist(), prompt=prompt, pieces=pieces
    )
    return float((given[asked] == due[asked]).mean()), int(asked.sum())
