"""Rotary frequencies against transformers' own initialisers, and the rotation against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from trtkit.engine.rope import RopeTable, inverse_frequencies, rotate_
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.model import RopeSpec


def test_plain_frequencies_fall_geometrically() -> None:
    assert inverse_frequencies(RopeSpec(theta=100.0), 4).tolist() == pytest.approx([1.0, 0.1])


def test_linear_scaling_divides_every_frequency() -> None:
    plain = inverse_frequencies(RopeSpec(), 8)
    scaled = inverse_frequencies(RopeSpec(scaling="linear", factor=4.0), 8)
    assert torch.equal(scaled, plain / 4)


def test_llama3_scaling_equals_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=parameters, rope_theta=500000.0)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    rope = RopeSpec(theta=500000.0, scaling="llama3", factor=8.0, original_max_position=8192)
    ours = inverse_frequencies(rope, 128)
    assert torch.allclose(ours, expected, rtol=1e-6)
    assert not torch.allclose(ours, inverse_frequencies(RopeSpec(theta=500000.0), 128), rtol=1e-3)


def test_an_unknown_scaling_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'yarn'"):
        inverse_frequencies(RopeSpec(scaling="yarn"), 8)


def test_rotation_turns_each_pair_by_its_angle_in_place() -> None:
    table = RopeTable(RopeSpec(theta=100.0), 4, 10, torch.float32, "cpu")
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    buffer = torch.cat([x, x], dim=1)
    rotate_(buffer[:, :1], *table.at(torch.tensor([3])))
    a, b = 3.0, 0.3
    expected = [math.cos(a), -2 * math.sin(b), math.sin(a), 2 * math.cos(b)]
    assert buffer[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(buffer[:, 1:], x), "the neighbour in the buffer is untouched"
