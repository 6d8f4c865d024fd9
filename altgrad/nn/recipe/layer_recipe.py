"""The recipe of one layer: the operands of its three GEMMs and its stored weight, which must agree; and its short form."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from altgrad.errors import OptionError, RecipeError
from altgrad.formats.accumulator import Accumulator
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.nn.recipe.scaling_choice import DelayedScaling, StorageScaling, is_block, is_foreign
from altgrad.nn.recipe.spec import GEMMS, REDUCED, GemmRecipe, OperandSpec, StorageSpec, grid_of
from altgrad.quantization import FloatFormat, get_format
from altgrad.quantization.accumulation import check_accumulator
from altgrad.quantization.hadamard import Signs
from altgrad.quantization.inverse_scaling import RegionScaling


@dataclass(frozen=True)
class LayerRecipe:
    """The formats of one layer.

    Args:
        forward, input_grad, weight_grad: the operands of the three GEMMs.
        storage: grid of the stored weight; None keeps a float32 master weight that is quantized at use.
        norm_weight: the weight of a normalisation layer, quantized at use.
        plain_evaluation: in evaluation mode the layer computes in full precision.
        save_codes: tensor cores' operands of at most 8 bits are kept for the backward as codes, which it decodes, instead of
            as bf16: half the memory, one launch more for each, the same bits. Elsewhere than on GPUs codes are kept anyhow.

    Raises:
        RecipeError: a GEMM names an operand that it does not multiply, or storage and operands contradict one another.
    """

    forward: GemmRecipe
    input_grad: GemmRecipe
    weight_grad: GemmRecipe
    storage: StorageSpec | None = None
    norm_weight: OperandSpec = field(default_factory=OperandSpec)
    plain_evaluation: bool = False
    save_codes: bool = False

    def __post_init__(self) -> None:
        for name in ("plain_evaluation", "save_codes"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} {getattr(self, name)!r} is neither true nor false")
        for gemm, roles in GEMMS.items():
            named = sorted(role for role, _ in getattr(self, gemm).named())
            if named != sorted(roles):
                raise RecipeError(
                    f"{gemm} names {', '.join(named) or 'nothing'}; its operands are {' and '.join(roles)}"
                )
        for gemm, role, spec in self.entries():
            if role == "grad_output" and spec.mask_saturated:
                raise RecipeError(f"{gemm}.grad_output: mask_saturated acts on input and weight operands only")
            if isinstance(spec.scaling, StorageScaling):
                self._check_storage_scaling(gemm, role, spec)
            elif role == "weight" and self.storage is not None and spec.format == self.storage.format:
                raise RecipeError(
                    f"{gemm}.weight is {spec} with its own scaling, but storage is {self.storage}: the weight would be "
                    'rounded to two different grids; use scaling="storage" for it'
                )
            if spec.requantize and (gemm, role) not in (("input_grad", "weight"), ("weight_grad", "input")):
                raise RecipeError(
                    f"{gemm}.{role}: only the weight of input_grad and the input of weight_grad were quantized before, "
                    "by the forward; drop requantize"
                )
            if spec.requantize and getattr(self.forward, role).format is None:
                raise RecipeError(f"{gemm}.{role} is requantized, but forward.{role} has no format; drop requantize")
            if spec.average is not None and (gemm, role) != ("forward", "weight"):
                raise RecipeError(f"{gemm}.{role}: an average of the master is the forward weight's; drop ema here")
        if self.norm_weight.average is not None:
            raise RecipeError("norm_weight: an average of the master is the forward weight's; drop ema here")
        for gemm in GEMMS:
            self._check_gemm(gemm)
        if self.save_codes and self.is_emulated:
            raise RecipeError(
                f"{self}: the arithmetic of a unit or a library keeps what it multiplies itself; drop save_codes"
            )

    def _check_gemm(self, gemm: str) -> None:
        """What the two operands of a GEMM must agree on."""
        one: GemmRecipe = getattr(self, gemm)
        (left, a), (right, b) = one.named()
        if a.hadamard != b.hadamard:
            raise RecipeError(
                f"{gemm}: {left} is mixed by {a.hadamard}, {right} by {b.hadamard}; both operands need the same transform"
            )
        again = self.weight_grad.input, self.input_grad.weight
        masked = a.mask_saturated or b.mask_saturated
        if (
            a.hadamard is not None
            and gemm == "forward"
            and masked
            and not all(spec and spec.requantize for spec in again)
        ):
            raise RecipeError(
                "forward: a mask of saturated elements means nothing in mixed ones, unless both gradients are made of those "
                "(requantized); drop one of them"
            )
        if one.accumulator is None:
            return
        for role, spec in ((left, a), (right, b)):
            if spec.format is None:
                raise RecipeError(
                    f"{gemm} has accumulator {one.accumulator}, and {role} no format; products are added up as a unit "
                    "does for operands of its formats only"
                )
            _check_sum(gemm, role, spec, one.accumulator)
        if one.accumulator.by_unit and (a.format, b.format) not in _OF_FP8_UNIT:
            raise RecipeError(
                f"{gemm} under accumulator {one.accumulator} has {a.format} and {b.format}; that unit multiplies E4M3 by E4M3 "
                "or E5M2; give an emulated accumulator such as hopper_fp8_promoted for others"
            )
        try:
            check_accumulator(one.accumulator, *(grid_of(spec.resolved) for spec in (a, b)))
        except OptionError as error:
            raise RecipeError(f"{gemm}: {error}") from None

    def _check_storage_scaling(self, gemm: str, role: str, spec: OperandSpec) -> None:
        if role != "weight" or self.storage is None or spec.format != self.storage.format:
            raise RecipeError(
                f'{gemm}.{role} ({spec.format}) has scaling="storage", which is for weights stored on a grid of the '
                f"same format; storage is {self.storage or 'master'}"
            )

    def entries(self):
        """(GEMM, role, spec) of the six operands."""
        for gemm, roles in GEMMS.items():
            for role in roles:
                yield gemm, role, getattr(getattr(self, gemm), role)

    @property
    def quantizes_products(self) -> bool:
        """Whether any operand or the storage has a format."""
        return self.storage is not None or any(spec.format is not None for _, _, spec in self.entries())

    @property
    def needs_steps(self) -> bool:
        """Whether something changes from step to step: stochastic keys, delayed scales, or grid storage."""
        specs = [spec for _, _, spec in self.entries()] + [self.norm_weight]
        return (
            self.storage is not None
            or self.mixes_at_random
            or any(
                spec.rounding is Rounding.STOCHASTIC
                or isinstance(spec.scaling, DelayedScaling | RegionScaling)
                or spec.average is not None
                for spec in specs
            )
        )

    @property
    def mixes_at_random(self) -> bool:
        """Whether a transform draws its signs."""
        return any(spec.hadamard is not None and spec.hadamard.signs is Signs.RANDOM for _, _, spec in self.entries())

    @property
    def gemms(self) -> dict[str, GemmRecipe]:
        """The three GEMMs by name."""
        return {gemm: getattr(self, gemm) for gemm in GEMMS}

    @cached_property
    def is_emulated(self) -> bool:
        """Whether it asks for the arithmetic of a library or a unit that is not a GEMM of quantized operands in float32."""
        return any(one.accumulator is not None for one in self.gemms.values()) or any(
            spec.hadamard is not None or spec.requantize or spec.average is not None or is_foreign(spec.scaling)
            for _, _, spec in self.entries()
        )

    @cached_property
    def by_unit(self) -> bool:
        """Whether a GPU's own FP8 unit adds up all products, of operands that need nothing else emulated."""
        return all(one.accumulator is not None and one.accumulator.by_unit for one in self.gemms.values()) and not any(
            spec.hadamard is not None or spec.requantize or is_foreign(spec.scaling) or not spec.subnormals
            for _, _, spec in self.entries()
        )

    def __str__(self) -> str:
        """One line that `altgrad.nn.recipe.text` reads back to an equal recipe."""
        by_role: dict[str, list[OperandSpec]] = {"input": [], "weight": [], "grad_output": []}
        for _, role, spec in self.entries():
            if by_role[role] != [spec]:
                by_role[role].append(spec)
        short = {"input": "x", "weight": "w", "grad_output": "dy"}
        text = " ".join(f"{short[role]}:{'|'.join(map(str, specs))}" for role, specs in by_role.items())
        text += f" {self.storage}" if self.storage else ""
        text += f" norm:{self.norm_weight}" if self.norm_weight != OperandSpec() else ""
        sums = [str(one.accumulator or "float32") for one in self.gemms.values()]
        if any(word != "float32" for word in sums):
            text += f" sum:{sums[0] if len(set(sums)) == 1 else '|'.join(sums)}"
        text += " saved:codes" if self.save_codes else ""
        return text + (" eval:FP32" if self.plain_evaluation else "")


_OF_FP8_UNIT = [("E4M3", "E4M3"), ("E4M3", "E5M2"), ("E5M2", "E4M3")]


def _check_sum(gemm: str, role: str, spec: OperandSpec, accumulator: Accumulator) -> None:
    """Refuse an operand whose scales the accumulator has no place for."""
    fmt, where = spec.resolved, f"{gemm}.{role} ({spec.format}) under accumulator {accumulator}"
    if not is_block(fmt):
        axis = getattr(spec.scaling, "axis", None)
        along = REDUCED[gemm, role]
        axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
        if along in axes or along - 2 in axes:
            raise RecipeError(f"{where}: its scales vary along the axis that is added up; use axis={1 - along} or none")
        if accumulator.group > 1 or accumulator.scaled_promotion:
            raise RecipeError(f"{where}: it has no blocks, whose scales that accumulator multiplies; use another one")
        return
    across = fmt.tile[1]
    if getattr(spec.scaling, "outer", 0):
        raise RecipeError(f"{where}: sums under scales of {spec.scaling.outer} elements are float32's only; drop sum:")  # type: ignore[union-attr]
    if accumulator.group > 1 and across % accumulator.group:
        raise RecipeError(f"{where}: blocks of {across} are no groups of {accumulator.group}")
    if accumulator.scaled_promotion and across != accumulator.promote_every:
        raise RecipeError(
            f"{where}: blocks of {across}, and sums are promoted every {accumulator.promote_every} products"
        )
    if accumulator.group == 1 and not accumulator.scaled_promotion and not fmt.power_of_two:
        raise RecipeError(
            f"{where}: the scales of its blocks are no powers of two, so their sums cannot be added; use an accumulator "
            "that promotes with the scales, such as hopper_fp8_blocks for blocks of 128"
        )


_SAME = object()


def layer_recipe(
    format: FloatFormat | str | None,
    *,
    weight=_SAME,
    activation=_SAME,
    grad=_SAME,
    rounding: Rounding | str = Rounding.NEAREST_EVEN,
    scaling="amax",
    overflow: Overflow | str = Overflow.SATURATE_FINITE,
    storage: str | StorageSpec = "master",
    storage_rounding: Rounding | str | None = None,
    norm_weight: FloatFormat | str | None = None,
    subnormals: bool = True,
    mask_saturated: bool = False,
    random_bits: int = 24,
    whole_blocks: bool = False,
    save_codes: bool = False,
) -> LayerRecipe:
    """One format for x, w and dy of all three GEMMs, with any of the three replaced.

    Args:
        format: format of every operand that is not replaced; None or "FP32" leaves it unquantized.
        weight, activation, grad: formats of w, x and dy where they differ (None leaves that operand unquantized).
        rounding, overflow, subnormals, random_bits: of every quantized operand.
        scaling: of every quantized operand; "amax" is the current amax per tensor (scale 1 for BF16 and TF32). Block
            formats have their own.
        storage: "master": float32 weights quantized at use. "grid": weights that stay on the weight format's grid; or
            a `StorageSpec`.
        storage_rounding: of the write back to the grid; None is `rounding`.
        norm_weight: format of normalisation weights (current amax per tensor).
        mask_saturated: straight-through gradient only where |x / scale| <= max (x and w).
        whole_blocks: refuse axes that are no multiple of a block format's block, instead of letting the last block be
            short.
        save_codes: on GPUs the backward keeps codes, as it does elsewhere (see `LayerRecipe`).

    Raises:
        RecipeError: contradictory arguments.
    """

    def named(value):
        return format if value is _SAME else value

    def operand(name, *, own_scaling=None, masked=False) -> OperandSpec:
        if name is None or get_format(name).name == "FP32":
            return OperandSpec()
        choice = None if is_block(get_format(name)) else own_scaling or scaling
        return OperandSpec(
            name if isinstance(name, str) else name.name,
            rounding,  # type: ignore[arg-type]
            overflow,  # type: ignore[arg-type]
            choice,  # type: ignore[arg-type]
            subnormals or is_block(get_format(name)),
            masked and not is_block(get_format(name)),
            random_bits,
            whole_blocks and is_block(get_format(name)),
        )

    grid = _storage(storage, named(weight), storage_rounding or rounding, subnormals, random_bits)
    x = operand(named(activation), masked=mask_saturated)
    w = operand(named(weight), masked=mask_saturated)
    if grid is not None and w.format == grid.format:
        w = operand(named(weight), own_scaling=StorageScaling(), masked=mask_saturated)
    dy = operand(named(grad))
    norm = OperandSpec() if norm_weight is None else operand(norm_weight, own_scaling="amax")
    return LayerRecipe(
        forward=GemmRecipe(input=x, weight=w),
        input_grad=GemmRecipe(grad_output=dy, weight=w),
        weight_grad=GemmRecipe(grad_output=dy, input=x),
        storage=grid,
        norm_weight=norm,
        save_codes=save_codes,
    )


def _storage(storage, weight, rounding, subnormals, random_bits) -> StorageSpec | None:
    if isinstance(storage, StorageSpec) or storage is None:
        return storage
    if storage == "master":
        return None
    if storage != "grid":
        raise RecipeError(f"storage {storage!r} is not one of master, grid; or pass a StorageSpec")
    if weight is None or get_format(weight).name == "FP32":
        raise RecipeError("storage='grid' needs a weight format other than FP32: the grid is that format's")
    fmt = get_format(weight)
    return StorageSpec(fmt.name, rounding, subnormals=subnormals, random_bits=random_bits)
