"""Counts that follow from a model's shape, and shapes that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError
from trtkit.spec.model import ModelSpec

SMALL = ModelSpec(
    name="small",
    architecture="LlamaForCausalLM",
    num_layers=3,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=20,
    vocab_size=50,
    max_position_embeddings=128,
)


def test_parameters_are_counted_matrix_by_matrix() -> None:
    attention = 16 * 32 + 2 * (16 * 16) + 32 * 16
    mlp = 3 * 16 * 20
    assert SMALL.linear_params_per_layer == attention + mlp
    assert SMALL.num_params == 3 * (attention + mlp + 2 * 16) + 2 * 50 * 16 + 16
    assert SMALL.group_size == 2


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"tie_embeddings": True}, -50 * 16),
        ({"attn_qkv_bias": True}, 3 * (32 + 2 * 16)),
        ({"attn_dense_bias": True}, 3 * 16),
        ({"mlp_bias": True}, 3 * (2 * 20 + 16)),
        ({"qk_norm": True}, 3 * 2 * 8),
    ],
)
def test_each_option_adds_its_own_parameters(change: dict[str, bool], more: int) -> None:
    assert replace(SMALL, **change).num_params - SMALL.num_params == more


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert SMALL.kv_bytes_per_token(DType.FP16) == 2 * 3 * 2 * 8 * 2
    assert SMALL.kv_bytes_per_token(DType.FP8) == 2 * 3 * 2 * 8


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_dimension_that_is_not_positive_is_refused(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"model 'small': {name} is {value}, must be positive"):
        replace(SMALL, **{name: value})


def test_heads_must_share_kv_heads_evenly() -> None:
    with pytest.raises(InputError, match="4 query heads cannot share 3 KV heads"):
        replace(SMALL, num_kv_heads=3)
