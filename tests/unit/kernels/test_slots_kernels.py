"""Judging a policy's answer on the device: the kernel in Triton's interpreter and its twin, against a plain loop."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys

import pytest
import torch

from trtkit.kernels import slots

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from trtkit.kernels import triton_slots

JUDGES = [triton_slots.flag_bad_slots, slots.flag_bad_slots_twin]


def plain(keep, live):
    """1 if any row is not strictly ascending inside [0, live)."""
    for row in keep.flatten(0, -2).tolist():
        if any(b <= a for a, b in itertools.pairwise(row)) or row[0] < 0 or row[-1] >= live:
            return 1
    return 0


def good(rows, kept, live, dtype=torch.int64):
    generator = torch.Generator().manual_seed(kept)
    order = torch.rand(rows, live, generator=generator).argsort(-1)[:, :kept]
    return order.sort(-1).values.to(dtype).reshape(2, rows // 2, kept)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("kept", "live"), [(1, 1), (5, 9), (1024, 1030), (1025, 1025), (2100, 2132)])
def test_sound_answers_leave_the_flag_alone(judge, dtype, kept, live):
    keep = good(4, kept, live, dtype)
    assert plain(keep, live) == 0
    for before in (0, 1):
        flag = torch.tensor([before], dtype=torch.int32)
        judge(keep, live, flag)
        assert flag.tolist() == [before]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("kept", [2, 40, 1025, 2100])
@pytest.mark.parametrize("fault", ["doubled", "swapped", "negative", "past the end", "far past the end"])
@pytest.mark.parametrize("where", ["first", "edge of a tile", "last"])
def test_one_wrong_slot_in_one_row_sets_the_flag(judge, kept, fault, where):
    live = kept + 32
    keep = good(6, kept, live)
    place = {"first": 1, "edge of a tile": min(1024, kept - 1), "last": kept - 1}[where]
    row = keep[-1, 1]
    if fault == "doubled":
        row[place] = row[place - 1]
    elif fault == "swapped":
        row[[place, place - 1]] = row[[place - 1, place]]
    elif fault == "negative":
        row[0] = -1
    else:
        row[-1] = live if fault == "past the end" else live + (1 << 33)
    assert plain(keep, live) == 1
    flag = torch.zeros(1, dtype=torch.int32)
    judge(keep, live, flag)
    assert flag.tolist() == [1]


@pytest.mark.parametrize("judge", JUDGES)
def test_views_that_are_not_contiguous_are_judged_by_what_they_show(judge):
    wide = torch.full((4, 20), 99, dtype=torch.int64)
    wide[:, :5] = torch.arange(5)
    flag = torch.zeros(1, dtype=torch.int32)
    judge(wide[:, :5], 5, flag)
    judge(torch.arange(5).expand(3, 2, 5), 5, flag)
    assert flag.tolist() == [0]


def test_an_answer_of_no_slots_is_sound():
    flag = torch.zeros(1, dtype=torch.int32)
    slots.flag_bad_slots(torch.zeros(2, 3, 0, dtype=torch.int64), 5, flag)
    assert flag.tolist() == [0]
