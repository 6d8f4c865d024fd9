"""The terminal pages of `altgrad recipes`: the recipes that people know, and what one says of each operand."""

from __future__ import annotations

import shlex
from dataclasses import astuple
from pathlib import Path

from altgrad.errors import OptionError, RecipeError
from altgrad.nn.recipe.ingredients import HIGH_LAYERS
from altgrad.nn.recipe.named import NAMED, named
from altgrad.nn.recipe.recipe import Recipe
from altgrad.nn.recipe.scaling_choice import is_block, scaling_label
from altgrad.nn.recipe.spec import OperandSpec
from altgrad.records.files import write_text
from altgrad.report.console import Terminal, ruled_table
from altgrad.report.pages.products import DRAWN, NO_VERDICT, render_products
from altgrad.report.text import SYMBOLS

LONGEST_LABEL = 28  # characters of a recipe's text that a table and a curve carry
LENGTHS = (64, 256, 1024, 4096)
"""Products in a sum, over which the figure draws the error of y."""

_REDUCED = {"forward": "the input features", "input_grad": "the output features", "weight_grad": "the tokens"}
_PRODUCTS = {"forward": "y = x w^T", "input_grad": "dx = dy w", "weight_grad": "dw = dy^T x"}
_CERTAINTY = {
    "code": "every number of the arithmetic was read in code",
    "one gap": "read in code but for what is named below",
    "report": "after a report; no code is public",
}


def print_recipes() -> None:
    """One row for each recipe."""
    table = ruled_table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is", width=max(len(word) for row in NAMED.values() for word in row.title.split()))
    table.add_column("certainty", no_wrap=True)
    table.add_column("made of")
    for row in NAMED.values():
        table.add_row(row.name, row.title, row.certainty, ", ".join(row.recipe.ingredients))
    console = Terminal()
    console.print(table)
    console.say(
        'What one says of each operand: altgrad recipes te_mxfp8. In Python: recipe("te_mxfp8").without("accumulator"); '
        "in a config: formats: te_mxfp8 without accumulator."
    )


def print_recipe(name: str) -> None:
    """All that one recipe says: per operand and GEMM, its source and how certain it is; also of an ablation's text.

    Raises:
        RecipeError: there is no such recipe.
    """
    base, _, less = name.partition(" without ")
    row = named(base)
    recipe = Recipe.from_dict(f"{row.name} without {less}" if less else row.name)
    layer = recipe.default
    if layer is None:
        raise RecipeError(f"{name} quantizes nothing")
    console = Terminal()
    console.say(row.title + (f", without {less}" if less else ""), "bold")
    console.say(f"{row.source}\n{row.certainty}: {_CERTAINTY[row.certainty]}\n")
    table = ruled_table()
    for column in ("product", "operand", "format", "what is done"):
        table.add_column(column, no_wrap=column != "what is done")
    for gemm, one in layer.gemms.items():
        for index, (role, spec) in enumerate(one.named()):
            words = _words(spec, gemm)
            table.add_row("" if index else _PRODUCTS[gemm], SYMBOLS[role], spec.format or "as it is", "; ".join(words))
        unit = one.accumulator
        summed = "in float32" if unit is None else "; ".join(f"{label}: {text}" for label, text in unit.facts())
        table.add_row("", "sum", "" if unit is None else str(unit), summed)
        table.add_section()
    console.print(table)
    if layer.storage is not None:
        console.say(f"Weights are stored on a grid: {layer.storage}")
    if layer.save_codes:
        console.say("The backward keeps codes on GPUs, too.")
    if layer.plain_evaluation:
        console.say("In evaluation mode layers compute in full precision.")
    high = [o.condition for o in recipe.overrides if o.recipe is None]
    _list(console, "In full precision", high)
    _list(console, "Beyond the layers' arithmetic", list(row.beyond))
    _list(console, "Gaps", list(row.gaps))
    console.say(f"\nMade of: {', '.join(recipe.ingredients) or 'nothing that can be removed'}", hang=2)
    console.print(f"As text: {recipe.text}", highlight=False, soft_wrap=True)


def print_errors(name: str, sizes: str | None, figure: Path | None = None) -> None:
    """What the recipe does to one layer's products, and each of its ingredients: errors with it removed.

    figure: a file for the same as a page, with the error of y over the length of its sums.

    Raises:
        RecipeError: there is no such recipe; OptionError: malformed sizes.
    """
    from altgrad.nn.layer_error import Sizes, layer_error

    recipe, given = Recipe.from_dict(name), Sizes.parse(sizes) if sizes else Sizes()
    table = ruled_table()
    table.add_column("recipe")
    for product in ("y", "dx", "dw"):
        table.add_column(product, justify="right")
    whole = name if len(name) <= LONGEST_LABEL else "the recipe"
    rows = [(whole, recipe)]
    rows += [(f"without {one}", recipe.without(one)) for one in recipe.ingredients if one != HIGH_LAYERS]
    errors = {label: astuple(layer_error(one, given)) for label, one in rows}
    for label, found in errors.items():
        table.add_row(label, *(f"{100 * error:.3f}%" for error in found))
    console = Terminal()
    console.print(name, style="bold", highlight=False, soft_wrap=True)
    console.say(
        f"One linear layer, {given.tokens} tokens, {given.inner} features to {given.outer}: relative error (root mean "
        f"square) of its products on {DRAWN}"
    )
    console.print(table)
    console.say(NO_VERDICT)
    if figure is None:
        return
    by_length = {
        label: [layer_error(one, Sizes(64, length, 64)).y for length in LENGTHS]
        for label, one in rows
        if label == whole or errors[label][0] != errors[whole][0]  # what changes nothing of y is no curve of its own
    }
    named = f"{given.tokens} tokens, {given.inner} features to {given.outer}"
    command = f"altgrad recipes {shlex.quote(name)} --error" + (f" --sizes {sizes}" if sizes else "")
    page = render_products(
        name, recipe.text, named, errors, LENGTHS, by_length, f"{command} --figure {shlex.quote(str(figure))}"
    )
    try:
        write_text(figure, page)
    except OSError as error:
        raise OptionError(
            f"{figure} cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from None
    console.print(f"figure: {figure}", highlight=False, soft_wrap=True)


def _list(console: Terminal, title: str, items: list[str]) -> None:
    if items:
        console.say(f"\n{title}", "bold")
        for item in items:
            console.say(f"  {item}", hang=2)


def _words(spec: OperandSpec, gemm: str) -> list[str]:
    """What is done to an operand, in order."""
    fmt = spec.resolved
    if fmt is None:
        return ["not quantized"]
    words = ["from the forward's quantized tensor"] if spec.requantize else []
    if spec.hadamard is not None:
        rounded = ", rounded to bf16" if spec.hadamard.bfloat16 else ""
        words.append(
            f"Hadamard over {spec.hadamard.size} along {_REDUCED[gemm]}, {spec.hadamard.signs.value} signs{rounded}"
        )
    if is_block(fmt):
        rows, columns = fmt.tile
        shape = f"tiles {rows}x{columns}" if fmt.is_tile else f"blocks of {columns} along {_REDUCED[gemm]}"
        words.append(f"{shape}, scale {fmt.scale_format}{' under one of the tensor' if fmt.tensor_scale else ''}")
    assert spec.scaling is not None
    words.append(f"scaling {scaling_label(spec.scaling)}")
    words.append(f"rounded {spec.rounding.value.replace('_', ' ')}")
    return words
