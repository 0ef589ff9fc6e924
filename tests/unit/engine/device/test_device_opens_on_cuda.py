"""An engine opened on "cuda" where a CPU poses as one: every branch that only a GPU takes, but for the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_models import limits, make_hf, spec_of
from support.fake_cuda import PretendedDevice

from trtkit.engine.device import capture, graphs, sampling, setup
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_embedded
from trtkit.kernels.sampling import sample_rows
from trtkit.spec.bundle import EngineBundle, Manifest
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import quant_for

MODEL = spec_of(make_hf())


def _bundle(tmp_path: Path, precision: str, policy: str) -> EngineBundle:
    plan = BuildPlan(
        name="d",
        model=MODEL,
        model_source="none",
        gpu="h100-sxm",
        quant=quant_for(precision),
        kv=parse_kv_policy(policy),
        limits=limits(),
        load_format="dummy",
    )
    manifest = Manifest(plan=plan, fidelity=KVFidelity.EXACT, versions={}, files={}, created_utc="")
    return EngineBundle(path=tmp_path, manifest=manifest)


def _tokens(engine: EmbeddedEngine) -> list[tuple[str, int | None, str | None]]:
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=tuple(range(3, 3 + length)),
            max_tokens=6,
            ignore_eos=True,
            sampling=Sampling(temperature=0.5, seed=3) if index == 1 else Sampling(),
        )
        for index, length in enumerate((5, 20, 30))
    ]
    with engine:
        return sorted((event.request_id, event.token_id, event.error) for event in engine.generate(requests))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PretendedDevice:
    """A graph that is replayed runs what was recorded, which the double of CUDA alone would not."""

    def record(work: Callable[[], None], **where: Any) -> SimpleNamespace:
        capture.record(work, **where)
        return SimpleNamespace(replay=work)

    monkeypatch.setattr(graphs, "record", record)
    return PretendedDevice(monkeypatch)


@pytest.mark.parametrize(
    ("precision", "policy"), [("int8", "full"), ("int8", "h2o:16"), ("fp8-rowwise", "full"), ("fp16", "h2o:50%")]
)
def test_it_opens_captures_tells_its_memory_and_writes_the_tokens_of_the_device_path_on_a_cpu(
    tmp_path: Path, device: PretendedDevice, precision: str, policy: str
) -> None:
    bundle = _bundle(tmp_path, precision, policy)
    expected = _tokens(open_embedded(bundle, device="cpu", path="device"))
    with device:
        engine = open_embedded(bundle)
        info = engine.info
        found = _tokens(engine)
    assert found == expected
    assert not any(error for _, _, error in found)
    assert (info.device, info.notes) == ("cuda", ())
    assert {"weights", "kv_pool", "graphs", "free", "activations"} <= set(info.device_memory)
    assert device.cuda.log.count("recording, thread_local") == len(graphs.buckets(limits().max_batch_size))
    assert "pinned" in device.cuda.log


def test_an_engine_whose_steps_cannot_be_captured_opens_and_writes_the_same(
    tmp_path: Path, device: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _bundle(tmp_path, "int8", "full")
    expected = _tokens(open_embedded(bundle, device="cpu", path="device"))
    work = graphs.DecodeGraphs.__init__

    def waiting(self: graphs.DecodeGraphs, sizes: Any, run: Callable[[int], None], *args: Any, **more: Any) -> None:
        def step(size: int) -> None:
            run(size)
            device.cuda.wait()

        work(self, sizes, step, *args, **more)

    monkeypatch.setattr(graphs.DecodeGraphs, "__init__", waiting)
    with device:
        engine = open_embedded(bundle)
        (note,) = engine.info.notes
        assert "runs eagerly: called a synchronizing" in note
        assert _tokens(engine) == expected


def test_opening_has_a_token_drawn_at_random_as_steps_will_have_it_so_that_no_request_waits_for_its_kernel(
    tmp_path: Path, device: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def note(*operands: Any) -> Any:
        drawn.append([(operand.dtype, operand.stride()) for operand in operands])
        return sample_rows(*operands)

    monkeypatch.setattr(setup, "sample_rows", note)
    monkeypatch.setattr(sampling, "sample_rows", note)
    with device:
        engine = open_embedded(_bundle(tmp_path, "int8", "full"))
        (at_opening,) = drawn
        _tokens(engine)
    assert len(drawn) > 1
    assert all(each == at_opening for each in drawn)
