from __future__ import annotations

import pytest

from trtkit.report.model import Cell, Row, Section
from trtkit.report.text import number, ratio_text, row_heading, section_heading, share_text, spread_text, value_text
from trtkit.spec.measured import Measured, Source


def row(*cells: Cell, label: str = "TPS", condition: str = "c 1", unit: str = "tok/s") -> Row:
    return Row(key="k", metric="m", label=label, condition=condition, unit=unit, digits=2, better="higher", cells=cells)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234.5, "tok/s", "1,234"),
        (12.345, "ms", "12.35"),
        (0.0, "ms", "0.00"),
        (0.00012, "ms", "0.00012"),
        (1 << 30, "B", "1.00 GiB"),
        (0.4712, "USD/1M tokens", "$0.47"),
        (0.000123, "USD/1M tokens", "$0.00012"),
    ],
)
def test_numbers_keep_their_digits(value: float, unit: str, text: str) -> None:
    assert number(value, unit, 2) == text


def test_a_missing_value_says_why_or_points_at_the_note() -> None:
    assert value_text(Cell(status="missing", reason="not measured"), row()) == "n/a (not measured)"
    assert value_text(Cell(status="missing", reason="long story", note=3), row()) == "n/a [3]"
    assert value_text(Cell(status="invalid", note=1), row()) == "invalid [1]"


def test_a_restricted_value_points_at_its_note() -> None:
    assert value_text(Cell(value=2.0, note=4), row()) == "2.00 [4]"


def test_bounds_and_standard_errors_read_differently() -> None:
    assert spread_text(Cell(value=2.0, low=1.0, high=3.0), row()) == "1.00 - 3.00"
    assert spread_text(Cell(value=2.0, low=1.0, high=3.0, error=1.0), row()) == "± 1.00"
    assert spread_text(Cell(value=2.0), row()) == ""


def test_a_ratio_within_the_spread_is_marked() -> None:
    assert ratio_text(Cell(ratio=1.5, distinct=True)) == "1.50x"
    assert ratio_text(Cell(ratio=1.5, distinct=None)) == "1.50x"
    assert ratio_text(Cell(ratio=1.5, distinct=False)) == "~1.50x"
    assert ratio_text(Cell()) == ""


def test_a_share_is_a_percentage() -> None:
    assert share_text(Cell(share=Measured(value=0.123, unit="share", source=Source.MEASURED))) == "12.3 %"


def test_a_heading_takes_what_all_rows_share_and_rows_keep_the_rest() -> None:
    measured = Cell(value=1.0, source=Source.MEASURED)
    section = Section(title="Throughput", rows=(row(measured, condition="c 1"), row(measured, condition="c 8")))
    assert section_heading(section) == "Throughput: TPS (tok/s), measured"
    assert [row_heading(section, r) for r in section.rows] == ["c 1", "c 8"]


def test_mixed_sources_are_not_claimed_for_all() -> None:
    cells = (Cell(value=1.0, source=Source.MEASURED), Cell(value=1.0, source=Source.ASSUMED))
    section = Section(title="Cost", rows=(row(*cells),))
    assert "measured" not in section_heading(section)
    assert "assumed" not in section_heading(section)
