"""What each intervention of `mechanism.CHANGES` does to the formats of a cell.

A change is a function of a spec that returns another spec, or says in a few words why it does not apply: then the
intervention is not made, which is not the same as one that did not help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from altgrad.errors import FormatError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import block_format, generic_format, get_format
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat, Specials
from altgrad.nn.recipe.scaling_choice import BlockScaling, CurrentScaling, default_scaling
from altgrad.nn.recipe.spec import OperandSpec, StorageSpec

Spec = OperandSpec | StorageSpec


class NotApplicable(Exception):
    """The change has nothing to change on this spec; the message says why."""


def widened(fmt: FloatFormat, exponent: int = 0, mantissa: int = 0) -> FloatFormat:
    """The format with more exponent or mantissa bits.

    A new exponent bit extends the range by the same number of binades at both ends (bias + 2^(e-1), which is the IEEE
    rule for formats that follow it); a new mantissa bit leaves the exponents where they are. Special codes stay.
    """
    specials = Specials.NONE if fmt.twos_complement else fmt.specials
    if exponent and fmt.bias is None:  # E0M7 is the grid of E1M6, which becomes E2M6: twice the max, half the step
        return generic_format(2, fmt.mantissa_bits - 1 + mantissa, 3, specials)
    bias = fmt.bias if not exponent or fmt.bias is None else fmt.bias + 2 ** (fmt.exponent_bits - 1)
    return generic_format(fmt.exponent_bits + exponent, fmt.mantissa_bits + mantissa, bias, specials)


def _with_format(spec: Spec, alter: Callable[[FloatFormat], FloatFormat]) -> Spec:
    try:
        return _altered(spec, alter)
    except FormatError as error:
        raise NotApplicable(f"no such format: {str(error).split(';')[0]}") from None


def _altered(spec: Spec, alter: Callable[[FloatFormat], FloatFormat]) -> Spec:
    assert spec.format is not None
    fmt = get_format(spec.format)
    if isinstance(fmt, BlockFormat):
        wider = block_format(alter(fmt.element), fmt.block, fmt.scale_format, fmt.rule, tensor_scale=fmt.tensor_scale)
        return replace(spec, format=wider.name)
    wider = alter(fmt)
    if isinstance(spec, OperandSpec) and spec.scaling == default_scaling(fmt):
        return replace(spec, format=wider.name, scaling=default_scaling(wider))
    return replace(spec, format=wider.name)


def _exponent(spec: Spec) -> Spec:
    return _with_format(spec, lambda fmt: widened(fmt, exponent=1))


def _mantissa(spec: Spec) -> Spec:
    return _with_format(spec, lambda fmt: widened(fmt, mantissa=1))


def _stochastic(spec: Spec) -> Spec:
    if spec.rounding is Rounding.STOCHASTIC:
        raise NotApplicable("it rounds stochastically")
    return replace(spec, rounding=Rounding.STOCHASTIC, random_bits=24)


def _nearest(spec: Spec) -> Spec:
    if spec.rounding is Rounding.NEAREST_EVEN:
        raise NotApplicable("it rounds to nearest even")
    return replace(spec, rounding=Rounding.NEAREST_EVEN, random_bits=24)


def _fresh_scale(spec: Spec) -> Spec:
    if isinstance(spec, StorageSpec):
        if spec.scale is None:
            raise NotApplicable("its scale follows the weights")
        return replace(spec, scale=None, refresh_every=1)
    if isinstance(spec.scaling, CurrentScaling | BlockScaling):
        raise NotApplicable("its scale is the tensor's own")
    return replace(spec, scaling=CurrentScaling(), mask_saturated=False)


def _fine_blocks(spec: Spec) -> Spec:
    if isinstance(spec, StorageSpec):
        if spec.per_channel:
            raise NotApplicable("each channel has a scale")
        return replace(spec, per_channel=True, scale=None)
    assert spec.format is not None
    fmt = get_format(spec.format)
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    if isinstance(fmt, BlockFormat) and fmt.block_elements <= 16:
        raise NotApplicable("its blocks are as small")
    finer = block_format(element, 16, "E8M0", "ceil")
    return replace(spec, format=finer.name, scaling=BlockScaling(), mask_saturated=False, subnormals=True)


def _saturate(spec: Spec) -> Spec:
    if isinstance(spec, StorageSpec) or spec.overflow not in (Overflow.NATIVE, Overflow.INF, Overflow.NAN):
        raise NotApplicable("it saturates")
    fmt = get_format(spec.format or "FP32")
    if spec.overflow is Overflow.NATIVE and not getattr(fmt, "has_inf", False):
        raise NotApplicable("it saturates")
    return replace(spec, overflow=Overflow.SATURATE)


CHANGES: dict[str, Callable[[Spec], Spec]] = {
    "exponent": _exponent,
    "mantissa": _mantissa,
    "stochastic": _stochastic,
    "nearest": _nearest,
    "fresh_scale": _fresh_scale,
    "fine_blocks": _fine_blocks,
    "saturate": _saturate,
}
"""By name; `master` and `half_lr` are no changes of a spec and are made by the oracle."""
