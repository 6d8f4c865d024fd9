"""result.json, env.json, crashes.json and config.yaml: one writer and one reader each, checksummed, checked for types.

A JSON document carries `"checksum"`, the SHA-256 of its other content in canonical form, so it survives another
indentation and nothing else. Documents from before there were checksums are read as they are. A result also lists the
run's other files as they were when it was written (`"files"`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from altgrad.errors import ReportError
from altgrad.records.files import file_sha256, read_file, write_json, write_text
from altgrad.records.folders import read_bytes
from altgrad.records.metrics_log import METRICS, mark_of
from altgrad.records.schema import ExperimentResult, Verdict, as_number, jsonable
from altgrad.records.untrusted import Malformed, parse_json, parse_yaml

CONFIG, ENVIRONMENT, RESULT = "config.yaml", "env.json", "result.json"
CRASHES = "crashes.json"  # a sweep's record of a run whose process died


@dataclass(frozen=True)
class Document:
    """One document, read.

    Args:
        content: its values, without its checksum; empty where it is missing or damaged.
        problem: what is wrong with it, as a clause that names it; None where nothing is.
        sealed: whether it has a checksum.
    """

    content: Mapping[str, Any]
    problem: str | None = None
    sealed: bool = False


def read_json(path: Path) -> Document:
    """The object in a JSON document; a missing file is an empty document without a problem."""
    document = _read(path, parse_json)
    content = dict(document.content)
    checksum = content.pop("checksum", None)
    if document.problem is None and checksum is not None and checksum != _checksum(content):
        return Document({}, f"{path.name} does not match its checksum")
    return Document(content, document.problem, checksum is not None)


def read_result(path: Path) -> Document:
    """result.json, whose known fields have the types that a run writes; one that has others is damaged."""
    document = read_json(path)
    if "figures" in document.content:  # the former name of the field
        content = {("details" if key == "figures" else key): value for key, value in document.content.items()}
        document = replace(document, content=content)
    wrong = _wrong_type(document.content, _RESULT_KINDS)
    if wrong is None and document.content.get("verdict") is not None:
        wrong = _wrong_verdict(document.content["verdict"], "verdict")
    for place, remark in enumerate(document.content.get("remarks") or ()):
        wrong = wrong or _wrong_verdict(remark, f"remarks.{place}")
    return Document({}, f"{path.name}: {wrong}") if wrong else document


def read_config(path: Path) -> Document:
    """The mapping in a YAML file."""
    return _read(path, parse_yaml)


def write_environment(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write env.json, with its checksum."""
    write_json(folder / ENVIRONMENT, sealed(facts))


def write_config(folder: Path, text: str) -> None:
    """Write config.yaml."""
    write_text(folder / CONFIG, text)


def write_result(folder: Path, content: Mapping[str, Any]) -> None:
    """Write result.json, with its checksum and those of the run's other files: its presence says that all else is there."""
    files: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, ENVIRONMENT, METRICS):
        if (folder / name).exists():
            files[name] = {"sha256": file_sha256(folder / name)}
    if METRICS in files:
        files[METRICS]["lines"] = mark_of(read_file(folder / METRICS)).lines
    write_json(folder / RESULT, sealed({**content, "files": files}))


def load_result(folder: Path) -> ExperimentResult | None:
    """The result in a run folder, or None if there is none yet.

    Raises:
        ReportError: result.json is not what a run writes. OSError: there cannot be such a folder (a file is in its way).
    """
    with contextlib.suppress(FileNotFoundError):
        (folder / RESULT).stat()
    document = read_result(folder / RESULT)
    if document.problem is None and not document.content:
        return None
    known = _kinds_of(ExperimentResult)
    values = {key: _number_or_value(value) for key, value in document.content.items() if key in known}
    try:
        if document.problem is not None:
            raise TypeError(document.problem)
        return ExperimentResult(**values, run_dir=folder, already_finished=True)
    except TypeError as error:
        path = folder / RESULT
        raise ReportError(f"{path} is damaged ({error}); delete it and run the same command again") from None


def _read(path: Path, parse: Callable[[bytes], Any]) -> Document:
    try:
        content = parse(read_bytes(path))
    except FileNotFoundError:
        return Document({})
    except (OSError, Malformed) as error:
        return Document({}, f"{path.name} is unreadable: {error}")
    return (
        Document(content)
        if isinstance(content, dict)
        else Document({}, f"{path.name} holds no mapping of names to values")
    )


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON document with its checksum; numbers that are not finite become texts."""
    plain = jsonable({key: value for key, value in content.items() if key != "checksum"})
    return {**plain, "checksum": _checksum(plain)}


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _number_or_value(value: Any) -> Any:
    return as_number(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value


def _wrong_type(document: Mapping[str, Any], kinds: Mapping[str, str], prefix: str = "") -> str | None:
    """Says which known field has a value that no run writes there; None is a value everywhere."""
    for key, kind in kinds.items():
        value = document.get(key)
        words, fits = _FITS[kind]
        if value is not None and not fits(value):
            return f"{prefix}{key} is {_shown(value)}, where {words} belongs"
    return None


def _wrong_verdict(verdict: Any, where: str) -> str | None:
    """As `_wrong_type` of a verdict or remark, which must say of what kind it is and why."""
    if not isinstance(verdict, dict):
        return f"{where} is {_shown(verdict)}, where a mapping belongs"
    lacks = next((key for key in ("kind", "reason") if not isinstance(verdict.get(key), str)), None)
    return f"{where} has no {lacks}" if lacks else _wrong_type(verdict, _VERDICT_KINDS, f"{where}.")


def _kinds_of(row: type) -> dict[str, str]:
    """Field -> kind, the first word of its annotation."""
    kinds = {f.name: re.match(r"\w+", str(f.type))[0] for f in fields(row)}  # type: ignore[index]
    return {
        name: "str" if kind in ("Literal", "VerdictKind") else kind
        for name, kind in kinds.items()
        if name not in _NOT_WRITTEN
    }


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_NOT_WRITTEN = ("run_dir", "already_finished")
_FITS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number", lambda value: as_number(value) is not None),
    "str": ("text", lambda value: isinstance(value, str)),
    "dict": ("a mapping", lambda value: isinstance(value, dict)),
    "list": ("a list", lambda value: isinstance(value, list)),
}
_RESULT_KINDS = {**_kinds_of(ExperimentResult), "files": "dict"}
_VERDICT_KINDS = _kinds_of(Verdict)
