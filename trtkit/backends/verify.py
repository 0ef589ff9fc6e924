"""The last step of a build: does the checkpoint just written compute what transformers computes from the source?

A conversion that loses RoPE's base, swaps gate and up, or splits heads wrongly gives an engine that runs and talks
nonsense. So the checkpoint is run by the embedded engine on a short prompt and held against transformers: all layers of
a small model, the first two of a large one (the errors looked for show in the first). Both sides compute in float32, and
transformers gets the source's weights rounded as the precision rounds them (`trtkit.backends.reference`): what is left
between them is the order of additions, so the limit is the same for every precision and far below any mistake.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtkit.backends.calibrated import ALGOS, Stored, check_steps
from trtkit.backends.chosen_groups import chosen_groups
from trtkit.backends.reference import (
    POSITIONS,
    PROMPT_TOKENS,
    Rounding,
    first_layers,
    linear_rounding,
    plain_source,
    probe_tokens,
    reference,
    reference_and_rounded,
    rounding_to,
    write_model,
)
from trtkit.backends.twin import source_names, write_twin
from trtkit.spec.checkpoint import CONFIG_NAME, rank_file
from trtkit.spec.checkpoint_config import checkpoint_config, read_checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.engine import ScoreRequest
from trtkit.spec.errors import InputError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.quant import FP8_ROWWISE, GPTQ_INT8, INT4_GROUPS, INT8_ROWS, QuantSpec
from trtkit.spec.units import GIB
from trtkit.trtllm.layout import EMBED, is_linear
from trtkit.trtllm.packed import read_packing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

SMALL_MODEL_BYTES = 2 * GIB
TRUNCATED_LAYERS = 2

MAX_DRIFT = 1e-3
"""Largest drift between two float32 computations on the same rounded weights. Measured on the shipped model: below 1e-5
for every precision; the smallest mistake tried (one row's scale doubled in one of 28 matrices) gives several times this."""


def verify(model: ModelSpec, quant: QuantSpec, source_dir: Path, checkpoint_dir: Path) -> dict[str, float]:
    """Compare log-probabilities with transformers on `PROMPT_TOKENS` random tokens.

    Returns:
        What `judged` does.

    Raises:
        InputError: the drift is beyond `MAX_DRIFT`: the engine would not compute this model.
    """
    layers = layers_to_run(model)
    prompt, tokens = probe_tokens(model.vocab_size)
    stored = read_checkpoint_config(checkpoint_dir)[1]
    extra: dict[str, float] = {}
    with _runnable(checkpoint_dir, layers) as directory:
        ours = _embedded(directory, prompt, tokens)
        if quant.algo in ALGOS:
            with plain_source(source_dir, layers) as source:
                plain = reference(source, layers, prompt, tokens)
                extra["worst_half_steps"], rounded = _held_to_source(checkpoint_dir, directory, source, quant, layers)
        else:
            roundings = (_linear_roundings(stored, source_dir, checkpoint_dir, layers), rounding_to(stored.compute))
            plain, rounded = reference_and_rounded(source_dir, layers, prompt, tokens, roundings)
    return extra | judged(ours, rounded, plain, layers, quant, checkpoint_dir)


def _held_to_source(
    checkpoint_dir: Path, twin: Path, source: Path, quant: QuantSpec, layers: int
) -> tuple[float, NDArray[np.float64]]:
    """For scales that cannot be foreseen: each number against the source's, then the numbers run with the source's config.

    Returns:
        How many half steps the worst number is off; transformers' log-probabilities on the checkpoint's weights.
    """
    stored, plain = source_names(twin), first_layers(source, layers)
    with tempfile.TemporaryDirectory(prefix="trtkit-verify-") as name:
        write_twin(checkpoint_dir, Path(name), layers, ones=True)
        steps = source_names(Path(name))
    matrices = {n: Stored(values=stored[n], steps=steps[n]) for n in stored if is_linear(n)}
    worst = check_steps(matrices, stored, plain, quant, str(checkpoint_dir))
    with tempfile.TemporaryDirectory(prefix="trtkit-verify-") as name:
        write_model(Path(name), stored, source, layers)
        return worst, reference(Path(name), layers, *probe_tokens(stored[EMBED].shape[0]))


def taken_over(stored: QuantSpec, source_dir: Path) -> bool:
    """Whether the numbers of a source that is quantised already go into a checkpoint as they are.

    They do where they have the width that is stored, unless their groups become rows.
    """
    packing = read_packing(source_dir)
    if packing is None or packing.bits != stored.weights.bits or stored.weights is DType.FP8:
        return False
    return not packing.group_size or stored.is_grouped or stored.algo == GPTQ_INT8


def _linear_roundings(
    stored: QuantSpec, source_dir: Path, checkpoint_dir: Path, layers: int
) -> Callable[[str], Rounding]:
    """What storing does to each matrix, by its name."""
    if taken_over(stored, source_dir):
        return lambda _: lambda weight: weight
    if stored.algo == INT4_GROUPS:
        return chosen_groups(checkpoint_dir, layers)
    rounding = linear_rounding(stored)
    return lambda _: rounding


def layers_to_run(model: ModelSpec) -> int:
    """All layers of a small model, the first few of a large one."""
    return model.num_layers if model.num_params * 4 <= SMALL_MODEL_BYTES else min(TRUNCATED_LAYERS, model.num_layers)


def judged(
    ours: NDArray[np.float64],
    rounded: NDArray[np.float64],
    plain: NDArray[np.float64],
    layers: int,
    quant: QuantSpec,
    checkpoint_dir: Path,
) -> dict[str, float]:
    """Hold the checkpoint's log-probabilities [positions, tokens] against the reference's.

    Returns:
        `drift`: root mean square of the difference from the rounded reference over that of its spread, both over
        `POSITIONS` x `SAMPLED_TOKENS` log-probabilities, and the `limit` it was held to; `quantisation_drift`: the same
        between the source as it is and the rounded reference, which is the precision's own doing;
        `max_abs_logprob_difference` from the source as it is; `layers` that were run.

    Raises:
        InputError: the drift is beyond the limit.
    """
    import numpy as np

    drift = drift_between(ours, rounded)
    if not drift <= MAX_DRIFT:
        raise InputError(
            f"{checkpoint_dir}: does not compute what transformers does on the source: its log-probabilities are off by "
            f"{drift:.3g} of their spread, rounding to {quant.precision} taken into account; {MAX_DRIFT:g} is allowed; "
            "please report this model"
        )
    return {
        "drift": drift,
        "limit": MAX_DRIFT,
        "quantisation_drift": drift_between(rounded, plain),
        "max_abs_logprob_difference": float(np.abs(ours - plain).max()),
        "layers": layers,
    }


def drift_between(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Root mean square of the difference over that of the spread of `theirs`; two unrelated ones are about 1.4 apart."""
    import numpy as np

    spread = theirs - theirs.mean(axis=1, keepdims=True)
    difference = (ours - ours.mean(axis=1, keepdims=True)) - spread
    return float(np.sqrt((difference**2).mean() / (spread**2).mean()))


def _embedded(checkpoint_dir: Path, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
    """The same log-probabilities by the embedded engine, in float32 on the weights as they are stored."""
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
    with open_checkpoint(checkpoint_dir, limits=limits, kv_policy=KVPolicySpec(), dtype=DType.FP32) as engine:
        results = {result.request_id: result for result in engine.score(requests)}
    rows = []
    for request in requests:
        result = results[request.request_id]
        if result.error is not None:
            raise InputError(f"{checkpoint_dir}: the embedded engine cannot run it: {result.error}")
        rows.append([score.logprobs[0] for score in result.continuations])
    return np.array(rows, dtype=np.float64)


@contextmanager
def _runnable(checkpoint_dir: Path, layers: int) -> Iterator[Path]:
    """The checkpoint's first layers in a form that the embedded engine runs.

    The checkpoint itself where it can be, links to its files where only layers are left out, and otherwise its twin:
    scales multiplied in, pipeline stages joined.
    """
    model, quant, parallel = read_checkpoint_config(checkpoint_dir)
    direct = parallel.pp == 1 and quant.algo in (None, INT8_ROWS, INT4_GROUPS, FP8_ROWWISE) and quant.kv.bits >= 16
    if direct and layers == model.num_layers:
        yield checkpoint_dir
        return
    with tempfile.TemporaryDirectory(prefix="trtkit-verify-") as name:
        directory = Path(name)
        if direct:
            config = checkpoint_config(replace(model, num_layers=layers), quant, parallel)
            (directory / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
            for rank in range(parallel.tp):
                (directory / rank_file(rank)).symlink_to((checkpoint_dir / rank_file(rank)).absolute())
        else:
            write_twin(checkpoint_dir, directory, layers)
        yield directory
