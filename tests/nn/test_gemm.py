"""Which unit multiplies, that its products are exact, and that what is not finite stays so."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from altgrad.nn import functional, quantize_model, uncoded_uses, uniform
from altgrad.nn.layer import gemm as gemm_rule
from altgrad.nn.layer import state as layer_state
from altgrad.nn.layer.gemm import (
    PROCESSOR,
    Needs,
    Processor,
    Route,
    choose_route,
    matmul_precision,
    mm,
    narrowest_route,
    needed_route,
    power_range,
    pull_apart,
)
from altgrad.nn.recipe.recipe import Recipe
from altgrad.nn.recipe.text import parse_layer
from altgrad.nn.session import STATE
from altgrad.quantization import FORMAT_REGISTRY, CurrentScaling, FloatFormat, amax_scale, decode, encode, get_format
from altgrad.quantization.products.units import LARGEST_DEPTH, common_unit
from altgrad.quantization.tensor_cores import accumulate_in_float32

EIGHT_BITS = [f for f in FORMAT_REGISTRY.values() if f.bits <= 8 and f.has_zero]
MODES = ("ordinary", "wide", "tiny", "huge")
MATRIX_UNITS = Processor(True, True, True)  # AMX: the setting around a GEMM may be emulated, which these tests allow


def every_size_is_large(monkeypatch, processor):
    """The rule of that processor, whose units are worth their while at any size."""
    for name, value in {"PROCESSOR": processor, "CPU_BF16_MIN_PRODUCTS": 0, "CPU_BF16_MIN_SIDE": 0}.items():
        monkeypatch.setattr(gemm_rule, name, value)


def sample(mode: str, shape, fmt, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if mode == "wide":  # every binade of the format, from its max downwards
        span = min(fmt.emax - int(np.log2(fmt.min_subnormal)) + 1, 120)
        return x.sign() * torch.exp2(-torch.rand(*shape, generator=generator) * span)
    return x * {"ordinary": 1.0, "tiny": 1e-18, "huge": 1e30 if seed == 1 else 1e-25}[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", EIGHT_BITS, ids=str)
def test_pulled_operands_are_bf16_numbers_and_the_product_is_exact(fmt, mode):
    assert narrowest_route(fmt) is Route.BF16
    matrices = []
    for shape, seed in (((24, 32), 1), ((32, 40), 2)):
        x = sample(mode, shape, fmt, seed)
        scale = amax_scale(x, fmt)
        codes = encode(x, fmt, scale, clamp=True)
        power, factor = pull_apart(scale, fmt)
        assert float(power) * float(factor) == float(scale)  # in float64, so exactly
        pulled = decode(codes, fmt, power)
        assert torch.equal(pulled.bfloat16().float(), pulled)
        nonzero = pulled[pulled != 0].abs()
        assert float(nonzero.min()) >= 2.0**-126  # normal: a unit that flushes subnormals keeps it
        matrices.append((pulled, factor, codes, scale))
    (a, fa, ca, sa), (b, fb, cb, sb) = matrices
    got = mm(a, b, Route.BF16).double() * float(fa) * float(fb)
    exact = [decode(c, fmt, 1.0, dtype=torch.float64) * float(s) for c, s in ((ca, sa), (cb, sb))]
    expected, magnitude = exact[0] @ exact[1], exact[0].abs() @ exact[1].abs()
    smallest = 32 * 2.0**-126 * float(fa) * float(fb)  # products below float32's normal numbers are lost on any unit
    assert bool(((got - expected).abs() <= 1e-6 * magnitude + smallest).all())


def test_e7m0_under_amax_scaling_stays_on_the_bf16_route_by_clamping_its_power():
    fmt = get_format("E7M0")
    power, factor = pull_apart(torch.tensor(2.0**-80), fmt)
    assert (float(power), float(factor)) == (2.0**-64, 2.0**-16)
    assert fmt.max * float(power) <= 1.0


def test_raw_payload_products_would_overflow():
    fmt = get_format("E7M0")
    raw = torch.full((1, 1), fmt.max)
    assert torch.isinf(mm(raw, raw, Route.FLOAT32)).all()
    power, _ = pull_apart(amax_scale(torch.ones(1), fmt), fmt)  # a tensor whose largest element is 1
    assert torch.isfinite(mm(raw * power, raw * power, Route.FLOAT32)).all()


ZEN5, SAPPHIRE_RAPIDS = Processor(True, True, False), Processor(True, True, True)
CASCADE_LAKE, HASWELL = Processor(int8_codes=True, vectors=True), Processor(vectors=True)
BIG = (512, 512, 512)


def needs(a, b) -> Needs:
    formats = [None if name is None else get_format(name) for name in (a, b)]
    unit = None if None in formats else common_unit(*formats)
    return Needs(needed_route(*(f if isinstance(f, FloatFormat) else None for f in formats)), unit)


@pytest.mark.parametrize(
    ("a", "b", "shape", "zen5", "sapphire_rapids", "cascade_lake"),
    [
        ("E4M3", "E5M2", BIG, Route.BF16_CODES, Route.AMX_BF16_CODES, Route.FLOAT32_CODES),
        ("E7M0", "E7M0", BIG, Route.BF16_CODES, Route.AMX_BF16_CODES, Route.FLOAT32_CODES),
        ("E0M7", "E4M3", BIG, Route.BF16_CODES, Route.AMX_BF16_CODES, Route.FLOAT32_CODES),
        ("E0M7", "E1M6", BIG, Route.INT8_CODES, Route.AMX_INT8_CODES, Route.INT8_CODES),
        ("INT8", "E2M1", BIG, Route.INT8_CODES, Route.AMX_INT8_CODES, Route.INT8_CODES),
        (
            "E0M7",
            "E0M7",
            (64, 64, LARGEST_DEPTH + 1),
            Route.BF16_CODES,
            Route.AMX_BF16_CODES,
            Route.FLOAT32_CODES,
        ),  # beyond int32
        ("MXFP8", "MXFP8", BIG, Route.BF16_CODES, Route.AMX_BF16_CODES, Route.FLOAT32_CODES),
        ("E4M3", "E4M3", (8, 512, 512), Route.BF16_CODES, Route.AMX_BF16_CODES, Route.FLOAT32_CODES),  # few rows
        ("E4M3", "E4M3", (32, 32, 32), Route.FLOAT32, Route.FLOAT32, Route.FLOAT32),  # few products
        ("BF16", "E4M3", BIG, Route.FLOAT32, Route.FLOAT32, Route.FLOAT32),  # subnormals are not normal bf16 numbers
        ("E5M7", "E4M3", BIG, Route.FLOAT32, Route.BF16, Route.FLOAT32),  # 8 significant bits in more than a byte
        ("FP16", "E4M3", BIG, Route.FLOAT32, Route.FLOAT32, Route.FLOAT32),  # 11 significant bits
        (None, "E4M3", BIG, Route.FLOAT32, Route.FLOAT32, Route.FLOAT32),  # unquantized, or scaled along the reduction
    ],
)
def test_rule_on_each_class_of_cpu(a, b, shape, zen5, sapphire_rapids, cascade_lake):
    needed = needs(a, b)
    assert choose_route(needed, shape, "cpu", processor=ZEN5) is zen5
    assert choose_route(needed, shape, "cpu", processor=SAPPHIRE_RAPIDS) is sapphire_rapids
    assert choose_route(needed, shape, "cpu", processor=CASCADE_LAKE) is cascade_lake
    plainer = {Route.INT8_CODES: Route.INT16_CODES, Route.BF16_CODES: Route.FLOAT32_CODES}
    assert choose_route(needed, shape, "cpu", processor=HASWELL) is plainer.get(zen5, Route.FLOAT32)
    assert choose_route(needed, shape, "cpu", processor=Processor()) is Route.FLOAT32
    for processor in (CASCADE_LAKE, HASWELL):  # codes decoded to float32 against Intel's library
        for side, library in ((256, False), (1024, True)):
            cube = (side, side, side)
            plain = choose_route(needed, cube, "cpu", processor=processor)
            found = choose_route(needed, cube, "cpu", processor=processor._replace(by_intel=True))
            assert found is (Route.FLOAT32 if library and plain is Route.FLOAT32_CODES else plain)
    for processor in (ZEN5, SAPPHIRE_RAPIDS, CASCADE_LAKE, HASWELL):
        assert choose_route(needed, shape, "cpu", dtype=torch.float64, processor=processor) is Route.FLOAT32
    assert choose_route(needed, shape, "cpu", codes=False, processor=ZEN5) is Route.FLOAT32  # in compiled code
    values = Route.BF16 if needed.values is Route.BF16 and min(shape) >= 64 else Route.FLOAT32
    assert choose_route(needed, shape, "cpu", codes=False, processor=SAPPHIRE_RAPIDS) is values


@pytest.mark.parametrize(
    ("a", "b", "route"),
    [
        ("E4M3", "E5M2", Route.BF16),
        ("E7M0", "INT8", Route.BF16),
        ("MXFP8", "MXFP4", Route.BF16),
        ("BF16", "E4M3", Route.BF16),
        ("NVFP4", "MXFP8", Route.BF16),
        ("E4M3/16:FP32", "E4M3", Route.FLOAT32),  # float scales of blocks
        ("FP16", "FP16", Route.FP16),
        ("E4M9", "FP16", Route.FP16),  # shorter, and not as wide
        ("E4M3", "FP16", Route.FLOAT32),  # bf16 numbers and float16 ones
        ("E6M9", "E6M9", Route.FLOAT32),  # wider than float16
        ("TF32", "FP16", Route.FLOAT32),
        ("E4M3", "FP32", Route.FLOAT32),
    ],
)
def test_rule_on_a_gpu(a, b, route, monkeypatch):
    monkeypatch.setattr(layer_state, "choose_route", choose_route)  # whatever route the command line forces
    layer = nn.Linear(8, 8)
    quantize_model(nn.Sequential(layer), Recipe(parse_layer(f"x:{a} w:{b} dy:E4M3")))
    rule = layer.__dict__[STATE].route
    assert rule("forward", (8, 8, 8), torch.device("cuda"), torch.float32) is route
    assert rule("forward", (8, 8, 8), torch.device("cuda"), torch.float64) is Route.FLOAT32
    monkeypatch.setattr(gemm_rule, "accumulate_in_float32", lambda: False)
    assert rule("forward", (8, 8, 8), torch.device("cuda"), torch.float32) is Route.FLOAT32


def test_a_build_that_refuses_float32_sums_of_bf16_takes_the_float32_route(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("out_dtype is not supported")

    accumulate_in_float32.cache_clear()
    assert accumulate_in_float32(), "builds for NVIDIA GPUs have it"
    accumulate_in_float32.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: torch.empty(size, **options))
    monkeypatch.setattr(torch, "mm", refuse)
    assert not accumulate_in_float32()
    accumulate_in_float32.cache_clear()

    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "mm", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        accumulate_in_float32()


def test_this_processor_is_one_of_the_classes_and_says_so():
    facts = torch.cpu.get_capabilities()
    assert not PROCESSOR.matrices or facts["amx_bf16"]
    assert not PROCESSOR.bf16_codes or facts["avx512_bf16"]
    assert PROCESSOR.vectors or not facts["avx2"]
    assert (str(Processor()), str(HASWELL)) == ("float32 alone", "int16 and float32 codes (AVX2)")
    assert "VNNI" in str(CASCADE_LAKE)


@pytest.mark.parametrize(
    ("options", "routes"),
    [
        ({}, ("codes", "codes", "codes")),
        ({"scaling": {"policy": "amax", "axis": 0}}, ("codes", "float32", "float32")),  # scales of rows
        ({"scaling": {"policy": "amax", "axis": 1}}, ("float32", "float32", "codes")),
        ({"scaling": "delayed"}, ("codes", "codes", "codes")),
        ({"storage": "grid"}, ("codes", "codes", "codes")),
    ],
)
def test_scales_along_the_reduction_take_the_float32_route(options, routes):
    torch.manual_seed(0)
    layer, plain = torch.nn.Linear(96, 80), torch.nn.Linear(96, 80)
    plain.load_state_dict(layer.state_dict())
    quantize_model(layer, uniform("E4M3", **options))
    state = layer.quantization
    for gemm, expected in zip(("forward", "input_grad", "weight_grad"), routes):
        assert (state._needed[gemm].unit is not None) == (expected == "codes")
    x = torch.randn(64, 96)
    found = []
    for one in (layer, plain):
        at = x.clone().requires_grad_()
        y = one(at)
        y.backward(torch.sin(torch.arange(y.numel()).float()).view_as(y))
        found.append((y.detach(), at.grad, one.weight.grad))
    for got, exact in zip(*found):
        assert float((got - exact).norm() / exact.norm()) < 0.06


def test_which_formats_hold_no_power_range():
    assert power_range(get_format("BF16"))[0] > power_range(get_format("BF16"))[1]
    for fmt in EIGHT_BITS:
        low, high = power_range(fmt)
        assert fmt.min_subnormal * 2.0**low == 2.0**-126
        assert low <= high


def test_precision_setting_is_left_as_found_also_when_an_exception_flies():
    backend = torch.backends.mkldnn.matmul
    for found in ("none", "ieee", "bf16"):
        backend.fp32_precision = found
        try:
            a = torch.randn(4, 4)
            seen = []
            with matmul_precision("cpu", "bf16"):
                seen.append(backend.fp32_precision)
            assert seen == ["bf16"]
            for route in Route:
                if route in (Route.FLOAT32, Route.BF16):
                    mm(a, a, route)
                assert backend.fp32_precision == found
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                mm(a, torch.randn(3, 4), Route.BF16)
            assert backend.fp32_precision == found
        finally:
            backend.fp32_precision = "none"


def test_float32_route_does_not_take_a_coarser_precision_that_is_set_globally():
    backend, seen = torch.backends.mkldnn.matmul, []
    backend.fp32_precision = "bf16"
    try:
        with matmul_precision("cpu", "ieee"):
            seen.append(backend.fp32_precision)
        assert seen == ["ieee"]
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = "none"


FORMATS = [
    "E4M3",
    "E5M2",
    "E3M4",
    "E0M7",
    "E7M0",
    "BF16",
    "E4M3FNUZ",
    "MXFP8",
    "MXFP4",
    "MXINT8",
    "NVFP4",
    "E2M1/16x16:E8M0",
]
SCALINGS = {
    "amax": {},
    "axis": {"scaling": {"policy": "amax", "axis": 0}},
    "delayed": {"scaling": "delayed"},
    "static": {"scaling": {"policy": "static", "scale": 2.0**-6}},
    "none": {"scaling": "none"},
    "stochastic": {"rounding": "stochastic"},
}
PLACES = ("x", "w", "dy")


def linear():
    return nn.Linear(32, 64), torch.randn(32, 32), (5, 7)


def conv():
    return nn.Conv2d(32, 32, 3, padding=1, groups=2), torch.randn(32, 32, 4, 4), (5, 7, 1, 2)


def finite(layer, x, dy):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    return [t.isfinite() for t in (y, leaf.grad, layer.weight.grad, layer.bias.grad)]


def check(make, recipe):
    torch.manual_seed(0)
    layer, x, element = make()
    plain, dy = copy.deepcopy(layer), torch.randn_like(layer(x)) * 0.1
    quantize_model(layer, recipe)
    for place in PLACES:
        for value in (torch.inf, -torch.inf, torch.nan):
            tensors = {"x": x.clone(), "w": plain.weight.detach().clone(), "dy": dy.clone()}
            spot = element if place != "w" else tuple(min(i, n - 1) for i, n in zip(element, plain.weight.shape))
            tensors[place][spot] = value
            found = []
            for one in (layer, plain):
                with torch.no_grad():
                    before = one.weight.clone()
                    one.weight.copy_(tensors["w"])
                found.append(finite(one, tensors["x"], tensors["dy"]))
                with torch.no_grad():
                    one.weight.copy_(before)
            for name, a, b in zip(("y", "dx", "dw", "db"), *found):
                assert torch.equal(a, b), (place, value, name, int((a != b).sum()))
    return layer


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make, name) for make in (linear, conv) for name in FORMATS if make is linear or "x16" not in name
    ],  # tiles: matrices
)
def test_every_format(make, name):
    check(make, uniform(name))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4"])
def test_every_scaling(name, scaling):
    check(linear, uniform(name, **SCALINGS[scaling]))


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4"])
def test_a_stored_weight(name):
    check(linear, uniform(name, storage="grid"))


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4"])
@pytest.mark.parametrize("route", [Route.BF16, Route.BF16_CODES, Route.FLOAT32_CODES], ids=str)
def test_the_bf16_routes(name, route, monkeypatch):
    monkeypatch.setattr(layer_state, "choose_route", lambda *_, **__: route)
    check(linear, uniform(name))


@pytest.mark.parametrize("name", ["E0M7", "E2M1"])
@pytest.mark.parametrize("route", [Route.INT8_CODES, Route.INT16_CODES], ids=str)
def test_the_integer_routes(name, route, monkeypatch):
    monkeypatch.setattr(layer_state, "choose_route", lambda *_, **__: route)
    check(linear, uniform(name))


def test_uses_without_a_code_are_counted():
    layer = nn.Linear(8, 4)
    quantize_model(layer, uniform("E4M3", grad="E5M2"))
    x = torch.randn(4, 8)
    layer(x).sum().backward()
    assert uncoded_uses(layer) == {}
    x[0, 0] = torch.nan  # E4M3 has a code for it
    layer(x).sum().backward()
    assert uncoded_uses(layer) == {}
    x[0, 0] = torch.inf
    layer(x).sum().backward()
    assert uncoded_uses(layer) == {" input forward": 1}


def test_a_finite_overflow_saturates_and_an_inf_does_not():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    quantize_model(layer, uniform("E5M2", scaling="none"))
    assert layer(torch.tensor([[1e6, 0.0]])).item() == 57344
    assert layer(torch.tensor([[torch.inf, 0.0]])).item() == torch.inf
    told = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        told.weight.fill_(1.0)
    quantize_model(told, uniform("E5M2", scaling="none", overflow="saturate"))
    assert told(torch.tensor([[torch.inf, 0.0]])).item() == 57344


def test_matmul_and_embedding():
    a, b = torch.randn(4, 32), torch.randn(32, 8)
    a[1, 3] = torch.inf
    for recipe in ("E3M4", "MXFP4"):
        assert torch.equal(functional.matmul(a, b, recipe=recipe).isfinite(), (a @ b).isfinite())
    table = nn.Embedding(6, 32)
    with torch.no_grad():
        table.weight[2, 5], table.weight[3, 7] = torch.nan, torch.inf
    expected = table(torch.arange(6)).isfinite()
    quantize_model(table, uniform("MXFP4"))
    assert torch.equal(table(torch.arange(6)).isfinite(), expected)


def test_a_loss_scaler_backs_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    quantize_model(model, uniform("E4M3", grad="E5M2"))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = model[0].weight.detach().clone()
    loss = (model(torch.randn(4, 8)) * 1e6).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**120
    assert torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4", "MXFP8", "NVFP4"])
@pytest.mark.parametrize("processor", [Processor(), MATRIX_UNITS], ids=str)
def test_compiled_layers_hide_nothing(name, processor, monkeypatch):
    torch._dynamo.reset()
    every_size_is_large(monkeypatch, processor)
    torch.manual_seed(0)
    layer, x, element = linear()
    plain = copy.deepcopy(layer)
    quantize_model(layer, uniform(name))
    compiled, dy = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(32, 64)
    x[element] = torch.inf
    y = compiled(x)
    y.backward(dy)
    expected = finite(plain, x, dy)
    assert torch.equal(y.isfinite(), expected[0])
    assert not layer.weight.grad.isfinite()[~expected[2]].any()


@pytest.mark.parametrize("axis", [0, 1])
def test_matrix_units_leave_scales_of_rows_to_the_other_routes(axis, monkeypatch):
    torch.manual_seed(0)
    plain, x, found = nn.Linear(64, 32), torch.randn(48, 64), []
    for processor in (Processor(), MATRIX_UNITS):
        every_size_is_large(monkeypatch, processor)
        layer, given = copy.deepcopy(plain), x.clone().requires_grad_()
        quantize_model(layer, uniform("E4M3", scaling=CurrentScaling(axis=axis)))
        layer(given).square().sum().backward()
        found.append((given.grad, layer.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
