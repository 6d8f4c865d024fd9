"""Small HTML tables for notebooks: what an object's `_repr_html_` shows; foreign text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0;overflow-wrap:anywhere"
_MOST_ROWS = 200


def notebook_table(title: str, rows: Iterable[Sequence[object]], headings: Sequence[str] = ()) -> str:
    """A table with its title as the caption; the first column heads its row. More than 200 rows are counted, not shown."""
    listed = list(rows)
    head = "".join(f'<th scope="col" style="{_CELL}">{escape(h)}</th>' for h in headings)
    body = "".join(f"<tr>{_row(row)}</tr>" for row in listed[:_MOST_ROWS])
    if len(listed) > _MOST_ROWS:
        body += f'<tr><td style="{_CELL}" colspan="99">and {len(listed) - _MOST_ROWS} more</td></tr>'
    caption = f'<caption style="text-align:left;font-weight:bold;padding:0 0 4px">{escape(title)}</caption>'
    return f"<table>{caption}{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _row(row: Sequence[object]) -> str:
    first, *rest = (escape(str(cell)) for cell in row)
    cells = "".join(f'<td style="{_CELL}">{cell}</td>' for cell in rest)
    return f'<th scope="row" style="{_CELL}">{first}</th>{cells}'
