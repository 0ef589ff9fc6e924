"""The sizes of `h2o.py`: Llama 3 70B's, and a rehearsal's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.gpu.h2o_runs import SETTLING_STEPS
from trtkit.spec.catalog import model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The real size, or a rehearsal's."""

    model: ModelSpec
    compute: DType | None
    isl: int
    osl: int
    limits: Limits
    interval: int
    rounds: int
    most_batch: int
    load: int

    @property
    def budget(self) -> int:
        """Half of a request's longest context."""
        return int(SHARE * (self.isl + self.osl))

    @property
    def half(self) -> str:
        """The policy, its budget in tokens so that both kinds of step have the same."""
        return f"h2o:{self.budget},interval={self.interval}"

    @property
    def chunk(self) -> int:
        """Steps of one turn: whole eviction intervals."""
        return 2 * self.interval

    @property
    def measured_steps(self) -> int:
        """Decode steps that a request lives through, with some to spare."""
        return self.rounds * (self.chunk + SETTLING_STEPS) + 4 * self.most_batch + 16


def real_scale(layers: int | None) -> Scale:
    model = model_preset("llama-3-70b")
    return Scale(
        model=model if layers is None else replace(model, num_layers=layers),
        compute=None,
        isl=4096,
        osl=512,
        limits=Limits(max_batch_size=16, max_num_tokens=4096, max_seq_len=4608),
        interval=32,
        rounds=4,
        most_batch=8,
        load=24,
    )


def rehearsal_scale() -> Scale:
    model = replace(
        model_preset("llama-3-70b"),
        name="llama-3-70b-rehearsal",
        num_layers=2,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=256,
        eos_ids=(2,),
    )
    limits = Limits(max_batch_size=8, max_num_tokens=96, max_seq_len=160, tokens_per_block=4)
    return Scale(
        model=model,
        compute=DType.FP32,
        isl=96,
        osl=48,
        limits=limits,
        interval=4,
        rounds=2,
        most_batch=2,
        load=10,
    )
