"""INT4 from a recipe to tokens: built and verified, as large as planned, the same on both of the engine's paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.packed_sources import write_packed

from trtkit.backends.build import build_engine
from trtkit.backends.fit import sizes
from trtkit.backends.recipe import BuildOptions, load_recipe, make_plan
from trtkit.engine.open import open_embedded
from trtkit.engine.weights import load_weights
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.engine import Request

TINY = Path(__file__).parents[2] / "bench" / "tiny_model" / "model"


def built(folder: Path, **options: str) -> EngineBundle:
    plan, source = make_plan(BuildOptions(**options).over(load_recipe("tiny-int4-cpu")))  # type: ignore[arg-type]
    return build_engine(plan, source, folder)


def tokens(bundle: EngineBundle, path: str) -> list[tuple[str, int, int]]:
    requests = [
        Request(request_id=str(i), prompt_ids=tuple(range(20 + i, 40 + 3 * i)), max_tokens=16, ignore_eos=True)
        for i in range(4)
    ]
    with open_embedded(bundle, path=path) as engine:
        return sorted((e.request_id, e.index, e.token_id) for e in engine.generate(requests))


@pytest.mark.parametrize("source", ["plain", "awq"])
def test_the_tiny_model_in_int4_is_verified_as_large_as_planned_and_alike_on_both_paths(
    tmp_path: Path, source: str
) -> None:
    options = {}
    if source == "awq":
        write_packed(tmp_path / "awq", TINY, "awq", group=64)
        options["model"] = str(tmp_path / "awq")
    bundle = built(tmp_path / "builds", **options)
    plan, found = bundle.manifest.plan, bundle.manifest.verification
    assert (plan.quant.group_size, plan.quant.zero_points) == ((128, False) if source == "plain" else (64, True))
    assert found["drift"] < 5e-5
    assert (found["quantisation_drift"] > 0) == (source == "plain")
    assert ("taken over as they are" in bundle.manifest.versions.get("weights", "")) == (source == "awq")
    weights, _ = load_weights(bundle.checkpoint_dir)
    assert weights.num_bytes == sizes(plan).weight_bytes
    written = tokens(bundle, "auto")
    assert len(written) == 4 * 16
    assert tokens(bundle, "device") == written
