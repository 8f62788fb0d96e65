"""The floors on paper: the document holds what the script prints, and some of it by hand."""

from pathlib import Path

import pytest
from bertkern.benchmarks import roofline

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "roofline.md"


def test_the_document_holds_the_tables():
    text = DOCUMENT.read_text(encoding="utf-8")
    tables = text.partition("roofline.py -->\n")[2].partition("<!-- end of tables -->")[0]
    assert tables == roofline.document()


def test_floors_by_hand():
    # 65,536 tokens of 12 heads of 64: 4 tensors of 100.7 MB and 3.1 MB of lse at 4.8 TB/s; 4 d FLOP
    # a score at 989 TFLOP/s.
    memory, unit, _ = roofline.floors(roofline.forward(64), 512, 64, 4, 4)
    assert memory == pytest.approx((4 * 100.663e6 + 3.146e6) / 4.8e12 * 1e6, rel=1e-3)
    assert unit == pytest.approx(4 * 64 * 65536 * 12 * 512 / 989.4e12 * 1e6, rel=1e-3)


def test_the_busiest_unit_bounds():
    assert roofline.forward(64).bound == "tensor"
    assert roofline.forward(32).bound == "exponential"
    assert roofline.forward(64, dropout=True).bound == "alu"
