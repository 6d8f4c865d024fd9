"""From a loop template and its constants to machine code: the one way in which loops are compiled.

A template is a plain function with free names: constants in capitals, which a frozen `Variant` (a NamedTuple of
numbers) and what follows from it fill in, and parts, which are compiled functions. `part` compiles a template for use in
others, `loop` to a C function that `jit.threads` runs by its address, `function` to a function that Python calls.

Machine code is compiled on first use and kept on disk by Numba, under a name that carries the variant and a stamp of
the sources: of the template's module and of all modules of this package that it imports, directly or not.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from numba import njit, types
from numba.core.ccallback import CFunc

from altgrad.jit.pipeline import LoopCache, LoopCompiler, PartCompiler

PACKAGE = __name__.partition(".")[0]

LOOP = types.int64(*[types.int64] * 5, types.float64, *[types.int64] * 7)
"""Every loop: (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop) -> flags."""

_OPTIONS = {"error_model": "numpy"}
_PART_OPTIONS = {
    **_OPTIONS,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": PartCompiler,
}
_kept: list = []  # compiled loops must outlive their addresses
_parts: dict[tuple, Any] = {}


class Plain(NamedTuple):
    """The variant of a template without constants."""


def bind(template: Callable, variant: NamedTuple, **bound: Any) -> FunctionType:
    """A copy of `template` that sees the variant's fields and `bound` as globals, under a name of its own."""
    label = "_".join(f"{k}{int(v)}" for k, v in variant._asdict().items()).lower()
    return _renamed(template, f"{template.__name__}_{label}_{stamp(template.__module__)}", variant._asdict() | bound)


def part(template: Callable, variant: NamedTuple, *, inline: bool = False, **bound: Any) -> Any:
    """`template` under these constants, compiled into whatever compiled function calls it.

    Variants that differ in nothing that the template names share one part. Its name tells what it was given: kept machine
    code of other processes may hold parts of the same template, and symbols of one name are taken for one function.
    """
    assert isinstance(template, FunctionType)
    seen = _names(template.__code__)
    given = {name: value for name, value in (variant._asdict() | bound).items() if name in seen}
    key = (template, inline, *given.items())
    if key not in _parts:
        told = [f"{name} {_told(value, variant)}" for name, value in given.items()]
        label = hashlib.sha256("\0".join([str(inline), *told]).encode()).hexdigest()[:12]
        named = _renamed(template, f"{template.__name__}_{label}_{stamp(template.__module__)}", given)
        _parts[key] = njit(forceinline=inline, **_PART_OPTIONS)(named)
    return _parts[key]


def _told(value: Any, variant: NamedTuple) -> str:
    """What tells a bound value apart: a number, the name of another part, or the variant that anything else follows from."""
    if isinstance(value, (int, float)):
        return repr(value)
    return value.py_func.__qualname__ if hasattr(value, "py_func") else f"{type(variant).__name__} {tuple(variant)}"


def inlined(plain: Callable) -> Any:
    """Decorator: a function compiled into whatever compiled function calls it, at the place of the call."""
    return njit(forceinline=True, **_PART_OPTIONS)(plain)


def called(plain: Callable) -> Any:
    """Decorator: as `inlined`, but the compiler chooses whether to copy it to the place of the call."""
    return njit(**_PART_OPTIONS)(plain)


def _names(code: CodeType) -> set[str]:
    """Global names that a function may refer to."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def loop(template: Callable, variant: NamedTuple, signature: Any = LOOP, **bound: Any) -> int:
    """Address of `template` as a C function, compiled or loaded from disk now.

    What is bound beside the variant must follow from it and the sources: only those tell kept machine code apart.
    """
    named = bind(template, variant, **bound)
    types_of = signature.args, signature.return_type

    def compiled_or_loaded(keep: bool) -> CFunc:
        made = CFunc(named, types_of, locals={}, options=_OPTIONS, pipeline_class=LoopCompiler)
        if keep:
            made._cache = LoopCache(named)
        made.compile()
        return made

    compiled = _kept_on_disk(compiled_or_loaded)
    _kept.append(compiled)
    return compiled.address


def function(
    signature: Any, *, parallel: bool = False, parts: Callable[[], dict[str, Any]] = dict
) -> Callable[[Callable], Callable[[], Callable]]:
    """Decorator: a call without arguments returns the function, compiled or loaded from disk the first time.

    parts: compiled functions that the plain one calls, by their names in it; made when it is compiled. What it returns
    takes arguments of the signature's types by position: Numba's entry to the machine code itself, which costs half of
    a call that first looks for a signature to fit the arguments.
    """

    def decorate(plain: Callable) -> Callable[[], Callable]:
        @cache
        def compiled() -> Callable:
            named = _renamed(plain, f"{plain.__name__}_{stamp(plain.__module__)}", parts())
            options = {"parallel": parallel, "nogil": True, "no_cfunc_wrapper": True, **_OPTIONS}

            def compiled_or_loaded(keep: bool) -> Any:
                made = njit(cache=keep and parallel, pipeline_class=LoopCompiler, **options)(named)
                if keep and not parallel:  # what Numba's threads need is loaded as Numba does
                    made._cache = LoopCache(named)
                made.compile(signature)
                made.disable_compile()
                return made

            made = _kept_on_disk(compiled_or_loaded)
            _kept.append(made)
            (found,) = made.overloads.values()
            return found.entry_point

        return compiled

    return decorate


def _renamed(plain: Callable, name: str, bound: dict[str, Any]) -> FunctionType:
    assert isinstance(plain, FunctionType)
    copy = FunctionType(plain.__code__, {**plain.__globals__, **bound}, name)
    copy.__qualname__ = name
    return copy


# -- sources ----------------------------------------------------------------------------------------------------------


@cache
def stamp(module: str) -> str:
    """A hash of the sources of a module and of all modules of this package that it imports, directly or not."""
    sources = _sources(module)
    return hashlib.sha256("\0".join(sources[name] for name in sorted(sources)).encode()).hexdigest()[:12]


def _sources(module: str) -> dict[str, str]:
    """Source by module name of everything that the machine code of a module's templates can come from."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name], imported = _read(name)
            waiting += imported
    return found


@cache
def _read(name: str) -> tuple[str, list[str]]:
    """(source, modules of this package imported at its top level) of a loaded module."""
    loader = getattr(sys.modules[name].__spec__, "loader", None)
    source = loader.get_source(name) if loader is not None else ""
    imported = []
    for statement in ast.parse(source or "").body:
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            imported += [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]
        elif isinstance(statement, ast.Import):
            imported += [alias.name for alias in statement.names]
    return source or "", [m for m in imported if m.partition(".")[0] == PACKAGE and m in sys.modules]


# -- the cache on disk ------------------------------------------------------------------------------------------------

_cache_refused = False
_compile_said = False


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let no cycles be collected: compiling makes so many objects that looking through all others costs a tenth of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def _kept_on_disk(compile_: Callable[[bool], Any]) -> Any:
    """compile_(True), or compile_(False) where Numba's cache folder cannot be written, which is said once."""
    global _cache_refused
    if not _cache_refused:
        try:
            made = compile_(True)
            _say_if_compiled(made)
            return made
        except OSError as error:
            reason = str(error)
        except RuntimeError as error:
            reason = str(error)
            if not reason.startswith("cannot cache function"):  # Numba found no folder that it may write
                raise
            reason = "no folder for it can be written"
        _cache_refused = True
        logging.getLogger(PACKAGE).warning(
            "compiled loops are not kept for the next process (%s); set NUMBA_CACHE_DIR to a writable folder",
            reason,
        )
    return compile_(False)


def _say_if_compiled(made: Any) -> None:
    """Log, at the first loop that was not found on disk, that this process compiles."""
    global _compile_said
    hits = made.stats.cache_hits if hasattr(made, "stats") else made.cache_hits
    if not _compile_said and not (sum(hits.values()) if isinstance(hits, dict) else hits):
        _compile_said = True
        logging.getLogger(PACKAGE).info(
            "compiling loops for this processor; they are kept, so only a first use waits for them"
        )
