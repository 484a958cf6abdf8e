"""The start of mHC over the width: flat by ``hc_fn_gain``, growing with its root without.

Widths that lie a factor of 16 apart differ by 4 at a fixed deviation. A figure is drawn with 48
rows of fn or more, so it strays from its expectation by up to 1 / sqrt(2 * 48) of it, a ratio of
two by 0.14; twice that is allowed, and seeds are fixed.
"""

import pytest

from docs.studies.mhc_init import table


@pytest.mark.parametrize("figure", ["spread", "moved"])
def test_gain_is_flat_over_the_width_where_a_fixed_deviation_grows(figure):
    def growth(gain):
        narrow, wide = (
            getattr(table.start(table.at_width(width, gain), 1, tokens=32), figure)
            for width in (32, 512)
        )
        return wide / narrow

    assert growth(0.5) == pytest.approx(1, rel=0.28)
    assert growth(0) == pytest.approx(4, rel=0.28)


def test_page_says_what_is_measured():
    """Of the narrowest width, which takes a second; another CPU may round otherwise."""
    page = table.PAGE.read_text()
    assert page.startswith(table.INTRODUCTION + "\n" + table.HEAD)
    figures = rows_of(page)
    rules = ("deviation 0.02", "hc_fn_gain 0.5")
    assert list(figures) == [(str(width), rule) for rule in rules for width in table.WIDTHS]
    measured = rows_of(table.document(widths=(64,)))
    assert len(measured) == 2
    for row, values in measured.items():
        assert figures[row] == pytest.approx(values, rel=0.02)


def rows_of(page):
    """(width, rule) -> figures, of the table's body."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {(width, rule): [*map(float, rest)] for width, rule, *rest in lines[2:]}
