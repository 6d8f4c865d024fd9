"""Judges what came of a drawn call: the oracle's bits, a refusal, or a fault."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from altgrad import errors
from altgrad.errors import AltGradError
from altgrad.quantization.stats import EXACT_FIELDS, FIELDS, SUM_ERROR
from benchmarks.fuzz.calls import WRAPPED, Case, leaves
from benchmarks.fuzz.inputs import BAD, SOUND, Given


def judge(case: Case) -> tuple[str, str]:
    """(verdict, words): `bits`, `refused` or `shape` are right; `foreign`, `wrong`, `accepted`, `overrefused` are faults."""
    status = case.status
    expected, refusal = None, None
    if case.oracle is not None and status != BAD:
        try:
            expected = [leaf.detach().clone() for leaf in leaves(case.oracle()) if isinstance(leaf, Tensor)]
        except AltGradError as error:
            refusal = error
    before = {name: _bytes(argument) for name, argument in case.arguments.items() if name in ("x", "scale", "codes")}
    try:
        found = leaves(case.call())
    except BaseException as error:  # every exception but our own is what this program looks for
        if isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, AltGradError) or (case.transform == "compile" and _quotes_ours(error)):
            excused = status != SOUND or refusal is not None or case.oracle is None
            return ("refused", "") if excused else ("overrefused", f"{type(error).__name__}: {error}")
        return "foreign", f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"
    if status == BAD:
        return "accepted", "a bad argument was not refused"
    if refusal is not None and case.transform not in WRAPPED:
        return "accepted", f"the oracle refuses: {refusal}"
    for name, bits in before.items():
        out = case.arguments.get("out")
        apart = out is None or (out.status == SOUND and out.says != "out is x")
        if bits is not None and apart and _bytes(case.arguments[name]) != bits:
            return "wrong", f"{name} was written to"
    if expected is None or refusal is not None:
        return "shape", ""
    return _compare(case, found, expected)


def _quotes_ours(error: BaseException) -> bool:
    """Whether the compiler, which wraps what is raised while it traces, quotes an error of ours."""
    names = [
        kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AltGradError)
    ]
    quoted = f"{error} {error.__cause__}"
    return any(f"{said} {name}(" in quoted for name in names for said in (" got", "raised exception"))


def _bytes(argument: Given) -> bytes | None:
    value = argument.value
    if argument.plain is None or type(value) is not Tensor or argument.status != SOUND or value.numel() > 5000:
        return None
    flat = value.detach().resolve_neg().flatten().clone(memory_format=torch.contiguous_format)
    return flat.double().numpy().tobytes()


def _compare(case: Case, found: tuple, expected: list[Tensor]) -> tuple[str, str]:
    found = tuple(leaf.a if isinstance(leaf, TwoTensor) else leaf for leaf in found if isinstance(leaf, Tensor))
    if len(found) != len(expected):
        return "wrong", f"{len(found)} results for {len(expected)}"
    for place, (ours, right) in enumerate(zip(found, expected)):
        if ours.device.type == "meta" or case.arguments[next(iter(case.arguments))].plain is None:
            return "shape", ""
        ours = ours.detach().resolve_neg().as_subclass(Tensor)
        if ours.shape != right.shape or ours.dtype != right.dtype:
            return "wrong", f"result {place} is {ours.dtype} {list(ours.shape)} for {right.dtype} {list(right.shape)}"
        if right.dtype == torch.float64 and right.shape == (len(FIELDS),) and "stats" in case.name and place:
            fault = _statistics(ours.tolist(), right.tolist())
        else:
            fault = _bits(ours, right)
        if fault:
            return "wrong", f"result {place}: {fault}"
    return "bits", ""


def _bits(ours: Tensor, right: Tensor) -> str:
    same = ours == right
    if right.is_floating_point():
        same = (same & (torch.signbit(ours) == torch.signbit(right))) | (ours.isnan() & right.isnan())
    wrong = (~same).flatten().nonzero().flatten()
    if not len(wrong):
        return ""
    i = int(wrong[0])
    return f"{len(wrong)} of {right.numel()} differ, element {i}: {ours.flatten()[i].item()!r} for {right.flatten()[i].item()!r}"


def _statistics(ours: list[float], right: list[float]) -> str:
    for name, mine, theirs in zip(FIELDS, ours, right):
        exact = name in EXACT_FIELDS
        same = mine == theirs or (mine != mine and theirs != theirs)
        if not same and (exact or not abs(mine - theirs) <= SUM_ERROR * abs(theirs) + 1e-300):
            return f"{name} is {mine!r} for {theirs!r}"
    return ""
