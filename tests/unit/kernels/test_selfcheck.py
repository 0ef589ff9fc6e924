"""The start-up check on a CPU, where it checks the twins, and what it does about kernels that are wrong."""

from __future__ import annotations

import pytest
import torch

from trtkit.kernels import check_matmul, dispatch, fused, paged, selfcheck
from trtkit.kernels.selfcheck import Check, CheckShape, self_check

CPU = torch.device("cpu")
SMALL = {
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 300,
    "tokens_per_block": 16,
    "weight_dtypes": (torch.int8, torch.float8_e4m3fn, torch.bfloat16),
}


@pytest.fixture(autouse=True)
def families_stay_on(monkeypatch):
    monkeypatch.setattr(check_matmul, "_INPUTS", 256)
    yield
    for family in dispatch.disabled():
        dispatch.enable(family)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_twins_of_every_family_pass(dtype, kv_dtype):
    rows = self_check(CPU, CheckShape(dtype=dtype, kv_dtype=kv_dtype, **SMALL))
    assert [row for row in rows if not row.ok] == []
    assert {row.family for row in rows} == set(dispatch.FAMILIES)
    assert not dispatch.disabled()
    inexact = {row.name for row in rows if row.bound and not row.error}
    assert inexact <= {"fp8 by fp8", "norm"}, "a check that compares a thing with itself"


def test_a_kernel_that_is_wrong_switches_its_family_off_and_says_which(monkeypatch):
    right = fused.silu_mul
    monkeypatch.setattr(fused, "silu_mul", lambda both: right(both) * 1.05)
    rows = self_check(CPU, CheckShape(**SMALL))
    failed = [row for row in rows if not row.ok]
    assert [row.name for row in failed] == ["activation"]
    assert failed[0].error == pytest.approx(0.05, rel=0.2)
    assert dispatch.disabled() == {"fused": failed[0].message}
    assert "0.02 is allowed" in failed[0].message
    assert not [row for row in rows if row.family == "fused" and row.name == "embedding"], (
        "a family that is off is left"
    )


def test_a_kernel_that_does_not_run_is_told_in_one_line_and_the_next_family_goes_on(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of resources: shared memory\nRequired: 300000")

    monkeypatch.setattr(paged, "paged_decode_attention", broken)
    rows = self_check(CPU, CheckShape(**SMALL))
    failed = next(row for row in rows if not row.ok)
    assert failed.error is None
    assert failed.message == "decode attention: RuntimeError: out of resources: shared memory"
    assert dispatch.disabled() == {"decode": failed.message}
    assert [row for row in rows if row.family == "sampling"]


def test_only_the_named_families_are_checked():
    rows = self_check(CPU, CheckShape(**SMALL), families=["sampling"])
    assert {row.family for row in rows} == {"sampling"}


@pytest.mark.parametrize("left", [True, False])
def test_a_check_may_give_up_less_than_its_family(monkeypatch, left):
    wrong = Check(
        family="matmul",
        name="one tile",
        bound=0.1,
        run=lambda: [(torch.ones(2), torch.zeros(2))],
        on_failure=lambda: left,
    )
    monkeypatch.setattr(selfcheck, "checks", lambda *_: iter([wrong]))
    assert not self_check(CPU)[0].ok
    assert bool(dispatch.disabled()) is not left


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("inf"), 2.0], [float("-inf"), 2.0], float("inf")),
        ([float("-inf")], [float("-inf")], 0.0),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_errors_count_against_the_largest_right_value_and_odd_numbers_must_be_alike(found, expected, error):
    assert selfcheck._error(torch.tensor(found), torch.tensor(expected)) == error


def test_odd_shapes_are_checked_where_one_asks_and_as_long_as_there_is_time():
    plain = self_check(CPU, CheckShape(**SMALL))
    thorough = self_check(CPU, CheckShape(**SMALL), thorough=True)
    assert [row for row in thorough if not row.ok] == []
    odd = [row for row in thorough if row.name.startswith("odd shapes")]
    assert len(thorough) == len(plain) + len(odd)
    assert {row.family for row in odd} == set(dispatch.FAMILIES) - {"matmul"}
    assert len({row.name for row in odd}) == len(odd)
    assert len(self_check(CPU, CheckShape(**SMALL), thorough=True, limit_s=0.0)) == len(plain)


def test_an_odd_shape_that_fails_is_told_and_gives_nothing_up(monkeypatch):
    right = fused.silu_mul
    monkeypatch.setattr(fused, "silu_mul", lambda both: right(both) * (1.5 if both.shape[1] == 2050 else 1.0))
    rows = self_check(CPU, CheckShape(**SMALL), families=["fused"], thorough=True)
    assert [row.name for row in rows if not row.ok] == ["odd shapes: activation of 1025, float32"]
    assert not dispatch.disabled()


def test_another_shape_is_an_error_without_bound():
    assert selfcheck._error(torch.zeros(2), torch.zeros(3)) == float("inf")


def test_random_numbers_of_the_process_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    self_check(CPU, CheckShape(**SMALL), families=["score", "ranking"])
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_families_named_in_the_environment_are_off(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "score, ranking")
    dispatch._switched_off.cache_clear()
    assert set(dispatch.disabled()) == {"score", "ranking"}
    assert not {row.family for row in self_check(CPU, CheckShape(**SMALL))} & {"score", "ranking"}
    monkeypatch.delenv(dispatch.SWITCH)
    dispatch._switched_off.cache_clear()


def test_the_first_reason_for_switching_off_stays():
    dispatch.disable("fused", "first")
    dispatch.disable("fused", "second")
    assert dispatch.disabled() == {"fused": "first"}


def test_every_family_that_is_checked_is_one_that_can_be_switched_off():
    checked = {check.family for check in selfcheck.checks(CPU, CheckShape(**SMALL))}
    checked |= {
        check.family for check in selfcheck.checks(CPU, CheckShape(**SMALL | {"weight_dtypes": (torch.float8_e4m3fn,)}))
    }
    assert checked <= set(dispatch.FAMILIES)
