"""Parses JSON and YAML that anybody may have written: bounded in size, depth, aliases and numbers, clear about what is wrong.

A parser's own leniency is the danger here: Python's JSON takes 1e400 as inf and half of a surrogate pair as text, YAML
unfolds aliases without end, and both recurse as deep as a file says. What passes is safe to walk, compare and print.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

MOST_JSON_BYTES, MOST_YAML_BYTES, MOST_LINE_BYTES = 16 << 20, 1 << 20, 1 << 20
MOST_NODES = 200_000
"""Values of one document, aliases counted as often as they are used."""
MOST_DEPTH = 64
LARGEST_INTEGER = 2**63 - 1

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|[eE]\+?\d{3}|\d{19}|NaN|Infinity")
"""What a line must have for any of its plain values to be refused; most have none of it and need no second look."""


class Malformed(ValueError):
    """Says what is wrong, as the end of a sentence such as "result.json is unreadable: ..."."""


def parse_json(text: bytes) -> Any:
    """The value of a strict JSON document in UTF-8.

    Raises:
        Malformed: it is none, has NaN or Infinity, a number beyond int64 or float64, half of a surrogate pair, or is larger
            or deeper than the limits of this module.
    """
    _limit_size(text, MOST_JSON_BYTES)
    value = _decode(text)
    _check(value)
    return value


def parse_line(line: bytes) -> dict[str, Any]:
    """The object on one line of a JSON Lines file; limits and errors as `parse_json`."""
    _limit_size(line, MOST_LINE_BYTES)
    value = _decode(line)
    if not isinstance(value, dict):
        raise Malformed("no JSON object")
    if line.count(b"{") + line.count(b"[") > 1 or _SUSPECT.search(line):
        _check(value)
    return value


def parse_yaml(text: bytes) -> Any:
    """The value of a YAML document in UTF-8, of plain values, lists and mappings with text as keys.

    Raises:
        Malformed: it is none, or is larger, deeper or (aliases unfolded) longer than the limits of this module.
    """
    _limit_size(text, MOST_YAML_BYTES)
    try:
        decoded = text.decode("utf-8")
        _limit_nesting(decoded)
        loader = _YamlLoader(decoded)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _unfolded(node, {}, 0)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        raise error if isinstance(error, Malformed) else Malformed(_short(error)) from None
    _check(value, of_yaml=True)
    return value


def _decode(text: bytes) -> Any:
    try:
        return _JSON.decode(text.decode("utf-8"))
    except RecursionError:
        raise Malformed(f"nested deeper than {MOST_DEPTH} levels") from None
    except ValueError as error:
        raise error if isinstance(error, Malformed) else Malformed(_short(error)) from None


def _no_constant(name: str) -> Any:
    raise Malformed(f"{name} is no JSON number; records spell it as text")


_JSON = json.JSONDecoder(parse_constant=_no_constant)


def _limit_size(text: bytes, most: int) -> None:
    if len(text) > most:
        raise Malformed(f"{len(text):,} bytes long, where {most:,} is the limit")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _check(value: Any, *, of_yaml: bool = False) -> None:
    """Every value below `value`: its kind, size and depth. `of_yaml`: non-finite floats and dates are values there."""
    waiting, seen = [(value, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if depth > MOST_DEPTH:
            raise Malformed(f"nested deeper than {MOST_DEPTH} levels")
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str) and not (of_yaml and isinstance(key, int | float | None)):
                    raise Malformed(f"the key {key!r} is no text"[:200])
            waiting += [(key, depth) for key in node]
            waiting += [(inner, depth + 1) for inner in node.values()]
        elif isinstance(node, list):
            waiting += [(inner, depth + 1) for inner in node]
        elif isinstance(node, str):
            if not node.isascii() and any("\ud800" <= letter <= "\udfff" for letter in node):
                raise Malformed("half of a surrogate pair stands for a letter")
        elif isinstance(node, bool) or node is None:
            pass
        elif isinstance(node, int):
            if not -LARGEST_INTEGER <= node <= LARGEST_INTEGER:
                raise Malformed("an integer needs more than 64 bits")
        elif isinstance(node, float):
            if not of_yaml and not math.isfinite(node):
                raise Malformed("a number is beyond the range of float64")
        elif not of_yaml or type(node).__name__ not in ("date", "datetime"):
            raise Malformed(f"a {type(node).__name__} is no plain value")
        if seen + len(waiting) > MOST_NODES:
            raise Malformed(f"more than {MOST_NODES:,} values")


def _limit_nesting(text: str) -> None:
    """By events, before anything recurses; the time that libyaml takes grows with the square of the depth."""
    depth = 0
    for event in yaml.parse(text, Loader=_YamlLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MOST_DEPTH:
                raise Malformed(f"nested deeper than {MOST_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _unfolded(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """How many values `node` has once its aliases are unfolded; `sizes` remembers it by node, -1 while it is being counted."""
    known = sizes.get(id(node))
    if known is not None:
        if known < 0:
            raise Malformed("an alias stands inside of what it names")
        return known
    if depth > MOST_DEPTH:
        raise Malformed(f"nested deeper than {MOST_DEPTH} levels")
    sizes[id(node)] = -1
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    size = 1 + sum(_unfolded(part, sizes, depth + 1) for part in inner)
    if size > MOST_NODES:
        raise Malformed(f"aliases unfold to more than {MOST_NODES:,} values")
    sizes[id(node)] = size
    return size
