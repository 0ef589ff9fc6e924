"""What a quantised Hugging Face checkpoint says of itself: GPTQ, AWQ and compressed-tensors, weights of 4 or 8 bits.

Read from `quantization_config` of `config.json`, or from the file beside it that older writers used. What the weights'
tensors look like is in `trtkit.trtllm.packed_matrix`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit.spec.checkpoint import with_groups
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import GPTQ_INT8, INT4_GROUPS, QuantSpec

GPTQ, AWQ, COMPRESSED = "gptq", "awq", "compressed-tensors"
METHODS = {GPTQ: "GPTQ", AWQ: "AWQ", COMPRESSED: "compressed-tensors"}
_OTHER_CONFIGS = ("quantize_config.json", "quant_config.json")
_LEAST_GROUP = 4
_BITS = {GPTQ: (4, 8), AWQ: (4,), COMPRESSED: (4, 8)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How weights are quantised. `group_size` is 0 where each row has one scale.

    `zero_less` is what a stored zero point lacks: GPTQ's first format stores it less one. `reordered` says that groups are
    not of neighbouring inputs (GPTQ's desc_act).
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    zero_less: int = 0
    reordered: bool = False

    @property
    def name(self) -> str:
        """`INT4 AWQ`."""
        return f"INT{self.bits} {METHODS[self.method]}"

    @property
    def middle(self) -> int:
        """The unsigned number that stands for 0 where weights are symmetric."""
        return 1 << (self.bits - 1)


def read_packing(directory: Path) -> Packing | None:
    """How a directory's weights are quantised; None where they are not.

    Raises:
        InputError: a setting has no value that the method knows.
        UnsupportedError: another method, or settings whose weights trtkit does not take over.
    """
    found = _quantisation(directory)
    if found is None:
        return None
    path, settings = found
    method = settings.get("quant_method", AWQ if "w_bit" in settings else GPTQ)
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedError(
            f"{path}: quantised with {str(method)[:40]}; trtkit converts 16-bit weights and {', '.join(METHODS.values())}"
        )
    packing = {GPTQ: _gptq, AWQ: _awq, COMPRESSED: _compressed}[method](path, settings)
    if type(packing.bits) is not int or packing.bits not in _BITS[method]:
        raise UnsupportedError(
            f"{path}: bits is {packing.bits!r}; trtkit converts {METHODS[method]} with {' or '.join(map(str, _BITS[method]))} "
            "bits (or the unquantised model)"
        )
    if packing.bits == 8 and not packing.symmetric:
        raise UnsupportedError(
            f"{path}: sym is False; trtkit converts 8-bit weights with sym True (or the unquantised model)"
        )
    return packing


def source_quant(
    quant: QuantSpec, model: ModelSpec, packing: Packing | None, parallel: Parallelism, where: str
) -> QuantSpec:
    """`quant` with the groups and zero points that it gets from a source: those of its own weights where they are kept.

    Raises:
        UnsupportedError: weights as they come are asked for, and they are not of that kind; or no groups fit.
    """
    kept = packing is not None and packing.bits == quant.weights.bits
    if packing is not None and packing.reordered and kept and quant.is_grouped and parallel.tp > 1:
        raise UnsupportedError(
            f"{where}: desc_act is True, so inputs have an order of their own, which is kept on one rank; use --tp 1"
        )
    if quant.precision == "int8-gptq":
        if packing is None or not kept:
            what = "not quantised" if packing is None else packing.name
            other = "int8" if packing is None else f"int{packing.bits}"
            raise UnsupportedError(
                f"{where}: precision int8-gptq takes a model that GPTQ has quantised to 8 bits (quantize_config.json or "
                f"quantization_config); this one is {what}: use --precision {other}"
            )
        if quant.algo == GPTQ_INT8 and packing.reordered:
            raise UnsupportedError(
                f"{where}: desc_act is True, and TensorRT-LLM's groups are of neighbouring inputs; use --target embedded, or "
                "GPTQ with desc_act False"
            )
        if quant.algo == GPTQ_INT8 or not packing.group_size:
            return replace(quant, group_size=packing.group_size)
        held = replace(quant, input_order=packing.reordered)
        return with_groups(model, held, parallel, within=packing.group_size)
    if quant.algo != INT4_GROUPS or packing is None or not kept:
        return with_groups(model, quant, parallel)
    held = replace(quant, zero_points=not packing.symmetric, input_order=packing.reordered)
    return with_groups(model, held, parallel, within=packing.group_size)


def weights_note(packing: Packing, quant: QuantSpec, *, to_engine: bool) -> str:
    """What became of the weights, for the manifest; `to_engine` says that TensorRT-LLM builds from them."""
    groups = f" in groups of {packing.group_size}" if packing.group_size else " with one scale for each of its rows"
    if quant.precision == "int8-gptq" or (quant.precision == "int4" and packing.bits == 4):
        return f"{packing.name}{groups}, taken over as they are"
    if quant.precision == "int8" and packing.bits == 8 and not to_engine:
        return f"{packing.name}{groups}, " + (
            "rounded again to one scale a row" if packing.group_size else "taken over as they are"
        )
    return f"{packing.name}, multiplied out and then stored as {quant.precision}"


def _gptq(path: Path, settings: Mapping[str, Any]) -> Packing:
    group = _group_size(path, settings.get("group_size", -1))
    if settings.get("checkpoint_format", GPTQ) not in (GPTQ, "gptq_v2"):
        raise UnsupportedError(
            f"{path}: checkpoint_format is {settings['checkpoint_format']!r}; trtkit converts gptq and gptq_v2"
        )
    return Packing(
        method=GPTQ,
        bits=settings.get("bits", 0),
        group_size=group,
        symmetric=_switch(path, settings, "sym", default=True),
        zero_less=0 if settings.get("checkpoint_format") == "gptq_v2" else 1,
        reordered=_switch(path, settings, "desc_act", default=False) and group > 0,
    )


def _awq(path: Path, settings: Mapping[str, Any]) -> Packing:
    version = settings.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise UnsupportedError(f"{path}: version is {version!r}; trtkit converts AWQ in its GEMM layout")
    return Packing(
        method=AWQ,
        bits=settings.get("bits", settings.get("w_bit", 0)),
        group_size=_group_size(path, settings.get("group_size", settings.get("q_group_size", -1))),
        symmetric=not _switch(path, settings, "zero_point", default=True),
    )


def _compressed(path: Path, settings: Mapping[str, Any]) -> Packing:
    layout, groups = settings.get("format"), _object(path, "config_groups", settings.get("config_groups") or {})
    if layout != "pack-quantized" or len(groups) != 1:
        raise UnsupportedError(
            f"{path}: compressed-tensors in format {layout!r} with {len(groups)} groups of layers; trtkit converts "
            "pack-quantized with one"
        )
    group = _object(path, "a group of layers", next(iter(groups.values())))
    weights = _object(path, "weights", group.get("weights") or {})
    if group.get("input_activations") or weights.get("type", "int") != "int" or weights.get("actorder"):
        raise UnsupportedError(
            f"{path}: compressed-tensors with quantised activations, floating-point weights or activation order; trtkit "
            "converts weight-only integers (W4A16, W8A16)"
        )
    if weights.get("strategy") not in ("group", "channel"):
        raise UnsupportedError(f"{path}: strategy is {weights.get('strategy')!r}; trtkit converts group and channel")
    return Packing(
        method=COMPRESSED,
        bits=weights.get("num_bits", 0),
        group_size=_group_size(path, weights.get("group_size") or -1),
        symmetric=_switch(path, weights, "symmetric", default=True),
    )


def _group_size(path: Path, group: Any) -> int:  # noqa: ANN401 - parsed JSON
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and group < _LEAST_GROUP):
        raise InputError(f"{path}: group_size is {group!r}, expected -1 or a number such as 128")
    return max(group, 0)


def _switch(path: Path, settings: Mapping[str, Any], name: str, *, default: bool) -> bool:
    found = settings.get(name)
    if found is None:
        return default
    if not isinstance(found, bool):
        raise InputError(f"{path}: {name} is {str(found)[:40]!r}, expected true or false")
    return found


def _object(path: Path, what: str, found: Any) -> Mapping[str, Any]:  # noqa: ANN401 - parsed JSON
    if not isinstance(found, dict):
        raise InputError(f"{path}: {what} is {str(found)[:40]!r}, expected an object")
    return found


def _quantisation(directory: Path) -> tuple[Path, Mapping[str, Any]] | None:
    path = directory / "config.json"
    config = _json(path)
    if config.get("quantization_config"):
        return path, _object(path, "quantization_config", config["quantization_config"])
    for name in _OTHER_CONFIGS:
        if (directory / name).is_file():
            return directory / name, _json(directory / name)
    return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object")
    return data
