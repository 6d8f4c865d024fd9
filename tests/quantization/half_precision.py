"""Checks, in Triton's interpreter, that operands of 9 to 11 significant bits are multiplied as float16 numbers, exactly."""

from unittest import mock

import torch

from altgrad.formats.scalar import FloatFormat, Specials
from altgrad.nn import GemmRecipe, LayerRecipe, OperandSpec, Recipe, quantize_model, uniform
from altgrad.nn.layer import contractions, gemm
from altgrad.nn.layer.tensor_cores import powers_of_half
from altgrad.nn.session import STATE
from altgrad.quantization import Cast, get_format, quantize, tensor_cores
from altgrad.quantization.kernels.choose import load
from altgrad.quantization.scaling import DelayedScaling
from benchmarks.cuda_traffic import by_channel
from tests.quantization.oracles import same

FORMATS = [
    get_format("FP16"),
    get_format("FP16").without_subnormals(),
    *map(get_format, ("E5M9", "E4M9", "E4M8", "E3M8", "E2M10", "E0M10", "E0M11")),
    FloatFormat("whole", 0, 10, None, Specials.NONE, twos_complement=True),
]
BEYOND = ("TF32", "E6M9", "E7M8", "E4M11", "BF16", "E4M3", "E5M7", "MXFP8")
inf, nan = float("inf"), float("nan")


def samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, generator=generator) * torch.exp2(
        torch.randint(-30, 17, (2048,), generator=generator).float()
    )
    x[:8] = torch.tensor([0.0, -0.0, inf, -inf, nan, 65504.0, 2.0**-24, 1e9])
    return x.reshape(32, 64)


def check_formats() -> list[str]:
    """Every value times the lowest and the highest power is a float16 number; times a further one some is not."""
    bad = [name for name in BEYOND if powers_of_half(get_format(name)) is not None]
    for fmt in FORMATS:
        values, powers = torch.tensor(fmt.values(), dtype=torch.float64), powers_of_half(fmt)
        assert powers is not None
        low, high = powers
        for p, holds in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
            scaled = values[values.isfinite()] * 2.0**p
            if torch.equal(scaled.half().double(), scaled) is not holds:
                bad.append(f"{fmt} times 2^{p}")
    return bad


def check_payloads() -> list[str]:
    """Operands of the kernel, and of compiled code, are the values of `quantize`, whatever the scale."""
    bad, x = [], samples()
    for fmt in FORMATS:
        powers, cast = powers_of_half(fmt), Cast(fmt, overflow="saturate_finite")
        assert powers is not None
        for scale in (1.0, 0.3, 1e-30, 1.5 * 2.0**-126, 1.9 * 2.0**90):
            given = torch.tensor(scale)
            values, factor = tensor_cores.payload(x, cast, given, powers, dtype=torch.float16)
            wanted = quantize(x, fmt, scale, overflow="saturate_finite", kernel="eager")
            assert factor is not None
            if values.dtype != torch.float16 or not same((values.double() * factor.double()).float(), wanted):
                bad.append(f"payload of {fmt} under {scale}")
            node = torch.ops.altgrad.payload(x, given, None, cast.spec, list(powers), None, torch.float16)
            if not (same(node[0], values) and same(node[1], factor)):
                bad.append(f"operator's payload of {fmt} under {scale}")
            facts = tensor_cores._pointwise_facts(cast.spec)
            fused = None if facts is None else tensor_cores.pointwise.payload(x, given, facts, powers, torch.float16)
            if fused is not None and not (same(fused[0], values) and same(fused[1], factor)):
                bad.append(f"pointwise payload of {fmt} under {scale}")
    return bad


def parts(fmt: str, weight: str) -> Recipe:
    """FP16 for what a weight meets, another format for the weight."""
    half, other = OperandSpec(fmt), OperandSpec(weight)
    forward, input_grad = GemmRecipe(input=half, weight=other), GemmRecipe(grad_output=half, weight=other)
    return Recipe(LayerRecipe(forward, input_grad, GemmRecipe(grad_output=half, input=half)))


RECIPES = {
    "FP16": (uniform("FP16"), "fp16"),
    "FP16 of powers of two": (uniform("FP16", scaling={"policy": "amax", "power_of_two": True}), "fp16"),
    "FP16 unscaled": (uniform("FP16", scaling="none"), "fp16"),
    "FP16 delayed": (uniform("FP16", scaling={"policy": "delayed", "history": 1}), "fp16"),
    "FP16 stochastic": (uniform("FP16", rounding="stochastic"), "fp16"),
    "FP16 by channel": (by_channel("FP16"), "fp16"),
    "E4M9 and FP16": (uniform("E4M9", grad="FP16"), "fp16"),
    "E0M10": (uniform("E0M10"), "fp16"),
    "FP16 on the grid": (uniform("FP16", storage="grid"), "fp16"),
    "FP16 and E4M3": (parts("FP16", "E4M3"), "forward float32, input_grad float32, weight_grad fp16"),
    "E5M4 and FP16": (parts("E5M4", "FP16"), "forward float32, input_grad float32, weight_grad bf16"),
    "BF16 and FP16": (parts("BF16", "FP16"), "forward float32, input_grad float32, weight_grad bf16"),
}


DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def results(recipe: Recipe, on_cores: bool, sizes: tuple[float, float], dtype=torch.float32) -> list[torch.Tensor]:
    """Output and gradients of a linear layer in its second step."""
    kernels = load("cuda", "products")
    with (
        mock.patch.object(gemm, "interpreted", lambda: on_cores),  # noqa: PT008
        mock.patch.object(tensor_cores, "interpreted", lambda: on_cores),  # noqa: PT008
        mock.patch.object(kernels, "LEAST_PROGRAMS", 1),
    ):
        torch.manual_seed(0)
        layer = torch.nn.Linear(48, 32)
        with torch.no_grad():
            layer.weight.mul_(sizes[1])
            layer.bias.mul_(sizes[0] * sizes[1])
        model = torch.nn.Sequential(layer.to(dtype))
        quantize_model(model, recipe)
        for _ in range(2):
            x = (torch.randn(40, 48) * sizes[0]).to(dtype).requires_grad_()
            layer.zero_grad()
            y = model(x)
            (y * torch.randn(40, 32, dtype=dtype)).sum().backward()
            layer.__dict__[STATE].session.advance()
        assert x.grad is not None
        assert layer.weight.grad is not None
        return [y.detach(), x.grad, layer.weight.grad]


def check_layers() -> list[str]:
    """Layers on a GPU's routes against float32: the same sums in another order, of the operands that the model prints."""
    bad = []
    with mock.patch.object(gemm, "PROCESSOR", gemm.Processor()):
        for number, (name, (recipe, routes)) in enumerate(RECIPES.items()):
            model = torch.nn.Sequential(torch.nn.Linear(48, 32))
            quantize_model(model, recipe)
            if f"[{routes}]" not in repr(model):
                bad.append(f"{name} takes {model}")
            told = routes.split(", ") if "," in routes else [routes] * 3
            dtypes = [DTYPES[route.split()[-1]] for route in told]
            for sizes in ((1.0, 1.0), ((1e-25, 1e25), (1e20, 1e-30))[number % 2]):
                if "unscaled" in name and sizes[0] != 1:
                    continue
                with mock.patch.object(contractions, "product", side_effect=contractions.product) as multiplied:
                    got = results(recipe, True, sizes)
                if [call.args[0].values.dtype for call in multiplied.call_args_list] != dtypes * 2:
                    bad.append(f"{name} multiplies {multiplied.call_args_list}")
                wanted = results(recipe, False, sizes)
                for one, other in zip(got, wanted, strict=True):
                    if not float((one - other).norm()) <= 2e-6 * float(other.norm()):
                        bad.append(f"layer {name} of sizes {sizes}")
        for fmt, dtype in (("FP16", torch.float16), ("E7M0", torch.float16), ("MXFP8", torch.float16)):
            got, wanted = (results(uniform(fmt), cores, (1.0, 1.0), dtype) for cores in (True, False))
            for one, other in zip(got, wanted, strict=True):
                step = torch.finfo(dtype).eps
                if one.dtype != dtype or not float((one - other).norm()) <= step * float(other.norm()):
                    bad.append(f"layer {fmt} of {dtype}")
    return bad


def check_products() -> list[str]:
    """|C - C64| <= 1e-6 |A||B| for float16 operands with factors far apart, in all three ways to an end."""
    bad, kernels = [], load("cuda", "products")
    torch.manual_seed(0)
    for rows, depth, columns in ((200, 100, 150), (1, 3, 1), (5, 0, 7)):
        a, b = samples_of(rows, depth), samples_of(depth, columns)
        for of_a, of_b in ((1e-38, 1e30), (1e36, 1e-38), (0.3, 0.7), (2.0**-126, 1.1)):
            factors = torch.tensor(of_a), torch.full((1, columns), of_b)
            exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
            scale = float(factors[0].double()) * factors[1].double()
            sums = a.float() @ b.float()
            ended = tensor_cores.finished(sums.clone(), *factors, None, torch.float32, True)
            with mock.patch.object(tensor_cores, "traced", return_value=True):
                traced = tensor_cores.finished(sums.clone(), *factors, None, torch.float32, True)
            for way, got in (
                ("at once", kernels.product(a, b, *factors, None, torch.float32)),
                ("afterwards", ended),
                ("traced", traced),
            ):
                if not bool(((got - exact * scale).abs() <= 1e-6 * size * scale + 2.0**-149).all()):
                    bad.append(f"product {rows} {depth} {columns} {of_a} {of_b} {way}")
    return bad


def samples_of(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * torch.exp2(torch.randint(-20, 12, (rows, columns)).float())).half()


def check_histories() -> list[str]:
    """A delayed scale follows what it sees where float32 multiplies the operand."""
    bad, plain = [], OperandSpec(None)
    delayed = OperandSpec("E4M3", scaling=DelayedScaling(1))
    forward, input_grad = GemmRecipe(input=delayed, weight=plain), GemmRecipe(grad_output=plain, weight=plain)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    quantize_model(model, Recipe(LayerRecipe(forward, input_grad, GemmRecipe(grad_output=plain, input=delayed))))
    state = model[0].__dict__[STATE]
    for size in (1.0, 2.0, 3.0):
        x = torch.randn(8, 16) * size
        model(x).sum().backward()
        state.session.advance()
        if float(state.x.window) != float(x.abs().max()):
            bad.append(f"history {state.x.window} after {x.abs().max()}")
    return bad


def check_half() -> list[str]:
    return [*check_formats(), *check_payloads(), *check_products(), *check_layers(), *check_histories()]
