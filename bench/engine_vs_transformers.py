"""The embedded engine against transformers on this CPU, side by side in one run.

A random Llama of about 100 million parameters; both sides have the same weights in the same type. Two loads:

- one request at a time (batch 1): prompt 64, output 64;
- 32 requests given at once, prompts of 16 to 256 and outputs of 16 to 128 tokens, seeded. transformers runs them as
  one left-padded `generate` (every row runs to the longest output) and through `generate_batch`, its own
  continuous batching; ours takes them in flight.

Useful tokens per second are the requested output tokens over the wall time of the whole load. Rounds are
interleaved, so that a busy machine disturbs all alike; medians and the range are printed. No stop token can occur.

    python bench/engine_vs_transformers.py [--rounds 5] [--threads 2] [--dtype fp32] [--output FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.matmul import linear
from trtkit.engine.open import open_tensors
from trtkit.spec.atomic import write_text
from trtkit.spec.checkpoint import FINAL_NORM, LM_HEAD, VOCAB_EMBEDDING, layer_prefix
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.hf import model_spec_from_hf
from trtkit.spec.plan import Limits

SIZES = {
    "vocab_size": 16_384,
    "hidden_size": 768,
    "intermediate_size": 2_048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1_024,
}
SINGLE_PROMPT, SINGLE_OUTPUT = 64, 64
NUM_MIXED = 32


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    dtype = DType.parse(args.dtype)
    hf = make_model(dtype)
    engine = make_engine(hf, dtype)
    rng = np.random.default_rng(0)
    single = [make_request(rng, "single", SINGLE_PROMPT, SINGLE_OUTPUT)]
    lengths = zip(rng.integers(16, 257, NUM_MIXED), rng.integers(16, 129, NUM_MIXED), strict=True)
    mixed = [make_request(rng, str(i), int(p), int(o)) for i, (p, o) in enumerate(lengths)]
    loads: dict[str, tuple[list[Request], dict[str, Callable[[list[Request]], dict[str, list[int]]]]]] = {
        "batch 1": (single, {"trtkit": lambda r: run_ours(engine, r), "generate": lambda r: run_padded(hf, r)}),
        "mixed 32": (
            mixed,
            {
                "trtkit": lambda r: run_ours(engine, r),
                "generate (padded)": lambda r: run_padded(hf, r),
                "generate_batch": lambda r: run_continuous(hf, r),
            },
        ),
    }
    limits = machine_limits(torch_dtype(dtype))
    record = environment(args, hf, limits)
    record["loads"] = {name: measure(name, load, runs, args.rounds) for name, (load, runs) in loads.items()}
    report(record, hf)
    write_text(args.output, json.dumps(record, indent=1) + "\n")
    print(f"\nrecord: {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="fp32", help="fp32 or bf16, on both sides")
    month = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m")
    default = Path(__file__).parent / "results" / f"engine-cpu-{month}.json"
    parser.add_argument("--output", type=Path, default=default)
    return parser.parse_args()


def torch_dtype(dtype: DType) -> torch.dtype:
    return getattr(torch, dtype.trtllm_name)


def make_model(dtype: DType) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).to(torch_dtype(dtype)).eval()


def make_engine(hf: transformers.LlamaForCausalLM, dtype: DType) -> EmbeddedEngine:
    state = hf.state_dict()
    tensors = {
        VOCAB_EMBEDDING: state["model.embed_tokens.weight"],
        FINAL_NORM: state["model.norm.weight"],
        LM_HEAD: state["lm_head.weight"],
    }
    for layer in range(hf.config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", layer_prefix(layer)
        qkv = [state[f"{source}self_attn.{name}_proj.weight"] for name in "qkv"]
        tensors[f"{target}attention.qkv.weight"] = torch.cat(qkv)
        tensors[f"{target}attention.dense.weight"] = state[f"{source}self_attn.o_proj.weight"]
        for ours, theirs in (("fc", "gate_proj"), ("gate", "up_proj"), ("proj", "down_proj")):
            tensors[f"{target}mlp.{ours}.weight"] = state[f"{source}mlp.{theirs}.weight"]
        tensors[f"{target}input_layernorm.weight"] = state[f"{source}input_layernorm.weight"]
        tensors[f"{target}post_layernorm.weight"] = state[f"{source}post_attention_layernorm.weight"]
    config = {**hf.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    spec = model_spec_from_hf(config, name="random-100m")
    limits = Limits(max_batch_size=NUM_MIXED, max_num_tokens=2048, max_seq_len=1024)
    return open_tensors(spec, tensors, limits=limits, dtype=dtype)


def make_request(rng: np.random.Generator, name: str, prompt: int, output: int) -> Request:
    ids = tuple(int(i) for i in rng.integers(1, SIZES["vocab_size"], prompt))
    return Request(request_id=name, prompt_ids=ids, max_tokens=output, ignore_eos=True)


def run_ours(engine: EmbeddedEngine, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for event in engine.generate(requests):
        assert event.token_id is not None, event.error
        tokens[event.request_id].append(event.token_id)
    return tokens


@torch.inference_mode()
def run_padded(hf: transformers.LlamaForCausalLM, requests: list[Request]) -> dict[str, list[int]]:
    width = max(len(r.prompt_ids) for r in requests)
    longest = max(r.max_tokens for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False)
    return {
        request.request_id: out[row, width : width + request.max_tokens].tolist()
        for row, request in enumerate(requests)
    }


def run_continuous(hf: transformers.LlamaForCausalLM, requests: list[Request]) -> dict[str, list[int]]:
    """`generate_batch`'s own manager, which unlike `generate_batch` takes each request's output length."""
    tokens = sum(len(r.prompt_ids) + r.max_tokens for r in requests)
    block = 32
    config = transformers.generation.configuration_utils.ContinuousBatchingConfig(
        block_size=block, num_blocks=tokens // block + 2 * len(requests), max_batch_tokens=2048
    )
    generation = transformers.GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
    out: dict[str, list[int]] = {}
    with hf.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=5
    ) as manager:
        for request in requests:
            manager.add_request(
                list(request.prompt_ids), request_id=request.request_id, max_new_tokens=request.max_tokens
            )
        while len(out) < len(requests):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                out[result.request_id] = result.generated_tokens
            elif not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped")
    return out


def machine_limits(dtype: torch.dtype) -> dict[str, float]:
    """What this CPU reached just now with these threads: the best of several tries."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    wide, one = torch.randn(16_384, 4_096).to(dtype), torch.randn(1, 4_096).to(dtype)
    # Both of torch's libraries, so that the ceiling is the machine's and not one library's.
    matmul_s = min(best_of(lambda: a @ b), best_of(lambda: linear(a, b)))
    read_s = best_of(lambda: torch.nn.functional.linear(one, wide))
    return {"matmul_flop_s": 2 * 1024**3 / matmul_s, "read_bytes_s": wide.numel() * wide.element_size() / read_s}


def best_of(work: Callable[[], object], tries: int = 15) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(
    name: str, requests: list[Request], runs: dict[str, Callable[[list[Request]], dict[str, list[int]]]], rounds: int
) -> dict[str, object]:
    """Interleaved rounds, after a short warm-up of each; the first round's tokens are compared."""
    print(f"{name}: warming up", flush=True)
    for run in runs.values():
        run([replace(request, max_tokens=4) for request in requests[:2]])
    seconds: dict[str, list[float]] = {runner: [] for runner in runs}
    tokens: dict[str, dict[str, list[int]]] = {}
    for index in range(rounds):
        for runner, run in runs.items():
            start = time.perf_counter()
            out = run(requests)
            seconds[runner].append(time.perf_counter() - start)
            tokens.setdefault(runner, out)
            print(f"{name}: round {index + 1} of {rounds}, {runner} {seconds[runner][-1]:.1f} s", flush=True)
    ours = tokens.pop("trtkit")
    equal = {runner: sum(out[key] == ours[key] for key in ours) / len(ours) for runner, out in tokens.items()}
    useful = sum(request.max_tokens for request in requests)
    return {
        "requests": len(requests),
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "output_tokens": useful,
        "seconds": seconds,
        "useful_tok_s": {runner: [useful / s for s in values] for runner, values in seconds.items()},
        "requests_with_equal_tokens": equal,
    }


def environment(
    args: argparse.Namespace, hf: transformers.LlamaForCausalLM, limits: dict[str, float]
) -> dict[str, object]:
    return {
        "kind": "engine-vs-transformers",
        "source": "measured",
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average_before": os.getloadavg()[0],
        "dtype": args.dtype,
        "params": sum(p.numel() for p in hf.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine_limits": limits,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(record: dict, hf: transformers.LlamaForCausalLM) -> None:
    limits = record["machine_limits"]
    blocks = sum(p.numel() for name, p in hf.named_parameters() if "layers" in name)
    head = hf.lm_head.weight.numel()
    size = hf.lm_head.weight.element_size()
    print(
        f"\n{record['params'] / 1e6:.0f}M parameters, {record['dtype']}, {record['threads']} threads, {record['cpu']}"
    )
    print(
        f"this CPU, measured: {limits['matmul_flop_s'] / 1e9:.0f} GFLOP/s matmul, "
        f"{limits['read_bytes_s'] / 1e9:.1f} GB/s read; load average {record['load_average_before']:.1f}"
    )
    for name, load in record["loads"].items():
        print(f"\n{name}: {load['prompt_tokens']} prompt and {load['output_tokens']} output tokens")
        ours = load["useful_tok_s"]["trtkit"]
        for runner, values in load["useful_tok_s"].items():
            ratio = statistics.median(ours) / statistics.median(values)
            same = load["requests_with_equal_tokens"].get(runner)
            note = "" if same is None else f"  ours is {ratio:.2f}x; {same:.0%} of requests have equal tokens"
            print(
                f"  {runner:18s} {statistics.median(values):7.1f} tok/s ({min(values):.1f} to {max(values):.1f}){note}"
            )
        best_s = statistics.median(load["seconds"]["trtkit"])
        fed = load["prompt_tokens"] + load["output_tokens"] - load["requests"]
        flop_s = 2 * (blocks * fed + head * load["output_tokens"]) / best_s
        load["share_of_matmul"] = flop_s / limits["matmul_flop_s"]
        print(f"  trtkit's matrix products run at {load['share_of_matmul']:.0%} of the measured matmul rate")
        if load["requests"] == 1:
            load["share_of_read"] = load["output_tokens"] * (blocks + head) * size / best_s / limits["read_bytes_s"]
            print(f"  and read weights at {load['share_of_read']:.0%} of the measured read rate")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="transformers")
    transformers.logging.set_verbosity_error()
    main()
