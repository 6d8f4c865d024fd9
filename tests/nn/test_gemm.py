"""Which unit multiplies, and that its products are exact for every 8-bit format of the catalog."""

import numpy as np
import pytest
import torch

from altgrad.nn.layer.gemm import (
    Route,
    choose_route,
    matmul_precision,
    mm,
    narrowest_route,
    needed_route,
    power_range,
    pull_apart,
)
from altgrad.quantization import FORMAT_REGISTRY, amax_scale, decode, encode, get_format

EIGHT_BITS = [f for f in FORMAT_REGISTRY.values() if f.bits <= 8 and f.has_zero]
MODES = ("ordinary", "wide", "tiny", "huge")


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


BF16_CPU = {"bf16_units": True}


@pytest.mark.parametrize(
    ("a", "b", "shape", "expected"),
    [
        ("E4M3", "E5M2", (512, 512, 512), Route.BF16),
        ("E7M0", "E7M0", (512, 512, 512), Route.BF16),
        ("E0M7", "E4M3", (512, 512, 512), Route.BF16),
        ("E4M3", "E4M3", (8, 512, 512), Route.FLOAT32),  # too few rows
        ("E4M3", "E4M3", (32, 32, 32), Route.FLOAT32),  # too few products
        ("BF16", "E4M3", (512, 512, 512), Route.FLOAT32),  # its subnormals are not normal bf16 numbers
        ("E5M7", "E4M3", (512, 512, 512), Route.BF16),  # 8 significant bits
        ("FP16", "E4M3", (512, 512, 512), Route.FLOAT32),  # 11 significant bits
        (None, "E4M3", (512, 512, 512), Route.FLOAT32),  # unquantized, or scaled along the reduction
    ],
)
def test_rule_on_a_cpu_with_bf16_units(a, b, shape, expected):
    formats = [None if name is None else get_format(name) for name in (a, b)]
    assert choose_route(needed_route(*formats), shape, "cpu", **BF16_CPU) is expected


def test_rule_without_bf16_units_in_float64_and_on_a_gpu():
    narrow, wide = get_format("E4M3"), get_format("FP16")
    needed, shape = needed_route(narrow, narrow), (512, 512, 512)
    assert choose_route(needed, shape, "cpu", bf16_units=False) is Route.FLOAT32
    assert choose_route(needed, shape, "cpu", dtype=torch.float64, **BF16_CPU) is Route.FLOAT32
    assert choose_route(needed, (8, 8, 8), "cuda") is Route.BF16
    assert choose_route(needed_route(narrow, wide), shape, "cuda") is Route.TF32
    assert choose_route(needed_route(narrow, get_format("FP32")), shape, "cuda") is Route.FLOAT32


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
                if route is not Route.TF32:
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
