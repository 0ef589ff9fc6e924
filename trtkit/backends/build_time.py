"""How long a build will take: from earlier builds beside it where there are some, else from published build logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtkit.spec.bundle import MANIFEST_NAME, Manifest, open_bundle
from trtkit.spec.errors import EngineError
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.units import GIB

PUBLISHED_S = 30.0
PUBLISHED_S_PER_GIB = (1.0, 8.5)
"""`trtllm-build` of four published logs, least and most seconds for a GiB of engine after the first 30: Command-R 35B fp16
1:47 (TensorRT-LLM examples/commandr README), Gemma 2 9B 0:47 (TensorRT-LLM issue 2324), Llama 3 8B bf16 2:09 and Llama 3.2
1B int8 0:34 (user write-ups). Releases 0.8 to 1.0; without `multiple_profiles`, which compiles several times."""

_COMPILE = "trtllm-build"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Earlier:
    manifest: Manifest
    weight_bytes: int


def expected_seconds(plan: BuildPlan, out_dir: Path, weight_bytes: int) -> Measured | None:
    """Seconds of all phases together; None where nothing is known.

    Args:
        plan: what is to be built.
        out_dir: where earlier engines are.
        weight_bytes: what the engine's weights take on all devices together.
    """
    earlier = [found for found in _earlier(plan, out_dir) if found.weight_bytes]
    if earlier:
        nearest = min(earlier, key=lambda found: abs(found.weight_bytes - weight_bytes))
        seconds = sum(nearest.manifest.phases_s.values()) * weight_bytes / nearest.weight_bytes
        note = f"from {nearest.manifest.plan.name}, by the weights' size"
        return Measured(value=seconds, unit="s", source=Source.MODELED, note=note)
    if plan.target != "tensorrt":
        return None
    low, high = (PUBLISHED_S + rate * weight_bytes / GIB / plan.parallel.world_size for rate in PUBLISHED_S_PER_GIB)
    note = "trtllm-build alone, from published logs of models of 1B to 35B without multiple profiles"
    return Measured(value=(low * high) ** 0.5, unit="s", source=Source.ASSUMED, low=low, high=high, note=note)


def _earlier(plan: BuildPlan, out_dir: Path) -> list[_Earlier]:
    """Finished engines of the same kind whose whole build was timed in one go."""
    found = []
    for path in sorted(out_dir.glob(f"*.engine/{MANIFEST_NAME}")):
        try:
            manifest = open_bundle(path.parent).manifest
        except EngineError:
            continue
        same = (manifest.plan.target, manifest.plan.gpu) == (plan.target, plan.gpu)
        wanted = {"convert", _COMPILE} if plan.target == "tensorrt" else {"convert"}
        if same and wanted <= set(manifest.phases_s):
            weights = sum(entry.size_bytes for name, entry in manifest.files.items() if name.startswith(_folder(plan)))
            found.append(_Earlier(manifest=manifest, weight_bytes=weights))
    return found


def _folder(plan: BuildPlan) -> str:
    """Where a bundle of the plan's kind keeps the weights that are run."""
    return "engine/" if plan.target == "tensorrt" else "checkpoint/"


def in_words(expected: Measured | None) -> str:
    """For people."""
    if expected is None:
        return "build time not known (no earlier engine to go by)"
    if expected.low is not None and expected.high is not None:
        return f"{_minutes(expected.low)} to {_minutes(expected.high)} ({expected.source.value}: {expected.note})"
    return f"about {_minutes(expected.value)} ({expected.source.value} {expected.note})"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
