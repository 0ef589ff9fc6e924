"""transformers' `generate` with a static cache (compiled on CUDA) beside our engine: one GPU, one shape, one precision.

Llama 3 8B of random weights in BF16, both in memory at once, rounds in turn: theirs, ours, theirs, ours. Theirs is what
its documentation tells users to do; its first token is timed as a call for one token, because `generate` shows no times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.peers.rounds import PeerCell, Round
from bench.gpu.sweep import dummy_bundle
from trtkit.backends.remote import DEFAULT_OPENER, RemoteEngine, Timeouts
from trtkit.benchmark.driver import run_repeat
from trtkit.benchmark.metrics import compute_metrics
from trtkit.spec.catalog import model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.errors import TrtkitError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.units import GIB, MIB
from trtkit.spec.workload import Workload

ROUNDS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One comparison. `left_s` says how much time there is."""

    model: ModelSpec
    precision: str
    device: str
    gpu: str
    loads: tuple[tuple[int, int, int], ...]
    work_dir: Path
    left_s: Callable[[], float]
    rounds: int = ROUNDS
    opener: str = DEFAULT_OPENER


def gpu_setup(gpu: str, work_dir: Path, left_s: Callable[[], float]) -> Setup:
    """Llama 3 8B in BF16 at batch 1 and 8."""
    return Setup(
        model=model_preset("llama-3-8b"),
        precision="bf16",
        device="cuda",
        gpu=gpu,
        loads=((1, 512, 128), (8, 512, 128)),
        work_dir=work_dir,
        left_s=left_s,
    )


def rehearsal_setup(model: ModelSpec, work_dir: Path, left_s: Callable[[], float]) -> Setup:
    """A tiny shape on the CPU."""
    return Setup(
        model=model,
        precision="fp32",
        device="cpu",
        gpu="cpu",
        loads=((1, 16, 6), (2, 16, 6)),
        work_dir=work_dir,
        left_s=left_s,
        rounds=2,
    )


def compare(setup: Setup) -> list[PeerCell]:
    """Cells of both, theirs first; a side that fails is told in one line and the other goes on."""
    cells = _empty(setup)
    started = time.monotonic()
    theirs: Theirs | str = _opened(setup)
    opened_s = time.monotonic() - started
    try:
        timeouts = Timeouts(start_s=max(setup.left_s(), 1.0), stall_s=max(setup.left_s(), 1.0))
        overrides = {"path": "device"} if setup.device == "cpu" else {}
        ours: RemoteEngine | str = RemoteEngine(_bundle(setup), overrides, opener=setup.opener, timeouts=timeouts)
    except TrtkitError as error:
        ours = str(error)
    try:
        for number, (concurrency, isl, osl) in enumerate(setup.loads):
            load = Workload(isl=isl, osl=osl, num_requests=concurrency, concurrency=concurrency)
            done = _rounds(setup, load, theirs, ours)
            for side in (0, 1):
                at = 2 * number + side
                cells[at] = replace(cells[at], **done[side])
            cells[2 * number] = replace(cells[2 * number], seconds_to_open=opened_s)
    finally:
        if isinstance(ours, RemoteEngine):
            ours.close()
    return cells


def _empty(setup: Setup) -> list[PeerCell]:
    cells = []
    for concurrency, isl, osl in setup.loads:
        common = {"model": setup.model.name, "precision": setup.precision, "concurrency": concurrency}
        for who, version in (("transformers static", metadata.version("transformers")), ("trtkit", "")):
            cells.append(PeerCell(who=who, version=version, isl=isl, osl=osl, **common))
    return cells


def _rounds(
    setup: Setup, load: Workload, theirs: Theirs | str, ours: RemoteEngine | str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rounds in turn, after one of each that does not count (it compiles and captures)."""
    sides: list[list[Round]] = [[], []]
    failed: list[str | None] = [side if isinstance(side, str) else None for side in (theirs, ours)]
    longest_s = 0.0
    for number in range(setup.rounds + 1):
        if number > 1 and setup.left_s() < 1.5 * longest_s:
            break
        started = time.monotonic()
        for side, engine in enumerate((theirs, ours)):
            if failed[side] is not None:
                continue
            try:
                done = engine.round(load, number) if isinstance(engine, Theirs) else our_round(engine, load, number)
            except (TrtkitError, RuntimeError, ValueError, TypeError) as error:
                failed[side] = f"{type(error).__name__}: {error}"[:300]
                continue
            if number > 0:
                sides[side].append(done)
        longest_s = max(longest_s if number > 1 else 0.0, time.monotonic() - started)
    missing = [reason or (None if rounds else "no time was left") for reason, rounds in zip(failed, sides, strict=True)]
    first, second = ({"rounds": tuple(r), "not_run": m} for r, m in zip(sides, missing, strict=True))
    return first, second


def _opened(setup: Setup) -> Theirs | str:
    try:
        return Theirs(setup)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"[:300]


def _bundle(setup: Setup) -> Path:
    longest = max(isl + osl for _, isl, osl in setup.loads)
    batch = max(concurrency for concurrency, _, _ in setup.loads)
    small = setup.device == "cpu"
    plan = BuildPlan(
        name=f"{setup.model.name}-{setup.precision}-peer",
        model=setup.model,
        model_source="random",
        gpu=setup.gpu,
        quant=quant_for(setup.precision),
        limits=Limits(
            max_batch_size=batch,
            max_num_tokens=64 if small else 4096,
            max_seq_len=longest,
            kv_memory_bytes=4 * MIB if small else 4 * GIB,
        ),
        load_format="dummy",
    )
    return dummy_bundle(setup.work_dir, plan)


def prompts_of(load: Workload, vocab_size: int, number: int) -> np.ndarray:
    """Fresh random ids for each round, the same for both sides, int64 [concurrency, isl]."""
    rng = np.random.default_rng([load.isl, load.num_requests, number])
    return rng.integers(3, vocab_size, size=(load.num_requests, load.isl))


def our_round(engine: RemoteEngine, load: Workload, number: int) -> Round:
    """One round of our engine by our own driver."""
    prompts = prompts_of(load, engine.info.vocab_size, number)
    requests = [
        Request(request_id=f"p{number}-{i}", prompt_ids=tuple(row.tolist()), max_tokens=load.osl, ignore_eos=True)
        for i, row in enumerate(prompts)
    ]
    metrics = compute_metrics([run_repeat(engine, requests, load, index=number)], load)
    return Round(
        ttft_ms=metrics["ttft_ms"].stats["p50"].value,
        tpot_ms=metrics["tpot_ms"].stats["p50"].value,
        tps=metrics["tps"].stats["value"].value,
    )


class Theirs:
    """A random transformers model on the device, and `generate` with a static cache."""

    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        model = setup.model
        config = LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_position_embeddings,
            bos_token_id=model.bos_id,
            eos_token_id=list(model.eos_ids),
            tie_word_embeddings=False,
        )
        dtype = torch.bfloat16 if setup.precision == DType.BF16.value else torch.float32
        with torch.device(setup.device):
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        # Random weights may choose any token; nothing ends a reply early, as ours is told too.
        self._model.generation_config.eos_token_id = None
        self._device = setup.device
        self._vocab_size = model.vocab_size

    def round(self, load: Workload, number: int) -> Round:
        """One batch for its first token alone, then whole."""
        import torch

        ids = torch.from_numpy(prompts_of(load, self._vocab_size, number)).to(self._device)
        # Whole first: the static cache is kept, so that both calls run with the same shapes.
        whole_s = self._timed(ids, load.osl)
        first_s = self._timed(ids, 1)
        return Round(
            ttft_ms=first_s * 1e3,
            tpot_ms=(whole_s - first_s) / (load.osl - 1) * 1e3,
            tps=load.num_requests * load.osl / whole_s,
        )

    def _timed(self, ids: Any, tokens: int) -> float:
        import torch

        self._wait()
        started = time.perf_counter()
        with torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
        self._wait()
        seconds = time.perf_counter() - started
        if found.shape[1] != ids.shape[1] + tokens:
            raise RuntimeError(f"generate made {found.shape[1] - ids.shape[1]} tokens, {tokens} were asked for")
        return seconds

    def _wait(self) -> None:
        import torch

        if self._device != "cpu":
            torch.cuda.synchronize()
