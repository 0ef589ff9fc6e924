"""The text formats of one synthetic record set, byte for byte. Rewrite with UPDATE_GOLDEN=1, then read the diff."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.golden import check_golden
from support.synthetic_records import PRICES, small_set

from trtkit.report.assemble import assemble
from trtkit.report.records import Records
from trtkit.report.write import render


@pytest.mark.parametrize(("fmt", "file"), [("md", "report.md"), ("csv", "report.csv"), ("console", "report.txt")])
def test_text_formats_stay_what_they_are(fmt: str, file: str) -> None:
    bench, quality = small_set()
    report = assemble(Records(bench=bench, quality=quality), PRICES, title="synthetic records, nothing was measured")
    check_golden(Path(__file__).with_name(file), render(report, fmt))
