"""The process around a command: a person's mistake, a full disk or a closed pipe ends in one line on stderr, never in a
traceback."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import typer

from altgrad.cli.usage import UsageError, usage_text
from altgrad.errors import AltGradError, os_error_text
from altgrad.report.text import for_terminal, mend_streams


def carried_out(app: typer.Typer) -> NoReturn:
    """Runs the command that `sys.argv` names, and exits with its code; 2 for a mistake, 130 for Ctrl-C."""
    mend_streams()
    warnings.showwarning = lambda message, *_: _tell(f"warning: {message}")
    sys.unraisablehook = _interrupt_again
    _show_log()
    _wait_briefly()
    try:
        try:
            code = app(standalone_mode=False)
        finally:
            sys.stdout.flush()
    except AltGradError as error:
        _fail(str(error))
    except UsageError as error:
        _refuse(error, app)
    except BrokenPipeError:
        _end_with_its_reader()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # click has met it before us, and exits with 1
            _end_with_its_reader()
        raise
    except OSError as error:
        _fail(f"{os_error_text(error)}. What was written before is whole; the same command goes on from there.")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail("there is not enough memory for that; make the model, the batch or the context smaller, or free some")
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", 130)
    if code == 130:  # how Typer passes on Ctrl-C
        _fail("stopped", 130)
    sys.exit(code)


def _interrupt_again(dropped: Any) -> None:
    """Ctrl-C that hits a callback of the interpreter's own (a weak reference's, a `__del__`) is dropped there, with a traceback:
    let it hit once more, outside."""
    if isinstance(dropped.exc_value, KeyboardInterrupt) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # by then this hook, where it would be dropped as well, has ended
    else:
        sys.__unraisablehook__(dropped)


def _refuse(error: Any, app: typer.Typer) -> NoReturn:
    """What the parser could not take; nothing at all is answered with help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    _fail(usage_text(error, app, sys.argv[1:]))


def _show_log() -> None:
    """What the package logs goes to stderr, as one line each: a first compilation, a cache that cannot be written."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _tell(record.getMessage())

    log = logging.getLogger("altgrad")
    log.handlers, log.propagate, log.level = [Lines()], False, logging.INFO


SPINS = "300"
"""Looks of a waiting OpenMP thread before it sleeps: a few microseconds. libgomp's own 300,000 are milliseconds; `python -m
benchmarks.bench_load` compares the two."""


def _wait_briefly() -> None:
    """Before torch is loaded: GNU OpenMP's threads spin for milliseconds by default, which beside busy programs costs
    several times the work itself; whoever has said how they are to wait is left to it."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _is_out_of_memory(error: Exception) -> bool:
    """Also as torch says it, of the CPU and of a GPU; a size that no machine can have is one, too."""
    said = str(error)
    return isinstance(error, MemoryError) or any(
        words in said for words in ("allocate memory", "out of memory", "size calculation overflowed")
    )


def _fail(message: str, code: int = 2) -> NoReturn:
    _forget_output()
    _tell(message)
    sys.exit(code)


def _tell(line: str) -> None:
    """On stderr, where there is one."""
    from altgrad.report.text import shortened

    with contextlib.suppress(OSError):
        print(f"altgrad: {for_terminal(shortened(line, 4000))}", file=sys.stderr)


def _end_with_its_reader() -> NoReturn:
    """Whoever read our output has gone: end as a shell's commands do."""
    _forget_output()
    sys.exit(128 + signal.SIGPIPE)


def _forget_output() -> None:
    """Drop what could not be printed: the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
