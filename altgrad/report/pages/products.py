"""The page of what recipes do to one layer's products: errors as a table, and the forward's over the length of its sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.figures import line_figure
from altgrad.report.charts.lines import Series
from altgrad.report.numbers import percent
from altgrad.report.pages.page import render_page
from altgrad.report.tables import Column, Table, TableCell
from altgrad.report.text import shortened
from altgrad.report.theme import styles_for

SAME = 0.005
"""An ingredient without which no error of y differs by this share has no curve of its own: it would cover the recipe's."""
DRAWN = "drawn tensors, 1% of the features 30 times as large"
NO_VERDICT = "Errors of single products are no verdict on training: altgrad sweep trains."
Errors = Mapping[str, tuple[float, float, float]]
"""label -> relative errors of y, dx and dw."""


def render_products(
    name: str,
    recipe_text: str,
    sizes: str,
    errors: Errors,
    lengths: Sequence[int],
    by_length: Mapping[str, Sequence[float]],
    command: str,
) -> str:
    """The page.

    Args:
        name: the recipe's, or its text. errors: of the recipe, which comes first, and of it without each ingredient, at
            `sizes`.
        by_length: label -> error of y where K, the number of products in a sum, is each of `lengths`.
    """
    return render_page(
        "products.html.j2",
        title=f"AltGrad: {name}, one layer's products",
        kind="one layer's products",
        headline=f"{shortened(name, 60)}: errors of "
        + ", ".join(
            f"{what} {percent(error)}"
            for what, error in zip(("y", "dx", "dw"), next(iter(errors.values())), strict=True)
        ),
        lede=[
            f"Relative errors (root mean square) against float64 of a linear layer's three products on {DRAWN}. {NO_VERDICT}"
        ],
        sizes=sizes,
        errors=_table(errors),
        chart=_chart(lengths, by_length),
        recipe=recipe_text,
        command=command,
    )


def _table(errors: Errors) -> Table:
    columns = [Column("Recipe"), *(Column(what, numeric=True) for what in ("y", "dx", "dw"))]
    rows = [
        [label, *(TableCell(f"{100 * error:.3f}%", sort=error) for error in found)] for label, found in errors.items()
    ]
    return Table(columns, rows)


def _chart(lengths: Sequence[int], by_length: Mapping[str, Sequence[float]]) -> Markup:
    whole = np.array(next(iter(by_length.values())))
    by_length = {
        label: values
        for place, (label, values) in enumerate(by_length.items())
        if place == 0 or (np.abs(np.array(values) - whole) > SAME * whole).any()
    }
    styles = styles_for(list(by_length))
    x = np.log2(np.array(lengths, dtype=np.float64))
    series = [
        Series(label, x, 100 * np.array(values), style, dots=True)
        for (label, values), style in zip(by_length.items(), styles, strict=True)
    ]
    return line_figure(
        series,
        title="Error of y over the length of its sums",
        description="Relative error of the forward's product for growing numbers of products in each sum.",
        caption="64 tokens, K features to 64; a curve for the recipe, and for each ingredient without which an error differs by more than 0.5%.",
        x_label="log2 K, the products of a sum",
        y_label="relative error of y, percent",
        y_scales=("linear", "log"),
    )
