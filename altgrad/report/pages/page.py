"""Puts a page together: one HTML file with its styles, script and figures inside, that opens offline."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from altgrad.report.charts.svg import breakable
from altgrad.report.numbers import count, difference, duration, loss, number, percent
from altgrad.report.tables import table_html, table_markdown
from altgrad.report.text import for_code_block, for_markdown
from altgrad.report.theme import palette_css


@cache
def _environment(html: bool) -> Environment:
    """Templates of pages (escaped by autoescape) or of Markdown (escaped by `_in_markdown`)."""
    environment = Environment(
        loader=PackageLoader("altgrad.report", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if html else _in_markdown,
    )
    environment.filters |= {
        "number": number,
        "loss": loss,
        "difference": difference,
        "percent": percent,
        "duration": duration,
        "count": count,
        "breakable": breakable,
        "table": table_html if html else lambda table: Markup(table_markdown(table)),
        "code": lambda text: Markup(for_code_block(text)),
        "target": lambda path: Markup(quote(str(path), safe="/")),
    }
    return environment


def _in_markdown(value: Any) -> Any:
    """What a template prints: text is made harmless, what is Markdown by itself (a table) stays."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else for_markdown(value)


@cache
def _asset(name: str) -> Markup:
    return Markup(files("altgrad.report").joinpath("assets", name).read_text("utf-8"))


def render_page(template: str, **content: Any) -> str:
    """The page of `template` (a name in templates/). `content` needs title, kind, headline; see base.html.j2."""
    defaults = {"facts": [], "lede": [], "warnings": [], "remarks": [], "contents": [], "footer": ""}
    assets = {"palette": Markup(palette_css()), "css": _asset("report.css"), "js": _asset("report.js")}
    return _environment(True).get_template(template).render({**defaults, **content, **assets})


def render_markdown(template: str, **content: Any) -> str:
    """The Markdown document of `template`."""
    defaults = {"facts": [], "lede": [], "warnings": [], "remarks": [], "footer": ""}
    return _environment(False).get_template(template).render({**defaults, **content})
