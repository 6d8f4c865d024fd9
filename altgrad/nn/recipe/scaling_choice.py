"""Which scaling policy an operand has, by name or as a value: the policies of the numerics, and two that layers add."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from enum import Enum

from altgrad.errors import OptionError, RecipeError
from altgrad.formats.rounding import as_option
from altgrad.quantization import CurrentScaling, DelayedScaling, FloatFormat, NoScaling, StaticScaling
from altgrad.quantization.inverse_scaling import RegionScaling
from altgrad.quantization.scaling import Arithmetic


@dataclass(frozen=True)
class StorageScaling:
    """The scale of the stored weight: a weight that lies on the storage grid is used as it is."""


@dataclass(frozen=True)
class BlockScaling:
    """The scales that a block format (such as MXFP8) finds for each block by itself, and how others find them for it.

    Args:
        arithmetic: of formats with a tensor scale (NVFP4): divide, or multiply as Transformer Engine does.
        outer: of formats with a tensor scale, multiplied: the tensor's is one for every `outer` elements along the reduced
            axis, as in TetraJet-v2; 0: one for the tensor.
        deviation: of formats with E8M0 scales: a block's scale is 2^floor(log2(deviation * sigma + 1e-8)), sigma being its
            standard deviation, and elements beyond the largest value are clipped; nearest rounding takes ties to the
            smaller magnitude (Quartet's forward). 0: by the amax.
        gain: of formats with E8M0 scales: what elements are multiplied by before they are scaled, and divided by after;
            3/4 keeps `floor` from clipping (Quartet's backward).
    """

    arithmetic: Arithmetic = Arithmetic.DIVIDE
    outer: int = 0
    deviation: float = 0.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "arithmetic", as_option(Arithmetic, self.arithmetic))
        for name, low, high in (("deviation", 0.0, 64.0), ("gain", 2.0**-8, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise OptionError(f"{name} {value!r} is outside {low:g}..{high:g}")
            object.__setattr__(self, name, float(value))
        if isinstance(self.outer, bool) or not isinstance(self.outer, int) or not 0 <= self.outer <= 2**20:
            raise OptionError(f"outer {self.outer!r} is no number of elements; use 0 (one scale for the tensor) or 128")
        if self.deviation and self.gain != 1:
            raise OptionError(f"deviation {self.deviation:g} with gain {self.gain:g}: one of the two decides the scale")

    @property
    def own_scales(self) -> bool:
        """Whether scales follow a rule that is not the format's."""
        return bool(self.deviation) or self.gain != 1

    def check(self, fmt) -> None:
        """Refuse a format that this does not fit.

        Raises:
            RecipeError: with the reason.
        """
        if self.arithmetic is Arithmetic.MULTIPLY and not fmt.tensor_scale:
            raise RecipeError(
                f'{fmt.name}: arithmetic="multiply" is for formats with a scale of the tensor above those of blocks (NVFP4); '
                "powers of two divide and multiply alike"
            )
        if self.outer and (self.arithmetic is not Arithmetic.MULTIPLY or fmt.is_tile or self.outer % fmt.tile[1]):
            raise RecipeError(
                f"{fmt.name} with outer={self.outer}: scales of {self.outer} elements stand above multiplied blocks along one "
                "axis that divide them; use NVFP4(block(arithmetic='multiply',outer=128))"
            )
        if self.own_scales and (not fmt.power_of_two or fmt.is_tile):
            raise RecipeError(
                f"{fmt.name}: deviation and gain are for blocks along one axis under E8M0 scales, such as MXFP4"
            )


Scaling = CurrentScaling | DelayedScaling | RegionScaling | StaticScaling | NoScaling | StorageScaling | BlockScaling

SCALINGS: dict[str, type] = {
    "amax": CurrentScaling,
    "delayed": DelayedScaling,
    "regions": RegionScaling,
    "static": StaticScaling,
    "none": NoScaling,
    "storage": StorageScaling,
    "block": BlockScaling,
}
_NAMES = {policy: name for name, policy in SCALINGS.items()}


def is_block(fmt) -> bool:
    """Whether `fmt` is a block format: an element format whose blocks carry scales of their own."""
    return fmt is not None and not isinstance(fmt, FloatFormat)


def default_scaling(fmt) -> Scaling:
    """Current amax; the block's own for block formats; scale 1 for formats with the range of float32 (BF16, TF32)."""
    if is_block(fmt):
        return BlockScaling()
    return NoScaling() if fmt.emax >= 127 else CurrentScaling()


def as_scaling(value, fmt) -> Scaling:
    """A policy from a policy, a name, a mapping {"policy": name, ...arguments}, or None (the format's default).

    Raises:
        RecipeError: no such policy or argument, or a policy that does not fit the kind of format.
    """
    if value is None:
        value = default_scaling(fmt)
    if isinstance(value, str):
        value = default_scaling(fmt) if value == "amax" else {"policy": value}
    if isinstance(value, dict):
        value = _from_mapping(value)
    if not isinstance(value, tuple(_NAMES)):
        raise RecipeError(
            f"scaling {value!r} is no scaling policy; use one of {', '.join(SCALINGS)}, or a policy object"
        )
    if is_block(fmt) != isinstance(value, BlockScaling):
        raise RecipeError(
            f"{fmt.name} with {type(value).__name__}: block formats, and only those, find their own block scales; "
            "leave scaling out"
        )
    if isinstance(value, BlockScaling):
        value.check(fmt)
    return value


def is_foreign(policy: Scaling | None) -> bool:
    """Whether scales or their arithmetic are those of a library, and not the kernels' own."""
    return multiplies(policy) or (isinstance(policy, BlockScaling) and policy.own_scales)


def multiplies(policy: Scaling | None) -> bool:
    """Whether x is multiplied by an inverse scale that is found first, instead of divided by the scale."""
    return isinstance(policy, RegionScaling) or getattr(policy, "arithmetic", None) is Arithmetic.MULTIPLY


def _from_mapping(mapping: dict) -> Scaling:
    arguments = dict(mapping)
    name = arguments.pop("policy", None)
    if name not in SCALINGS:
        raise RecipeError(f"scaling policy {name!r} is not one of {', '.join(SCALINGS)}")
    known = {f.name: f for f in fields(SCALINGS[name])}
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise RecipeError(f"scaling {name!r} has no argument {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    missing = [n for n, f in known.items() if f.default is MISSING and n not in arguments]
    if missing:
        raise RecipeError(f"scaling {name!r} needs {', '.join(missing)}; write {{policy: {name}, {missing[0]}: ...}}")
    if isinstance(arguments.get("axis"), list):
        arguments["axis"] = tuple(arguments["axis"])
    try:
        return SCALINGS[name](**arguments)
    except OptionError as error:
        raise RecipeError(f"scaling {name!r}: {error}") from None


def scaling_to_config(policy: Scaling) -> str | dict:
    """The policy as plain data that `as_scaling` reads back: its name, or a mapping where arguments differ."""
    name = _NAMES[type(policy)]
    changed = {f.name: getattr(policy, f.name) for f in fields(policy) if getattr(policy, f.name) != f.default}
    changed = {
        key: list(value) if isinstance(value, tuple) else value.value if isinstance(value, Enum) else value
        for key, value in changed.items()
    }
    return {"policy": name, **changed} if changed or name == "amax" else name


def scaling_label(policy: Scaling) -> str:
    """Short form for printing, such as amax(axis=0)."""
    config = scaling_to_config(policy)
    if isinstance(config, str):
        return config
    arguments = ",".join(f"{key}={value!r}" for key, value in config.items() if key != "policy")
    return config["policy"] + (f"({arguments})" if arguments else "")
