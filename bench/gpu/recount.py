"""Bytes and operations of Llama-like models, counted again from a record's own plan: nothing of trtkit is used.

A second way to the same numbers, for `recompute.py`. Dimensions, types and policy are read from the record's JSON; GPUs'
datasheet rates stand here once more, as NVIDIA prints them (dense).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DATASHEET = {
    "h100-sxm": {"read": 3.35e12, "wide": 989.4e12, "fp8": 1978.9e12},
    "h100-pcie": {"read": 2.0e12, "wide": 756e12, "fp8": 1513e12},
    "h200": {"read": 4.8e12, "wide": 989.4e12, "fp8": 1978.9e12},
}
"""Bytes and operations a second."""
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
Plan = Mapping[str, Any]


def block_weights(model: Mapping[str, Any]) -> int:
    """Elements of a layer's matrices."""
    width, inner = model["hidden_size"], model["intermediate_size"]
    queries, keys = model["num_heads"] * model["head_dim"], model["num_kv_heads"] * model["head_dim"]
    return width * (queries + 2 * keys) + queries * width + 3 * width * inner


def read_bytes(plan: Plan) -> float:
    """Weights that a decode step reads: matrices, their scales, norms, head."""
    model, quant = plan["model"], plan["quant"]
    width, inner = model["hidden_size"], model["intermediate_size"]
    queries, keys = model["num_heads"] * model["head_dim"], model["num_kv_heads"] * model["head_dim"]
    compute = BITS[quant["compute"]] / 8
    outputs = {queries + 2 * keys: width, width: queries, 2 * inner: width}
    channels = sum(outputs) + width
    group = quant.get("group_size") or 0
    if group:
        scales = block_weights(model) / group * compute
    elif quant["weights"] == "int8":
        scales = channels * compute
    elif quant["weights"] == "fp8":
        scales = channels * 4
    else:
        scales = 0.0
    layer = block_weights(model) * BITS[quant["weights"]] / 8 + scales + 2 * width * compute
    return model["num_layers"] * layer + width * compute + model["vocab_size"] * width * compute


def context(plan: Plan, load: Mapping[str, Any]) -> float:
    """Cached tokens that a step's query sees, over the output's mean; H2O's budget where it is less."""
    mean = load["isl"] + (load["osl"] - 1) / 2
    kv = plan["kv"]
    if kv["kind"] == "full":
        return mean
    share = kv["budget_fraction"]
    budget = kv["budget"] if share is None else int(share * (load["isl"] + load["osl"]))
    return min(mean, budget)


def reused(plan: Plan, load: Mapping[str, Any]) -> int:
    """Tokens of a prompt that lie in blocks of all prompts: whole blocks, never the last token."""
    if not plan["limits"].get("enable_block_reuse"):
        return 0
    size = plan["limits"]["tokens_per_block"]
    return min(load.get("shared_prefix_tokens") or 0, load["isl"] - 1) // size * size


def step_bytes(plan: Plan, load: Mapping[str, Any], batch: int) -> float:
    """A decode step: weights once, each request's cache once, what they share once for all."""
    model = plan["model"]
    tokens = batch * context(plan, load) - (batch - 1) * reused(plan, load)
    token = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"] * BITS[plan["quant"]["kv"]] / 8
    return read_bytes(plan) + tokens * token


def prompt_flops(plan: Plan, load: Mapping[str, Any]) -> tuple[float, float]:
    """Operations of a prompt: of the layers' matrices, and of attention and the head. Found blocks are not computed."""
    model, tokens = plan["model"], load["isl"]
    found = reused(plan, load)
    pairs = (tokens**2 - found**2) / 2
    attention = 4 * model["num_layers"] * model["num_heads"] * model["head_dim"] * pairs
    blocks = 2 * model["num_layers"] * block_weights(model) * (tokens - found)
    return blocks, attention + 2 * model["vocab_size"] * model["hidden_size"]


def token_flops(plan: Plan, load: Mapping[str, Any]) -> tuple[float, float]:
    """Operations of one decoded token, in the same two parts."""
    model = plan["model"]
    attention = 4 * model["num_layers"] * model["num_heads"] * model["head_dim"] * context(plan, load)
    blocks = 2 * model["num_layers"] * block_weights(model)
    return blocks, attention + 2 * model["vocab_size"] * model["hidden_size"]


def floor_s(
    plan: Plan, load: Mapping[str, Any], rates: Mapping[str, float], batch: int, *, per_step: float = 1.0
) -> tuple[float, float] | None:
    """Least seconds of one prompt and of one more token for each request; None where a rate is not known.

    `rates` are "read", "wide" and "fp8"; a step gives each request `per_step` tokens.
    """
    fp8 = plan["quant"]["activations"] == "fp8" and plan["gpu"] != "cpu"
    narrow = rates.get("fp8") if fp8 else rates.get("wide")
    wide = rates.get("wide", narrow)
    if narrow is None or wide is None or "read" not in rates:
        return None

    def seconds(flops: tuple[float, float]) -> float:
        return flops[0] / narrow + flops[1] / wide

    step = max(step_bytes(plan, load, batch) / rates["read"] / per_step, batch * seconds(token_flops(plan, load)))
    return seconds(prompt_flops(plan, load)), step


def rates_of(limits: Mapping[str, Any], *, wide_only: str | None = None) -> dict[str, float]:
    """A record's measured ceilings by the names used here; `wide_only` is the one type a 32-bit plan multiplies in."""
    values = {key: entry["value"] for key, entry in limits.items()}
    found = {"read": values["read_bytes_s"]} if "read_bytes_s" in values else {}
    types = (wide_only,) if wide_only else ("fp32", "bf16", "fp16")
    wide = [values[f"matmul_flops_s.{kind}"] for kind in types if f"matmul_flops_s.{kind}" in values]
    if wide:
        found["wide"] = max(wide)
    if "matmul_flops_s.fp8" in values:
        found["fp8"] = values["matmul_flops_s.fp8"]
    return found
