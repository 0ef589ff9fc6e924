"""What `trtkit plan` does with its flags: one of table, search, recipes or a single configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trtkit.backends.model_source import resolve_model
from trtkit.backends.recipe import load_recipe, make_plan
from trtkit.cli.common import emit, note
from trtkit.plan.ask import LoadPoint, PlanAnswer, ask, plan_text
from trtkit.plan.cost_report import parse_tokens
from trtkit.plan.memory import Placement
from trtkit.plan.names import Precision, gpu_word, model_word, precision_from
from trtkit.plan.options import Wanted
from trtkit.plan.prices import load_prices
from trtkit.plan.published import corrected, corrected_text
from trtkit.plan.search import search
from trtkit.plan.search_text import pareto_plot, search_text
from trtkit.plan.table import forecast_rows, read_rows, table_text
from trtkit.spec.atomic import write_text
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.errors import OutputError, UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.trtllm.capabilities import unbuildable


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFlags:
    """The command line, one field per flag."""

    recipes: Sequence[str] | None
    model: str | None
    gpu: str | None
    precision: str
    kv: str
    kv_dtype: str
    tp: int
    pp: int
    isl: str
    osl: int
    concurrency: str
    request_rate: float | None
    max_num_tokens: int
    target: str
    traffic: str | None
    ttft_p99: str | None
    tpot: str | None
    max_mmlu_drop: float | None
    pareto: Path | None
    table: Path | None
    output: Path | None
    prices: Path | None
    catalog: Sequence[Path] | None
    force: bool
    as_json: bool


def run(flags: PlanFlags) -> None:
    """Carry out one command."""
    if flags.table is not None:
        _table(flags, flags.table)
    elif flags.traffic is not None:
        _search(flags, flags.traffic)
    elif flags.recipes:
        _recipes(flags)
    else:
        answer = _single(flags)
        emit(answer, plan_text(answer), as_json=flags.as_json)


def _table(flags: PlanFlags, path: Path) -> None:
    header, rows = read_rows(path)
    answered = forecast_rows(rows, catalogs=tuple(flags.catalog or ()))
    if flags.output is None:
        emit(answered, table_text(header, answered).rstrip("\n"), as_json=flags.as_json)
        return
    if flags.output.exists() and not flags.force:
        raise OutputError(f"{flags.output} exists already; give --force to replace it")
    write_text(flags.output, table_text(header, answered))
    known = sum(1 for row in answered if row["forecast"])
    summary = {"rows": len(answered), "forecast": known, "output": str(flags.output)}
    emit(summary, f"{known} of {len(answered)} rows forecast: {flags.output}", as_json=flags.as_json)


def _search(flags: PlanFlags, traffic: str) -> None:
    lengths = numbers(flags.isl, "--isl")
    wanted = Wanted(
        model=_model(flags),
        tokens_per_month=parse_tokens(traffic),
        isl=lengths[0],
        osl=flags.osl,
        ttft_p99_ms=None if flags.ttft_p99 is None else milliseconds(flags.ttft_p99, "--ttft-p99"),
        tpot_ms=None if flags.tpot is None else milliseconds(flags.tpot, "--tpot"),
        max_mmlu_drop=flags.max_mmlu_drop,
        gpus=tuple(gpu_word(name) for name in (flags.gpu or "").split(",") if name.strip()),
    )
    if len(lengths) > 1:
        note(f"searching for prompts of {lengths[0]} tokens; give one --isl", as_json=flags.as_json)
    result = search(wanted, load_prices(flags.prices))
    if flags.pareto is not None:
        if flags.pareto.exists() and not flags.force:
            raise OutputError(f"{flags.pareto} exists already; give --force to replace it")
        pareto_plot(result, flags.pareto)
    emit(result, search_text(result), as_json=flags.as_json)


def _recipes(flags: PlanFlags) -> None:
    book = load_prices(flags.prices)
    payload, texts = [], []
    for name in flags.recipes or ():
        plan, _ = make_plan(load_recipe(name), dry_run=True)
        placement, precision = _placement_of(plan, flags)
        answer = ask(plan.name, placement, precision, _loads(flags), book)
        published = corrected(placement, precision, book)
        payload.append({"plan": answer, "published": published})
        texts.append(plan_text(answer) + ("\n" + corrected_text(published) if published else ""))
    emit(payload, "\n\n".join(texts), as_json=flags.as_json)


def _placement_of(plan: BuildPlan, flags: PlanFlags) -> tuple[Placement, Precision]:
    gpu = gpu_spec(plan.gpu, catalogs=tuple(flags.catalog or ()))
    parallel = Parallelism() if plan.target == "embedded" else plan.parallel
    placement = Placement(
        model=plan.model,
        gpu=gpu,
        quant=plan.quant,
        policy=plan.kv,
        parallel=parallel,
        limits=plan.limits,
        target=plan.target,
        speculation=plan.speculation,
    )
    return placement, replace(precision_from(plan.quant.precision), quant=plan.quant)


def _single(flags: PlanFlags) -> PlanAnswer:
    model = _model(flags)
    gpu = gpu_spec(gpu_word(flags.gpu or "h100"), catalogs=tuple(flags.catalog or ()))
    precision = precision_from(flags.precision, kv_dtype=flags.kv_dtype)
    loads = _loads(flags)
    longest = max(load.isl + load.osl for load in loads)
    most = max((load.concurrency or 256 for load in loads), default=256)
    placement = Placement(
        model=model,
        gpu=gpu,
        quant=precision.quant,
        policy=parse_kv_policy(flags.kv),
        parallel=Parallelism(tp=flags.tp, pp=flags.pp),
        limits=Limits(max_batch_size=most, max_num_tokens=flags.max_num_tokens, max_seq_len=longest),
        target=flags.target,
    )
    plan = BuildPlan(
        name="plan",
        model=model,
        model_source=flags.model or "",
        gpu=gpu.name,
        quant=precision.quant,
        parallel=placement.parallel,
        target=flags.target,
    )
    if model.num_layers % plan.parallel.pp:
        raise UsageError(f"pp={flags.pp} does not divide {model.name}'s {model.num_layers} layers")
    title = f"{model.name} as {precision.name} on {flags.tp * flags.pp} x {gpu.title}, KV {flags.kv}"
    answer = ask(title, placement, precision, loads, load_prices(flags.prices))
    reason = unbuildable(plan)
    return answer if reason is None else replace(answer, notes=(*answer.notes, f"not to be built: {reason}"))


def _model(flags: PlanFlags) -> ModelSpec:
    if flags.model is None:
        raise UsageError("name a model with --model (a preset such as llama-3-70b, a hub id, or a directory)")
    if Path(flags.model).is_dir():
        return resolve_model(flags.model, look_up=False).model
    return model_preset(model_word(flags.model), catalogs=tuple(flags.catalog or ()))


def _loads(flags: PlanFlags) -> list[LoadPoint]:
    lengths = numbers(flags.isl, "--isl")
    if flags.request_rate is not None:
        if flags.request_rate <= 0:
            raise UsageError(f"--request-rate is {flags.request_rate:g}, must be above 0")
        return [LoadPoint(isl=isl, osl=flags.osl, request_rate=flags.request_rate) for isl in lengths]
    words = [word.strip() for word in flags.concurrency.split(",") if word.strip()]
    at = [None if word == "max" else numbers(word, "--concurrency")[0] for word in words]
    if not at:
        raise UsageError("--concurrency is empty; give e.g. 1,8,32,max")
    return [LoadPoint(isl=isl, osl=flags.osl, concurrency=c) for isl in lengths for c in at]


def numbers(text: str, flag: str) -> list[int]:
    """Positive whole numbers, separated by commas.

    Raises:
        UsageError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d+", word) and int(word) > 0 for word in words):
        raise UsageError(f"{flag} is {text!r}: expected whole numbers of at least 1, such as 512,4096")
    return [int(word) for word in words]


def milliseconds(text: str, flag: str) -> float:
    """`500ms`, `0.5s` or plain milliseconds.

    Raises:
        UsageError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s)?\s*", text.lower())
    if not found or float(found.group(1)) <= 0:
        raise UsageError(f"{flag} is {text!r}: expected a time above 0 such as 500ms or 0.5s")
    return float(found.group(1)) * (1000 if found.group(2) == "s" else 1)
