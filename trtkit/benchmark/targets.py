"""The engines to measure: bundles with what this run overrides, and a digest that tells every variant apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit.spec.bundle import EngineBundle, open_bundle
from trtkit.spec.codec import digest, to_plain
from trtkit.spec.errors import EngineError, UsageError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.plan import BuildPlan
from trtkit.spec.result import EngineRef
from trtkit.spec.speculation import parse_speculation

_LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len", "kv_memory_bytes", "enable_block_reuse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One engine of a run: its bundle, what is overridden at run time, and the identity its records carry."""

    bundle: EngineBundle
    overrides: Mapping[str, object]
    ref: EngineRef

    @property
    def path(self) -> Path:
        """The bundle's directory."""
        return self.bundle.path

    @property
    def plan(self) -> BuildPlan:
        """The plan with the overrides in it."""
        return self.ref.plan

    @property
    def device(self) -> str:
        """What it will run on."""
        return str(self.overrides.get("device") or ("cpu" if self.plan.gpu == "cpu" else "cuda"))

    @property
    def tokenizer_dir(self) -> Path | None:
        """Tokenizer files, if it came with some."""
        return self.bundle.tokenizer_dir if self.bundle.tokenizer_dir.is_dir() else None


def open_targets(
    paths: Sequence[Path], overrides: Mapping[str, object] | None = None, labels: Mapping[str, str] | None = None
) -> list[Target]:
    """The engines at `paths`, with the same overrides each.

    Args:
        paths: `<name>.engine` directories.
        overrides: limits, `kv`, `speculation` (as text) and `device` as `open_engine` takes them; None values are left out.
        labels: engine name -> label for tables.

    Raises:
        EngineError: a path is no finished engine.
        UsageError: an engine is given twice, or a label names none.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    targets = [_target(path, given, labels or {}) for path in paths]
    names = [target.ref.name for target in targets]
    for name in labels or {}:
        if name not in names:
            raise UsageError(f"--label {name}: no such engine here; the engines are {', '.join(names)}")
    seen: dict[tuple[str, str], Path] = {}
    for target in targets:
        key = (target.ref.name, target.ref.digest)
        if key in seen:
            raise UsageError(f"{target.path} is given twice (as {seen[key]}); name each engine once")
        seen[key] = target.path
    return targets


def _target(path: Path, overrides: Mapping[str, object], labels: Mapping[str, str]) -> Target:
    bundle = open_bundle(path)
    plan = bundle.manifest.plan
    limits: dict[str, Any] = {name: overrides[name] for name in _LIMITS if name in overrides}
    kv = overrides.get("kv", plan.kv)
    assert isinstance(kv, KVPolicySpec)
    speculation = plan.speculation
    if "speculation" in overrides:
        speculation = parse_speculation(str(overrides["speculation"]))
    effective = replace(plan, kv=kv, speculation=speculation, limits=replace(plan.limits, **limits))
    name = bundle.manifest.digest if not overrides else digest([bundle.manifest.digest, to_plain(overrides)])
    ref = EngineRef(
        name=bundle.name,
        digest=name,
        plan=effective,
        fidelity=bundle.manifest.fidelity,
        label=labels.get(bundle.name, ""),
    )
    return Target(bundle=bundle, overrides=overrides, ref=ref)


def expand(patterns: Sequence[str]) -> list[Path]:
    """Engine directories for what was typed: paths, or patterns that no shell has expanded.

    Raises:
        EngineError: nothing matches.
    """
    paths: list[Path] = []
    for pattern in patterns:
        if any(sign in pattern for sign in "*?["):
            base = Path(pattern)
            matches = sorted(base.parent.glob(base.name))
            if not matches:
                raise EngineError(f"{pattern}: no engine matches; build one with `trtkit build`")
            paths += matches
        else:
            paths.append(Path(pattern))
    return paths
