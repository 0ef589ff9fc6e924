"""What to build, as people write it: a recipe file, command line options, or both. Lowered once, to a `BuildPlan`.

A recipe is TOML whose keys are the fields of `BuildOptions`; options given on the command line win over it. `model`
is a directory (relative to the recipe), a preset of the catalog, or a hub id.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.backends.build import builder_of
from trtkit.backends.model_source import ModelSource, download, resolve_model
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.checkpoint import with_groups
from trtkit.spec.codec import from_plain
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.plan import LOAD_FORMATS, TARGETS, BuildPlan, Limits, Parallelism
from trtkit.spec.quant import GPTQ_INT8, GROUPS, INT4_GROUPS, QuantSpec, quant_for
from trtkit.spec.speculation import OFF, SpeculationSpec, parse_speculation
from trtkit.spec.units import GIB, KIB, MIB
from trtkit.trtllm.installed import installation
from trtkit.trtllm.packed import read_packing, source_quant
from trtkit.trtllm.requirements import choose_target

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same module under its older name
    import tomli as tomllib

CPU = "cpu"
_DEFAULT_MAX_SEQ_LEN = 8192
_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """Every choice of a build; None is "not said". `kv_memory` is text with a unit, such as "12GiB"."""

    model: str | None = None
    name: str | None = None
    model_name: str | None = None
    description: str = ""
    precision: str | None = None
    group_size: int | None = None
    dtype: str | None = None
    gpu: str | None = None
    tp: int | None = None
    pp: int | None = None
    kv: str | None = None
    target: str | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    tokens_per_block: int | None = None
    kv_memory: str | None = None
    kv_fraction: float | None = None
    allow_approximate: bool | None = None
    calib_text: str | None = None
    load_format: str | None = None
    kv_dtype: str | None = None
    reuse_prefix: bool | None = None
    speculate: str | None = None

    def over(self, base: BuildOptions) -> BuildOptions:
        """These options, with `base`'s value where nothing was said."""
        said = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) not in (None, "")}
        return dataclasses.replace(base, **said)


DEFAULT_MODEL = "meta-llama/Meta-Llama-3-70B-Instruct"
"""What is built for a GPU when no model is named."""


def load_recipe(name: str) -> BuildOptions:
    """Read a recipe by path, or by name from `builds/recipes/` and from the recipes shipped with trtkit.

    The engine is named after the recipe unless it says otherwise.

    Raises:
        UsageError: no such recipe; the message lists those there are.
        InputError: not TOML, or an unknown key or a wrong type in it.
    """
    path = _find_recipe(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a recipe (TOML expected): {error}") from None
    options = from_plain(BuildOptions, data, path.name)
    model = options.model
    if model is not None and model.startswith((".", "/")):
        model = str((path.parent / model).resolve())
    return dataclasses.replace(options, model=model, name=options.name or path.stem)


def recipe_directories() -> list[Path]:
    """Where recipes are looked up by name, first match wins."""
    package = Path(__file__).resolve().parents[1]
    return [Path("builds/recipes"), package / "data" / "builds" / "recipes", package.parent / "builds" / "recipes"]


def _find_recipe(name: str) -> Path:
    if name.endswith(".toml") or Path(name).is_file():
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such recipe file")
        return Path(name)
    for directory in recipe_directories():
        if (directory / f"{name}.toml").is_file():
            return directory / f"{name}.toml"
    known = sorted({path.stem for directory in recipe_directories() for path in directory.glob("*.toml")})
    raise UsageError(f"no recipe {name!r}; known are {', '.join(known) or 'none'} (or give --model)")


def make_plan(options: BuildOptions, *, dry_run: bool = False) -> tuple[BuildPlan, ModelSource]:
    """Decide everything that was left open.

    Args:
        options: what was said.
        dry_run: nothing will be built, so the catalog's shape will do and the target need not be installed.

    Raises:
        UsageError: an option has a value that is not allowed, or the model is not named.
        MissingDependencyError: the target is not installed.
        InputError: the model's directory or config cannot be read.
    """
    gpu = gpu_spec(options.gpu or CPU).name
    model = options.model or (DEFAULT_MODEL if gpu != CPU else None)
    if model is None:
        raise UsageError("nothing to build: name a recipe or give --model DIRECTORY, PRESET or HUB_ID")
    load_format = options.load_format or "auto"
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"unknown load format {load_format!r}: allowed are {', '.join(LOAD_FORMATS)}")
    kv = parse_kv_policy(options.kv or "full")
    speculation = parse_speculation(options.speculate or OFF)
    target, _ = resolve_target(options)
    if not dry_run:
        builder_of(target)
    source = resolve_model(model, name=options.model_name, look_up=not dry_run and load_format != "dummy")
    parallel = Parallelism(tp=_or(options.tp, 1), pp=_or(options.pp, 1))
    quant = _with_groups(_quant(options), source, parallel, target, look_up=not dry_run and load_format != "dummy")
    name = engine_name(source.model.name, quant, gpu, parallel, kv, speculation)
    plan = BuildPlan(
        name=_checked_name(options.name or name + ("-reuse" if options.reuse_prefix else "")),
        model=source.model,
        model_source=model,
        gpu=gpu,
        quant=quant,
        kv=kv,
        parallel=parallel,
        limits=_limits(options, source.model.max_position_embeddings),
        target=target,
        target_version=None if dry_run or target == "embedded" else installation().version,
        load_format=load_format,
        speculation=speculation,
    )
    return plan, source


def resolve_target(options: BuildOptions) -> tuple[str, str]:
    """The target, and why it is that one where nobody named it.

    Raises:
        UsageError: no such target.
    """
    target = options.target or "auto"
    if target in TARGETS:
        return target, ""
    if options.load_format == "dummy":
        return "embedded", "only it makes random weights"
    if target != "auto":
        raise UsageError(f"unknown target {target!r}: allowed are auto, {', '.join(TARGETS)}")
    if gpu_spec(options.gpu or CPU).name == CPU:
        return "embedded", ""
    return choose_target(installation())


def engine_name(
    model: str,
    quant: QuantSpec,
    gpu: str,
    parallel: Parallelism,
    kv: KVPolicySpec,
    speculation: SpeculationSpec | None = None,
) -> str:
    """`<model>-<precision>[-gN]-<gpu>[-tpN][-ppN][-kvTYPE][-kv][-speculation]`, safe as a directory name."""
    parts = [model, quant.precision, gpu]
    if quant.algo == INT4_GROUPS and quant.group_size != GROUPS[0]:
        parts[1] += f"-g{quant.group_size}"
    parts += [f"{name}{ranks}" for name, ranks in (("tp", parallel.tp), ("pp", parallel.pp)) if ranks > 1]
    if quant.kv.bits < 16:
        parts.append(f"kv{quant.kv.value}")
    if not kv.is_full:
        parts.append(kv.label.replace(":budget=", "-b").replace(":", "").replace("%", "").replace("=", ""))
    if speculation is not None:
        parts.append(speculation.label.replace(":", "").replace("=", ""))
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-.")


def parse_bytes(text: str, what: str) -> int:
    """`12GiB`, `512 MiB`, `8GB` or plain bytes.

    Raises:
        UsageError: no number, an unknown unit, or nothing above zero; `what` names the option.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{what} is {text!r}: expected a number with a unit, such as 12GiB or 512MiB")
    value = int(float(match[1]) * _UNITS[match[2].lower()])
    if value <= 0:
        raise UsageError(f"{what} is {text!r}, must be above 0")
    return value


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"engine name {name!r}: letters, digits, '.', '_' and '-' only, as it names a directory")
    return name


def _quant(options: BuildOptions) -> QuantSpec:
    precision = options.precision or "fp16"
    compute = DType.parse(options.dtype) if options.dtype else None
    quant = quant_for(precision, compute=compute)
    if compute is not None and quant.compute is not compute:
        raise UsageError(f"dtype {options.dtype} with precision {precision}: dtype is for int8 and int4, leave it out")
    if options.group_size is not None:
        if quant.algo != INT4_GROUPS or options.group_size not in GROUPS:
            raise UsageError(
                f"group_size {options.group_size} with precision {precision}: it is for int4, where allowed are "
                f"{', '.join(map(str, GROUPS))}"
            )
        quant = dataclasses.replace(quant, group_size=options.group_size)
    if options.kv_dtype is None:
        return quant
    kv = DType.parse(options.kv_dtype)
    allowed = (quant.compute, DType.FP8, DType.INT8)
    if kv not in allowed:
        raise UsageError(f"kv_dtype is {options.kv_dtype!r}: allowed are {', '.join(dtype.value for dtype in allowed)}")
    return quant.with_kv(kv)


def _with_groups(
    quant: QuantSpec, source: ModelSource, parallel: Parallelism, target: str, *, look_up: bool
) -> QuantSpec:
    """`quant` with the groups that the model's widths allow, and those of a checkpoint that is quantised already.

    Raises:
        UnsupportedError: the model is not quantised as the precision wants, or has no groups of its.
    """
    wants = quant.algo in (GPTQ_INT8, INT4_GROUPS)
    if not wants:
        return quant
    if source.directory is None and not look_up:
        return with_groups(source.model, quant, parallel)
    directory = source.directory or download(source.hub_id, weights=False)
    held = quant.held_by(target)
    found = source_quant(held, source.model, read_packing(directory), parallel, str(source.hub_id or directory))
    return dataclasses.replace(
        quant, group_size=found.group_size, zero_points=found.zero_points, input_order=found.input_order
    )


def _limits(options: BuildOptions, max_position: int) -> Limits:
    max_seq_len = _or(options.max_seq_len, min(_DEFAULT_MAX_SEQ_LEN, max_position))
    if max_seq_len > max_position:
        raise UsageError(f"max_seq_len is {max_seq_len}, the model was made for at most {max_position} positions")
    given: dict[str, Any] = {
        name: value
        for name in ("max_batch_size", "max_num_tokens", "tokens_per_block", "kv_fraction")
        if (value := getattr(options, name)) is not None
    }
    kv_memory = None if options.kv_memory is None else parse_bytes(options.kv_memory, "kv_memory")
    reuse = bool(options.reuse_prefix)
    return Limits(max_seq_len=max_seq_len, kv_memory_bytes=kv_memory, enable_block_reuse=reuse, **given)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
