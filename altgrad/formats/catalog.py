"""The catalog: every named format, scalar or block, and the parsing of format names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any

from altgrad.errors import FormatError
from altgrad.formats.block import BlockFormat, ScaleRule
from altgrad.formats.rounding import as_option
from altgrad.formats.scalar import FloatFormat, Specials
from altgrad.formats.scalar_rows import FORMAT_REGISTRY, SCALAR_ROWS

_BY_KEY = {name.lower(): row for row in SCALAR_ROWS for name in (row.name, *row.aliases)}
_EXMY = re.compile(r"e(?P<e>\d{1,2})m(?P<m>\d{1,2})(b(?P<bias>-?\d{1,3}))?(_(?P<specials>fn|ieee|fnuz|p3109))?")
_SPECIALS = {"fn": Specials.NAN_ONLY, "ieee": Specials.IEEE, "fnuz": Specials.FNUZ, "p3109": Specials.P3109}


@cache
def _parse(name: str) -> FloatFormat:
    key = name.strip().lower()
    if key in _BY_KEY:
        return _BY_KEY[key]
    if match := _EXMY.fullmatch(key):
        e, m, bias, word = int(match["e"]), int(match["m"]), match["bias"], match["specials"]
        return generic_format(e, m, None if bias is None else int(bias), _SPECIALS.get(word or "", Specials.NONE))
    known = {**{k: row.name for k, row in _BY_KEY.items()}, **{n.lower(): n for n in BLOCK_FORMATS}}
    near = list(dict.fromkeys(known[k] for k in get_close_matches(key, known, n=4, cutoff=0.4)))
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(FORMAT_REGISTRY)}."
    raise FormatError(f"unknown format {name!r}: {hint} Any E<exponent bits>M<mantissa bits> parses too, such as E3M4")


def generic_format(
    exponent_bits: int, mantissa_bits: int, bias: int | None = None, specials: Specials = Specials.NONE
) -> FloatFormat:
    """A format by its numbers alone, under a name that `get_format` reads back: E4M4, E3M5b1, E3M5b3_ieee.

    Args:
        bias: None is the IEEE bias, 2^(exponent_bits - 1) - 1.
    """
    usual = 2 ** (exponent_bits - 1) - 1 if exponent_bits else None
    chosen = usual if bias is None else bias
    suffix = "" if chosen == usual else f"b{chosen}"
    suffix += next((f"_{word}" for word, kind in _SPECIALS.items() if kind is specials), "")
    rule = "the IEEE bias" if chosen == usual else f"bias {chosen}"
    kind = "finite only" if specials is Specials.NONE else f"special codes: {specials.value}"
    name = f"E{exponent_bits}M{mantissa_bits}{suffix}"
    return FloatFormat(name, exponent_bits, mantissa_bits, chosen, specials, source=f"ExMy with {rule}, {kind}")


def get_format(name) -> Any:
    """The format of that name, case-insensitively: a FloatFormat, or a BlockFormat; a format is returned as it is.

    Args:
        name: a catalog name or alias, a block format's name (`MXFP4`), any `E<e>M<m>` (IEEE bias, finite only, unless
            the catalog has a row of that name), with another bias and special codes on demand (`E3M5b1_ieee`), or a format.

    Raises:
        FormatError: unknown name (with the nearest valid ones), or a format that the float32 carrier cannot hold.
    """
    if isinstance(name, FloatFormat | BlockFormat):
        return name
    if not isinstance(name, str):
        raise FormatError(f"a format is a name or a FloatFormat, not {type(name).__name__}: {name!r}")
    return find_block_format(name) or _parse(name)


def block_format(
    element: str | FloatFormat,
    block: int | tuple[int, int] = 32,
    scale: str | FloatFormat = "E8M0",
    rule: str | ScaleRule | None = None,
    *,
    tensor_scale: bool = False,
) -> BlockFormat:
    """The block format of these facts: the catalog's row if there is one, else one with a generic name.

    Args:
        element: element format or its name.
        block: block size along one axis, or (rows, columns) of a tile.
        scale: "E8M0", "FP32", or a format with a zero such as "E4M3".
        rule: for E8M0 floor (the default), ceil, nearest or even; all other scales round to nearest.
        tensor_scale: a float32 scale above the blocks' scales.

    Example:
        >>> block_format("E2M1", 32).name
        'MXFP4'
        >>> block_format("E3M4", 64, rule="ceil").name
        'E3M4/64:E8M0:ceil'

    Raises:
        FormatError: the parts do not fit together.
    """
    element, scale = get_format(element), get_format(scale)
    if not isinstance(element, FloatFormat) or not isinstance(scale, FloatFormat):
        raise FormatError(f"the element {element} and the scale {scale} must be scalar formats")
    powers = scale.name == "E8M0"
    chosen = as_option(ScaleRule, rule) if rule is not None else ScaleRule.FLOOR if powers else ScaleRule.NEAREST
    tile = block if isinstance(block, int) else (int(block[0]), int(block[1]))
    shape = str(tile) if isinstance(tile, int) else f"{tile[0]}x{tile[1]}"
    name = f"{element}/{shape}:{scale}" + (f":{chosen.value}" if powers else "") + (":tensor" if tensor_scale else "")
    made = BlockFormat(name, element, tile, scale, chosen, tensor_scale, source="generic block format")
    for row in BLOCK_FORMATS.values():
        if (row.element, row.block, row.scale_format, row.tensor_scale) == (element, tile, scale, tensor_scale):
            return row if row.rule is chosen else replace(made, name=f"{row.name}:{chosen.value}", source=row.source)
    return made


_MX = "OCP Microscaling Formats (MX) Specification 1.0"
_NV = "NVIDIA, NVFP4 in Blackwell: E2M1 elements, E4M3 scale per 16, float32 scale per tensor"


def _mx(name: str, element: str, *aliases: str, note: str = "") -> BlockFormat:
    """A concrete MX format: blocks of 32, E8M0 scales, floor rule."""
    scale = FORMAT_REGISTRY["E8M0"]
    return BlockFormat(
        name, FORMAT_REGISTRY[element], 32, scale, ScaleRule.FLOOR, source=_MX, aliases=aliases, note=note
    )


_BLOCK_ROWS: tuple[BlockFormat, ...] = (
    _mx("MXFP8", "E4M3", "MXFP8_E4M3"),
    _mx("MXFP8_E5M2", "E5M2", note="finite values beyond max saturate (6.3), though the element has inf"),
    _mx("MXFP6", "E2M3", "MXFP6_E2M3"),
    _mx("MXFP6_E3M2", "E3M2"),
    _mx("MXFP4", "E2M1", "MXFP4_E2M1"),
    _mx("MXINT8", "INT8", note="symmetric: -2 is decoded but never produced (5.3.4)"),
    BlockFormat(
        "NVFP4",
        FORMAT_REGISTRY["E2M1"],
        16,
        FORMAT_REGISTRY["E4M3"],
        ScaleRule.NEAREST,
        tensor_scale=True,
        source=_NV,
        note="two levels: tensor amax / (448 * 6) as float32, then one E4M3 scale for each 16 elements",
    ),
)

BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType({row.name: row for row in _BLOCK_ROWS})

_BLOCK_BY_KEY = {name.lower(): row for row in _BLOCK_ROWS for name in (row.name, *row.aliases)}
_GENERIC = re.compile(r"(?P<element>[^/:]+)/(?P<block>\d+(x\d+)?)(?P<rest>(:[^:]*)*)", re.IGNORECASE)
_RULES = {rule.value for rule in ScaleRule}


def find_block_format(name: str) -> BlockFormat | None:
    """The block format that a name means, or None if it has neither a block format's name nor the generic form.

    Names are a catalog name or alias (`MXFP4`), a catalog name with another E8M0 rule (`MXFP4:ceil`), or
    `ELEMENT/BLOCK[:SCALE][:RULE][:tensor]` such as `E3M4/64`, `E4M3/128x128:FP32`, `E2M1/16:E4M3:tensor`.
    All are case-insensitive.

    Raises:
        FormatError: the generic form with a part that is wrong.
    """
    key = name.strip().lower()
    if key in _BLOCK_BY_KEY:
        return _BLOCK_BY_KEY[key]
    return _parse_block(key) if "/" in key or ":" in key else None


@cache
def _parse_block(key: str) -> BlockFormat | None:
    base, colon, rule = key.rpartition(":")
    if colon and base in _BLOCK_BY_KEY:
        row = _BLOCK_BY_KEY[base]
        return block_format(row.element, row.block, row.scale_format, rule, tensor_scale=row.tensor_scale)
    match = _GENERIC.fullmatch(key)
    if not match:
        return None
    sides = [int(side) for side in match["block"].split("x")]
    parts = match["rest"].split(":")[1:]
    tensor_scale = bool(parts) and parts[-1] == "tensor"
    if tensor_scale:
        parts.pop()
    rule = parts.pop() if parts and parts[-1] in _RULES else None
    scale = parts.pop(0) if parts else "E8M0"
    if parts:
        raise FormatError(
            f"block format {key!r}: {parts[0]!r} is not a rule ({', '.join(sorted(_RULES))}); "
            "the form is ELEMENT/BLOCK[:SCALE][:RULE][:tensor], such as E3M4/64:E8M0:ceil"
        )
    block = sides[0] if len(sides) == 1 else (sides[0], sides[1])
    return block_format(match["element"], block, scale, rule, tensor_scale=tensor_scale)
