"""What INT8 and a shorter memory do to the tiny model: `python bench/tiny_model/measure.py`.

Plain transformers in fp32, no engine of ours, so that the engines have something to be held against. Prints one line a
variant: perplexity on the held-out text, the share of next tokens guessed right, and its paired difference in nats.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

HERE = Path(__file__).resolve().parent
CONTEXT, SCORED = 768, 128


def windows(model_dir: Path, heldout: Path) -> torch.Tensor:
    """Disjoint windows [n, CONTEXT + SCORED] of the held-out documents, each behind BOS."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = []
    for path in sorted(heldout.glob("*.txt")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
        step = CONTEXT + SCORED - 1
        rows += [[tokenizer.bos_token_id, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor(rows)


def int8_rounded(model: PreTrainedModel) -> None:
    """Round the linear layers inside blocks to 8 bits, symmetric, one scale per output channel."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ".layers." in name:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            weight.copy_((weight / scale).round().clamp(-127, 127) * scale)


def window_mask(length: int, keep: int, sinks: int) -> torch.Tensor:
    """Additive mask [1, 1, length, length]: each query sees the first `sinks` and the last `keep` positions."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (key <= query) & ((query - key < keep) | (key < sinks))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def scores(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[np.ndarray, float]:
    """Mean negative log-likelihood of each window's last SCORED tokens in nats, and top-1 accuracy over all."""
    losses, hits = [], []
    for row in ids.split(4):
        logits = model(input_ids=row, attention_mask=None if mask is None else mask.expand(len(row), -1, -1, -1)).logits
        log_probs = logits[:, CONTEXT - 1 : -1].log_softmax(-1)
        target = row[:, CONTEXT:]
        losses.append(-log_probs.gather(-1, target[..., None])[..., 0].mean(1))
        hits.append((log_probs.argmax(-1) == target).float().mean(1))
    return torch.cat(losses).double().numpy(), float(torch.cat(hits).mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout")
    args = parser.parse_args()
    ids = windows(args.model, args.heldout)
    print(f"{len(ids)} windows, {SCORED} tokens scored in each after {CONTEXT}")

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    model = load()
    base, _ = report("fp32", scores(model, ids))
    for keep in (512, 384, 192, 96, 48):
        report(f"sinks 4 + window {keep}", scores(model, ids, window_mask(CONTEXT + SCORED, keep, 4)), base)
    report("window 192, no sinks", scores(model, ids, window_mask(CONTEXT + SCORED, 192, 0)), base)
    int8_rounded(model)
    report("int8", scores(model, ids), base)
    report("bf16", scores(load().to(torch.bfloat16), ids), base)


def report(label: str, result: tuple[np.ndarray, float], base: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Print one variant."""
    losses, accuracy = result
    line = f"{label:22s} perplexity {np.exp(losses.mean()):7.3f}  top-1 {accuracy:.2%}"
    if base is not None:
        delta = losses - base
        line += f"  {delta.mean():+.4f} nats +- {delta.std(ddof=1) / np.sqrt(len(delta)):.4f} (s.e.)"
    print(line, flush=True)
    return result


if __name__ == "__main__":
    main()
