"""transformers with a static cache and torch.compile beside our engine: one GPU, one shape, one precision.

Llama 3 8B of random weights in BF16, both in memory at once, rounds in turn: `generate` (which compiles by itself on
CUDA; it shows no times, so its first token is timed as a call for one), a loop by hand around one compiled decode step
(the best that its documentation shows), ours.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.peers.rounds import Arrivals, PeerCell, Round, round_of
from bench.gpu.sweep import dummy_bundle
from trtkit.backends.remote import DEFAULT_OPENER, RemoteEngine, Timeouts
from trtkit.benchmark.driver import run_repeat
from trtkit.spec.catalog import model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.errors import TrtkitError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.result import RequestSample
from trtkit.spec.units import GIB, MIB
from trtkit.spec.workload import Workload

ROUNDS = 4
Side = Callable[[Workload, int], Round] | str
"""What runs a round of a load, or why it cannot."""


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
    """Cells of every side, ours last; a side that fails is told in one line and the others go on."""
    started = time.monotonic()
    theirs = _opened(setup)
    opened_s = time.monotonic() - started
    ours = _ours(setup)
    sides: dict[str, Side] = {
        "transformers generate, static": theirs if isinstance(theirs, str) else theirs.generated,
        "transformers loop, static": theirs if isinstance(theirs, str) else theirs.looped,
        "trtkit": ours if isinstance(ours, str) else partial(our_round, ours),
    }
    cells = []
    try:
        for concurrency, isl, osl in setup.loads:
            load = Workload(isl=isl, osl=osl, num_requests=concurrency, concurrency=concurrency)
            done = _rounds(setup, load, sides)
            for name in sides:
                cells.append(
                    PeerCell(
                        who=name,
                        version="" if name == "trtkit" else metadata.version("transformers"),
                        model=setup.model.name,
                        precision=setup.precision,
                        concurrency=concurrency,
                        isl=isl,
                        osl=osl,
                        rounds=done[name][0],
                        not_run=done[name][1],
                        seconds_to_open=None if name == "trtkit" else opened_s,
                    )
                )
    finally:
        if not isinstance(ours, str):
            ours.close()
    return cells


def _ours(setup: Setup) -> RemoteEngine | str:
    left_s = max(setup.left_s(), 1.0)
    overrides = {"path": "device"} if setup.device == "cpu" else {}
    try:
        timeouts = Timeouts(start_s=left_s, stall_s=left_s)
        return RemoteEngine(_bundle(setup), overrides, opener=setup.opener, timeouts=timeouts)
    except TrtkitError as error:
        return str(error)


def _rounds(setup: Setup, load: Workload, sides: Mapping[str, Side]) -> dict[str, tuple[tuple[Round, ...], str | None]]:
    """Rounds in turn, after one of each that does not count (it compiles and captures)."""
    done: dict[str, list[Round]] = {name: [] for name in sides}
    failed = {name: side for name, side in sides.items() if isinstance(side, str)}
    longest_s = 0.0
    for number in range(setup.rounds + 1):
        if number > 1 and setup.left_s() < 1.5 * longest_s:
            break
        started = time.monotonic()
        for name, side in sides.items():
            if isinstance(side, str) or name in failed or setup.left_s() < 0:
                continue
            try:
                each = side(load, number)
            except (TrtkitError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                continue
            if number > 0:
                done[name].append(each)
        longest_s = max(longest_s if number > 1 else 0.0, time.monotonic() - started)
    return {
        name: (tuple(each), failed.get(name) or (None if each else "no time was left")) for name, each in done.items()
    }


def _opened(setup: Setup) -> Theirs | str:
    try:
        return Theirs(setup)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


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
    samples = run_repeat(engine, requests, load, index=number).samples
    began_ns = min(sample.submit_ns for sample in samples)
    return round_of([_arrivals(sample, began_ns) for sample in samples], load.osl)


def _arrivals(sample: RequestSample, began_ns: int) -> Arrivals:
    """One request of ours, each token's time."""
    if sample.first_token_ns is None:
        raise RuntimeError(f"request {sample.request_id} gave no token: {sample.error}")
    times_ns = itertools.accumulate(sample.gaps_ns, initial=sample.first_token_ns)
    times_ms = tuple(round((time_ns - began_ns) / 1e6, 4) for time_ns in times_ns)
    asked_ms = round((sample.submit_ns - began_ns) / 1e6, 4)
    return Arrivals(asked_ms=asked_ms, times_ms=times_ms, tokens=tuple(range(1, len(times_ms) + 1)))


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
        self._cache: Any = None
        self._cache_of: tuple[int, int] | None = None
        self._step: Callable[[Any, Any], Any] = self._compiled(None)

    def generated(self, load: Workload, number: int) -> Round:
        """One batch by `generate`."""
        ids = self._ids(load, number)
        # Whole first: the static cache keeps that size, so that both calls run with the same shapes.
        whole_s = self._timed_generate(ids, load.osl)
        first_s = self._timed_generate(ids, 1)
        return _round(load, first_s, whole_s)

    def looped(self, load: Workload, number: int) -> Round:
        """One batch by hand: the prompt as it is, then one compiled step a token; nothing waits but at the ends."""
        import torch
        from transformers import StaticCache

        ids = self._ids(load, number)
        longest = load.isl + load.osl
        if self._cache_of != (load.num_requests, longest):
            self._cache = StaticCache(config=self._model.config, max_cache_len=longest)
            self._cache_of = (load.num_requests, longest)
            self._step = self._compiled(self._cache)
        with torch.no_grad():
            self._cache.reset()
            self._wait()
            started = time.perf_counter()
            positions = torch.arange(load.isl, device=self._device)[None]
            token = self._next(ids, positions, self._cache)
            self._wait()
            first_s = time.perf_counter() - started
            for position in range(load.isl, longest - 1):
                torch.compiler.cudagraph_mark_step_begin()
                token = self._step(token, torch.full((1, 1), position, device=self._device)).clone()
            self._wait()
        return _round(load, first_s, time.perf_counter() - started)

    def _compiled(self, cache: Any) -> Callable[[Any, Any], Any]:
        import torch

        def step(token: Any, positions: Any) -> Any:
            return self._next(token, positions, cache)

        return step if self._device == "cpu" else torch.compile(step, mode="reduce-overhead", fullgraph=True)

    def _next(self, ids: Any, positions: Any, cache: Any) -> Any:
        found = self._model(
            ids,
            past_key_values=cache,
            position_ids=positions.expand(ids.shape[0], -1),
            cache_position=positions[0],
            use_cache=True,
            logits_to_keep=1,
        )
        return found.logits[:, -1].argmax(-1, keepdim=True)

    def _ids(self, load: Workload, number: int) -> Any:
        import torch

        return torch.from_numpy(prompts_of(load, self._vocab_size, number)).to(self._device)

    def _timed_generate(self, ids: Any, tokens: int) -> float:
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


def _round(load: Workload, first_s: float, whole_s: float) -> Round:
    """All requests of a batch go together; only its first token and its last have times."""
    each = Arrivals(asked_ms=0.0, times_ms=(first_s * 1e3, whole_s * 1e3), tokens=(1, load.osl))
    return round_of([each] * load.num_requests, load.osl)
