"""`QuantSpec`: what is stored in which type. `--precision` names map to one each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from trtkit.spec.codec import LATER
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UsageError

FP8_ROWWISE = "FP8_PER_CHANNEL_PER_TOKEN"
GPTQ_INT8 = "W8A16_GPTQ"
INT8_ROWS = "W8A16"
INT4_GROUPS = "W4A16"
MODELOPT_AWQ = "W4A16_AWQ"
COMPUTED = (DType.FP32, DType.FP16, DType.BF16)
"""Types that activations, norms and scales may have."""
GROUPS = (128, 64, 32)
"""Input channels that may share a scale in the embedded engine, best first: larger groups are fewer bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """Element types of a built engine.

    `weights` is the storage of the linear layers inside blocks, `activations` the matmul's other operand,
    `compute` everything else (embeddings, norms, lm_head, scales), `kv` the cache. `group_size` is 0 for
    per-output-channel scales. `algo` is TensorRT-LLM's name of the scheme, None when nothing is quantised.
    `zero_points` says that a zero point is stored beside every scale of a group, `input_order` that inputs are stored in
    another order than the model's (GPTQ with activation order).
    """

    precision: str
    weights: DType
    activations: DType
    compute: DType
    kv: DType
    algo: str | None = None
    group_size: int = 0
    zero_points: bool = field(default=False, metadata=LATER)
    input_order: bool = field(default=False, metadata=LATER)

    def with_kv(self, kv: DType) -> QuantSpec:
        """The same scheme with another cache type."""
        return replace(self, kv=kv)

    @property
    def is_weight_only(self) -> bool:
        """Weights are narrower than the activations they multiply."""
        return self.weights.bits < self.activations.bits

    @property
    def is_grouped(self) -> bool:
        """Weights in the embedded engine's own form, with a scale for each row and group of `group_size` inputs."""
        return self.algo in (INT8_ROWS, INT4_GROUPS) and self.group_size > 0

    @property
    def embedded(self) -> QuantSpec:
        """How the embedded engine holds it: GPTQ's INT8 as its own groups, everything else as it is."""
        return replace(self, algo=INT8_ROWS) if self.algo == GPTQ_INT8 else self

    def held_by(self, target: str) -> QuantSpec:
        """The scheme in the form that a target holds in memory and reads."""
        return self.embedded if target == "embedded" else self


def _plain(dtype: DType) -> QuantSpec:
    return QuantSpec(precision=dtype.value, weights=dtype, activations=dtype, compute=dtype, kv=dtype)


def _quantised(
    precision: str, algo: str, weights: DType, activations: DType, *, compute: DType = DType.FP16, group_size: int = 0
) -> QuantSpec:
    return QuantSpec(
        precision=precision,
        weights=weights,
        activations=activations,
        compute=compute,
        kv=compute,
        algo=algo,
        group_size=group_size,
    )


PRECISIONS: dict[str, QuantSpec] = {
    "fp32": _plain(DType.FP32),
    "fp16": _plain(DType.FP16),
    "bf16": _plain(DType.BF16),
    "int8": _quantised("int8", INT8_ROWS, DType.INT8, DType.FP16),
    "int8-gptq": _quantised("int8-gptq", GPTQ_INT8, DType.INT8, DType.FP16, group_size=128),
    "int8-sq": _quantised("int8-sq", "W8A8_SQ_PER_CHANNEL", DType.INT8, DType.INT8),
    "fp8": _quantised("fp8", "FP8", DType.FP8, DType.FP8),
    "fp8-rowwise": _quantised("fp8-rowwise", FP8_ROWWISE, DType.FP8, DType.FP8, compute=DType.BF16),
    "int4": _quantised("int4", INT4_GROUPS, DType.INT4, DType.FP16, group_size=128),
    "int4-awq": _quantised("int4-awq", MODELOPT_AWQ, DType.INT4, DType.FP16, group_size=128),
}


def quant_for(precision: str, *, compute: DType | None = None, kv: DType | None = None) -> QuantSpec:
    """The scheme behind a `--precision` name.

    `compute` replaces the 16-bit type of a quantised scheme (a CPU may want fp32), `kv` the cache type.

    Raises:
        UsageError: the name is not known, or nothing is computed in `compute`.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}: allowed are {', '.join(PRECISIONS)}")
    if compute not in (None, *COMPUTED):
        raise UsageError(f"compute type {compute.value}: allowed are {', '.join(dtype.value for dtype in COMPUTED)}")
    quant = PRECISIONS[precision]
    if compute is not None and quant.algo is not None:
        activations = compute if quant.is_weight_only else quant.activations
        quant = replace(quant, compute=compute, kv=compute, activations=activations)
    return quant if kv is None else quant.with_kv(kv)
