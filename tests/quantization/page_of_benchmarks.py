"""Tables of docs/benchmarks.md, which tests hold to what is counted."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def of_the_page(head: str) -> dict[str, list[str]]:
    """A table of docs/benchmarks.md by the first cell of its rows."""
    rows = (ROOT / "docs" / "benchmarks.md").read_text().partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in (r.strip("|").split("|") for r in rows)}
