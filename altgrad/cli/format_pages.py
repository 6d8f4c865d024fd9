"""The terminal pages of `altgrad formats`: catalog, one format, groups of one grid."""

from __future__ import annotations

from rich.table import Table

from altgrad.formats.catalog import BLOCK_FORMATS, get_format
from altgrad.formats.describe import binades, density_chart, equivalent_groups, facts, number
from altgrad.formats.scalar import FloatFormat
from altgrad.formats.scalar_rows import FORMAT_REGISTRY
from altgrad.report.console import Terminal, ruled_table

_SOURCES = list(dict.fromkeys(fmt.source for fmt in FORMAT_REGISTRY.values()))


def print_catalog() -> None:
    """Every scalar format, one row each, grouped by the source that it follows; then the block formats by name."""
    table = ruled_table()
    table.add_column("format", no_wrap=True)
    for column in ("bits", "bias", "max", "min normal", "min step", "binades"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("inf/nan", no_wrap=True)
    source = None
    for fmt in sorted(FORMAT_REGISTRY.values(), key=lambda f: _SOURCES.index(f.source)):
        if fmt.source != source:
            source = fmt.source
            table.add_section()
        table.add_row(
            fmt.name,
            str(fmt.bits),
            "-" if fmt.bias is None else str(fmt.bias),
            number(fmt.max, digits=6),
            number(fmt.min_normal, digits=6),
            number(fmt.min_subnormal, digits=6),
            str(binades(fmt)),
            "inf nan" if fmt.has_inf else "nan" if fmt.has_nan else "-",
        )
    console = Terminal()
    console.print(table)
    console.say(
        "A gap parts the sources. Facts, source and a chart of one: altgrad formats E3M4. Any E<e>M<m> parses too."
    )
    if BLOCK_FORMATS:
        console.say(f"Block formats: {', '.join(BLOCK_FORMATS)}", hang=2)


def print_format(name: str) -> None:
    """All facts of one format, with a chart of where its values lie."""
    fmt = get_format(name)
    console = Terminal()
    table = Table(
        title=fmt.name, show_header=False, box=None, title_style="bold", title_justify="left", padding=(0, 2, 0, 0)
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    rows = facts(fmt) if isinstance(fmt, FloatFormat) else fmt.facts()
    for label, text in rows:
        table.add_row(label, text)
    console.print(table)
    scalar = fmt if isinstance(fmt, FloatFormat) else fmt.element
    if scalar.magnitude_bits <= 18:
        console.print(f"\nPositive values of {scalar.name} by magnitude", style="bold", highlight=False)
        for line in density_chart(scalar, min(64, console.width - 2)):
            console.print(line, highlight=False)


def print_equivalent() -> None:
    """Groups of formats whose grids are one another's multiples, found by comparing every value."""
    console = Terminal()
    console.print("Formats that are one grid under scaling (every value compared):", style="bold")
    for members in equivalent_groups(FORMAT_REGISTRY.values()):
        first = members[0]
        ratios = ", ".join(f"{m.name} (x {m.max / first.max:g})" for m in members[1:])
        console.say(f"  {first.name} = {ratios}", hang=2)
