"""The rows of the table: configurations, their cells in order of importance, and the shape they run at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.gpu.memory import fits, most_in_flight
from bench.gpu.sweep import CellPlan
from trtkit.spec.catalog import model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import parse_speculation
from trtkit.spec.workload import Workload

OSL = 256
LIMITS = Limits(max_batch_size=32, max_num_tokens=4096, max_seq_len=4352, kv_fraction=0.92)
# H2O's rings are held for every place of the batch, so its limit is the batch that is worth having at each length.
SHORT, LONG = replace(LIMITS, max_batch_size=48), replace(LIMITS, max_batch_size=16)
# Narrow weights and caches leave room for so many; a decode step of up to 64 tokens reads each weight once.
WIDE, WIDEST = replace(LIMITS, max_batch_size=64), replace(LIMITS, max_batch_size=128)
FEW = replace(LIMITS, max_batch_size=8)
GUESSING = "bench.gpu.guessing:open_guessing"
_REHEARSED_GROUP = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One configuration of the table. `cells` are the ones it is about, most important first.

    `stage` is the one of one_call.sh that runs it: core, more or levers. `shared` is the share of every prompt that is
    the same in all of them. `opener` opens the engine in another way than `trtkit bench` does.
    """

    label: str
    precision: str
    cells: tuple[str, ...]
    stage: str = "more"
    kv: str = "full"
    kv_dtype: DType | None = None
    limits: Limits = LIMITS
    speculation: str = "off"
    shared: float = 0.0
    opener: str | None = None


CORE, MORE, LEVERS = "core", "more", "levers"
STAGES = (CORE, MORE, LEVERS)
ROWS: dict[str, Row] = {
    "int8": Row(
        label="INT8",
        precision="int8",
        stage=CORE,
        cells=("c1-isl512", "c32-isl512", "c1-isl4096", "c8-isl512", "c32-isl4096", "c8-isl4096"),
    ),
    "int8-h2o": Row(
        label="INT8 + H2O 50% + tuned batching (48)",
        precision="int8",
        kv="h2o:50%",
        limits=SHORT,
        cells=("c32-isl512", "c48-isl512", "c1-isl512", "c1-isl4096", "c8-isl512", "c32-isl4096"),
    ),
    "int8-h2o-long": Row(
        label="INT8 + H2O 50% + tuned batching (16)",
        precision="int8",
        kv="h2o:50%",
        limits=LONG,
        cells=("c32-isl4096", "c8-isl4096"),
    ),
    "fp8": Row(
        label="FP8",
        precision="fp8-rowwise",
        cells=("c1-isl4096", "c32-isl512", "c1-isl512", "c8-isl512", "c32-isl4096", "c8-isl4096"),
    ),
    "int8-kv8": Row(
        label="INT8 + FP8 KV",
        precision="int8",
        kv_dtype=DType.FP8,
        cells=("c32-isl4096", "c32-isl512", "c1-isl512", "c1-isl4096", "c8-isl512", "c8-isl4096"),
    ),
    "int8-tuned": Row(
        label="INT8 + tuned batching (48)",
        precision="int8",
        limits=SHORT,
        cells=("c48-isl512",),
    ),
    "fp16": Row(
        label="FP16",
        precision="fp16",
        cells=("c1-isl512", "c32-isl512", "c1-isl4096", "c8-isl512", "c8-isl4096"),
    ),
    "int4": Row(
        label="INT4",
        precision="int4",
        stage=LEVERS,
        cells=("c1-isl512", "c32-isl512", "c1-isl4096", "c32-isl4096"),
    ),
    "int4-kv8": Row(
        label="INT4 + FP8 KV + tuned batching (128)",
        precision="int4",
        stage=LEVERS,
        kv_dtype=DType.FP8,
        limits=WIDEST,
        cells=("c64-isl512", "c128-isl512", "c64-isl4096"),
    ),
    "fp8-kv8": Row(
        label="FP8 + FP8 KV + tuned batching (64)",
        precision="fp8-rowwise",
        stage=LEVERS,
        kv_dtype=DType.FP8,
        limits=WIDE,
        cells=("c64-isl512", "c32-isl4096"),
    ),
    "int8-ngram4": Row(
        label="INT8 + 4 guesses a step, all wrong",
        precision="int8",
        stage=LEVERS,
        limits=FEW,
        speculation="ngram:4,adaptive=no",
        opener=GUESSING,
        cells=("c1-isl512", "c8-isl512"),
    ),
    "int8-ngram8": Row(
        label="INT8 + 8 guesses a step, all wrong",
        precision="int8",
        stage=LEVERS,
        limits=FEW,
        speculation="ngram:8,adaptive=no",
        opener=GUESSING,
        cells=("c1-isl512", "c8-isl512"),
    ),
    "int8-reuse": Row(
        label="INT8 + prefix reuse, 7/8 of a prompt shared",
        precision="int8",
        stage=LEVERS,
        limits=replace(LIMITS, enable_block_reuse=True),
        shared=7 / 8,
        cells=("c1-isl4096", "c32-isl4096"),
    ),
    "int4-h2o": Row(
        label="INT4 + H2O 50% + tuned batching (48)",
        precision="int4",
        stage=LEVERS,
        kv="h2o:50%",
        limits=SHORT,
        cells=("c48-isl4096",),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The real size, or a rehearsal's: model, lengths by name, concurrency by name."""

    model: ModelSpec
    isl: Mapping[str, int]
    concurrency: Mapping[str, int]
    osl: int
    gpu: str
    rehearsal: bool


def real_scale(gpu: str) -> Scale:
    return Scale(
        model=model_preset("llama-3-70b"),
        isl={"isl512": 512, "isl4096": 4096},
        concurrency={f"c{n}": n for n in (1, 8, 32, 48, 64, 128)},
        osl=OSL,
        gpu=gpu,
        rehearsal=False,
    )


def rehearsal_scale() -> Scale:
    """Two layers, four query heads for each KV head, and lengths at which H2O still evicts."""
    model = ModelSpec(
        name="llama-3-70b-rehearsal",
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=512,
        max_position_embeddings=512,
        bos_id=1,
        eos_ids=(2,),
    )
    return Scale(
        model=model,
        isl={"isl512": 32, "isl4096": 96},
        concurrency={"c1": 1, "c8": 2, "c32": 3, "c48": 4, "c64": 4, "c128": 4},
        osl=24,
        gpu="cpu",
        rehearsal=True,
    )


def plan_of(key: str, scale: Scale) -> BuildPlan:
    """The build plan of one row."""
    row = ROWS[key]
    compute = DType.FP32 if scale.rehearsal else None
    quant = quant_for("fp32" if scale.rehearsal and row.precision == "fp16" else row.precision, compute=compute)
    limits = row.limits
    if scale.rehearsal:
        quant = replace(quant, group_size=min(quant.group_size, _REHEARSED_GROUP))
        limits = replace(
            limits,
            max_batch_size=4,
            max_num_tokens=64,
            max_seq_len=max(scale.isl.values()) + scale.osl,
            tokens_per_block=8,
            kv_memory_bytes=4 << 20,
            kv_fraction=0.9,
        )
    return BuildPlan(
        name=f"{scale.model.name}-{key}",
        model=scale.model,
        model_source="random",
        gpu=scale.gpu,
        quant=quant if row.kv_dtype is None else quant.with_kv(row.kv_dtype),
        kv=parse_kv_policy(row.kv),
        limits=limits,
        load_format="dummy",
        speculation=parse_speculation(row.speculation),
    )


def cell_plan(name: str, scale: Scale, row: str | None = None) -> CellPlan:
    """One round of requests a repeat: with the same number in flight as asked, every request sees the full batch.

    Three repeats give an interval; the largest cell, a minute each, is run once.
    """
    load, _, length = name.partition("-")
    if load not in scale.concurrency or length not in scale.isl:
        known = ", ".join(sorted({cell for each in ROWS.values() for cell in each.cells}))
        raise UsageError(f"unknown cell {name!r}: there are {known}")
    count, isl = scale.concurrency[load], scale.isl[length]
    shared = 0.0 if row is None else ROWS[row].shared
    tokens = count * (isl - int(shared * isl))
    repeats = 1 if scale.rehearsal or tokens > 48 * 1024 else 2 if tokens > 16 * 1024 and count != 32 else 3
    workload = Workload(
        isl=isl, osl=scale.osl, num_requests=count, concurrency=count, shared_prefix_tokens=int(shared * isl)
    )
    return CellPlan(name=name, workload=workload, repeats=repeats, warmup=min(count, 2))


def default_rows(scale: Scale, stage: str | None = None) -> list[str]:
    """Every row, or a stage's, whose weights and one longest request fit: INT8, FP16 where it does (an H200's own row),
    then the others.

    The small batch of H2O is for a card whose memory the large one's rings would take from the caches.
    """
    plans = {key: plan_of(key, scale) for key in ROWS}
    roomy = (most_in_flight(plans["int8-h2o"], LIMITS.max_seq_len) or 0) >= LIMITS.max_batch_size
    left_out = [*(["fp16"] if scale.rehearsal else []), *(["int8-h2o-long"] if roomy else [])]
    order = sorted(ROWS, key=lambda key: (STAGES.index(ROWS[key].stage), key != "fp16"))
    return [key for key in order if key not in left_out and fits(plans[key]) and stage in (None, ROWS[key].stage)]
