"""Spellings that published tables use for GPUs, precisions, models and serving stacks, and what each one means here."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.gpu import GpuSpec
from trtkit.spec.quant import PRECISIONS, QuantSpec, quant_for

FP4 = "fp4"
_PRECISION_SPELLINGS = {
    "mixed(fp16)": "fp16",
    "mixed": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int8-wo": "int8",
    "int8-weight-only": "int8",
    "w8a16": "int8",
    "gptq": "int8-gptq",
    "int8-smoothquant": "int8-sq",
    "sq": "int8-sq",
    "w8a8": "int8-sq",
    "w4a16": "int4-awq",
    "awq": "int4-awq",
    "nvfp4": FP4,
    "e4m3": "fp8",
}
_GPU_SPELLINGS = {
    "a100-sxm-80gb": "a100-80gb-sxm",
    "a100-sxm4-80gb": "a100-80gb-sxm",
    "a100-pcie-80gb": "a100-80gb-pcie",
    "a100-sxm-40gb": "a100-40gb-sxm",
    "a100-sxm4-40gb": "a100-40gb-sxm",
    "a100-pcie-40gb": "a100-40gb-pcie",
    "h100-80gb-hbm3": "h100-sxm",
    # The number is the host's LPDDR memory; the accelerator beside it has 96 GB of HBM3.
    "gh200-120gb": "gh200",
    "gh200-480gb": "gh200",
    "gh200-96gb": "gh200",
}
_CLASSES = {
    "fp16": "fp16",
    "bf16": "fp16",
    "int8": "int8",
    "int8-gptq": "int8",
    "int8-sq": "int8-sq",
    "int4": "int4",
    "int4-awq": "int4",
    "fp8": "fp8",
    "fp8-rowwise": "fp8",
    FP4: FP4,
}
_FP4_OVER_FP8_PEAK = 2.0
"""Blackwell datasheets: dense FP4 rate over dense FP8 rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """A scheme with its name; `family` is the key of its constants, None where nothing was ever fitted."""

    name: str
    quant: QuantSpec
    family: str | None

    def gemm_flops_s(self, gpu: GpuSpec) -> float:
        """Datasheet peak of the matrix products in blocks.

        Raises:
            UnsupportedError: the device has no unit for these operands.
        """
        if self.name == FP4:
            if gpu.sm < 100:
                raise UnsupportedError(f"{gpu.name} has no FP4 units (Blackwell and later have)")
            return gpu.flops(DType.FP8) * _FP4_OVER_FP8_PEAK
        return gpu.flops(self.quant.activations)

    def attention_flops_s(self, gpu: GpuSpec) -> float:
        """Datasheet peak of attention, which runs in the compute type whatever the weights are."""
        return gpu.flops(self.quant.compute)


def precision_from(text: str, *, kv_dtype: str = "", keep_16_bit_kv: bool = False) -> Precision:
    """Read a precision as this project, a checkpoint or a published table spells it ("Mixed(FP16)", "INT8-WO", "FP8?").

    Without a KV type, FP8 and FP4 engines keep their cache in FP8 (the documented TensorRT-LLM build flow) unless
    `keep_16_bit_kv`, and all others in 16 bits.

    Raises:
        UnsupportedError: the word is in no dialect.
        UsageError: the KV type is unknown.
    """
    key = re.sub(r"[\s_]+", "-", text.strip().lower()).removesuffix("?").removesuffix("-weights")
    key = _PRECISION_SPELLINGS.get(key, key)
    if key != FP4 and key not in PRECISIONS:
        raise UnsupportedError(f"unknown precision {text!r}: known are {', '.join((*PRECISIONS, FP4))}")
    quant = _fp4() if key == FP4 else quant_for(key)
    if kv_dtype.strip():
        quant = quant.with_kv(DType.parse(_kv_word(kv_dtype)))
    elif key in ("fp8", FP4) and not keep_16_bit_kv:
        quant = quant.with_kv(DType.FP8)
    return Precision(name=key, quant=quant, family=_CLASSES.get(key))


def _kv_word(text: str) -> str:
    word = text.strip().lower()
    return {"auto": "fp16", "fp8_e4m3": "fp8", "e4m3": "fp8"}.get(word, word)


def _fp4() -> QuantSpec:
    # NVFP4: 4-bit values, one 8-bit scale per 16 of them; DType has no 4-bit float, and only the width counts here.
    base = replace(quant_for("fp8"), precision=FP4, algo="NVFP4", weights=DType.INT4, activations=DType.INT4)
    return replace(base, group_size=32)


def gpu_word(text: str) -> str:
    """A GPU's catalog name or alias, from a published table's spelling; unknown words pass through unchanged."""
    key = re.sub(r"[\s_/]+", "-", text.strip().lower()).removeprefix("nvidia-")
    return _GPU_SPELLINGS.get(key, key)


def model_word(text: str) -> str:
    """A model's catalog name from a published spelling: hub owner, "meta-" and packaging suffixes dropped."""
    key = text.strip().lower().rsplit("/", 1)[-1].removeprefix("meta-").replace("_", "-").replace(" ", "-")
    key = re.sub(r"-(hf|fp8|fp16|bf16|awq|gptq|int8|int4)$", "", key)
    key = re.sub(r"^llama(\d)", r"llama-\1", key)
    return {"llama-70b": "llama-2-70b", "llama-13b": "llama-2-13b", "llama-7b": "llama-2-7b"}.get(key, key)
