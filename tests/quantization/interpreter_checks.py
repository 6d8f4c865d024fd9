"""Runs the Triton kernels in Triton's interpreter and compares them with the CPU kernels; prints one line per mismatch.

Started by `test_cuda.py` with the name of a part in a process of its own, because the interpreter is chosen before
Triton is imported. Values go through `eager` where the compiled CPU kernel would need a variant of its own for one
case.
"""

import os
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")  # the interpreter computes masked lanes in NumPy, which warns of what they hold

import torch
import triton
import triton.language as tl
from torch._dynamo.backends.common import aot_autograd

from altgrad.errors import RecipeError
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.nn import Recipe, quantize_model, set_step, uniform
from altgrad.nn.layer import emulated, gemm
from altgrad.nn.layer import tensor_cores as cores
from altgrad.nn.session import STATE
from altgrad.quantization import (
    Cast,
    Want,
    decode,
    encode,
    get_format,
    pointwise,
    quantize,
    scaling,
    tensor_cores,
)
from altgrad.quantization.kernels.choose import load
from altgrad.quantization.kernels.cuda.bits import divisor_of, lean_quotient
from altgrad.quantization.kernels.eager import blocks as eager_blocks
from altgrad.quantization.kernels.eager import scalar as eager
from altgrad.quantization.scaling import DelayedScaling, DelayedState
from benchmarks.cuda_traffic import by_channel
from tests.quantization.oracles import same
from tests.quantization.triton_interpreter import compute_as_gpus_do, prepare_each_launch_once

KEY = (3, -9)
BOTH = Want.VALUES | Want.CODES  # by the arithmetic for the casts of training, where that serves
ALL = BOTH | Want.STATS
inf, nan = float("inf"), float("nan")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.cpu(), b.cpu(), rtol=1e-12, equal_nan=True)


def near(found: list[torch.Tensor], wanted: list[torch.Tensor], bound: float) -> bool:
    """Whether tensors are finite in the same places and there within a share of each one's norm, and of the same dtypes."""
    places = [(a, b, b.isfinite()) for a, b in zip(found, wanted, strict=True)]
    alike = all(torch.equal(here, a.isfinite()) and a.dtype == b.dtype for a, b, here in places)
    return alike and all(float((a - b)[here].norm()) <= bound * float(b[here].norm()) for a, b, here in places)


def scalar_samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2048,), dtype=torch.int32, generator=generator).view(torch.float32)
    near = torch.randn(2016, generator=generator) * torch.exp2(
        torch.randint(-12, 12, (2016,), generator=generator).float()
    )
    x = torch.cat([bits, near, torch.arange(-16, 16) / 16]).reshape(4, 1024)
    x[0, :6] = torch.tensor([0.0, -0.0, inf, -inf, nan, 448.0])
    return x


def check_scalars(device: str, names: tuple[str, ...]) -> list[str]:
    x, bad = scalar_samples().to(device), []
    channels = (torch.arange(4.0, device=device) + 0.3)[:, None]
    for name in names:
        fmt = get_format(name)
        for rounding in Rounding:
            policies = Overflow if rounding is Rounding.NEAREST_EVEN and name == "E5M2" else (Overflow.NATIVE,)
            for overflow in policies:
                scale = channels if rounding in (Rounding.NEAREST_EVEN, Rounding.STOCHASTIC) else 1.0
                options = {"rounding": rounding, "overflow": overflow}
                key = KEY if rounding is Rounding.STOCHASTIC else None
                payload, over = eager.round_payload(
                    x, fmt, scale, **options, key=None if key is None else torch.tensor(key)
                )
                cast = Cast(fmt, **options)
                found = cast(x, scale, key=key, want=ALL, kernel="cuda")
                codes = eager.payload_codes(payload, fmt)
                values = payload.float() * scale
                stats = eager_blocks.measure(x, values, over).vector
                good = same(found.values, values) and close(found.stats.vector, stats)
                good = (
                    good
                    and same(found.codes.int(), codes.clamp(min=0))
                    and bool(found.problems) == bool((codes < 0).any())
                )
                lean = cast(x, scale, key=key, want=BOTH, kernel="cuda")
                good = good and all(map(same, (lean.values, lean.codes), (found.values, found.codes)))
                good = good and int(lean.problems) == int(found.problems)
                if not good:
                    bad.append(f"{name} {rounding.value} {overflow.value}")
                beyond = torch.tensor([-1, 2**fmt.bits], dtype=torch.int32, device=device)
                if not cast.decode(beyond, 1.0, kernel="cuda").isnan().all():
                    bad.append(f"decode {name} beyond its codes")
                decoded = cast.decode(found.codes, scale, kernel="cuda")
                plain = payload.isfinite()
                if not same(torch.where(plain, decoded, 0), torch.where(plain, values, 0)):
                    bad.append(f"decode {name} {rounding.value}")
    return bad + check_training(device, x) + check_quotients(device) + check_dtypes(device, x)


def check_training(device: str, x: torch.Tensor) -> list[str]:
    """The casts of training, under one scale of any size."""
    bad = []
    for name in ("E4M3", "E0M7", "E7M0", "E5M2", "E2M1"):
        for scale in (1.0, 0.3, 1.9999999, 1e-40, 1.5 * 2.0**-126, 3e38):
            for rounding in (Rounding.NEAREST_EVEN, Rounding.STOCHASTIC):
                for overflow in (Overflow.SATURATE_FINITE, Overflow.SATURATE):
                    cast = Cast(name, rounding, overflow)
                    key = KEY if rounding is Rounding.STOCHASTIC else None
                    a, b = (cast(x, scale, key=key, want=BOTH, kernel=kernel) for kernel in ("eager", "cuda"))
                    if not (
                        same(a.values, b.values) and same(a.codes, b.codes) and bool(a.problems) == bool(b.problems)
                    ):
                        bad.append(f"{cast} scale {scale}")
    return bad


@triton.jit
def quotients(x, scale, out, ELEMENTS: tl.constexpr):
    index = tl.arange(0, ELEMENTS)
    tl.store(out + index, lean_quotient(tl.load(x + index), divisor_of(tl.load(scale))))


def check_quotients(device: str) -> list[str]:
    """|x| / scale by a reciprocal, against IEEE division, for significands near 1, near 2 and anywhere."""
    x = scalar_samples().flatten()
    near = torch.arange(1024, dtype=torch.int32)
    x[1024:2048], x[2048:3072] = ((one + near).view(torch.float32) for one in (0x3F800000, 0x3FFFFC00))
    x, bad = x.to(device), []
    for bits in (0x3F800001, 0x3FFFFFFF, 0x3FFFFFFE, 0x3FAAAAAB, 0x3F800000, 0x00123456, 0x7F7FFFFF, 0x3EB504F3):
        scale, out = torch.tensor([bits], dtype=torch.int32, device=device).view(torch.float32), torch.empty_like(x)
        quotients[(1,)](x, scale, out, ELEMENTS=len(x))
        expected = (x / scale).abs()
        judged = (expected >= 2.0**-70) & (expected <= 2.0**76)
        if not same(torch.where(judged, out, 0), torch.where(judged, expected, 0)):
            bad.append(f"quotient by {scale.item()}")
    return bad


def check_dtypes(device: str, x: torch.Tensor) -> list[str]:
    bad = []
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        fmt, given = get_format("E4M3"), x.to(dtype)
        found = quantize(given, fmt, 0.75, kernel="cuda")
        expected = quantize(given, fmt, 0.75, kernel="eager")
        if not same(found, expected):
            bad.append(f"E4M3 {dtype}")
    return bad


def block_samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 64, generator=generator) * torch.exp2(
        torch.randint(-9, 9, (2, 40, 64), generator=generator).float()
    )
    x[0, :, :32] = 0
    x[1, 3, 40], x[1, 5, 50], x[1, 36, 2], x[1, 37, 5] = inf, nan, -0.0, -inf
    x[1, :4] *= 1e-42
    x[0, 39] = torch.finfo(torch.float32).max / 50
    return x


def check_blocks(device: str, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[str]:
    bad = []
    for name in names:
        fmt = get_format(name)
        for dtype in dtypes:
            x = block_samples().to(dtype).to(device)
            for axis in (-1,) if fmt.is_tile else (-1, 1):
                for rounding in (Rounding.NEAREST_EVEN, Rounding.STOCHASTIC, Rounding.UP):
                    cast = Cast(fmt, rounding, axis=axis, pad=True)
                    a, b = (cast(x, key=KEY, want=ALL, kernel=kernel) for kernel in ("eager", "cuda"))
                    good = same(a.values, b.values) and same(a.codes, b.codes) and same(a.scales, b.scales)
                    lean = cast(x, key=KEY, want=BOTH, kernel="cuda")
                    good = good and all(map(same, lean[:3], b[:3])) and bool(lean.problems) == bool(b.problems)
                    if not (good and close(a.stats.vector, b.stats.vector) and bool(a.problems) == bool(b.problems)):
                        bad.append(f"{name} {dtype} axis {axis} {rounding.value}")
                packed = encode(torch.where(x.isfinite(), x, 0.0), name, axis=axis, pad=True, kernel="eager")
                plain, compiled = (decode(packed, dtype=dtype, kernel=kernel) for kernel in ("eager", "cuda"))
                if not same(plain, compiled):
                    bad.append(f"decode {name} {dtype} axis {axis}")
    return bad


LAYERS = [
    ("E4M3", {}),
    ("E7M0", {}),
    ("INT8", {}),
    ("MXFP8", {}),
    ("NVFP4", {}),
    ("E2M1/16:E4M3", {}),
    ("BF16", {}),
    ("E4M3", {"rounding": "stochastic"}),
    ("E4M3", {"scaling": "none"}),
    ("E4M3", {"scaling": {"policy": "amax", "power_of_two": True}}),
    ("E4M3", {"scaling": {"policy": "delayed", "history": 1}}),
    (by_channel("E4M3"), {}),
]


def layer_results(fmt: str | Recipe, recipe: dict, on_cores: bool, autocast: bool) -> list[torch.Tensor]:
    """Output and gradients of a linear layer in its third step, and with a NaN in its input."""
    cores = lambda: on_cores  # noqa: E731
    products = load("cuda", "products")
    with (
        mock.patch.object(gemm, "interpreted", cores),
        mock.patch.object(tensor_cores, "interpreted", cores),
        mock.patch.object(products, "LEAST_PROGRAMS", 1),
    ):
        torch.manual_seed(0)
        layer = torch.nn.Linear(48, 32)
        model = torch.nn.Sequential(layer)
        quantize_model(model, fmt if isinstance(fmt, Recipe) else uniform(fmt, **recipe))
        for step in range(3):
            set_step(model, step)
            x = (torch.randn(40, 48) * (1 + step)).requires_grad_()
            layer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                y = model(x)
            (y.float() * torch.randn(40, 32)).sum().backward()
            layer.__dict__[STATE].session.advance()
        with torch.no_grad():
            special = x.detach().clone()
            special[3, 5], special[7, 1] = nan, inf
            return [y, x.grad, layer.weight.grad, layer.bias.grad, model(special)]


def check_two_levels() -> list[str]:
    """Operands under a tensor scale, whatever it is: payload times factor is the value, to float32's rounding."""
    cast, bad = Cast("NVFP4"), []
    powers = cores.powers_of_blocks(cast.format)
    for size in (1e-37, 1e-20, 1.0, 3e37):
        x = torch.randn(8, 64) * size
        values, factor = tensor_cores.block_payload(x, cast, powers)
        wanted = cast(x, kernel="eager").values
        if not torch.allclose(values.double() * factor.double(), wanted.double(), rtol=3e-7, atol=0):
            bad.append(f"two levels {size}")
        if size == 1.0 and not 1 <= float(factor) < 2:
            bad.append(f"factor {float(factor)}")
    return bad


def check_rolls() -> list[str]:
    """Steps of delayed scales against the policy's own arithmetic."""
    bad = []
    for history, margin, power_of_two in ((1, 0, False), (3, 1, True), (16, -2, False)):
        policy, fmt = DelayedScaling(history, margin, power_of_two), get_format("E5M2")
        window, scale = torch.rand(history) * 100, torch.zeros(())
        for seen in (0.0, 3e-42, 7.5, -1.0, 1e30):
            pending = torch.tensor(seen)
            wanted = policy.update(pending, DelayedState(window), fmt)[1].window if seen >= 0 else window.clone()
            tensor_cores.roll(window, pending, scale, fmt.max, margin, power_of_two)
            following = policy.update(pending, DelayedState(wanted), fmt)[0]
            if not (same(window, wanted) and same(scale, following) and float(pending) == -1):
                bad.append(f"roll {policy} {seen}")
    return bad


def check_layers() -> list[str]:
    """Layers on tensor cores against layers in float32: the same sums in another order."""
    bad = []
    with mock.patch.object(gemm, "PROCESSOR", gemm.Processor()):
        for fmt, recipe in LAYERS:
            for autocast in (False, True) if fmt == "E4M3" and not recipe else (False,):
                got, wanted = (layer_results(fmt, recipe, cores, autocast) for cores in (True, False))
                bound = 2.0**-8 if autocast else 2e-6
                if not near(got, wanted, bound):
                    bad.append(f"layer {fmt} {recipe} {autocast}")
    return bad


UNIT = [
    uniform("E4M3"),
    uniform("E4M3", grad="E5M2", rounding="stochastic"),
    uniform("E4M3", scaling={"policy": "delayed", "history": 1}),
    uniform("E4M3", scaling={"policy": "static", "scale": 0.05}),
    by_channel("E4M3"),
]


@contextmanager
def on_an_fp8_unit():
    """A CPU passes for a GPU with Hopper's unit; it adds up in float32."""
    with (
        mock.patch.object(emulated, "on_unit", lambda x: True),  # noqa: PT008 - which the compiler traces
        mock.patch.object(torch.cuda, "get_device_capability", lambda index: (9, 0)),  # noqa: PT008
    ):
        yield


def check_fp8_unit() -> list[str]:
    """Layers whose codes go to an FP8 unit against layers in float32: NaN and inf in place, too; in bf16 as well."""
    bad = []
    for recipe in UNIT:
        for autocast in (False, True) if recipe == UNIT[0] else (False,):
            with on_an_fp8_unit(), mock.patch.object(torch, "_scaled_mm", side_effect=torch._scaled_mm) as products:
                got = layer_results(recipe.with_(accumulator="fp8_unit"), {}, True, autocast)
            wanted = layer_results(recipe, {}, False, autocast)
            if products.call_count != 3 * 3 + 1:
                bad.append(f"unit {recipe} has {products.call_count} products")
            bound = 2.0**-8 if autocast else 2e-6
            if not near(got, wanted, bound):
                bad.append(f"unit {recipe} {autocast}")
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(4, 16, requires_grad=True)
    quantize_model(model, uniform("E4M3").with_(accumulator="fp8_unit"))
    with on_an_fp8_unit():
        torch.autograd.grad(model(x).sum(), x)
        try:
            torch.autograd.grad(model(x).sum(), x, create_graph=True)
            bad.append("unit differentiated twice")
        except RecipeError as refused:
            bad += [] if "is differentiated once; drop create_graph" in str(refused) else [str(refused)]
    x = scalar_samples()
    for cast in (CAST, Cast("E5M2", overflow="saturate_finite"), Cast("E4M3", Rounding.UP, Overflow.SATURATE)):
        (found,) = (one.float() for one in tensor_cores.codes(x, cast, torch.tensor(0.3)))
        wanted = cast(x, 0.3, kernel="eager", want=BOTH)
        plain = wanted.values.isfinite()
        exact = cast.decode(wanted.codes, kernel="eager")
        kept = torch.where(x.isinf() & ~plain, x if cast.grid.has_inf else nan, nan)
        if not same(found, torch.where(plain, exact, kept)):
            bad.append(f"codes {cast}")
    return bad


CAST = Cast("E4M3", overflow="saturate_finite")


def check_channels() -> list[str]:
    """Scales of rows and columns, operands under them and products of those, against plain torch."""
    bad, fmt = [], get_format("E4M3")
    for rows, columns in ((70, 300), (1, 5), (5, 1), (3000, 2), (0, 4), (4, 0)):
        x = torch.randn(rows, columns) * torch.exp2(torch.randint(-30, 9, (rows, columns)).float())
        x[:, : columns // 3] *= 1e-38
        if x.numel() > 40:
            x[0, 1], x[3, 0] = inf, nan
        for axis in (0, 1):
            for power_of_two in (False, True):
                scale = tensor_cores.largest(x, fmt.max, power_of_two, axis)
                if not same(scale, scaling.amax_scale(x, fmt, axis=axis, power_of_two=power_of_two)):
                    bad.append(f"scales of {rows} x {columns} along {axis}")
            values, factor = tensor_cores.payload(x, CAST, scale, (-117, 119))
            fused = pointwise.payload(x, scale, pointwise.facts_of(fmt, fmt, CAST.rounding, CAST.overflow), (-117, 119))
            if not (same(fused[0].float(), values.float()) and same(fused[1], factor)):
                bad.append(f"pointwise payload of {rows} x {columns} along {axis}")
            wanted = quantize(x, fmt, scale, overflow="saturate_finite", kernel="eager")
            apart = (
                (values.double() * factor - wanted.double()).nan_to_num() if x.numel() else wanted
            )  # inf - inf is NaN
            alike = torch.equal(values.isfinite(), wanted.isfinite()) and not apart.any()
            if factor.shape != scale.shape or not alike:
                bad.append(f"payload of {rows} x {columns} along {axis}")
    return bad


def check_large_scales() -> list[str]:
    """Operands of formats below 1 under scales up to float32's largest: 2^-127 is no normal number."""
    bad, x = [], torch.tensor([3e38, -1e38, 1e36, 0.0])
    for scale in (1.7e38, 2.0**127, 3.3e38, 2.0**-126):
        given = torch.tensor(scale)
        values, factor = tensor_cores.payload(x, Cast("E0M7", overflow="saturate_finite"), given, (-118, 127))
        wanted = quantize(x, "E0M7", scale, overflow="saturate_finite", kernel="eager")
        if not torch.equal((values.double() * factor.double()).float(), wanted):
            bad.append(f"payload under scale {scale}")
    return bad


def check_compiled_layers() -> list[str]:
    """A layer whose graph rounds in pointwise operations gives the bits of the kernels."""
    bad, nodes = [], []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    recipe = uniform("E4M3", scaling={"policy": "static", "scale": 0.05})
    x[0, :2] = torch.tensor([inf, nan])
    for unit in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(32, 16))
        quantize_model(model, recipe.with_(accumulator="fp8_unit") if unit else recipe)
        nodes.clear()
        with torch.no_grad(), on_an_fp8_unit():
            eager, compiled = model(x), torch.compile(model, backend=backend, fullgraph=True)(x)
        if not same(eager, compiled):
            bad.append(f"compiled layer {unit}")
        operators = ("payload", "codes") if not unit else ("altgrad",)
        if not any("copysign" in node for node in nodes) or any(one in node for one in operators for node in nodes):
            bad.append(f"compiled layer {unit} has {nodes}")
    return bad


def check_compiled_keys() -> list[str]:
    """Compiled stochastic layers draw the bits of eager ones, by keys that are found where the tensors are."""
    bad, keys = [], []

    def kept(graph, inputs):
        payloads = [node for node in graph.graph.nodes if node.args and str(node.args[0]) == "altgrad.payload.default"]
        keys.extend(str(node.kwargs["key"].target) for node in payloads)
        return graph.forward

    def trained(compiles: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 32))
        quantize_model(model, uniform("E4M3", rounding="stochastic"))
        optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
        run = torch.compile(model, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept)) if compiles else model
        for _ in range(3):
            x = torch.randn(24, 32, requires_grad=True)
            for _ in range(2):  # uses of one step
                run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(x.grad)
        with torch.no_grad():
            return [*found, *model.parameters(), run.eval()(x)]

    if not all(map(same, trained(True), trained(False))):
        bad.append("compiled stochastic layers")
    if not keys or not all("key_beside" in key for key in keys):  # made in the graph, or kept by its forward
        bad.append(f"keys of compiled layers: {keys}")
    return bad


def check_products() -> list[str]:
    """Products that end in their epilogue against sums in float64."""
    bad, kernels = [], load("cuda", "products")
    for rows, depth, columns in ((200, 100, 150), (1, 3, 1), (5, 0, 7), (130, 70, 257)):
        a, b = torch.randn(depth, rows).bfloat16().t(), torch.randn(depth, columns).bfloat16()
        of_a, of_b, bias = torch.rand(rows, 1) + 1, torch.rand(()) + 1, torch.randn(columns)
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        got = kernels.product(a, b, of_a, of_b, bias, torch.float32)
        if not bool(((got - exact * of_a * of_b - bias).abs() <= 1e-6 * (4 * size + bias.abs())).all()):
            bad.append(f"product {rows} {depth} {columns}")
        sums = kernels.product(a, b, None, None, None, torch.float32)
        last = load("cuda", "operands").finished(sums.clone(), of_a, of_b, bias, torch.bfloat16)
        if not same(kernels.product(a, b, of_a, of_b, bias, torch.bfloat16), last):
            bad.append(f"epilogue {rows} {depth} {columns}")
    return bad


def check_kernels() -> list[str]:
    return [
        *check_scalars("cpu", ("E4M3", "E5M2", "INT8", "E0M7", "E7M0", "E2M1")),
        *check_blocks("cpu", ("MXFP8", "MXFP8_E5M2", "NVFP4", "MXFP4:ceil", "E3M4/24:even", "E4M3/16x32:FP32")),
        *check_blocks("cpu", ("MXFP8",), (torch.bfloat16, torch.float16)),
    ]


PARTS = {
    "kernels": [check_kernels, lambda: import_module("tests.quantization.cached_operands").check_cached()],
    "layers": [
        check_layers,
        check_rolls,
        check_two_levels,
        check_channels,
        check_products,
        check_large_scales,
        check_compiled_layers,
        check_compiled_keys,
        check_fp8_unit,
    ],
    "graphs": [lambda: import_module("tests.quantization.captured_steps").check_graphs()],
    "generated": [lambda: import_module("tests.quantization.generated_code").check_generated(scalar_samples())],
    "half": [lambda: import_module("tests.quantization.half_precision").check_half()],
    "codes": [lambda: import_module("tests.quantization.operand_codes").check_codes()],
}


if __name__ == "__main__":
    compute_as_gpus_do()
    prepare_each_launch_once()
    found = [line for check in PARTS[sys.argv[1]] for line in check()]
    print("\n".join(found))
    sys.exit(1 if found else 0)
