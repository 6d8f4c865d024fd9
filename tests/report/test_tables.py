"""Tables and the numbers in them: the same cells in HTML and Markdown, sort keys apart from text."""

import codecs
import math

import pytest
from markupsafe import Markup

from altgrad.report import numbers, text
from altgrad.report.tables import Column, Table, TableCell, table_html, table_markdown

TABLE = Table(
    [Column("Run"), Column("Loss", numeric=True)],
    [["a|b", TableCell("1.5", sort=1.5)], ["<i>c</i>\nd", TableCell("NaN", Markup("<em>NaN</em>"), tone="bad")]],
    caption="Losses",
)


def test_markdown_escapes_what_would_break_the_table():
    lines = table_markdown(TABLE).splitlines()
    assert lines == ["| Run | Loss |", "|---|---:|", "| a\\|b | 1.5 |", "| &lt;i>c&lt;/i> d | NaN |"]


def test_html_escapes_text_keeps_markup_and_carries_sort_keys():
    html = str(table_html(TABLE))
    assert "&lt;i&gt;c&lt;/i&gt;" in html
    assert '<td class="num" data-sort="1.5">1.5</td>' in html
    assert '<td class="num bad"><em>NaN</em></td>' in html
    assert html.count('aria-sort="none"') == 2
    assert '<th scope="row">a|b</th>' in html


def test_a_row_of_the_wrong_length_is_an_error_of_ours():
    with pytest.raises(ValueError, match="zip"):
        table_html(Table([Column("a"), Column("b")], [["only one"]]))


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 bits"), (1, "1 bit"), (1.0, "1 bit"), (8.5, "8.5 bits"), (1200, "1\u202f200 bits")]
)
def test_one_is_singular(n, text):
    assert numbers.plural(n, "bit") == text


def test_filterable_tables_have_a_search_box():
    html = str(table_html(Table([Column("a")], [["x"]], filterable=True, sortable=False)))
    assert 'type="search"' in html
    assert "sortable" not in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (0.985, "0.985"),
        (1234.5678, "1235"),
        (100.0, "100"),
        (-2.5, "−2.5"),
        (1e-9, "1e-9"),
        (2.34567e8, "2.35e8"),
    ],
)
def test_number(value, text):
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0%"),
        (1e-9, "<0.01%"),
        (0.00123, "0.12%"),
        (0.5, "50.0%"),
        (0.9999, ">99.9%"),
        (1.0, "100%"),
        (math.nan, "NaN"),
    ],
)
def test_percent_never_rounds_to_none_or_all(value, text):
    assert numbers.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "same"), (0.0216, "+0.022"), (-0.5, "−0.500"), (1e-5, "+1e-5"), (None, "–"), (math.nan, "NaN")],
)
def test_difference_is_signed_and_tells_tiny_from_same(value, text):
    assert numbers.difference(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (None, "–"), (math.nan, "–")],
)
def test_duration(seconds, text):
    assert numbers.duration(seconds) == text


def test_listing_and_plural():
    assert numbers.listing([]) == ""
    assert numbers.listing(["a"]) == "a"
    assert numbers.listing(["a", "b", "c"]) == "a, b and c"
    assert numbers.plural(1, "run") == "1 run"
    assert numbers.plural(2000, "run") == "2\u202f000 runs"


def test_thin_spaces_between_thousands_are_spaces_where_there_is_ascii_alone():
    codecs.register_error("plain", text._plainly)
    assert numbers.count(1200).encode("ascii", "plain") == b"1 200"
