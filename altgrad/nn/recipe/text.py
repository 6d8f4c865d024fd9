"""Recipes as one line of text that people read and that parses back to an equal recipe.

    E4M3                                                  one format for every operand
    x:E4M3 w:E4M3 dy:E5M2                                 input, weight, gradient of the output
    x:E3M4 w:E3M4(storage) dy:E3M4 grid(E3M4,stochastic)  the stored weight lies on a grid
    x:E4M3(stochastic,delayed(history=4)) w:E4M3 dy:FP32  options in brackets, where they are not the defaults
    x:E4M3|E5M2 w:E4M3 dy:E4M3                            forward's input, then weight_grad's: a role's two products
    MXFP8; name='head': FP32; type='Conv2d': E4M3         overrides, each with its conditions
    x:E4M3 w:E4M3 dy:E5M2 sum:hopper_fp8 eval:FP32        how products are added up; plain in evaluation
    x:E4M3 w:E4M3 dy:E5M2 saved:codes                     a GPU keeps codes for the backward, as CPUs do

In a role's pair the products come in the order forward, input_grad, weight_grad; so do the three of `sum:A|B|C`, where
float32 stands for a plain sum. `norm:FORMAT` is the weight of a normalisation layer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from altgrad.errors import RecipeError
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.nn.recipe.layer_recipe import LayerRecipe, layer_recipe
from altgrad.nn.recipe.spec import GemmRecipe, OperandSpec, StorageSpec

_ROLES = ("x", "w", "dy")
_FORM = "write a format name, or x:FORMAT w:FORMAT dy:FORMAT with grid(FORMAT,ROUNDING) for weights stored on a grid"
_LONGEST = 20_000  # characters
_CONDITION = re.compile(r"""\s*(name|type|position)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(and\b|:)""")
_ROUNDINGS = {mode.value for mode in Rounding}
_OVERFLOWS = {policy.value for policy in Overflow}


def layer_text(recipe: LayerRecipe | None) -> str:
    """The text of one layer's recipe: a format's name alone where that says everything."""
    if recipe is None:
        return "FP32"
    name = recipe.forward.weight.format if recipe.forward.weight is not None else None
    return name or "FP32" if layer_recipe(name) == recipe else str(recipe)


def parse_layer(text: str, where: str = "recipe") -> LayerRecipe:
    """The layer's recipe that a text means (see the module).

    Raises:
        RecipeError: the text is no recipe; FormatError: a format's name is unknown.
    """
    if len(text) > _LONGEST:
        raise RecipeError(f"{where} is {len(text)} characters long; a recipe's text has at most {_LONGEST}")
    words = _split(text, " ")
    if len(words) == 1 and not words[0].startswith(("x:", "w:", "dy:", "grid(", "norm:", "sum:", "saved:", "eval:")):
        return layer_recipe(words[0])
    parts: dict[str, str] = {}
    for word in words:
        key, rest = ("grid", word[5:-1]) if word.startswith("grid(") and word.endswith(")") else _halves(word)
        if key not in (*_ROLES, "grid", "norm", "sum", "saved", "eval") or not rest:
            raise RecipeError(f"{where} {text!r}: {word!r} is no part of a recipe; {_FORM}")
        if key in parts:
            raise RecipeError(f"{where} {text!r} names {key} twice; {_FORM}")
        parts[key] = rest
    missing = [role for role in _ROLES if role not in parts]
    if missing:
        raise RecipeError(f"{where} {text!r} lacks {missing[0]}:; {_FORM}")
    (x, x_back), (w, w_back), (dy, dy_back) = (_pair(parts[role], f"{where} {text!r}") for role in _ROLES)
    sums = _sums(parts.get("sum", "float32"), f"{where} {text!r}")
    if parts.get("eval", "FP32") != "FP32":
        raise RecipeError(
            f"{where} {text!r}: eval:{parts['eval']}; in evaluation a layer is as in training, or eval:FP32"
        )
    if parts.get("saved", "codes") != "codes":
        raise RecipeError(f"{where} {text!r}: saved:{parts['saved']}; write saved:codes, or nothing")
    return LayerRecipe(
        forward=GemmRecipe(input=x, weight=w, accumulator=sums[0]),  # type: ignore[arg-type]
        input_grad=GemmRecipe(grad_output=dy, weight=w_back, accumulator=sums[1]),  # type: ignore[arg-type]
        weight_grad=GemmRecipe(grad_output=dy_back, input=x_back, accumulator=sums[2]),  # type: ignore[arg-type]
        plain_evaluation="eval" in parts,
        save_codes="saved" in parts,
        storage=_storage(parts["grid"], f"{where} {text!r}") if "grid" in parts else None,
        norm_weight=_operand(parts["norm"], f"{where} {text!r}") if "norm" in parts else OperandSpec(),
    )


def split_recipe(text: str) -> tuple[str, list[tuple[dict[str, str], str]]]:
    """A whole recipe's text as the default's and, for each override, its conditions and text.

    Raises:
        RecipeError: an override has no condition, or is not closed.
    """
    default, *others = _split(text, ";")
    overrides = []
    for part in others:
        conditions: dict[str, str] = {}
        at, end = 0, "and"
        while end == "and":
            found = _CONDITION.match(part, at)
            if found is None or found[1] in conditions:
                raise RecipeError(
                    f"recipe {text!r}: {part.strip()!r} is no override; write name='*.mlp.*': FORMAT, or type=, position="
                )
            conditions[found[1]], end, at = ast.literal_eval(found[2]), found[3], found.end()
        overrides.append((conditions, part[at:].strip()))
    return default.strip(), overrides


def _sums(text: str, where: str) -> list[str | None]:
    """The accumulators of the three products; None for float32."""
    words = [None if word == "float32" else word for word in _split(text, "|")]
    if len(words) not in (1, 3):
        raise RecipeError(
            f"{where}: sum:{text} names {len(words)} accumulators; name one, or one for each of the three"
        )
    return words * (3 // len(words))


def _pair(text: str, where: str) -> tuple[OperandSpec, OperandSpec]:
    """A role's operands in its two products."""
    first, *second = _split(text, "|")
    if len(second) > 1:
        raise RecipeError(f"{where}: {text!r} gives {len(second) + 1} operands; a role has two products: A or A|B")
    one = _operand(first, where)
    return one, _operand(second[0], where) if second else one


def _operand(text: str, where: str) -> OperandSpec:
    name, notes = _call(text, where)
    options: dict = {}
    for note in notes:
        key, value = _option(note, where)
        if key in options:
            raise RecipeError(f"{where}: {text!r} says {key} twice")
        options[key] = value
    return OperandSpec(name, **options)


def _storage(text: str, where: str) -> StorageSpec:
    name, *notes = _split(text, ",")
    options: dict = {}
    for note in notes:
        key, equals, value = note.partition("=")
        if note in _ROUNDINGS:
            options["rounding"] = note
        elif note in ("per channel", "any scale", "no subnormals"):
            options |= {"per channel": {"per_channel": True}, "any scale": {"power_of_two": False}}.get(
                note, {"subnormals": False}
            )
        elif equals and key in _STORAGE_NUMBERS:
            options[_STORAGE_NUMBERS[key]] = _literal(value, where)
        else:
            raise RecipeError(
                f"{where}: grid option {note!r} is not known; use a rounding mode, per channel, any scale, "
                f"no subnormals, or {', '.join(f'{key}=' for key in _STORAGE_NUMBERS)}"
            )
    return StorageSpec(name, **options)


_STORAGE_NUMBERS = {"scale": "scale", "headroom": "headroom", "every": "refresh_every", "bits": "random_bits"}


def _option(note: str, where: str) -> tuple[str, object]:
    if note in _ROUNDINGS:
        return "rounding", note
    if note in _OVERFLOWS:
        return "overflow", note
    if note in ("no subnormals", "masked"):
        return ("subnormals", False) if note == "no subnormals" else ("mask_saturated", True)
    if note in ("whole blocks", "requantized"):
        return ("whole_blocks" if note == "whole blocks" else "requantize"), True
    if note.startswith("bits="):
        return "random_bits", _literal(note[5:], where)
    name, arguments = _call(note, where)
    pairs = [one.partition("=") for one in arguments]
    if any(not equals for _, equals, _ in pairs):
        raise RecipeError(f"{where}: {note!r} has an argument without a name; write {name}(key=value)")
    given = {key: _literal(value, where) for key, _, value in pairs}
    field = {"hadamard": "hadamard", "ema": "average"}.get(name)
    return (field, given) if field else ("scaling", {"policy": name, **given})


def _call(text: str, where: str) -> tuple[str, list[str]]:
    """`name(a,b)` as its name and parts."""
    name, bracket, inner = text.partition("(")
    if not bracket:
        return name.strip(), []
    if not inner.endswith(")"):
        raise RecipeError(f"{where}: {text!r} has a bracket that is not closed")
    return name.strip(), _split(inner[:-1], ",")


def _literal(text: str, where: str):
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RecipeError(
            f"{where}: {text!r} is no number, quoted word, True, False, None or list of numbers"
        ) from None
    return tuple(value) if isinstance(value, list) else value


def _halves(word: str) -> tuple[str, str]:
    key, _, rest = word.partition(":")
    return key, rest


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand outside brackets and quotes; empty parts are left out."""
    return [part.strip() for part in _parts(text, separator) if part.strip()] or [""]


def _parts(text: str, separator: str) -> Iterator[str]:
    depth, quote, begin = 0, "", 0
    escaped = False
    for at, char in enumerate(text):
        if quote:
            if not escaped and char == quote:
                quote = ""
            escaped = char == "\\" and not escaped
        elif char in "'\"":
            quote = char
        elif char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == separator and depth <= 0:
            yield text[begin:at]
            begin = at + 1
    yield text[begin:]
