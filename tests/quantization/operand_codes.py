"""Codes of operands as the Triton kernels make them, in Triton's interpreter: in the layouts of an FP8 unit.

Part of `interpreter_checks`.
"""

from unittest import mock

import torch

from altgrad.nn import functional, quantize_model, uniform
from altgrad.nn.layer import gemm
from altgrad.quantization import Cast, Want, tensor_cores
from altgrad.quantization.kernels.choose import load
from tests.quantization.interpreter_checks import on_an_fp8_unit
from tests.quantization.oracles import same

KEY = torch.tensor([3, -9])
CASTS = [
    Cast("E4M3", overflow="saturate_finite"),
    Cast("E4M3", "stochastic", "saturate_finite"),
    Cast("E5M2", "stochastic", "saturate"),
    Cast("E5M2", "up"),
]
SHAPES = ((70, 300), (1, 5), (5, 1), (260, 2), (0, 4), (4, 0))
inf, nan = float("inf"), float("nan")


def scales_of(rows: int, columns: int) -> list[torch.Tensor | float]:
    """A number, one of a tensor, one of each row and one of each column."""
    return [0.3, torch.tensor(0.05), torch.rand(rows, 1) + 0.1, torch.rand(1, columns) + 0.1]


def check_layouts() -> list[str]:
    """Codes in both layouts, or in one, against those of rows alone, which have a kernel of their own."""
    bad, kernels, one_by_one = [], load("cuda", "codes"), load("cuda", "operands").codes
    for rows, columns in SHAPES:
        x = torch.randn(rows, columns) * torch.exp2(torch.randint(-9, 9, (rows, columns)).float())
        if x.numel() > 40:
            x[0, 1], x[3, 0], x[7, 1] = inf, nan, -0.0
        for cast in CASTS:
            plan = cast.plan(x.dtype, x.device, Want.VALUES, "cuda")
            for scale in scales_of(rows, columns):
                wanted = one_by_one(plan, x, scale, key=KEY)
                for inner in ((1,), (0,), (1, 0), (0, 1), (-1, 0)):
                    amax = torch.tensor(1.0)
                    found = kernels.codes(plan, x, scale, inner=inner, key=KEY, amax=amax)
                    laid = [(one.t() if axis == 0 else one).is_contiguous() for axis, one in zip(inner, found)]
                    seen = float(torch.where(x.isfinite(), x.abs(), 0).max()) if x.numel() else 1.0
                    right = all(torch.equal(one, wanted) for one in found) and len(found) == len(inner)
                    if not (right and all(laid) and float(amax) == max(1.0, seen)):
                        bad.append(f"codes of {rows} x {columns}, {cast}, inner {inner}")
            with mock.patch.object(kernels, "ONE_BLOCK", 100):
                found = kernels.codes(plan, x, 0.3, inner=(0, 1), key=KEY)
            if not all(torch.equal(one, one_by_one(plan, x, 0.3, key=KEY)) for one in found):
                bad.append(f"codes of many elements, {cast}")
    return bad


def check_transposed_weights() -> list[str]:
    """x @ w with w as it lies, and x @ w^T of its transpose, have the same bits on an FP8 unit; nothing is copied."""
    recipe = uniform("E4M3", grad="E5M2").with_(accumulator="fp8_unit").default
    x, w, bad = torch.randn(32, 48), torch.randn(48, 64), []

    def run(multiply, w: torch.Tensor, wants: tuple[bool, bool]) -> list[torch.Tensor | None]:
        left, right = x.clone().requires_grad_(wants[0]), w.clone().requires_grad_(wants[1])
        y = multiply(left, right, recipe=recipe)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        return [y.detach(), left.grad, right.grad]

    seen = []

    def watched(a, b, *rest, **options):
        seen.append(a.is_contiguous() and b.t().is_contiguous())
        return product(a, b, *rest, **options)

    product = torch._scaled_mm
    cores = mock.patch.object(tensor_cores, "interpreted", return_value=True)
    copies = mock.patch.object(tensor_cores, "_padded", side_effect=lambda x, rows, columns: x)
    with on_an_fp8_unit(), cores, copies, mock.patch.object(torch, "_scaled_mm", watched):
        for wants in ((True, True), (True, False), (False, True)):
            one, other = run(functional.matmul, w, wants), run(functional.linear, w.t().contiguous(), wants)
            if other[2] is not None:
                other[2] = other[2].t()
            if not all(a is b if a is None or b is None else same(a, b) for a, b in zip(one, other, strict=True)):
                bad.append(f"transposed weight, gradients {wants}")
    return bad if seen and all(seen) and len(seen) == 14 else [*bad, f"operands of a unit lie as {seen}"]


def check_compiled() -> list[str]:
    """Compiled layers on an FP8 unit, whose codes come from one operator in both layouts, have the bits of eager ones."""
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model, x = torch.nn.Sequential(torch.nn.Linear(32, 48)), torch.randn(16, 32, requires_grad=True)
        quantize_model(model, uniform("E4M3", rounding="stochastic").with_(accumulator="fp8_unit"))
        with (
            on_an_fp8_unit(),
            mock.patch.multiple(tensor_cores, interpreted=on_gpu),
            mock.patch.multiple(gemm, interpreted=on_gpu),
        ):
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
            run(x).square().sum().backward()
        found.append([x.grad, model[0].weight.grad])
    return [] if all(map(same, *found)) else ["compiled layers on an FP8 unit"]


def on_gpu() -> bool:
    return True


def check_codes() -> list[str]:
    return [*check_layouts(), *check_transposed_weights(), *check_compiled()]
