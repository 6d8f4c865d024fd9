"""The three products of a layer as formulas: what multiplies what in the forward and in its two gradients.

A description knows shapes and orders of axes only. Which values enter, which unit multiplies and what is kept for the
backward is the same for all of them (`gemms`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from altgrad.nn.layer.gemm import Route, conv_precision, without_autocast
from altgrad.nn.layer.products import Ready, product
from altgrad.nn.recipe.spec import REDUCED

LINEAR_REDUCED = REDUCED  # input [n, k], weight [o, k], grad_output [n, o]
MATMUL_REDUCED = {  # a [..., m, k] is the input, b [..., k, n] the weight, dy [..., m, n]
    ("forward", "input"): -1,
    ("forward", "weight"): -2,
    ("input_grad", "grad_output"): -1,
    ("input_grad", "weight"): -1,
    ("weight_grad", "grad_output"): -2,
    ("weight_grad", "input"): -2,
}
CONV_REDUCED = LINEAR_REDUCED  # input [n, c, ...], weight [o, c, ...], grad_output [n, o, ...]

Sizes = tuple[int, int, int]  # rows, columns, reduced


class Contraction(Protocol):
    """The formulas of a layer's three products."""

    def sizes(self, gemm: str, a: torch.Size, b: torch.Size) -> Sizes | None:
        """Sizes of the GEMM of operands of these shapes; None where it is no matrix product of a library."""
        ...

    def multiply(
        self,
        gemm: str,
        a: Ready,
        b: Ready,
        route: Route,
        shape: torch.Size | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The product in the carrier: forward (input, weight), input_grad (grad_output, weight), weight_grad
        (grad_output, input).

        Args:
            shape: of the tensor whose gradient this is.
            bias: added to the forward.
            dtype: that the product is wanted in (`product`).
        """
        ...

    def bias_axes(self, dims: int) -> list[int]:
        """Axes of a grad_output of that many axes which the bias's gradient sums over."""
        ...


class Matrices(NamedTuple):
    """y = x w^T + b for x [n, in] and w [out, in]; or y = x w for w [..., in, out] and x [..., n, in], in batches.

    transposed: the weight is [in, out].
    """

    transposed: bool = False

    def sizes(self, gemm: str, a: torch.Size, b: torch.Size) -> Sizes:
        """See `Contraction`."""
        if gemm == "weight_grad":
            return a[-1], b[-1], a[-2]
        return a[-2], b[-1] if (gemm == "forward") == self.transposed else b[-2], a[-1]

    def multiply(
        self,
        gemm: str,
        a: Ready,
        b: Ready,
        route: Route,
        shape: torch.Size | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `Contraction`."""
        out = product(*self.ordered(gemm, a, b), route, bias, dtype)
        return out if shape is None or out.shape == shape else out.sum_to_size(shape)  # broadcast batch axes

    def ordered(self, gemm: str, a: Any, b: Any) -> tuple[Any, Any]:
        """The operands of `multiply` as the left and right matrix of a product."""
        if gemm == "weight_grad":
            return (b.t(), a) if self.transposed else (a.t(), b)
        return a, b.t() if (gemm == "forward") != self.transposed else b

    def bias_axes(self, dims: int) -> list[int]:
        """See `Contraction`."""
        return [0]


class Convolution(NamedTuple):
    """A convolution of x [n, c, ...] with w [o, c / groups, ...], by torch's own loops, in IEEE float32.

    transposed: w is [c, o / groups, ...]. output_padding: of a transposed one.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def sizes(self, gemm: str, a: torch.Size, b: torch.Size) -> None:
        """See `Contraction`."""
        return

    def multiply(
        self,
        gemm: str,
        a: Ready,
        b: Ready,
        route: Route,
        shape: torch.Size | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `Contraction`."""
        extra = list(self.output_padding or [0] * len(self.stride))
        geometry = (list(self.stride), list(self.padding), list(self.dilation), self.groups, self.transposed, extra)
        if gemm == "forward":
            bias = None if bias is None else bias.to(a.values.dtype)
            return _run(_convolution, _convolve, a.values, b.values, bias, *geometry)
        like = b.values.new_empty(1).expand(shape)  # type: ignore[arg-type]  # only its shape is read
        x, w = (like, b.values) if gemm == "input_grad" else (b.values, like)
        return _run(_convolution_grad, _convolve_back, a.values, x, w, gemm == "input_grad", *geometry)

    def bias_axes(self, dims: int) -> list[int]:
        """See `Contraction`."""
        return [0, *range(2, dims)]


def _run(operator, direct, first: Tensor, *rest) -> Tensor:
    """`direct` in IEEE float32 whatever torch is set to; behind an operator where a compiler would decide that."""
    return operator(first, *rest) if torch.compiler.is_compiling() else _exactly(direct, first, *rest)


def _exactly(direct, first: Tensor, *rest) -> Tensor:
    kind = first.device.type
    with without_autocast(kind), conv_precision(kind):
        return direct(first, *rest)


def _convolve(x, w, bias, stride, padding, dilation, groups, transposed, extra) -> Tensor:
    return torch.convolution(x, w, bias, stride, padding, dilation, transposed, extra, groups)


def _convolve_back(dy, x, w, of_input, stride, padding, dilation, groups, transposed, extra) -> Tensor:
    mask = [of_input, not of_input, False]
    geometry = (stride, padding, dilation, transposed, extra, groups)
    found = torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, mask)
    return found[0] if of_input else found[1]


@torch.library.custom_op("altgrad::convolution", mutates_args=())
def _convolution(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    extra: list[int],
) -> Tensor:
    return _exactly(_convolve, x, w, bias, stride, padding, dilation, groups, transposed, extra)


@_convolution.register_fake
def _(x, w, bias, stride, padding, dilation, groups, transposed, extra):
    return _exactly(_convolve, x, w, bias, stride, padding, dilation, groups, transposed, extra)


@torch.library.custom_op("altgrad::convolution_grad", mutates_args=())
def _convolution_grad(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    of_input: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    extra: list[int],
) -> Tensor:
    return _exactly(_convolve_back, dy, x, w, of_input, stride, padding, dilation, groups, transposed, extra)


@_convolution_grad.register_fake
def _(dy, x, w, of_input, stride, padding, dilation, groups, transposed, extra):
    return _exactly(_convolve_back, dy, x, w, of_input, stride, padding, dilation, groups, transposed, extra)
