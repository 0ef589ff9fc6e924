"""What a checkpoint must compute: transformers in float32, on the source's weights rounded as the precision says.

Rounding the reference leaves nothing between the two sides but the order of additions, so one small limit serves every
precision. The roundings are written from the formats' definitions, in torch, and share no code with the converter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.spec.dtype import DType
from trtkit.spec.quant import QuantSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Rounding = Callable[["Tensor"], "Tensor"]
"""[out, in] in float32 to the nearest that a format can hold, in float32."""

PROMPT_TOKENS = 64
POSITIONS = (1, 8, 32, PROMPT_TOKENS)
SAMPLED_TOKENS = 256
FP8_MAX = 448.0
FP8_LEAST_SCALE = 1 / (FP8_MAX * 512)
_SEED = 20240419


def probe_tokens(vocab_size: int) -> tuple[list[int], list[int]]:
    """A prompt and the tokens whose log-probability is asked for after each of `POSITIONS`."""
    import numpy as np

    generator = np.random.default_rng(_SEED)
    prompt = generator.integers(0, vocab_size, size=PROMPT_TOKENS)
    tokens = generator.choice(vocab_size, size=min(SAMPLED_TOKENS, vocab_size), replace=False)
    return [int(token) for token in prompt], [int(token) for token in tokens]


def rounding_to(dtype: DType) -> Rounding:
    """To a floating-point type and back."""
    import torch

    target = getattr(torch, dtype.trtllm_name)
    return lambda tensor: tensor.to(target).float()


def linear_rounding(quant: QuantSpec) -> Rounding:
    """What storing a block's matrices in `quant` does to them; `quant.weights` is the type they are stored in.

    For schemes that ModelOpt calibrates (FP8 by tensor, INT4-AWQ, SmoothQuant) it is plain rounding to the same grid,
    which their own result is near and not equal to.
    """
    import torch

    to_compute = rounding_to(quant.compute)

    def int8_rows(weight: Tensor) -> Tensor:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return torch.round(weight / torch.where(scale > 0, scale, 1.0)) * to_compute(scale)

    def fp8_tensor(weight: Tensor) -> Tensor:
        scale = weight.abs().amax() / FP8_MAX
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale

    def int4_groups(weight: Tensor) -> Tensor:
        groups = weight.reshape(weight.shape[0], -1, min(quant.group_size, weight.shape[1]))
        scale = groups.abs().amax(dim=2, keepdim=True) / 7
        rounded = torch.round(groups / torch.where(scale > 0, scale, 1.0)) * scale
        return rounded.reshape(weight.shape)

    def fp8_rows(weight: Tensor) -> Tensor:
        scale = (weight.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=FP8_LEAST_SCALE)
        return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale

    by_type: dict[DType, Rounding] = {DType.INT8: int8_rows, DType.FP8: fp8_rows, DType.INT4: int4_groups}
    return fp8_tensor if quant.algo == "FP8" else by_type.get(quant.weights, to_compute)


def reference(
    source_dir: Path,
    layers: int,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    linear: Rounding | None = None,
    other: Rounding | None = None,
) -> NDArray[np.float64]:
    """Log-probabilities [positions, tokens] by transformers in float32, after rounding the weights.

    Args:
        source_dir: a Hugging Face directory.
        layers: how many of its first layers are run.
        prompt: token ids.
        tokens: the vocabulary entries asked for after each of `POSITIONS`.
        linear: applied to the matrices inside the blocks.
        other: applied to every other parameter.
    """
    import torch

    model = _load(source_dir, layers)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            rounding = linear if ".layers." in name and name.endswith("_proj.weight") else other
            if rounding is not None:
                parameter.copy_(rounding(parameter))
        logits = model(torch.tensor([list(prompt)])).logits[0, [position - 1 for position in POSITIONS]]
    logprobs = torch.log_softmax(logits.double(), dim=-1)[:, list(tokens)]
    result: NDArray[np.float64] = logprobs.numpy()
    return result


def _load(source_dir: Path, layers: int) -> Any:  # noqa: ANN401 - a transformers model
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _silent_transformers():
        config = AutoConfig.from_pretrained(source_dir, local_files_only=True)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return AutoModelForCausalLM.from_pretrained(
            source_dir, config=config, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )


@contextmanager
def _silent_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
