"""The shipped tiny model is what its card says: loadable, small, and hurt by forgetting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.tiny_model.measure import CONTEXT, SCORED, int8_rounded, scores, window_mask, windows
from trtkit.backends.tokenizer import load_tokenizer
from trtkit.quality.heldout import HeldoutRules, default_heldout, read_windows
from trtkit.spec.dtype import DType
from trtkit.spec.hf import load_model_spec

HOME = Path(__file__).parents[2] / "bench" / "tiny_model"
MODEL = HOME / "model"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Every eighth window of the held-out text, [n, CONTEXT + SCORED]."""
    return windows(MODEL, HOME / "heldout")[::8]


@pytest.fixture
def model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)


def test_it_is_a_small_llama_with_grouped_heads() -> None:
    spec = load_model_spec(MODEL)
    assert spec.architecture == "LlamaForCausalLM"
    assert spec.num_params == 918_656
    assert spec.group_size == 2
    assert spec.max_position_embeddings >= 1024
    assert spec.dtype is DType.FP16
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 4_000_000


def test_its_tokenizer_encodes_anything_and_agrees_with_the_config() -> None:
    tokenizer, spec = load_tokenizer(MODEL), load_model_spec(MODEL)
    text = "def f(x):\n\treturn 'żółć 🙂'\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == spec.vocab_size
    assert (tokenizer.bos_id, (tokenizer.eos_id,)) == (spec.bos_id, spec.eos_ids)
    assert tokenizer.chat_template is not None


def test_our_windows_are_those_of_the_plain_measurement(ids: torch.Tensor) -> None:
    ours = read_windows(load_tokenizer(MODEL), HeldoutRules(context=CONTEXT, scored=SCORED))[::8]
    assert default_heldout() == HOME / "heldout"
    assert [[*w.context_ids, *w.scored_ids] for w in ours] == ids.tolist()


@torch.no_grad()
def test_forgetting_costs_perplexity_and_a_wide_window_costs_less(model: torch.nn.Module, ids: torch.Tensor) -> None:
    full, accuracy = scores(model, ids)
    narrow, wide = (scores(model, ids, window_mask(CONTEXT + SCORED, keep, 4))[0].mean() for keep in (48, 384))
    assert full.mean() < 3.1
    assert accuracy > 0.3
    assert narrow - full.mean() > 0.03
    assert narrow > wide


@torch.no_grad()
def test_rounding_to_int8_changes_it_a_little(model: torch.nn.Module, ids: torch.Tensor) -> None:
    full = scores(model, ids)[0]
    int8_rounded(model)
    change = abs(scores(model, ids)[0] - full)
    assert 1e-5 < change.mean() < 0.05


@torch.no_grad()
def test_a_passage_read_before_is_easier_the_second_time(model: torch.nn.Module, ids: torch.Tensor) -> None:
    passage = ids[:, 1:129]
    twice = torch.cat([ids[:, :1], passage, passage], dim=1)
    log_probs = model(input_ids=twice).logits[:, :-1].log_softmax(-1).gather(-1, twice[:, 1:, None])[..., 0]
    first, second = -log_probs[:, :128].mean(), -log_probs[:, 129:].mean()
    assert second < 0.6 * first
