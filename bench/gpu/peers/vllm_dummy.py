"""vLLM on the same GPU with random weights of Llama 3 70B in 8 bits: same lengths, same concurrency, token ids in.

Written against vLLM's documented names (AsyncEngineArgs, AsyncLLM.from_engine_args, generate, SamplingParams with
output_kind, prompts as {"prompt_token_ids": ...}) and read again in its source of mid 2026: a directory without
safetensors skips the dummy loader's check of names, "fp8" with activation_scheme allocates 8-bit weights, and "gptq" of 8 bits, groups
of 128 and no act-order runs on Marlin's kernels. None of it has run on a GPU yet. Prefix caching is off, as in our rows beside it, and so
are log statistics; everything else is vLLM's default. The share of memory that vLLM may take leaves less cache than ours has, and the note of
each cell says how much.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu.peers.rounds import Arrivals, PeerCell, Round, round_of
from bench.gpu.peers.transformers_static import prompts_of
from trtkit.spec.model import ModelSpec
from trtkit.spec.workload import Workload

QUANTISATIONS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "int8-gptq": {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False, "sym": True},
}
"""`quantization_config` of a checkpoint in each form; with it, vLLM allocates 8-bit weights and never 16-bit ones."""
ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What to run. `loads` are (concurrency, ISL, OSL), most important first."""

    model: ModelSpec
    loads: tuple[tuple[int, int, int], ...]
    work_dir: Path
    left_s: Callable[[], float]
    rounds: int = ROUNDS
    max_num_seqs: int = 64


def hf_config(model: ModelSpec, quantisation: str) -> dict[str, Any]:
    """A Hugging Face config.json of the model's shape."""
    return {
        "architectures": [model.architecture],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope.theta,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float16" if quantisation == "int8-gptq" else "bfloat16",
        "bos_token_id": model.bos_id,
        "eos_token_id": model.eos_ids[0] if model.eos_ids else None,
        "quantization_config": QUANTISATIONS[quantisation],
    }


def engine_arguments(setup: Setup, directory: Path, quantisation: str) -> dict[str, Any]:
    """Keyword arguments of `AsyncEngineArgs`."""
    longest = max(isl + osl for _, isl, osl in setup.loads)
    return {
        "model": str(directory),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float16" if quantisation == "int8-gptq" else "bfloat16",
        "max_model_len": longest,
        "max_num_seqs": setup.max_num_seqs,
        "gpu_memory_utilization": 0.95,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }


def sampling_arguments(osl: int) -> dict[str, Any]:
    """Keyword arguments of `SamplingParams` but for `output_kind`: greedy, exactly `osl` tokens, no text."""
    return {"temperature": 0.0, "max_tokens": osl, "ignore_eos": True, "detokenize": False}


def missing() -> str | None:
    """What keeps vLLM from running here, in one line; None if nothing does."""
    try:
        from vllm import SamplingParams  # noqa: F401
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: F401
        from vllm.sampling_params import RequestOutputKind  # noqa: F401
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: F401
    except ImportError as error:
        needed = error.name or str(error)
        return f"vLLM cannot be imported: {needed!r} is missing; see bench/gpu/README.md for how to bring its wheels"
    return None


def run(setup: Setup, quantisation: str) -> list[PeerCell]:
    """All loads on one engine; what was not run says why."""
    reason = missing()
    if reason is not None:
        return [_cell(setup, quantisation, load, not_run=reason) for load in setup.loads]
    directory = setup.work_dir / f"vllm-{quantisation}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(setup.model, quantisation)), encoding="utf-8")
    try:
        return asyncio.run(_serve(setup, quantisation, directory))
    except Exception as error:  # noqa: BLE001 - whatever a peer raises ends the peer, not our run
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return [_cell(setup, quantisation, load, not_run=text) for load in setup.loads]


async def _serve(setup: Setup, quantisation: str, directory: Path) -> list[PeerCell]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    started = time.monotonic()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(setup, directory, quantisation)))
    opened_s = time.monotonic() - started
    cells = []
    try:
        for load in setup.loads:
            cells.append(await _measure(engine, setup, quantisation, load, opened_s))
    finally:
        engine.shutdown()
    return cells


async def _measure(
    engine: Any, setup: Setup, quantisation: str, load: tuple[int, int, int], opened_s: float
) -> PeerCell:
    concurrency, isl, osl = load
    workload = Workload(isl=isl, osl=osl, num_requests=concurrency, concurrency=concurrency)
    rounds: list[Round] = []
    last_s = 0.0
    for number in range(setup.rounds + 1):
        if setup.left_s() < 1.2 * last_s:
            break
        started = time.monotonic()
        done = await _round(engine, workload, setup.model.vocab_size, number)
        last_s = time.monotonic() - started
        if number > 0:
            rounds.append(done)
    cell = _cell(setup, quantisation, load, not_run=None if rounds else "no time was left")
    note = "; ".join(filter(None, (cell.note, _cache_note(engine))))
    return PeerCell(**{**_fields(cell), "rounds": tuple(rounds), "seconds_to_open": opened_s, "note": note})


def _cache_note(engine: Any) -> str:
    """Tokens that vLLM's cache holds, where this version tells."""
    cache = getattr(getattr(engine, "vllm_config", None), "cache_config", None)
    blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
    return f"a cache of {blocks * size} tokens" if blocks and size else ""


async def _round(engine: Any, load: Workload, vocab_size: int, number: int) -> Round:
    """A closed-loop round: all requests at once, token times as they reach this process."""
    prompts = prompts_of(load, vocab_size, number)
    names = [f"r{number}-{index}" for index in range(len(prompts))]
    started = time.monotonic()
    times = await asyncio.gather(
        *(_request(engine, name, row.tolist(), load.osl) for name, row in zip(names, prompts, strict=True))
    )
    arrivals = [
        Arrivals(
            asked_ms=0.0,
            times_ms=tuple(round((at - started) * 1e3, 4) for at, _ in seen),
            tokens=tuple(tokens for _, tokens in seen),
        )
        for seen in times
    ]
    return round_of(arrivals, load.osl)


async def _request(engine: Any, name: str, prompt: list[int], osl: int) -> list[tuple[float, int]]:
    """(time, tokens so far) of each message of one request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(**sampling_arguments(osl), output_kind=RequestOutputKind.DELTA)
    seen: list[tuple[float, int]] = []
    tokens = 0
    async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
        tokens += len(output.outputs[0].token_ids)
        seen.append((time.monotonic(), tokens))
    return seen


def _version() -> str:
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return ""


def _cell(setup: Setup, quantisation: str, load: tuple[int, int, int], *, not_run: str | None) -> PeerCell:
    concurrency, isl, osl = load
    return PeerCell(
        who="vllm",
        version=_version(),
        model=setup.model.name,
        precision=quantisation,
        concurrency=concurrency,
        isl=isl,
        osl=osl,
        note="token times as they reach the client",
        not_run=not_run,
    )


def _fields(cell: PeerCell) -> Mapping[str, Any]:
    return {name: getattr(cell, name) for name in PeerCell.__dataclass_fields__}
