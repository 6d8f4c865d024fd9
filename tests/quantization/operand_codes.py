"""Codes of operands as the Triton kernels make them, in Triton's interpreter: in the layouts of an FP8 unit, and kept for
the backward.

Part of `interpreter_checks`.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from altgrad.nn import GemmRecipe, LayerRecipe, OperandSpec, Recipe, functional, quantize_model, uniform
from altgrad.nn.layer import gemm
from altgrad.nn.layer import tensor_cores as cores
from altgrad.nn.session import STATE
from altgrad.quantization import Cast, Want, get_format, tensor_cores
from altgrad.quantization.kernels.choose import load
from benchmarks.cuda_traffic import by_channel
from tests.quantization.interpreter_checks import on_an_fp8_unit
from tests.quantization.oracles import same

KEY = torch.tensor([3, -9])
CASTS = [
    Cast("E4M3", overflow="saturate_finite"),
    Cast("E4M3", "stochastic", "saturate_finite"),
    Cast("E5M2", "stochastic", "saturate"),
    Cast("E5M2", "up"),
]
SHAPES = ((70, 140), (1, 5), (5, 1), (260, 2), (0, 4), (4, 0))
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
            for number, scale in enumerate(scales_of(rows, columns)[:: 1 if cast is CASTS[1] else 3]):
                wanted = one_by_one(plan, x, scale, key=KEY)
                for inner in ((1,), (0,), (1, 0), (0, 1), (-1, 0)) if number == 0 else ((0, 1),):
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


@contextmanager
def on_tensor_cores():
    """A CPU passes for a GPU: products take the routes of tensor cores."""
    with ExitStack() as stack:
        for module in (tensor_cores, gemm):
            stack.enter_context(mock.patch.multiple(module, interpreted=on_gpu))
        yield


NEAREST, BY_CHANCE, UP = ("nearest_even", "saturate_finite"), ("stochastic", "saturate"), ("up", "native")
FORMATS = {name: [NEAREST] for name in ("E5M2", "E0M7", "E7M0", "E2M1", "E4M3FNUZ", "float8_e3m4")}
FORMATS |= {"E4M3": [NEAREST, BY_CHANCE], "E3M4": [BY_CHANCE, UP], "INT8": [NEAREST, UP], "binary8p3": [NEAREST, UP]}


def check_decoded() -> list[str]:
    """Codes that were made beside a payload are decoded to its bits; where something has no code, to NaN."""
    bad = []
    for name, ways in FORMATS.items():
        for rounding, overflow in ways:
            cast = Cast(name, rounding, overflow)
            low, high = gemm.power_range(cast.grid)
            powers = (low, min(high, 127))
            for rows, columns in ((30, 140), (1, 5), (0, 4)):
                x = torch.randn(rows, columns) * torch.exp2(torch.randint(-20, 20, (rows, columns)).float())
                scales = [*scales_of(rows, columns), 2.0**-140, torch.tensor(2.0**100)]
                every = rows == 30 and (rounding, overflow) == NEAREST
                for number, scale in enumerate(scales if every else scales[2:3]):
                    wanted, of_wanted = tensor_cores.payload(x, cast, scale, powers, KEY)
                    amax = torch.tensor(0.0)
                    values, factor, saved = tensor_cores.payload_and_codes(x, cast, scale, powers, KEY, amax)
                    alone = tensor_cores.payload_and_codes(x, cast, scale, powers, KEY, values=False)[2]
                    again, of_again = tensor_cores.decoded(saved, cast, scale, powers)
                    good = all(same(one.float(), wanted.float()) for one in (values, again))
                    good = good and all(map(same, saved, alone)) and float(amax) == float(x.abs().max() if rows else 0)
                    for one in (factor, of_again):
                        good = good and (one is of_wanted if one is None or of_wanted is None else same(one, of_wanted))
                    if not good:
                        bad.append(f"decoded {cast}, {rows} x {columns}, scale {number}")
            x = torch.randn(8, 600)
            for special in (nan, inf, -inf):
                x[1, 517] = special
                kept, _, saved = tensor_cores.payload_and_codes(x, cast, 0.5, powers, KEY)
                again, _ = tensor_cores.decoded(saved, cast, 0.5, powers)
                assert kept is not None
                finite = kept.isfinite() if cast.grid.has_nan or kept.isfinite().all() else torch.zeros(8, 600).bool()
                inside = kept.isinf() & again.isinf()
                if not (torch.equal(again.isfinite(), finite) and same(kept[finite | inside], again[finite | inside])):
                    bad.append(f"decoded {cast} of {special}")
    return bad


def check_decoded_blocks() -> list[str]:
    """Codes of blocks are decoded to the bits of the payload that would be kept; an inf makes NaN of no more than its block."""
    bad = []
    for name in ("MXFP8", "MXINT8", "MXFP4", "NVFP4", "E3M4/24:even", "E4M3/16x32:E8M0"):
        fmt = get_format(name)
        for shape, axis in (((2, 33, 40), -1), ((40, 70), 0), ((1, 3), -1)) if not fmt.is_tile else (((40, 70), -1),):
            rounding = "nearest_even" if axis else "stochastic"
            cast = Cast(fmt, rounding, "saturate_finite", axis=axis, pad=True)
            powers = (cores.powers_of_blocks(fmt) if fmt.tensor_scale else None) or (0, 0)
            for size in (1.0, 1e-38, 1e30) if name in ("MXFP8", "NVFP4") and axis else (1.0,):
                x = torch.randn(shape) * size * torch.exp2(torch.randint(-9, 3, shape).float())
                x[..., 0] = 0
                wanted, factor = tensor_cores.block_payload(x, cast, powers, KEY)
                saved = tensor_cores.block_codes(x, cast, KEY)
                found, again = tensor_cores.decoded_blocks(saved, cast, powers)
                alike = factor is again if factor is None or again is None else same(factor, again)
                if not (same(wanted.float(), found.float()) and alike and saved[0].dtype == torch.uint8):
                    bad.append(f"decoded {cast}, {shape}, {size}")
            for special in (inf, nan):
                x = torch.randn(shape)
                x[..., -1, 2] = special
                found = tensor_cores.decoded_blocks(tensor_cores.block_codes(x, cast, KEY), cast, powers)[0]
                finite, lost = found.isfinite(), ~found.isfinite()
                inside = fmt.element.has_nan and not finite[x.isfinite()].all()
                if finite[~x.isfinite()].any() or inside or lost.sum() > fmt.tile[0] * fmt.tile[1] * len(x):
                    bad.append(f"decoded {cast} of {special}, {shape}")
    return bad


KEPT = [
    ("E4M3", {}),
    ("E3M4", {"rounding": "stochastic"}),
    ("E4M3", {"scaling": "none", "grad": "E5M2"}),
    ("E7M0", {"scaling": {"policy": "amax", "power_of_two": True}}),
    ("INT8", {"scaling": {"policy": "delayed", "history": 1}}),
    ("E4M3", {"storage": "grid"}),
    ("E2M1", {"activation": "BF16"}),
    ("MXFP8", {"rounding": "stochastic"}),
    ("NVFP4", {}),
]


def check_kept() -> list[str]:
    """Layers whose backward decodes codes have the bits of those whose backward keeps bf16, and keep half the bytes."""
    bad = []
    recipes = [(f"{fmt} {options}", uniform(fmt, **options)) for fmt, options in KEPT]
    for name, recipe in [*recipes, ("channels", by_channel("E4M3")), ("another x", ANOTHER_X)]:
        found, kept = [], []
        rows = 40 if name.startswith(("MX", "NV")) else 8  # for blocks a whole one and a part of one
        for codes in (False, True):
            torch.manual_seed(0)
            layer = torch.nn.Linear(48, 16)
            model = torch.nn.Sequential(layer)
            quantize_model(model, recipe.with_(save_codes=codes))
            sizes: list[tuple[torch.Size, int]] = []

            def pack(t, sizes=sizes):
                sizes.append((t.shape, t.element_size()))
                return t

            results = []
            for _ in range(2 if "delayed" in name else 1):
                x = torch.randn(rows, 48, requires_grad=True)
                layer.zero_grad()
                sizes.clear()
                with on_tensor_cores(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    y = model(x)
                    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
                layer.__dict__[STATE].session.advance()
                results += [y.detach(), x.grad, layer.weight.grad.clone()]
            found.append(results)
            kept.append([size for shape, size in sizes if shape in ((rows, 48), (16, 48))])
        if not all(map(same, *found)):
            bad.append(f"kept codes of {name}")
        if kept != [[2, 2], [2, 1] if "BF16" in name else [1, 1]]:
            bad.append(f"{name} keeps {kept} bytes an element")
    return bad


def check_kept_compiled() -> list[str]:
    """Compiled layers that keep codes have the bits of eager ones; a gradient is differentiated again."""
    found, recipe = [], uniform("E3M4", save_codes=True)
    for compiles in (False, True):
        torch.manual_seed(0)
        model, x = torch.nn.Sequential(torch.nn.Linear(32, 48)), torch.randn(16, 32, requires_grad=True)
        quantize_model(model, recipe)
        with on_tensor_cores():
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
            run(x).square().sum().backward()
            if not compiles:
                (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
                (second,) = torch.autograd.grad(first.square().sum(), x)
                assert second.isfinite().all()
                assert second.any()
        found.append([x.grad, model[0].weight.grad])
    return [] if all(map(same, *found)) else ["compiled layers that keep codes"]


X = OperandSpec("E4M3")
ANOTHER_X = Recipe(
    LayerRecipe(
        GemmRecipe(input=X, weight=X),
        GemmRecipe(grad_output=X, weight=X),
        GemmRecipe(grad_output=X, input=OperandSpec("E3M4")),
    )
)


def check_codes() -> list[str]:
    return [
        *check_layouts(),
        *check_transposed_weights(),
        *check_compiled(),
        *check_decoded(),
        *check_decoded_blocks(),
        *check_kept(),
        *check_kept_compiled(),
    ]
