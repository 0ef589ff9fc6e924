from __future__ import annotations

from dataclasses import replace

from support.synthetic_records import PRICES, bench, full_set, quality, stat

from trtkit.report.assemble import assemble
from trtkit.report.model import Tile
from trtkit.report.records import Records
from trtkit.spec.result import BenchResult, Check, QualityResult


def tiles(*results: BenchResult, scores: tuple[QualityResult, ...] = ()) -> dict[str, Tile]:
    report = assemble(Records(bench=results, quality=scores), PRICES)
    return {tile.title.partition(":")[0]: tile for tile in report.tiles}


def test_the_strip_names_the_best_configuration_of_each_kind() -> None:
    cells, scores = full_set()
    strip = tiles(*cells, scores=scores)
    assert strip["Valid cells"].value == "26 of 27"
    assert strip["Valid cells"].good is False
    assert strip["Highest throughput"].detail.startswith("Optimised (INT8 + H2O 50 % + tuned batching), concurrency 8")
    assert strip["Shortest time to first token"].value == "17.8 ms"
    assert strip["Lowest cost"].detail.startswith("Optimised")
    assert strip["Lowest quality"].detail.startswith("Optimised")


def test_a_lead_within_the_spread_is_called_that() -> None:
    close = bench("int8")
    metrics = {**close.metrics, "tps": replace(close.metrics["tps"], stats={"value": stat(101.0)})}
    assert "(within the spread)" in tiles(bench("fp32"), replace(close, metrics=metrics))["Highest throughput"].detail
    assert "(within the spread)" not in tiles(bench("fp32"), close)["Highest throughput"].detail


def test_one_configuration_alone_leads_nothing() -> None:
    assert tiles(bench())["Highest throughput"].detail == "Baseline (FP32), concurrency 1, ISL 64, OSL 32"


def test_warnings_are_counted_without_spoiling_validity() -> None:
    warned = replace(bench(), checks=(Check(name="rounds", status="warn", detail="few"),))
    assert tiles(warned)["Valid cells"] == Tile(
        title="Valid cells", value="1 of 1", detail="no check failed, 1 warned", good=True
    )


def test_a_score_that_knows_no_better_is_no_verdict() -> None:
    assert "Lowest quality" not in tiles(bench(), scores=(replace(quality(), better="neither"),))
