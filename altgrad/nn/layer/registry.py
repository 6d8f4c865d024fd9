"""Which module classes are quantized, and how: the built-in layers, and foreign classes that a person registers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from altgrad.errors import RecipeError

KINDS = ("linear", "conv", "conv_transpose", "embedding", "norm")


@dataclass(frozen=True)
class LayerKind:
    """How a module class is quantized.

    kind: "linear" (`weight` [out, in], `bias`, input [..., in]), "conv" (a torch convolution), "conv_transpose" (a
        transposed one), "embedding" (rows of `weight`), or "norm" (only its `weight`, quantized at use).
    transposed: a linear weight is stored [in, out].
    """

    kind: str
    transposed: bool = False


RAW = LayerKind("raw")
"""A parameter that its module multiplies by function calls (`altgrad.nn.layer.raw`)."""

_BY_CLASS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind("linear"),
    nn.Conv1d: LayerKind("conv"),
    nn.Conv2d: LayerKind("conv"),
    nn.Conv3d: LayerKind("conv"),
    nn.ConvTranspose1d: LayerKind("conv_transpose", transposed=True),
    nn.ConvTranspose2d: LayerKind("conv_transpose", transposed=True),
    nn.ConvTranspose3d: LayerKind("conv_transpose", transposed=True),
    nn.Embedding: LayerKind("embedding"),
    nn.EmbeddingBag: LayerKind("embedding"),
    nn.LayerNorm: LayerKind("norm"),
    nn.RMSNorm: LayerKind("norm"),
}
# Foreign classes by module and name, so that their packages need not be imported.
_BY_NAME: dict[str, LayerKind] = {
    "transformers.pytorch_utils.Conv1D": LayerKind("linear", transposed=True),
}


def register_layer(cls: type[nn.Module] | str, kind: str, *, transposed: bool = False) -> None:
    """Let `quantize_model` swap a foreign class.

    Args:
        cls: the class, or its full dotted name (then its package is not imported).
        kind: "linear", "conv", "conv_transpose", "embedding" or "norm": whose arithmetic the class's forward has. The
            class needs that kind's attributes: `weight`; for linear also `bias` (a tensor or None).
        transposed: a linear weight is stored [in, out], as in Hugging Face's `Conv1D`.

    Raises:
        RecipeError: unknown kind, or the class is registered differently already.
    """
    if kind not in KINDS:
        raise RecipeError(f"layer kind {kind!r} is not one of {', '.join(KINDS)}")
    made = LayerKind(kind, transposed)
    table, key = (_BY_NAME, cls) if isinstance(cls, str) else (_BY_CLASS, cls)
    known = table.get(key)  # type: ignore[arg-type]
    if known is not None and known != made:
        raise RecipeError(f"{cls} is registered as {known} already; it cannot also be {made}")
    table[key] = made  # type: ignore[index]


def kind_of(cls: type[nn.Module]) -> LayerKind | None:
    """How instances of exactly this class are quantized, or None.

    A subclass that inherits its parent's forward counts as its parent; one with a forward of its own does not. A
    quantized class counts as the class that it was made of.
    """
    cls = getattr(cls, "_base", cls)
    for base in cls.__mro__:
        found = _BY_CLASS.get(base) or _BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found if cls.forward is base.forward else None
    return None
