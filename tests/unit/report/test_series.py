from __future__ import annotations

from dataclasses import replace

import pytest
from support.synthetic_records import PRICES, bench, full_set, invalid

from trtkit.report.assemble import assemble
from trtkit.report.model import Plot
from trtkit.report.records import Records
from trtkit.report.series import MAX_CDF_POINTS
from trtkit.spec.result import BenchResult


def plots_of(*results: BenchResult) -> dict[str, Plot]:
    return {plot.key: plot for plot in assemble(Records(bench=results), PRICES).plots}


def test_every_figure_is_there_for_a_full_set() -> None:
    assert list(plots_of(*full_set()[0])) == ["throughput", "ttft", "memory", "pareto", "ttft_cdf", "e2e_cdf", "cost"]


def test_throughput_points_carry_the_spread_of_the_record() -> None:
    cells = [bench(concurrency=c) for c in (8, 1)]
    (curve,) = plots_of(*cells)["throughput"].curves
    assert [point.x for point in curve.points] == [1.0, 8.0]
    stat = cells[1].metrics["tps"].stats["value"]
    assert (curve.points[0].y, curve.points[0].low, curve.points[0].high) == (stat.value, stat.low, stat.high)


def test_prompts_with_a_shared_prefix_are_a_curve_of_their_own_and_no_point_of_their_length() -> None:
    plain = bench(concurrency=1)
    alike = replace(plain, workload=replace(plain.workload, shared_prefix_tokens=32))
    found = plots_of(plain, alike)
    assert len(found["throughput"].curves) == 2
    (curve,) = found["ttft"].curves
    assert [point.x for point in curve.points] == [64.0]


def test_an_open_loop_has_no_place_on_a_concurrency_axis() -> None:
    cell = bench()
    open_loop = replace(cell, workload=replace(cell.workload, concurrency=None, request_rate=2.0))
    assert "throughput" not in plots_of(open_loop)


def test_the_distribution_rises_to_one_and_has_no_more_points_than_fit() -> None:
    cell = bench()
    samples = tuple(
        replace(cell.repeats[0].samples[0], submit_ns=0, first_token_ns=(i * 7919) % 1009 * 1000) for i in range(1009)
    )
    many = replace(cell, repeats=(replace(cell.repeats[0], samples=samples),))
    (curve,) = plots_of(many)["ttft_cdf"].curves
    assert len(curve.points) <= MAX_CDF_POINTS + 1
    assert [p.y for p in curve.points] == sorted(p.y for p in curve.points)
    assert [p.x for p in curve.points] == sorted(p.x for p in curve.points)
    assert curve.points[-1].y == 1.0
    assert curve.points[-1].x == pytest.approx(1008 / 1000)


def test_requests_without_a_token_are_left_out_of_the_distribution() -> None:
    cell = bench()
    failed = tuple(replace(s, first_token_ns=None, last_token_ns=None) for s in cell.repeats[0].samples)
    nothing = replace(cell, repeats=(replace(cell.repeats[0], samples=failed),))
    assert "ttft_cdf" not in plots_of(nothing)


def test_invalid_cells_are_not_drawn() -> None:
    assert plots_of(invalid(bench())) == {}


def test_parts_of_unknown_or_negative_size_are_not_drawn() -> None:
    cell = bench()
    memory = replace(cell.memory, other_bytes=-5, kv_pool_bytes=None)
    (stack,) = plots_of(replace(cell, memory=memory))["memory"].stacks
    assert [name for name, _ in stack.parts] == ["weights"]


def test_each_figure_can_be_read_without_eyes() -> None:
    for plot in plots_of(*full_set()[0]).values():
        assert "INT8" in plot.summary
        assert any(character.isdigit() for character in plot.summary)
