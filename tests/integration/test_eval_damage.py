"""Planted damage on the shipped tiny model: what an accuracy would miss, the gate catches; an identical pair passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engine_models import kv_bytes, limits, quantised, spec_of, trtllm_tensors
from support.synthetic_records import engine, environment

from trtkit.backends.tokenizer import load_tokenizer
from trtkit.engine.open import open_tensors
from trtkit.engine.rope import RopeTable
from trtkit.quality.gate import GateResult, Status, run_gate
from trtkit.quality.local_tasks import prepare_tasks
from trtkit.quality.records import QualitySource
from trtkit.quality.rules import parse_drop
from trtkit.quality.sides import Side
from trtkit.quality.tasks import TaskSelection, run_tasks
from trtkit.spec.kv import parse_kv_policy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "bench" / "tiny_model" / "model"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Side]:
    """Weights and a policy in, a side with quality records out; the plan on record stays the honest one."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(str(MODEL)).float()
    spec, weights = spec_of(hf), trtllm_tensors(hf)
    tokenizer = load_tokenizer(MODEL)
    tasks = prepare_tasks(ROOT / "bench" / "tasks", tmp_path_factory.mktemp("tasks") / "all")
    selection = TaskSelection(names=("mini_recall",), directory=tasks, limit=16)

    def side(name: str, tensors: Callable[[Tensors], Tensors], kv: str = "full", actual: str | None = None) -> Side:
        ref = engine(name)
        ref = replace(ref, plan=replace(ref.plan, kv=parse_kv_policy(kv)))
        opened = open_tensors(
            spec,
            tensors(weights),
            limits=limits(max_seq_len=512, kv_memory_bytes=kv_bytes(spec, 1024)),
            kv_policy=parse_kv_policy(actual or kv),
        )
        with opened:
            source = QualitySource(engine=ref, environment=environment())
            return Side(engine=ref, quality=run_tasks(opened, tokenizer, source, selection))

    return side


def gate(a: Side, b: Side) -> GateResult:
    return run_gate(a, b, (parse_drop("mini_recall", 2),))


def damaged(tensors: Tensors) -> Tensors:
    """INT8 with the scales of one layer 2 % too large."""
    result = quantised(tensors)
    layer = [name for name in result if ".layers.1." in name and name.endswith("per_channel_scale")]
    assert len(layer) == 5
    return result | {name: result[name] * 1.02 for name in layer}


def test_scales_off_by_two_percent_fail_and_the_honest_build_passes(judge: Callable[..., Side]) -> None:
    honest, again, bad = judge("int8", quantised), judge("int8", quantised), judge("int8", damaged)
    assert gate(honest, again).status is Status.PASS
    assert gate(honest, bad).status is Status.FAIL


def test_an_honest_int8_build_passes_against_full_precision(judge: Callable[..., Side]) -> None:
    assert gate(judge("fp32", dict), judge("int8", quantised)).status is Status.PASS


def test_dropping_the_heavy_hitters_fails(judge: Callable[..., Side]) -> None:
    policy = "h2o:budget=48,recent=16,interval=16"
    honest = judge("fp32-h2o", dict, policy)
    assert honest.quality[0].evictions > 0
    assert gate(honest, judge("fp32-h2o", dict, policy)).status is Status.PASS
    assert gate(honest, judge("fp32-h2o", dict, policy, "window:budget=48,interval=16")).status is Status.FAIL


def test_positions_off_by_one_from_the_fortieth_token_fail(
    judge: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = judge("fp32", dict)
    right = RopeTable.at
    monkeypatch.setattr(RopeTable, "at", lambda self, positions: right(self, positions + (positions >= 40).long()))
    assert gate(honest, judge("fp32", dict)).status is Status.FAIL
