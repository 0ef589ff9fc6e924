from __future__ import annotations

import torch

from trtkit.kv.moves import plan_moves


def apply(rows, moves):
    moved = rows.clone()
    moved[moves.rows, moves.targets] = rows[moves.rows, moves.sources]
    return moved[:, : moves.kept]


def test_holes_in_front_are_filled_with_kept_tokens_from_behind():
    rows = torch.tensor([[10, 11, 12, 13, 14, 15]])
    moves = plan_moves(torch.tensor([[0, 2, 5]]), 6)
    assert sorted(apply(rows, moves)[0].tolist()) == [10, 12, 15]
    assert (moves.sources.tolist(), moves.targets.tolist()) == ([5], [1])


def test_heads_move_their_own_tokens():
    rows = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    moves = plan_moves(torch.tensor([[0, 1], [2, 3], [0, 3]]), 4)
    assert [sorted(row) for row in apply(rows, moves).tolist()] == [[0, 1], [6, 7], [8, 11]]


def test_no_source_is_a_target_and_no_more_move_than_are_evicted():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        length = int(torch.randint(1, 40, (), generator=generator))
        kept = int(torch.randint(1, length + 1, (), generator=generator))
        keep = torch.stack([torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(5)])
        moves = plan_moves(keep, length)
        assert (moves.targets < kept).all()
        assert (moves.sources >= kept).all()
        assert (torch.bincount(moves.rows, minlength=5) <= length - kept).all()
        moved = apply(torch.arange(length).expand(5, -1), moves)
        assert torch.equal(moved.sort().values, keep)


def test_keeping_everything_moves_nothing():
    assert plan_moves(torch.arange(6)[None], 6).rows.numel() == 0
