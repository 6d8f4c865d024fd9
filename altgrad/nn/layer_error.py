"""What a recipe does to one layer's three products, before anything is trained: errors on drawn tensors.

x and w are normal, some features of x much larger than the rest, as in language models; dy is normal with a spread from
token to token. The error of a product is |made - exact| / |exact| in the root mean square, exact in float64. It says nothing
about training by itself: errors of x, w and dy that average out do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from altgrad.errors import OptionError
from altgrad.nn.model.convert import quantize_model
from altgrad.nn.recipe.recipe import Recipe

_OUTLIERS = 0.01  # share of features
_LARGER = 30.0


@dataclass(frozen=True)
class LayerError:
    """Relative root-mean-square errors of y, dx and dw."""

    y: float
    dx: float
    dw: float


@dataclass(frozen=True)
class Sizes:
    """A layer's sizes: tokens, features in and out.

    Raises:
        OptionError: no positive integers, or too many.
    """

    tokens: int = 512
    inner: int = 1024
    outer: int = 256

    def __post_init__(self) -> None:
        for name, size in (("tokens", self.tokens), ("inner", self.inner), ("outer", self.outer)):
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1 << 20:
                raise OptionError(f"{name} {size!r} is no integer in 1..{1 << 20}")
        if self.tokens * self.inner * self.outer > 1 << 34:
            raise OptionError(f"{self} means {self.tokens * self.inner * self.outer:.2g} products; use at most 1.7e10")

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """512x1024x256: tokens, features in, features out.

        Raises:
            OptionError: not of that form.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise OptionError(f"sizes {text!r} are not tokens x in x out, such as 512x1024x256")
        return cls(*(int(part[:20]) for part in parts))  # more digits are too many all the same


def layer_error(recipe: Recipe | str, sizes: Sizes | None = None, *, seed: int = 0) -> LayerError:
    """The errors of a linear layer under the recipe's default.

    A recipe that remembers amaxes sees the same tensors once before.

    Raises:
        RecipeError: the recipe quantizes nothing, or contradicts itself.
    """
    sizes = sizes or Sizes()
    made = Recipe.from_dict(recipe) if isinstance(recipe, str) else recipe
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes.tokens, sizes.inner, generator=g)
    x *= torch.where(torch.rand(sizes.inner, generator=g) < _OUTLIERS, _LARGER, 1.0)
    dy = torch.randn(sizes.tokens, sizes.outer, generator=g)
    dy *= 1e-3 * torch.exp2(torch.randn(sizes.tokens, 1, generator=g))
    w = torch.randn(sizes.outer, sizes.inner, generator=g) / sizes.inner**0.5
    layer = nn.Linear(sizes.inner, sizes.outer, bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    model = nn.Sequential(layer)
    quantize_model(model, Recipe(made.default), seed=seed)
    for _ in range(2):
        model.zero_grad()
        given = x.clone().requires_grad_()
        y = model(given)
        y.backward(dy)
    assert given.grad is not None
    assert layer.weight.grad is not None
    wide = x.double(), w.double(), dy.double()
    return LayerError(
        _relative(y.detach(), wide[0] @ wide[1].T),
        _relative(given.grad, wide[2] @ wide[1]),
        _relative(layer.weight.grad, wide[2].T @ wide[0]),
    )


def _relative(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).norm() / exact.norm())
