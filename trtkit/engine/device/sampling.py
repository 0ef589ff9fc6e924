"""Drawing tokens for the rows of a step that are not greedy, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from trtkit.engine.device.staging import Field, Layout, Staging
from trtkit.engine.sampler import uniform
from trtkit.engine.step import Draw
from trtkit.kernels.sampling import sample_rows


def draw_into(tokens_R: Tensor, logits_RV: Tensor, draws: Seq[Draw | None], staging: Staging) -> None:
    """Replace the greedy tokens of rows whose sampling has a temperature; the n-th draw is of row n, None of none."""
    drawn = [(row, draw) for row, draw in enumerate(draws) if draw is not None and draw.how.temperature > 0]
    if not drawn:
        return
    real, whole = Field(shape=(len(drawn),), kind="float64"), Field(shape=(len(drawn),))
    layout = Layout({"temperature": real, "top_p": real, "uniform": real, "top_k": whole, "rows": whole})
    values = {
        "temperature": [draw.how.temperature for _, draw in drawn],
        "top_p": [draw.how.top_p for _, draw in drawn],
        "uniform": [uniform(draw.seed, draw.index) for _, draw in drawn],
        "top_k": [min(draw.how.top_k, logits_RV.shape[1]) for _, draw in drawn],
        "rows": [row for row, _ in drawn],
    }
    sent = staging.send(layout, values)
    chosen = sample_rows(
        logits_RV.index_select(0, sent["rows"]), sent["temperature"], sent["top_k"], sent["top_p"], sent["uniform"]
    )
    tokens_R.index_copy_(0, sent["rows"].to(torch.int64), chosen)
