from __future__ import annotations

import pytest
import torch

from trtkit.kv.selection import Selection, check_slots


def test_sequences_are_joined_along_the_kept_axis_with_offsets():
    first, second = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0], [4]])
    selection = Selection.of([first, second])
    assert selection.indices_HK.tolist() == [[0, 2, 0], [1, 3, 4]]
    assert selection.offsets_B1.tolist() == [0, 2, 3]
    assert selection.indices_HK.dtype == selection.offsets_B1.dtype == torch.int32
    assert selection.sequence(1).tolist() == [[0], [4]]


def test_a_sound_selection_passes_its_check():
    Selection.of([torch.tensor([[0, 2]]), torch.tensor([[0]])]).check([3, 1])


@pytest.mark.parametrize("slots", [[1, 0], [0, 0], [-1, 2], [0, 5]], ids=["unsorted", "doubled", "negative", "beyond"])
def test_slots_that_would_lose_or_invent_tokens_are_refused(slots):
    with pytest.raises(ValueError, match="strictly ascending inside"):
        check_slots(torch.tensor([slots]), 5)


def test_offsets_that_do_not_bound_the_sequences_are_refused():
    with pytest.raises(ValueError, match="do not bound 2 sequences"):
        Selection.of([torch.tensor([[0]])]).check([1, 1])
