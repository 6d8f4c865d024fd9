"""Reads and writes the YAML that people hand over: configs, matrices and `a.b=c` settings, within stated limits.

A document is strings, numbers, true, false, null, lists and mappings with text keys. `${a.b}` stands for the value at
that path of the same document and for nothing else: no environment, no file, no function. `\\${` is a plain `${`.
`write_document` and `read_document` are inverses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from altgrad.errors import ConfigError
from altgrad.records.files import open_regular
from altgrad.records.untrusted import MOST_DEPTH, MOST_NODES, MOST_YAML_BYTES, Malformed, as_in_yaml_1_2, parse_yaml
from altgrad.report.text import shortened

_REFERENCE = re.compile(r"(\\*)\$\{([^${}\\]*)(\})?")
_PATH = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")


def read_document(source: Path | str, origin: str | None = None, *, references: bool = True) -> Any:
    """The plain data in a YAML file (a `Path`) or text.

    Args:
        origin: what errors call it.
        references: replace references by what they stand for; False leaves them to `resolved`.

    Raises:
        ConfigError: it cannot be read, is no YAML, is larger than the limits, or refers to what is not in it.
    """
    name = origin or (str(source) if isinstance(source, Path) else "text")
    data = _parse(_bytes_of(source, name) if isinstance(source, Path) else _encoded(source), name)
    return resolved(data, name) if references else data


def read_value(text: str, origin: str) -> Any:
    """One value as YAML reads it, references left as they are: what stands behind a setting's `=`."""
    return _parse(_encoded(text), origin)


def write_document(data: Any) -> str:
    """YAML text that `read_document` reads back to equal data."""
    return yaml.dump(literal(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def literal(data: Any) -> Any:
    """The data with every `${` escaped, so that `resolved` gives it back unchanged."""
    if isinstance(data, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", data)
    if isinstance(data, Mapping):
        return {key: literal(value) for key, value in data.items()}
    return [literal(value) for value in data] if isinstance(data, list | tuple) else data


def resolved(data: Any, origin: str) -> Any:
    """The data with each reference replaced by what it stands for.

    Raises:
        ConfigError: a reference to nothing, to itself, or to anything but the document; too much data.
    """
    return _Resolver(data, origin).value(data, ())


def setting(text: str) -> tuple[list[str], Any]:
    """The key's path and the value of `a.b=c`.

    Raises:
        ConfigError: it has no key or no value (null is written out), or a value that is no YAML.
    """
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"override {shortened(text)!r} has no key and value; write it as key=value, such as seed=7")
    if not value.strip():
        raise ConfigError(f"override {shortened(text)!r} has no value; write {shortened(key)}=null where none is meant")
    return path, read_value(value, f"override {shortened(text)}")


def merged(base: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `later` on top: mappings are joined key by key, all else is replaced."""
    result = dict(base)
    for key, value in later.items():
        held = result.get(key)
        both = isinstance(held, Mapping) and isinstance(value, Mapping)
        result[key] = merged(held, value) if both else value  # type: ignore[arg-type]
    return result


def nested(path: list[str], value: Any) -> dict[str, Any]:
    """A mapping in which `path` leads to `value`."""
    for part in reversed(path):
        value = {part: value}
    return value


@as_in_yaml_1_2
class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads; no anchors, so equal parts are written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # of which the reader says what is wrong


def _bytes_of(path: Path, name: str) -> bytes:
    try:
        with open_regular(path) as stream:
            return stream.read(MOST_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from None


def _parse(text: bytes, name: str) -> Any:
    try:
        return parse_yaml(text)
    except Malformed as error:
        raise ConfigError(f"{name} is not valid YAML: {shortened(str(error), 300)}") from None


class _Resolver:
    """Replaces references in one document."""

    def __init__(self, root: Any, origin: str) -> None:
        self.root, self.origin = root, origin
        self.left, self.characters = MOST_NODES, 4 * MOST_YAML_BYTES

    def value(self, node: Any, following: tuple[str, ...]) -> Any:
        """`node` with its references replaced; `following`: the references that led here."""
        self.left -= 1
        if self.left < 0 or self.characters < 0:
            raise ConfigError(
                f"{self.origin}: the references write out more than {MOST_NODES:,} values or too much text"
            )
        if isinstance(node, Mapping):
            return {key: self.value(item, following) for key, item in node.items()}
        if isinstance(node, list | tuple):
            return [self.value(item, following) for item in node]
        if not isinstance(node, str) or "${" not in node:
            return node
        whole = _REFERENCE.fullmatch(node)
        if whole is not None and not whole[1]:
            return self._target(whole, following)
        text = _REFERENCE.sub(lambda found: self._part(found, following), node)
        self.characters -= len(text)
        return text

    def _part(self, found: re.Match, following: tuple[str, ...]) -> str:
        slashes = len(found[1])
        if slashes % 2:
            return "\\" * (slashes // 2) + found[0][slashes:]
        target = self._target(found, following)
        if isinstance(target, Mapping | list):
            raise ConfigError(f"{self.origin}: ${{{found[2]}}} is no text or number, and stands inside a text")
        return "\\" * (slashes // 2) + str(target)

    def _target(self, found: re.Match, following: tuple[str, ...]) -> Any:
        path = found[2]
        if found[3] is None or not _PATH.fullmatch(path):
            raise ConfigError(
                f"{self.origin}: {shortened(found[0].lstrip(chr(92)))!r} reaches outside the document: only ${{key}} and "
                "${section.key} of the same document are known; write \\${ for a plain ${"
            )
        if path in following or len(following) > MOST_DEPTH:
            raise ConfigError(f"{self.origin}: ${{{path}}} refers to itself; write the value")
        at = self.root
        for part in path.split("."):
            if isinstance(at, Mapping) and part in at:
                at = at[part]
            elif isinstance(at, list) and part.isdecimal() and int(part) < len(at):
                at = at[int(part)]
            else:
                raise ConfigError(f"{self.origin}: ${{{path}}} names nothing in the document; write the value")
        return self.value(at, (*following, path))
