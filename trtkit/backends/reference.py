"""What a checkpoint must compute: transformers in float32, on the source's weights rounded as the precision says.

Rounding the reference leaves nothing between the two sides but the order of additions, so one small limit serves every
precision. The roundings are written from the formats' definitions, in torch, and share no code with the converter.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.backends.multiplied_out import multiply_out, quantisation_of
from trtkit.spec.directory import check_space
from trtkit.spec.dtype import DType
from trtkit.spec.quant import GPTQ_INT8, QuantSpec

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

    GPTQ's numbers are stored as they come, so it rounds nothing.
    """
    import torch

    to_compute = rounding_to(quant.compute)

    def int8_rows(weight: Tensor) -> Tensor:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return torch.round(weight / torch.where(scale > 0, scale, 1.0)) * to_compute(scale)

    def fp8_rows(weight: Tensor) -> Tensor:
        scale = (weight.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=FP8_LEAST_SCALE)
        return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale

    if quant.algo == GPTQ_INT8:
        return lambda weight: weight
    by_type: dict[DType, Rounding] = {DType.INT8: int8_rows, DType.FP8: fp8_rows}
    return by_type.get(quant.weights, to_compute)


def reference(source_dir: Path, layers: int, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities [positions, tokens] by transformers in float32.

    Args:
        source_dir: a Hugging Face directory, quantised ones included.
        layers: how many of its first layers are run.
        prompt: token ids.
        tokens: the vocabulary entries asked for after each of `POSITIONS`.
    """
    with plain_source(source_dir, layers) as directory:
        return _logprobs(_load(directory, layers), prompt, tokens)


def reference_and_rounded(
    source_dir: Path,
    layers: int,
    prompt: Sequence[int],
    tokens: Sequence[int],
    roundings: tuple[Callable[[str], Rounding], Rounding],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`reference`, and the same after rounding the weights, with one loading of the model.

    `roundings` are for the matrices inside the blocks, by name, and for every other parameter.
    """
    import torch

    with plain_source(source_dir, layers) as directory:
        model = _load(directory, layers)
    plain, (linear, other) = _logprobs(model, prompt, tokens), roundings
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            rounding = linear(name) if ".layers." in name and name.endswith("_proj.weight") else other
            parameter.copy_(rounding(parameter))
    return plain, _logprobs(model, prompt, tokens)


def _logprobs(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:  # noqa: ANN401 - a model
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([list(prompt)])).logits[0, [position - 1 for position in POSITIONS]]
    logprobs = torch.log_softmax(logits.double(), dim=-1)[:, list(tokens)]
    result: NDArray[np.float64] = logprobs.numpy()
    return result


@contextmanager
def plain_source(source_dir: Path, layers: int) -> Iterator[Path]:
    """The directory, or, of a quantised one, one that holds its first layers multiplied out in float32."""
    settings = quantisation_of(source_dir)
    if settings is None:
        yield source_dir
        return
    tensors = first_layers(source_dir, layers)
    multiply_out(tensors, settings)
    with tempfile.TemporaryDirectory(prefix="trtkit-verify-") as folder:
        write_model(Path(folder), tensors, source_dir, layers)
        yield Path(folder)


def write_model(directory: Path, tensors: Mapping[str, Tensor], config_dir: Path, layers: int) -> None:
    """A float32 model directory of these tensors, with the config of another.

    Raises:
        OutputError: the disk of temporary files is too small.
    """
    from safetensors.torch import save_file

    check_space(directory, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((config_dir / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config |= {"num_hidden_layers": layers, "torch_dtype": "float32", "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def first_layers(source_dir: Path, layers: int) -> dict[str, Tensor]:
    """Every tensor of a directory but those of later layers, as it is stored."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in sorted(source_dir.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                match = re.search(r"\.layers\.(\d+)\.", name)
                if match is None or int(match[1]) < layers:
                    tensors[name] = handle.get_tensor(name)
    return tensors


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
