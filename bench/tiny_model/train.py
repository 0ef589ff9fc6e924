"""Train the shipped tiny Llama on this Python's own standard library: `python bench/tiny_model/train.py`.

A few minutes on two CPU threads. The corpus is text that every Python installation has, so nothing is downloaded and
nothing of it is stored in this repository; another Python version gives a slightly different corpus and therefore a
slightly different model. `training.json` beside the weights records what this one was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 512
CONTEXT = 1024
HIDDEN, HEAD_DIM, ROPE_THETA = 128, 32, 10_000.0
COPIES_PER_256 = 2
"""Spans of 8 to 48 tokens repeated in 256, on average: about a fifth of the text."""
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
"""Folders left out: tests and tables repeat themselves too much to teach anything."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)
"""A base model has learned no turns; Python comments are the nearest thing it has seen."""


def corpus_files() -> list[Path]:
    """The standard library's Python files, in an order that does not depend on the file system."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts))
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte has a token, so any text encodes; each text starts with BOS as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = 2 * CONTEXT
    return fast


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents in one array of ids: BOS, text, EOS for each."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([BOS_ID, *ids, EOS_ID], dtype=np.int64) for ids in encoded])


def batches(
    stream: np.ndarray, *, steps: int, tokens_per_step: int, seed: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(step, ids, copied): short windows first, full ones for the last 40 %; every window starts with BOS.

    A million parameters and a few minutes are too little for looking things up far back to be worth learning from
    plain text, and a model that never looks back cannot feel an eviction. So spans of each window reappear later in it;
    `copied` marks them.
    """
    generator = np.random.default_rng(seed)
    for step in range(steps):
        length = 256 if step < 0.6 * steps else CONTEXT
        starts = generator.integers(0, len(stream) - length, size=tokens_per_step // length)
        windows = np.stack([stream[s : s + length] for s in starts])
        windows[:, 0] = BOS_ID
        copied = np.zeros(windows.shape, dtype=bool)
        for row, mark in zip(windows, copied, strict=True):
            for _ in range(int(COPIES_PER_256 * length / 256 * generator.uniform(0.5, 1.5))):
                repeat_span(row, mark, generator)
        yield step, torch.from_numpy(windows), torch.from_numpy(copied)


def repeat_span(row: np.ndarray, mark: np.ndarray, generator: np.random.Generator) -> None:
    """Overwrite a random span of `row` with an earlier one, at any distance."""
    size = int(generator.integers(8, 49))
    source = int(generator.integers(1, len(row) - 2 * size))
    target = int(generator.integers(source + size, len(row) - size))
    row[target : target + size] = row[source : source + size]
    mark[target : target + size] = True


def new_model() -> LlamaForCausalLM:
    """Four layers, 4 query heads on 2 KV heads of 32, under a million parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=2 * CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    plant_lookback(model)
    return model


@torch.no_grad()
def plant_lookback(model: LlamaForCausalLM) -> None:
    """Start head 0 of the first two layers as the pair that finds an earlier occurrence and predicts what followed it.

    Larger models find this circuit by themselves (it is known as an induction head); this one would need hours. Layer 0
    attends to the previous token and writes what it was into spare dimensions; layer 1 matches the current token
    against that and copies the token it finds towards the output. Training goes on from there and may change it.
    Hidden dimensions: 0 a constant, 1-63 the token, 64-95 the token before, 96-126 the copied one.
    """
    generator = torch.Generator().manual_seed(1)
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, 0] = 1.0
    embedding[:, 1:64] = 0.5 * torch.randn(VOCAB_SIZE, 63, generator=generator)
    head = model.lm_head.weight
    head.normal_(0, 0.02, generator=generator)
    head[:, 96:127] = 0.3 * embedding[:, 33:64]
    previous, match = (model.model.layers[i].self_attn for i in (0, 1))
    for attention in (previous, match):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:HEAD_DIM] = 0
        attention.o_proj.weight[:, :HEAD_DIM] = 0
    plant_previous_token(previous)
    plant_match(match)


def plant_previous_token(attention: torch.nn.Module) -> None:
    """A constant query and a constant key, rotated by one position's angle: their product peaks at distance 1."""
    norm = ((1 + 63 * 0.25) / HIDDEN) ** 0.5
    strength = 40**0.5 * norm
    for pair in range(6):  # the fast rotations, which tell neighbours apart
        angle = ROPE_THETA ** (-2 * pair / HEAD_DIM)
        attention.q_proj.weight[pair, 0] = strength
        attention.k_proj.weight[pair, 0] = strength * math.cos(angle)
        attention.k_proj.weight[pair + HEAD_DIM // 2, 0] = strength * math.sin(angle)
    for j in range(32):
        attention.v_proj.weight[j, 1 + j] = 1.0
        attention.o_proj.weight[64 + j, j] = norm


def plant_match(attention: torch.nn.Module) -> None:
    """Query: the token; key: the token before; on slow rotations, which leave content alone over some distance."""
    norm = ((1 + 63 * 0.25 + 32 * 0.25) / HIDDEN) ** 0.5
    strength = 6**0.5 * norm / 0.5
    slow = [pair + half for half in (0, HEAD_DIM // 2) for pair in range(8, 16)]
    for j, dimension in enumerate(slow):
        attention.q_proj.weight[dimension, 1 + j] = strength
        attention.k_proj.weight[dimension, 64 + j] = strength
    for j in range(31):
        attention.v_proj.weight[j, 33 + j] = 1.0
        attention.o_proj.weight[96 + j, j] = 1.0


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.03, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Learning-rate multiplier: a short warm-up, flat, then linearly to zero over the last half."""
    return min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))


def train(model: LlamaForCausalLM, stream: np.ndarray, *, steps: int, tokens_per_step: int, seed: int) -> list[float]:
    """Train in place and return the loss of every step on text that was not copied, in nats per token."""
    opts = optimizers(model)
    peaks = [[g["lr"] for g in opt.param_groups] for opt in opts]
    losses: list[float] = []
    copies: list[float] = []
    started = time.monotonic()
    for step, ids, copied in batches(stream, steps=steps, tokens_per_step=tokens_per_step, seed=seed):
        for opt, lrs in zip(opts, peaks, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = each.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        marked = copied[:, 1:].flatten()
        losses.append(each.detach()[~marked].mean().item())
        copies.append(each.detach()[marked].mean().item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"step {step}: the loss is {losses[-1]}; lower the learning rate")
        if step % 25 == 0 or step == steps - 1:
            print(
                f"step {step:5d}  text {np.mean(losses[-25:]):.3f}  copied spans {np.mean(copies[-25:]):.3f} nats/token"
                f"  {time.monotonic() - started:5.0f} s",
                flush=True,
            )
    return losses


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model in FP16 and the tokenizer, readable by transformers 4.57 too."""
    model.to(torch.float16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    # 5.x writes a class name that 4.57 does not know; both know this one.
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in output.iterdir():
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    files = corpus_files()
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    tokenizer = build_tokenizer(texts)
    stream = token_stream(tokenizer, texts)
    model = new_model()
    corpus_bytes = sum(len(t.encode()) for t in texts)
    print(
        f"{len(files)} files, {corpus_bytes / 1e6:.1f} MB, {len(stream) / 1e6:.2f} M tokens; {model.num_parameters():,} parameters"
    )
    losses = train(model, stream, steps=args.steps, tokens_per_step=args.tokens_per_step, seed=args.seed)
    save(model, tokenizer, args.output)
    record = {
        "corpus": f"standard library of Python {platform.python_version()}, {len(files)} files",
        "corpus_bytes": corpus_bytes,
        "corpus_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "corpus_tokens": len(stream),
        "parameters": model.num_parameters(),
        "seed": args.seed,
        "steps": args.steps,
        "tokens_per_step": args.tokens_per_step,
        "final_loss_nats_per_token": round(float(np.mean(losses[-50:])), 4),
        "seconds": round(time.monotonic() - started),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
