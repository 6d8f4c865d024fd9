"""Tables as data: columns and cells, drawn as sortable HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from altgrad.report.charts.svg import breakable, el
from altgrad.report.text import for_markdown


@dataclass(frozen=True)
class Column:
    """`numeric` columns align right and sort by value."""

    title: str
    numeric: bool = False
    note: str = ""


@dataclass(frozen=True)
class TableCell:
    """`text` is what Markdown prints; `html` what the page shows if that differs; `sort` the key to sort by (None last)."""

    text: str
    html: Markup | None = None
    sort: Any = None
    tone: str = ""
    """"" | "bad" | "changed" | "quiet"."""


@dataclass(frozen=True)
class Table:
    """Cells are `TableCell` or plain strings. `groups` names each row's series, so that the legend can dim it."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[TableCell | str]]
    caption: str = ""
    sortable: bool = True
    groups: Sequence[str] = field(default_factory=tuple)
    filterable: bool = False
    row_headers: bool = True


def cell_of(value: TableCell | str) -> TableCell:
    return value if isinstance(value, TableCell) else TableCell(value)


def table_html(table: Table) -> Markup:
    heads = []
    for i, column in enumerate(table.columns):
        label = el("button", column.title, type="button", class_="sort") if table.sortable else column.title
        heads.append(
            el(
                "th",
                label,
                scope="col",
                class_="num" if column.numeric else None,
                title=column.note or None,
                data_column=i,
                aria_sort="none" if table.sortable else None,
            )
        )
    body = []
    for r, row in enumerate(table.rows):
        cells = []
        for c, (column, value) in enumerate(zip(table.columns, row, strict=True)):
            cell = cell_of(value)
            names = [*(["num"] if column.numeric else []), *([cell.tone] if cell.tone else [])]
            cells.append(
                el(
                    "th" if c == 0 and table.row_headers else "td",
                    cell.html if cell.html is not None else breakable(cell.text),
                    scope="row" if c == 0 and table.row_headers else None,
                    class_=" ".join(names) or None,
                    data_sort=None if cell.sort is None else cell.sort,
                )
            )
        body.append(el("tr", *cells, data_group=table.groups[r] if table.groups else None))
    caption = el("caption", table.caption) if table.caption else None
    markup = el(
        "table",
        caption,
        el("thead", el("tr", *heads)),
        el("tbody", *body),
        class_="data" + (" sortable" if table.sortable else ""),
    )
    scroll = el("div", markup, class_="table-scroll", tabindex="0", role="region", aria_label=table.caption or "table")
    if not table.filterable:
        return scroll
    box = el(
        "input",
        type="search",
        class_="filter",
        placeholder="Filter rows, e.g. E3M4 collapsed",
        aria_label="Filter rows",
    )
    return el(
        "div", el("div", box, el("output", class_="filter-count"), class_="table-tools"), scroll, class_="filterable"
    )


def table_markdown(table: Table) -> str:
    """A GitHub table; bars and line breaks in cells are escaped."""
    lines = [
        "| " + " | ".join(_escape(c.title) for c in table.columns) + " |",
        "|" + "|".join("---:" if c.numeric else "---" for c in table.columns) + "|",
    ]
    lines += ["| " + " | ".join(_escape(cell_of(v).text) for v in row) + " |" for row in table.rows]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return for_markdown(text.replace("\\", "\\\\").replace("|", "\\|"))
