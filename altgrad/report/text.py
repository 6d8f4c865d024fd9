"""Text on its way out: roles by the words that all pages share; names, paths and messages made harmless for a terminal,
Markdown and a spreadsheet; any text made printable where the encoding is narrow or the stream closed.

HTML needs none of this: the templates escape by themselves.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from itertools import takewhile

SYMBOLS = {"input": "x", "weight": "w", "grad_output": "dy"}
"""How the operands of a layer's products are written on pages and in a terminal."""

_TO_A_JOINT, _FROM_A_JOINT = re.compile(r"(?<=[\s._/])\w{1,12}$"), re.compile(r"^\w{1,12}?[\s._/]")
_MARKDOWN = re.compile(r"[`\[\]]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")  # what CommonMark reads as HTML
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_UNITS = "us|ms|s|min|h|MB|GB|bits?|nats?|steps?|runs?|seeds?|forks?|jobs?|tokens?|parameters"
_TOGETHER = re.compile(
    rf"(?<=\d) (?=(?:{_UNITS})\b)|(?<= min) (?=\d)|(?<= h) (?=\d)|(?<=\bstep) (?=\d)|(?<=\bsteps) (?=\d)|(?<=\bto) (?=[-+]\d)"
)
_BREAKS = re.compile(r"[\s,;:(]+")
_KEPT = "\ue000"
"""A blank at which no line is broken, while lines are made."""

_PLAIN = dict(zip("▁▂▃▄▅▆▇█–—−·×…\u202f∞", [*".:-=+*%#---.x. ", "inf"], strict=True))


def mend_streams() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is printed in ASCII; a closed one drops what it is told."""
    codecs.register_error("plain", _plainly)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="plain")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lacking), error.end


def role_words(role: str) -> str:
    """A role in words: "input x", "weight w", "gradient dy"; the update and the gradient of a weight as they are."""
    return {"input": "input x", "weight": "weight w", "grad_output": "gradient dy"}.get(role, role.replace("_", " "))


def shortened(text: object, longest: int = 120) -> str:
    """`text` with its middle left out, at joints of its words where some are near, where it is longer than `longest`."""
    said = str(text)
    if len(said) <= longest:
        return said
    kept = (longest - 5) // 2
    head, tail = _TO_A_JOINT.sub("", said[:kept]), _FROM_A_JOINT.sub("", said[-kept:])
    return f"{head.rstrip()} ... {tail.lstrip()}"


def told_apart(names: Sequence[str], longest: int = 24) -> tuple[list[str], str]:
    """`names` short enough to stand beside a chart, distinct ones still distinct; and what a leading "…" stands for, or "".

    Where some are longer than `longest`, the dotted beginning that these share is left out of all that have it. What is then
    still longer loses its middle, as little of it as keeps all of them distinct.

    >>> told_apart(["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"])
    (['lm_head', '…self_attn.q_proj', '…mlp.up_proj'], 'model.layers.0.')
    """
    too_long = [name.split(".")[:-1] for name in names if len(name) > longest]
    start = "".join(
        f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, zip(*too_long, strict=False))
    )
    began = [f"…{name.removeprefix(start)}" if start and name.startswith(start) else name for name in names]
    return _shortest_distinct(began, longest, without_middle), start


def kept_apart(names: Sequence[str], longest: int = 36) -> list[str]:
    """`names` of at most `longest` characters beside a chart, distinct ones still distinct (where that takes more, longer): of a
    longer one is kept what tells it from the others, at the end of what it shares with any of them.

    >>> kept_apart(["te_current", "x:E4M3 w:E4M3 dy:E5M2 sum:TF32; head: FP32", "x:E4M3 w:E4M3 dy:E5M2 sum:BF16; head: FP32"], 24)
    ['te_current', 'x:E4M3…TF32; head: FP32', 'x:E4M3…BF16; head: FP32']
    """
    distinct = list(dict.fromkeys(names))
    others = {name: [other for other in distinct if other != name] for name in distinct}
    return _shortest_distinct(names, longest, lambda name, most: _around_difference(name, others[name], most))


def _shortest_distinct(names: Sequence[str], longest: int, cut: Callable[[str, int], str]) -> list[str]:
    """`names`, each as `cut` makes it of at most `longest` characters, or of as few more as keep distinct ones distinct."""
    for most in range(longest, max(map(len, names), default=0) + 1):
        made = [cut(name, most) for name in names]
        if len(set(made)) == len(set(names)):
            return made
    return list(names)


def _around_difference(name: str, others: Sequence[str], longest: int) -> str:
    if len(name) <= longest:
        return name
    shared = max((_common(name, other) for other in others), default=0)
    if shared < longest - 6:  # its beginning tells it
        return f"{name[: longest - 1].rstrip(' ,;')}…"
    head = name[: longest // 4 + 1].rpartition(" ")[0] or name[: longest // 4]
    begins = max((found.end() for found in _BREAKS.finditer(name, 0, shared)), default=shared)
    room = longest - len(head) - 1
    tail = name[begins:]
    return f"{head}…{tail if len(tail) <= room else tail[: room - 1].rstrip(' ,;') + '…'}"


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def without_middle(name: str, longest: int) -> str:
    """A name of at most `longest` characters: two thirds of them are its end, where names mostly differ."""
    head = longest // 3
    return name if len(name) <= longest else f"{name[:head]}…{name[len(name) - (longest - head - 1) :]}"


def wrapped(text: str, width: int, hang: int = 0) -> str:
    """`text` in lines of at most `width` characters, broken between words; a figure stays beside its unit, and a name or path in
    one piece, even where it is longer than a line.

    Args:
        hang: how much further in than its first line each line's others begin.

    >>> print(wrapped("  E7M0 froze at step 114 of 200", 24, hang=2))
      E7M0 froze at step 114
        of 200
    """
    lines = []
    for line in text.split("\n"):
        begins = line[: len(line) - len(line.lstrip(" "))]
        made = textwrap.wrap(
            _TOGETHER.sub(_KEPT, line.strip(" ")),
            max(width, len(begins) + hang + 20),
            initial_indent=begins,
            subsequent_indent=begins + " " * hang,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [one.replace(_KEPT, " ") for one in made] or [""]
    return "\n".join(lines)


def for_terminal(text: object) -> str:
    """`text` without control characters: no escape sequence reaches the terminal. Line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or not _controls(c) else f"\\x{ord(c):02x}" for c in str(text))


def for_markdown(text: object) -> str:
    """`text` on one line of Markdown, where it makes no HTML, link, image or code; bars are escaped by tables."""
    line = for_terminal(text).replace("\n", " ")
    return _TAG.sub("&lt;", _MARKDOWN.sub(lambda found: "\\" + found[0], line))


def for_code_block(text: object) -> str:
    """`text` inside a fenced block of Markdown, which it cannot end."""
    return for_terminal(text).replace("```", "` ` `")


def for_spreadsheet(value: object) -> object:
    """A cell's value; text that a spreadsheet would run as a formula gets a leading apostrophe. Numbers stay."""
    if not isinstance(value, str):
        return value
    text = for_terminal(value)
    return f"'{text}" if text.startswith(_FORMULA) and len(text) > 1 and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _controls(character: str) -> bool:
    """C0, C1, and the marks that turn the direction of text; half a surrogate pair cannot be encoded."""
    return (
        unicodedata.category(character) in ("Cc", "Cs")
        or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )
