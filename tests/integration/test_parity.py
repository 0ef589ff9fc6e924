"""The embedded engine against transformers: same weights, same tokens, same logits, in float32.

The logit bound is 1e-4 absolute. Configs are random but fixed by seed; each names what it is there for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.engine_models import hf_greedy, make_hf, open_hf

from trtkit.spec.engine import Request, ScoreRequest

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa-1": ("Llama", {"num_key_value_heads": 4}),
    "gqa-4": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}),
    "gqa-8": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 64}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "head-dim": ("Llama", {"head_dim": 16}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "odd-sizes": ("Llama", {"vocab_size": 101, "intermediate_size": 37, "num_hidden_layers": 3}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def _hf(name: str) -> Any:
    kind, overrides = CONFIGS[name]
    return make_hf(kind, seed=sorted(CONFIGS).index(name), **overrides)


def _prompts(vocab: int, lengths: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(i) for i in rng.integers(3, vocab, size=n)) for n in lengths]


def _requests(prompts: list[tuple[int, ...]], count: int) -> list[Request]:
    return [
        Request(request_id=str(i), prompt_ids=prompt, max_tokens=count, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]


def _tokens(engine: Any, requests: list[Request]) -> list[list[int]]:
    out: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for event in engine.generate(requests):
        assert event.error is None, event.error
        out[event.request_id].append(event.token_id)
    engine.check()
    assert engine.kv_stats().blocks_used == 0
    return [out[r.request_id] for r in requests]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    hf = _hf(name)
    prompts = _prompts(hf.config.vocab_size, (1, 3, 4, 17, 31))
    expected = [hf_greedy(hf, prompt, 6) for prompt in prompts]
    with open_hf(hf) as engine:
        assert _tokens(engine, _requests(prompts, 6)) == expected
    with open_hf(hf, max_num_tokens=5, tokens_per_block=3) as chunked:
        assert _tokens(chunked, _requests(prompts, 6)) == expected


@pytest.mark.parametrize("chunks", [(), (1, 9, 20)], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_logit_is_within_1e_4_of_transformers(name: str, chunks: tuple[int, ...]) -> None:
    """All logits of five positions: log-probabilities of the whole vocabulary, shifted by transformers' normaliser."""
    hf = _hf(name)
    vocab = hf.config.vocab_size
    (ids,) = _prompts(vocab, (33,))
    with torch.no_grad():
        expected_TV = hf(torch.tensor([ids]), use_cache=False).logits[0, 27:32]
    request = ScoreRequest(
        request_id="r", context_ids=ids[:28], continuations=(ids[28:],), chunk_ends=chunks, top_logprobs=vocab
    )
    with open_hf(hf) as engine:
        (result,) = engine.score([request])
    ours_TV = torch.zeros(5, vocab)
    for position, top in enumerate(result.continuations[0].top):
        for token, logprob in top:
            ours_TV[position, token] = logprob
    ours_TV += expected_TV.logsumexp(-1, keepdim=True)
    assert float((ours_TV - expected_TV).abs().max()) < 1e-4


def test_tokens_are_the_same_alone_batched_chunked_and_preempted() -> None:
    hf = _hf("gqa-4")
    prompts = _prompts(96, (5, 40, 12, 3, 29, 18, 33, 9), seed=3)
    requests = _requests(prompts, 20)
    expected = [hf_greedy(hf, prompt, 20) for prompt in prompts]
    alone = []
    with open_hf(hf) as engine:
        for request in requests:
            alone += _tokens(engine, [request])
    assert alone == expected
    with open_hf(hf) as batched:
        assert _tokens(batched, requests) == expected
        assert batched.kv_stats().preemptions == 0
    with open_hf(hf, max_num_tokens=7) as chunked:
        assert _tokens(chunked, requests) == expected
    with open_hf(hf, blocks=32) as tight:
        assert _tokens(tight, requests) == expected
        assert tight.kv_stats().preemptions > 0, "the pool was not tight enough to preempt"


def test_a_seeded_request_does_not_depend_on_its_neighbours() -> None:
    from trtkit.spec.engine import Sampling

    hf = _hf("gqa-1")
    prompts = _prompts(96, (8, 21, 4, 30), seed=5)
    requests = [
        Request(
            request_id=str(i),
            prompt_ids=prompt,
            max_tokens=16,
            ignore_eos=True,
            sampling=Sampling(temperature=0.9, top_k=30, top_p=0.95, seed=i % 2),
        )
        for i, prompt in enumerate(prompts)
    ]
    with open_hf(hf) as engine:
        together = _tokens(engine, requests)
        alone = [_tokens(engine, [request])[0] for request in requests]
    with open_hf(hf, blocks=24, max_num_tokens=9) as tight:
        crowded = _tokens(tight, requests)
        assert tight.kv_stats().preemptions > 0
    assert together == alone == crowded
    assert len({tuple(t) for t in together}) > 1
