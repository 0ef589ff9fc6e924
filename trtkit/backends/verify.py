"""The last step of a build: does the checkpoint just written compute what transformers computes from the source?

A conversion that loses RoPE's base, swaps gate and up, or splits heads wrongly gives an engine that runs and talks
nonsense. So the checkpoint is run by the embedded engine on a short prompt and held against transformers in float32:
all layers of a small model, the first two of a large one (the errors looked for show in the first).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.spec.checkpoint import CONFIG_NAME, rank_file
from trtkit.spec.checkpoint_config import checkpoint_config, read_checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.engine import ScoreRequest
from trtkit.spec.errors import InputError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.quant import QuantSpec
from trtkit.spec.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

SMALL_MODEL_BYTES = 2 * GIB
TRUNCATED_LAYERS = 2
PROMPT_TOKENS = 64
POSITIONS = (1, 8, 32, PROMPT_TOKENS)
SAMPLED_TOKENS = 256
_SEED = 20240419

MAX_DRIFT = {DType.FP32: 1e-3, DType.FP16: 2e-2, DType.BF16: 1e-1}
"""Largest drift of an unquantised checkpoint by compute type: rounding explains a tenth of it, a mistake exceeds it."""

MAX_QUANTISED_DRIFT = 0.7
"""INT8 drift depends on the model and is recorded; two unrelated distributions differ by about 1.4."""


def verify(model: ModelSpec, quant: QuantSpec, source_dir: Path, checkpoint_dir: Path) -> dict[str, float]:
    """Compare log-probabilities with transformers on `PROMPT_TOKENS` random tokens.

    Returns:
        `drift`: root mean square of the difference over that of the reference's own spread, both over
        `POSITIONS` x `SAMPLED_TOKENS` log-probabilities; `max_abs_logprob_difference`; `layers` that were run;
        `limit` the drift was held to.

    Raises:
        InputError: the drift is beyond the limit: the engine would not compute this model.
    """
    layers = layers_to_run(model)
    prompt, tokens = probe_tokens(model.vocab_size)
    theirs = reference(source_dir, layers, prompt, tokens)
    with _truncated(checkpoint_dir, layers) as directory:
        ours = _embedded(directory, prompt, tokens)
    return judged(ours, theirs, layers, quant, checkpoint_dir)


def layers_to_run(model: ModelSpec) -> int:
    """All layers of a small model, the first few of a large one."""
    return model.num_layers if model.num_params * 4 <= SMALL_MODEL_BYTES else min(TRUNCATED_LAYERS, model.num_layers)


def judged(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], layers: int, quant: QuantSpec, checkpoint_dir: Path
) -> dict[str, float]:
    """What `verify` returns, from log-probabilities [positions, tokens] of both sides.

    Raises:
        InputError: the drift is beyond the precision's limit.
    """
    import numpy as np

    spread = theirs - theirs.mean(axis=1, keepdims=True)
    difference = (ours - ours.mean(axis=1, keepdims=True)) - spread
    drift = float(np.sqrt((difference**2).mean() / (spread**2).mean()))
    limit = MAX_DRIFT[quant.compute] if quant.algo is None else MAX_QUANTISED_DRIFT
    if not drift <= limit:
        raise InputError(
            f"{checkpoint_dir}: does not compute what transformers does on the source: its log-probabilities are off by "
            f"{drift:.3g} of their spread, {quant.precision} allows {limit:g}; please report this model"
        )
    return {
        "drift": drift,
        "max_abs_logprob_difference": float(np.abs(ours - theirs).max()),
        "layers": layers,
        "limit": limit,
    }


def probe_tokens(vocab_size: int) -> tuple[list[int], list[int]]:
    """A prompt and the tokens whose log-probability is asked for after each of `POSITIONS`."""
    import numpy as np

    generator = np.random.default_rng(_SEED)
    prompt = generator.integers(0, vocab_size, size=PROMPT_TOKENS)
    tokens = generator.choice(vocab_size, size=min(SAMPLED_TOKENS, vocab_size), replace=False)
    return [int(token) for token in prompt], [int(token) for token in tokens]


def reference(source_dir: Path, layers: int, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities [positions, tokens] by transformers in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source_dir, local_files_only=True)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model: Any = AutoModelForCausalLM.from_pretrained(
            source_dir, config=config, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    with torch.inference_mode():
        logits = model(torch.tensor([list(prompt)])).logits[0, [position - 1 for position in POSITIONS]]
    logprobs = torch.log_softmax(logits.double(), dim=-1)[:, list(tokens)]
    result: NDArray[np.float64] = logprobs.numpy()
    return result


def _embedded(checkpoint_dir: Path, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
    """The same log-probabilities by the embedded engine, in the checkpoint's own types."""
    import numpy as np

    from trtkit.engine.open import open_checkpoint

    limits = Limits(max_batch_size=len(POSITIONS), max_num_tokens=PROMPT_TOKENS, max_seq_len=PROMPT_TOKENS + 1)
    requests = [
        ScoreRequest(
            request_id=str(index),
            context_ids=tuple(prompt[:position]),
            continuations=tuple((token,) for token in tokens),
        )
        for index, position in enumerate(POSITIONS)
    ]
    with open_checkpoint(checkpoint_dir, limits=limits, kv_policy=KVPolicySpec()) as engine:
        results = {result.request_id: result for result in engine.score(requests)}
    rows = []
    for request in requests:
        result = results[request.request_id]
        if result.error is not None:
            raise InputError(f"{checkpoint_dir}: the embedded engine cannot run it: {result.error}")
        rows.append([score.logprobs[0] for score in result.continuations])
    return np.array(rows, dtype=np.float64)


@contextmanager
def _truncated(checkpoint_dir: Path, layers: int) -> Iterator[Path]:
    """The checkpoint, or a directory that shows only its first layers (the weights are links)."""
    model, quant, parallel = read_checkpoint_config(checkpoint_dir)
    if layers == model.num_layers:
        yield checkpoint_dir
        return
    with tempfile.TemporaryDirectory(prefix="trtkit-verify-") as name:
        directory = Path(name)
        config = checkpoint_config(replace(model, num_layers=layers), quant, parallel)
        (directory / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        for rank in range(parallel.world_size):
            (directory / rank_file(rank)).symlink_to((checkpoint_dir / rank_file(rank)).absolute())
        yield directory
