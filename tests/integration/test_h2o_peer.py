"""The engine's kept set against kvpress' H2O relative, on attention maps of an eager transformers model."""

from __future__ import annotations

import pytest
import torch
from support.engine_models import make_hf, spec_of, trtllm_tensors

from trtkit.engine.open import open_tensors
from trtkit.spec.engine import ScoreRequest
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_a_prompts_kept_tokens_are_those_of_kvpress(heads, kv_heads):
    hf = make_hf(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=64, attn_implementation="eager")
    prompt = tuple(torch.randint(3, 96, (70,), generator=torch.Generator().manual_seed(heads)).tolist())
    with torch.no_grad():
        maps = hf(torch.tensor([prompt]), output_attentions=True).attentions
    spec = spec_of(hf)
    # kvpress protects neither sinks nor recent tokens, and averages over the queries that could see a key.
    policy = parse_kv_policy("h2o:24,sinks=0,recent=0,scorer=mean")
    limits = Limits(max_batch_size=2, max_num_tokens=128, max_seq_len=128, tokens_per_block=4)
    with open_tensors(spec, trtllm_tensors(hf), limits=limits, kv_policy=policy) as engine:
        kept = []
        forget = engine._runner.forget

        def keep(sequence):
            kept.append(engine._runner.observer._tracked[sequence].ledger.positions.clone().sort(-1).values)
            forget(sequence)

        engine._runner.forget = keep
        list(engine.score([ScoreRequest(request_id="a", context_ids=prompt, continuations=((5,),), chunk_ends=(70,))]))
    press = kvpress.ObservedAttentionPress()
    for layer, attention in enumerate(maps):
        keys = torch.zeros(1, kv_heads, 70, spec.head_dim)
        scores = press.score(None, None, keys, keys, attention, {})[0]
        expected = scores.topk(24, dim=-1).indices.sort(-1).values
        assert torch.equal(kept[0][layer].long(), expected)
