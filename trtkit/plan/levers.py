"""What each step buys and costs, and when not to take it."""

from __future__ import annotations

from collections.abc import Sequence

from trtkit.plan.options import Lever, Option, Wanted

SMALL_TRAFFIC_PER_DAY = 1e6
SMALL_MODEL_PARAMS = 8e9


def levers(options: Sequence[Option]) -> list[Lever]:
    """Each step from the cheapest plain 16-bit option, holding the rest, then all together."""
    plain = [option for option in options if option.precision == "fp16" and option.kv == "full"]
    if not plain:
        return []
    base = plain[0]

    def on(same_gpu: bool, precision: str | None, kv: str | None) -> Option | None:
        fitting = (
            o
            for o in options
            if (o.gpu == base.gpu) == same_gpu
            and (precision is None or o.precision == precision)
            and (kv is None or o.kv == kv)
        )
        return next(fitting, None)

    steps = [
        (f"reference: {base.label}", base, "16-bit weights, whole cache"),
        ("INT8 weights", on(True, "int8", "full"), "half the weight bytes; prefill stays at the 16-bit rate"),
        ("H2O, 50% of the cache", on(True, "fp16", "h2o:50%"), "frees cache for more requests; gains nothing at one"),
        ("INT8 and H2O 50%", on(True, "int8", "h2o:50%"), "both"),
        ("another GPU, 16 bit", on(False, "fp16", "full"), "right-sizing"),
        ("another GPU, FP8", on(False, "fp8", "full"), "half the bytes and twice the operations; Hopper and later"),
        ("cheapest of all", options[0], options[0].label),
    ]
    return [_lever(name, option, base, text) for name, option, text in steps]


def _lever(name: str, option: Option | None, base: Option, note: str) -> Lever:
    if option is None:
        return Lever(step=name, usd_per_month=None, saving=None, tok_s_gain=None, mmlu_points=0.0, note="not possible")
    return Lever(
        step=name,
        usd_per_month=option.usd_per_month,
        saving=1 - option.usd_per_month / base.usd_per_month,
        tok_s_gain=option.tok_s / option.num_gpus * option.replicas / (base.tok_s / base.num_gpus * base.replicas),
        mmlu_points=option.mmlu_drop,
        note=note if option is base else f"{note} ({option.label})",
    )


def advice(wanted: Wanted, options: Sequence[Option]) -> list[str]:
    """What to heed, and when not to optimise at all."""
    texts = []
    per_day = wanted.tokens_per_month / 30
    if per_day < SMALL_TRAFFIC_PER_DAY:
        texts.append(f"{per_day:,.0f} tokens a day is under 1M: an API is likely cheaper than any machine of your own")
    if wanted.model.num_params < SMALL_MODEL_PARAMS:
        texts.append("a model this small: tune batching before precision or KV budgets")
    if options and options[0].utilisation < 0.3:
        texts.append(
            f"the cheapest option would be busy {options[0].utilisation:.0%} of the month: capacity is not the problem"
        )
    if options and options[0].mmlu_drop > 0:
        texts.append("the quality losses are published averages; run `trtkit gate` on your own eval before shipping")
    if not options:
        texts.append("nothing keeps every limit; the rejected list says which limit each one missed")
    return texts
