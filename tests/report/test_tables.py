"""Tables: the same cells in HTML and Markdown, sort keys apart from text, nothing that breaks a row."""

import pytest
from markupsafe import Markup

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


def test_filterable_tables_have_a_search_box():
    html = str(table_html(Table([Column("a")], [["x"]], filterable=True, sortable=False)))
    assert 'type="search"' in html
    assert "sortable" not in html
