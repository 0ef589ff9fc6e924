"""Element types, with their size and their name in every dialect we speak."""

from __future__ import annotations

from enum import Enum

from trtkit.spec.errors import UsageError


class DType(str, Enum):
    """An element type. The value is trtkit's own spelling, which records and recipes use."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    INT32 = "int32"

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return _BITS[self]

    @property
    def safetensors_name(self) -> str:
        """Name in a safetensors header; INT4 is stored packed, two to a byte."""
        return _SAFETENSORS[self]

    @property
    def trtllm_name(self) -> str:
        """Name in a TensorRT-LLM or Hugging Face config, which is also torch's attribute name."""
        return _TRTLLM[self]

    @classmethod
    def parse(cls, name: str) -> DType:
        """Read trtkit's, torch's, TensorRT-LLM's or safetensors' spelling.

        Raises:
            UsageError: the name is in none of these dialects.
        """
        key = name.lower().removeprefix("torch.")
        for member in cls:
            if key in (member.value, member.trtllm_name, member.safetensors_name.lower()):
                return member
        raise UsageError(f"unknown dtype {name!r}: allowed are {', '.join(m.value for m in cls)}")


_BITS = {
    DType.FP32: 32,
    DType.FP16: 16,
    DType.BF16: 16,
    DType.FP8: 8,
    DType.INT8: 8,
    DType.INT4: 4,
    DType.INT32: 32,
}
_SAFETENSORS = {
    DType.FP32: "F32",
    DType.FP16: "F16",
    DType.BF16: "BF16",
    DType.FP8: "F8_E4M3",
    DType.INT8: "I8",
    DType.INT4: "U8",
    DType.INT32: "I32",
}
_TRTLLM = {
    DType.FP32: "float32",
    DType.FP16: "float16",
    DType.BF16: "bfloat16",
    DType.FP8: "float8_e4m3fn",
    DType.INT8: "int8",
    DType.INT4: "int4",
    DType.INT32: "int32",
}
