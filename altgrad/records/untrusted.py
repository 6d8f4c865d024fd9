"""Parses JSON, YAML and patterns that anybody may have written: bounded in size, depth, aliases, numbers and time.

A parser's own leniency is the danger here: Python's JSON takes 1e400 as inf and half of a surrogate pair as text, YAML
unfolds aliases without end, takes the later of two equal keys, and both recurse as deep as a file says. What passes is
plain: text, numbers, true, false, null, lists and mappings with text keys, safe to walk, compare and print.
"""

from __future__ import annotations

import json
import math
import re
import re._parser as _regex  # pyright: ignore[reportMissingImports]
import warnings
from functools import lru_cache
from typing import Any

import yaml

MOST_JSON_BYTES, MOST_YAML_BYTES, MOST_LINE_BYTES = 16 << 20, 1 << 20, 1 << 20
MOST_NODES = 200_000
"""Values of one document, aliases counted as often as they are used."""
MOST_DEPTH = 64
MOST_ALIASES = 1000
MOST_PATTERN, MOST_REPEATS = 2000, 4
LARGEST_INTEGER = 2**63 - 1
_MOST_MERGED = 2000  # keys that `<<` brings into one mapping

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
    """The value of a YAML document in UTF-8; numbers as in YAML 1.2 (3e-4 is one), dates stay text.

    Raises:
        Malformed: it is none, gives a key twice, or is larger, deeper or (aliases unfolded) longer than the limits of this
            module.
    """
    _limit_size(text, MOST_YAML_BYTES)
    try:
        decoded = text.decode("utf-8-sig")
        _limit_shape(decoded)
        loader = _Loader(decoded)
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


@lru_cache(maxsize=1024)
def parse_pattern(text: str) -> re.Pattern[str]:
    """A regular expression for names, whose matching takes no time to speak of on any name.

    Raises:
        Malformed: it is none, is longer than `MOST_PATTERN`, or has more than `MOST_REPEATS` repetitions or one inside of
            another: such a one may take years on a name of 40 letters.
    """
    if len(text) > MOST_PATTERN:
        raise Malformed(f"{len(text):,} characters long, where {MOST_PATTERN:,} is the limit")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            repeats = _repeats(_regex.parse(text), False)
            found = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise Malformed(f"no regular expression ({_short(error)})") from None
    if repeats > MOST_REPEATS:
        raise Malformed(
            f"{repeats} repetitions (*, +, {{m,n}}), where {MOST_REPEATS} is the limit; write several patterns"
        )
    return found


def _repeats(tree: Any, inside: bool) -> int:
    """Repetitions that matching may go back to; what stands in an atomic group is not."""
    count = 0
    for kind, argument in tree:
        name = str(kind)
        if name in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] > 1:
            if inside:
                raise Malformed("a repetition stands inside of a repetition; write it without")
            count += 1 + _repeats(argument[2], True)
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            count += _repeats(argument[2], inside)
        elif name == "ATOMIC_GROUP":
            _repeats(argument, inside)
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            count += _repeats(argument[-1], inside)
        elif name == "BRANCH":
            count += sum(_repeats(branch, inside) for branch in argument[1])
        elif name == "GROUPREF_EXISTS":
            count += sum(_repeats(branch, inside) for branch in argument[1:] if branch is not None)
    return count


def as_in_yaml_1_2(kind: Any) -> Any:
    """A loader or dumper class for which 3e-4 is a number and 2020-01-01 a text."""
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in (_FLOAT_TAG, "tag:yaml.org,2002:timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    kind.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
    return kind


_FLOAT_TAG = "tag:yaml.org,2002:float"
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


@as_in_yaml_1_2
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # pyright: ignore[reportGeneralTypeIssues]
    """YAML's plain data; a key that is given twice is an error."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(own) != len(set(own)):
            twice = next(key for key in own if own.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        super().flatten_mapping(node)
        if len(node.value) > len(own) + _MOST_MERGED:
            raise yaml.constructor.ConstructorError(None, None, "`<<` brings in too many keys", node.start_mark)


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
    """Every value below `value`: its kind, size and depth. `of_yaml`: non-finite floats are values there."""
    waiting: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    seen = 0
    while waiting:
        node, path = waiting.pop()
        seen += 1
        if len(path) >= MOST_DEPTH:
            raise Malformed(f"nested deeper than {MOST_DEPTH} levels")
        problem = _problem(node, of_yaml)
        if problem:
            raise Malformed(f"{'.'.join(map(str, path))}: {problem}"[-300:] if path else problem)
        if isinstance(node, dict):
            waiting += [(key, path) for key in node]
            waiting += [(inner, (*path, key)) for key, inner in node.items()]
        elif isinstance(node, list):
            waiting += [(inner, (*path, index)) for index, inner in enumerate(node)]
        if seen + len(waiting) > MOST_NODES:
            raise Malformed(f"more than {MOST_NODES:,} values")


def _problem(node: Any, of_yaml: bool) -> str | None:
    """What is wrong with one value by itself."""
    if isinstance(node, dict):
        return next(
            (f"the key {key!r:.100} is no text; put it in quotes" for key in node if not isinstance(key, str)), None
        )
    if isinstance(node, str):
        halves = not node.isascii() and any("\ud800" <= letter <= "\udfff" for letter in node)
        return "half of a surrogate pair stands for a letter" if halves else None
    if isinstance(node, bool | list) or node is None:
        return None
    if isinstance(node, int):
        return None if -LARGEST_INTEGER <= node <= LARGEST_INTEGER else "an integer needs more than 64 bits"
    if isinstance(node, float):
        return None if of_yaml or math.isfinite(node) else "a number is beyond the range of float64"
    return f"a {type(node).__name__} is no plain value; write text, a number, a list or a mapping"


def _limit_shape(text: str) -> None:
    """By events, before anything recurses; the time that libyaml takes grows with the square of the depth."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > MOST_DEPTH:
            raise Malformed(f"nested deeper than {MOST_DEPTH} levels")
        if aliases > MOST_ALIASES:
            raise Malformed(f"more than {MOST_ALIASES:,} aliases")


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
