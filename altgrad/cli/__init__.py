"""The command line: parses, calls, prints; every command imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="AltGrad: the wind tunnel and flight recorder for low-precision training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root() -> None:
    """Put any number format on any tensor of a model, train it, and see when, where and why it breaks."""


@app.command()
def formats(
    name: Annotated[str | None, typer.Argument(help="A format's name, such as E3M4 or MXFP4.")] = None,
    equivalent: Annotated[bool, typer.Option("--equivalent", help="Groups that are one grid under scaling.")] = False,
) -> None:
    """Show the catalog of number formats, or one format's facts."""
    from altgrad.cli import format_pages

    if equivalent:
        format_pages.print_equivalent()
    elif name is None:
        format_pages.print_catalog()
    else:
        format_pages.print_format(name)


@app.command("demo-formats", hidden=True)
def demo_formats() -> None:
    """Quantize one tensor of real weights-like data in every 8-bit format and print the error."""
    from altgrad.cli import format_pages

    format_pages.print_demo()


def main() -> None:
    """Entry point: a person's mistake ends in one line on stderr and exit code 2, never in a traceback."""
    from altgrad.errors import AltGradError

    try:
        app()
    except AltGradError as error:
        print(f"altgrad: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("altgrad: stopped", file=sys.stderr)
        sys.exit(130)
