"""What the parser of commands cannot take (an unknown option, a missing argument, a value of the wrong kind), said as every
other mistake is: the value, the limit and the remedy, in one line.

Typer's own words for it change from version to version; what is read here every version keeps in its errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer

from altgrad.errors import OptionError

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The parser's errors; Typer exports the one of wrong values alone."""


def at_least(option: str, given: float | None, least: int) -> None:
    """Refuse a number below `least`, and NaN; None is what was not given."""
    if given is not None and not (math.isfinite(given) and given >= least):
        raise OptionError(f"{option} {given:g}; use at least {least}")


def usage_text(error: Any, app: typer.Typer, given: Sequence[str]) -> str:
    """One line on a `UsageError`.

    Args:
        error: as the parser raised it; some know no command.
        given: the words of the command line.
    """
    group: Any = typer.main.get_command(app)
    command = error.ctx.command if error.ctx else group.commands.get(next(filter(group.commands.get, given), ""), group)
    whole = hasattr(command, "commands")
    name = str(command.name)
    if hasattr(error, "possibilities"):
        begun = "there is" if whole else f"{name} has"
        return f"{begun} no option {error.option_name}; {_instead_of_option(error.option_name, command, group)}"
    if hasattr(error, "option_name"):
        return _without_its_value(error.option_name, command)
    if hasattr(error, "param_type"):
        return f"{name} needs {_called(error.param)}: {_of(error.param)}"
    if getattr(error, "param", None) is not None:
        return _wrong_value(error)
    said = " ".join(error.format_message().split())
    if whole and (word := re.search("'(.*?)'", said)):
        return f"there is no command {word[1]}; {_instead_of_command(word[1], group)}"
    if word := re.search(r"\(([^()]*)\)$", said):
        return f"{name} takes {_arguments(command)}; leave out {word[1]}"
    return said


def _instead_of_option(given: str, command: Any, group: Any) -> str:
    """A like option, else a setting or a command of that name, else the options that there are."""
    word, options = given.lstrip("-").replace("_", "-"), _options(command)
    near = get_close_matches(word, [option.lstrip("-") for option in options], n=1, cutoff=0.6)
    if near:
        return f"did you mean --{near[0]}?"
    if hasattr(command, "commands") and (near := get_close_matches(word, group.commands, n=1, cutoff=0.6)):
        return f"did you mean altgrad {near[0]}?"
    there = f"options are {', '.join([*options, '--help'])}"
    if not any(param.name == "overrides" for param in command.params):
        return there
    from altgrad.training.config.loading import nearest_key

    key = nearest_key(word.replace("-", "_"))
    return f"a setting is written {key}=VALUE, without dashes" if key else f"{there}, and settings such as seed=7"


def _options(command: Any) -> list[str]:
    """The long names of a command's own options."""
    own = [param for param in command.params if param.param_type_name == "option" and "completion" not in param.name]
    return [name for param in own for name in (*param.opts, *param.secondary_opts) if name.startswith("--")]


def _instead_of_command(given: str, group: Any) -> str:
    near = get_close_matches(given.lower(), group.commands, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"commands are {', '.join(group.commands)}"


def _without_its_value(given: str, command: Any) -> str:
    """Of an option that lacks its value, or of a switch that was given one."""
    param = next((param for param in command.params if given in (*param.opts, *param.secondary_opts)), None)
    if param is None or getattr(param, "is_flag", False):
        return f"{given} is a switch and takes no value; write {given} alone"
    return f"{given} needs a value: {_of(param)}"


def _wrong_value(error: Any) -> str:
    """Of a number that is none, the only kind of value that the parser itself refuses."""
    fault = error.__cause__
    inputs = [one["input"] for one in fault.errors()] if hasattr(fault, "errors") else []
    given = str(inputs[0]) if inputs else error.message.partition("'")[2].rpartition("'")[0]
    kind = "whole number" if "integer" in error.message else "number"
    return f"{_called(error.param)} {given or 'of nothing'} is no {kind}: {_of(error.param)}"


def _called(param: Any) -> str:
    """--steps of an option, CONFIG of an argument."""
    return max(param.opts, key=len) if param.param_type_name == "option" else (param.metavar or param.name).upper()


def _of(param: Any) -> str:
    """What a parameter is, as its help says it, in the middle of a sentence."""
    said = (param.help or "").removesuffix(".")
    return said if said[1:2].isupper() else said[:1].lower() + said[1:]


def _arguments(command: Any) -> str:
    named = [_called(param) for param in command.params if param.param_type_name == "argument"]
    return f"{' and '.join(named)} and no more" if named else "options alone"
