"""Products of codes: exact on every unit, for every format, layout, shape and number of threads.

The units' instructions are run where this CPU has them and spelled out everywhere: both by the same packing code.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from altgrad.nn.layer import gemm
from altgrad.quantization import FORMAT_REGISTRY, Cast, amax_scale, decode, encode, get_format
from altgrad.quantization.codec import scale_values
from altgrad.quantization.products import multiply as multiply_module
from altgrad.quantization.products.multiply import Codes, fits_exponents, multiply
from altgrad.quantization.products.units import (
    GROUP,
    LARGEST_DEPTH,
    Unit,
    common_unit,
    has_wide_vectors,
    on_this_cpu,
    power,
    unit_of,
)
from altgrad.quantization.quantized import Want

BYTES = [f for f in FORMAT_REGISTRY.values() if f.bits <= 8 and f.has_zero]
INTEGERS = [f for f in BYTES if unit_of(f) is Unit.INT8]
UNITS = [(f, u) for f in BYTES for u in Unit if not u.sums_integers or f in INTEGERS]
LIKE_ZEN5, LIKE_HASWELL = gemm.Processor(True, True, False), gemm.Processor(vectors=True)
EMULATED = [pytest.param(False, id="instruction"), pytest.param(True, id="emulated")]
LAYOUTS = ["nt", "nn", "tn", "tt"]
BLOCKS = ["MXFP8", "MXFP8_E5M2", "MXFP6", "MXFP4", "MXINT8", "NVFP4", "E2M1/16x16:E8M0"]


@pytest.fixture(autouse=True)
def only_where_it_is(request):
    """A run by the instruction needs it; the emulated run of the same test is there on every CPU."""
    given = getattr(request.node, "callspec", None)
    params = given.params if given else {}
    unit = params["case"][1] if "case" in params else params.get("unit")
    if params.get("emulated") is False and unit is not None and not on_this_cpu(unit):
        pytest.skip(f"this CPU multiplies no {unit.value}; the emulated run covers the same code")


def matrix(shape, seed, fmt, mode="ordinary"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if mode == "wide":  # every binade of the format, from its max downwards
        span = min(fmt.emax - math.frexp(fmt.min_subnormal)[1] + 2, 120)
        return x.sign() * torch.exp2(-torch.rand(*shape, generator=generator) * span)
    return x * {"ordinary": 1.0, "tiny": 1e-30, "huge": 1e37}[mode]


def coded(x, fmt):
    scale = float(amax_scale(x, fmt))
    return Codes(encode(x, fmt, scale, clamp=True), fmt, scale)


def values(operand):
    """Exact values of an operand in float64, without its scale."""
    if operand.blocks is None:
        return decode(operand.codes, operand.fmt, 1.0, dtype=torch.float64)
    scales = scale_values(operand.blocks, operand.fmt, None).double()
    for axis, times in zip((-2, -1), operand.tile):
        scales = scales.repeat_interleave(times, axis).narrow(axis, 0, operand.codes.shape[axis])
    return decode(operand.codes, operand.fmt.element, 1.0, dtype=torch.float64) * scales


def check(a, b, unit, emulated, bias=None):
    """|C - C64| <= 1e-6 (|A| |B|), in units of both scales, but for what lies below float32's normal numbers."""
    got = multiply(a, b, unit, bias=bias, emulated=emulated)
    x, w = values(a), values(b)
    expected, magnitude = x @ w, x.abs() @ w.abs()
    units = float(a.scale) * float(b.scale)  # in float64, where no scale overflows
    shift = 0.0 if bias is None else bias.double() / units
    lost = 2.0**-126 / units + 2.0 ** -(126 + power(a.fmt, unit) + power(b.fmt, unit)) * x.shape[-1]
    limit = 1e-6 * (magnitude + abs(shift)) + lost
    finite = (expected * units).abs() < torch.finfo(torch.float32).max
    error = (got.double() / units - (expected + shift)).abs()
    assert bool((error <= limit)[finite].all()), float((error / limit)[finite].max())
    return got


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("case", UNITS, ids=lambda case: f"{case[0]}-{case[1].value}")
def test_every_format_on_every_unit_that_holds_it(case, emulated):
    fmt, unit = case
    for mode in ("ordinary", "wide", "tiny", "huge"):
        a, b = matrix((24, 70), 1, fmt, mode), matrix((70, 40), 2, fmt, "ordinary" if mode == "huge" else mode)
        check(coded(a, fmt), coded(b, fmt), unit, emulated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize(("unit", "name"), [(u, "E0M7" if u.sums_integers else "E4M3") for u in Unit])
def test_every_layout_and_odd_shapes(unit, name, emulated, layout):
    fmt = get_format(name)
    for m, k, n in ((1, 1, 1), (8, 32, 32), (5, 7, 3), (33, 1000, 65), (70, 131, 47), (16, 2305, 9)):
        a, b = coded(matrix((m, k), 1, fmt), fmt), coded(matrix((k, n), 2, fmt), fmt)
        if layout[0] == "t":
            a = a._replace(codes=a.codes.t().contiguous().t())
        if layout[1] == "t":
            b = b._replace(codes=b.codes.t().contiguous().t())
        check(a, b, unit, emulated, bias=torch.randn(n))
    wide = coded(matrix((40, 60), 1, fmt), fmt)
    check(wide._replace(codes=wide.codes[::2, ::3]), coded(matrix((20, 8), 2, fmt), fmt), unit, emulated)


def test_nothing_to_multiply():
    fmt = get_format("E4M3")
    for m, k, n in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        operands = [Codes(torch.zeros(shape, dtype=torch.uint8), fmt) for shape in ((m, k), (k, n))]
        bias = torch.ones(n)
        assert torch.equal(multiply(*operands, Unit.BF16, bias=bias), torch.ones(m, n))


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("unit", list(Unit), ids=lambda unit: unit.value)
def test_both_uniform_grids_give_the_same_bits(unit, emulated):
    x, w = torch.randn(50, 900), torch.randn(900, 70)
    found = [multiply(coded(x, f), coded(w, f), unit, emulated=emulated) for f in map(get_format, ("E0M7", "E1M6"))]
    assert torch.equal(*found)


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize(("unit", "name"), [(u, "E1M6" if u.sums_integers else "E5M2") for u in Unit])
def test_every_number_of_threads_beside_torchs_own(unit, name, emulated):
    fmt = get_format(name)
    left, right = torch.randn(500, 700), torch.randn(700, 600)
    a, b = coded(left, fmt), coded(right, fmt)
    expected = check(a, b, unit, emulated)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for _ in range(4):
            plain = left @ right  # torch's pool has just run, and runs again
            assert torch.equal(multiply(a, b, unit, emulated=emulated), expected)
            assert torch.equal(left @ right, plain)


def test_the_instructions_and_their_emulation_agree():
    for unit in filter(on_this_cpu, Unit):
        fmt = get_format("E0M7" if unit.sums_integers else "E4M3")
        a, b = coded(torch.randn(40, 800), fmt), coded(torch.randn(800, 50), fmt)
        found = [multiply(a, b, unit, emulated=emulated) for emulated in (False, True)]
        if unit is not Unit.BF16:
            assert torch.equal(*found), unit
        assert torch.allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("unit", [Unit.INT16, Unit.FLOAT32], ids=lambda unit: unit.value)
def test_tiles_for_few_registers_give_the_same_bits(unit, emulated, monkeypatch):
    fmt = get_format("E0M7")
    for m, k, n in ((1, 1, 1), (8, 64, 32), (33, 700, 65)):
        a, b, bias = coded(torch.randn(m, k), fmt), coded(torch.randn(k, n), fmt), torch.randn(n)
        found = []
        for wide in (True, False):
            monkeypatch.setattr(multiply_module, "_plans", {})
            monkeypatch.setattr(multiply_module, "has_wide_vectors", lambda wide=wide: wide)
            found.append(multiply(a, b, unit, bias=bias, emulated=emulated or (wide and not has_wide_vectors())))
        assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(40, 1600, 70), (2, 33, 1600, 35)], ids=str)
@pytest.mark.parametrize("unit", list(Unit), ids=lambda unit: unit.value)
def test_a_reduction_in_pieces_has_the_bits_of_one_in_one(unit, shape, monkeypatch):
    fmt = get_format("E0M7" if unit.sums_integers else "MXFP8")
    *batch, m, k, n = shape
    if fmt.name == "MXFP8":
        found = [Cast(fmt)(torch.randn(*batch, *sides), want=Want.CODES) for sides in ((m, k), (n, k))]
        a, b = (Codes(one.codes, fmt, 1.0, one.scales, (1, 32)) for one in found)
    else:
        a, b = (coded(torch.randn(*batch, *sides), fmt) for sides in ((m, k), (n, k)))
    found = []
    for size in (1 << 30, 1):
        monkeypatch.setattr(multiply_module, "PIECE_BYTES", size)
        for threads in (1, 2):
            monkeypatch.setattr(multiply_module, "_plans", {})
            torch.set_num_threads(threads)
            found.append(multiply(a, b.t(), unit, bias=torch.arange(float(n))))
            (plan,) = multiply_module._plans.values()
            assert len(plan.pieces) == (1 if size > 1 else {1: 5, 2: 5, 4: 3}[GROUP[unit]])
    assert all(torch.equal(one, found[0]) for one in found)


def test_integers_have_one_sum_on_every_unit():
    fmt = get_format("E1M6")
    a, b = coded(torch.randn(37, 900), fmt), coded(torch.randn(900, 41), fmt)
    found = [multiply(a, b, unit) for unit in Unit if unit.sums_integers]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("unit", [unit for unit in Unit if unit.by_matrices], ids=lambda unit: unit.value)
def test_matrix_registers_are_given_back_as_found(unit):
    fmt = get_format("E0M7")
    a, b = coded(torch.randn(200, 300), fmt), coded(torch.randn(300, 150), fmt)
    left, right = torch.randn(200, 300).bfloat16(), torch.randn(300, 150).bfloat16()
    expected = multiply(a, b, unit), left @ right  # a library's product, by matrix units where there are any
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(multiply(a, b, unit), expected[0])
            assert torch.equal(left @ right, expected[1])


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize(("unit", "name"), [(Unit.BF16, "E5M2"), (Unit.FLOAT32, "E5M2")])
def test_codes_of_nan_and_inf(unit, name, emulated):
    x, w = torch.randn(20, 40), torch.randn(40, 36)
    x[3, 5], x[7, 39], w[11, 35] = torch.nan, torch.inf, -torch.inf
    w[39, 2] = 0.0  # inf times zero
    fmt = get_format(name)
    a, b = (Codes(encode(t, fmt, 0.25), fmt, 0.25) for t in (x, w))
    for one in (a, a._replace(codes=a.codes.t().contiguous().t())):
        got, expected = multiply(one, b, unit, emulated=emulated), x @ w
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("unit", [Unit.BF16, Unit.FLOAT32], ids=lambda unit: unit.value)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_formats_along_the_reduction(name, unit, emulated):
    fmt = get_format(name)
    assert common_unit(fmt, fmt) is Unit.BF16

    def packed(x, axis):
        cast = Cast(fmt, axis=-1 if fmt.is_tile else axis, pad=True)
        found = cast(x, want=Want.CODES)
        layout = cast.layout(x.shape)
        scale = 1.0 if found.tensor_scale is None else float(found.tensor_scale)
        return Codes(found.codes, fmt, scale, found.scales, layout[3:5])

    spread = torch.exp2(torch.randint(-20, 20, (45, 1)).float())
    x, w = torch.randn(45, 100) * spread, torch.randn(100, 37)
    check(packed(x, 1), packed(w, 0), unit, emulated)
    check(packed(x.t().contiguous(), 0).t(), packed(w.t().contiguous(), 1).t(), unit, emulated)
    x, w = torch.randn(3, 20, 64), torch.randn(3, 64, 24)
    check(packed(x, -1), packed(w, -2), unit, emulated)
    check(packed(x, -1), packed(w[0], -2), unit, emulated)


def test_batches_and_one_matrix_for_all():
    fmt = get_format("E4M3")
    for left, right in (
        ((2, 3, 9, 40), (2, 3, 40, 11)),
        ((3, 9, 40), (2, 1, 40, 11)),
        ((9, 40), (4, 40, 11)),
        ((1, 9, 40), (40, 11)),
    ):
        a, b = coded(torch.randn(left), fmt), coded(torch.randn(right), fmt)
        got = check(a, b, Unit.BF16, True)
        assert got.shape == (torch.empty(left) @ torch.empty(right)).shape


def test_which_unit_holds_which_format():
    assert {f.name for f in INTEGERS} >= {"E0M7", "E1M6", "INT8", "E2M1", "E2M3"}
    assert all(unit_of(f) is not None for f in BYTES)
    assert common_unit(get_format("E0M7"), get_format("E4M3")) is Unit.BF16
    for name in ("FP16", "BF16", "E5M7", "E4M3/16x16:FP32", "MXFP8"):
        fmt = get_format(name)
        assert unit_of(fmt) is (Unit.BF16 if name == "MXFP8" else None), name


def test_the_deepest_sum_of_bytes_is_exact():
    fmt = get_format("E0M7")
    depth = LARGEST_DEPTH
    largest = Codes(torch.full((1, depth), 127, dtype=torch.uint8), fmt)
    other = Codes(torch.full((depth, 1), 255, dtype=torch.uint8), fmt)  # -127
    for unit in (Unit.INT8, Unit.INT16):
        got = multiply(largest, other, unit, emulated=True)
        assert float(got) == float(torch.tensor(-(127.0**2) * depth / 2.0**14))


@pytest.mark.parametrize("threads", [1, 2])
def test_packed_operands_beyond_what_a_thread_keeps_live_until_they_are_multiplied(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (torch.randint(0, 120, size, dtype=torch.uint8) for size in ((8, 256), (256, 70_000)))
        assert 2 * b.numel() > multiply_module.KEPT_BYTES
        fmt = get_format("E4M3")
        found = multiply(Codes(a, fmt), Codes(b, fmt), Unit.BF16)
        expected = decode(a, fmt).double() @ decode(b[:, -32:].contiguous(), fmt).double()
        torch.testing.assert_close(found[:, -32:].double(), expected, rtol=1e-5, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_multiplies_shapes_that_its_parent_planned():
    code = "\n".join([
        "import os, torch",
        "from altgrad.quantization import get_format",
        "from altgrad.quantization.products.multiply import Codes, multiply",
        "from altgrad.quantization.products.units import Unit",
        "torch.set_num_threads(2)",
        "from altgrad.nn import functional, layer_recipe",
        "recipe = layer_recipe('E4M3')",
        "x, y = Codes(torch.zeros(512, 512, dtype=torch.uint8), get_format('E4M3')), torch.ones(384, 384)",
        "work = lambda: (multiply(x, x, Unit.BF16), functional.linear(y, y, recipe=recipe))",
        "work()",
        "child = os.fork()",
        "if child == 0: work(); os._exit(7)",
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7",
    ])  # fmt: skip
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    ("fmt", "axis"), [("MXFP8", -1), ("MXFP8", 0), ("MXFP8", 1), ("MXINT8", -1), ("E2M1/16x16:E8M0", -1)]
)
def test_extreme_scales_leave_the_unit_but_blocks_of_zeros_do_not(fmt, axis):
    cast = Cast(fmt, axis=axis, pad=True)

    def fits(x):
        found = cast(x, want=Want.CODES)
        layout = cast.layout(x.shape)
        codes = found.codes.view(layout.outer, layout.rows, layout.columns)  # matrices whose tiles these are
        return fits_exponents(Codes(codes, cast.format, 1.0, found.scales, (layout.tile_rows, layout.tile_columns)))

    x = matrix((3, 40, 70), 0, None)
    assert fits(x)
    x[1, 32:, 64:] = 0  # short blocks
    x[2] = -0.0
    assert fits(x)
    assert fits(torch.zeros(5, 33))
    x[:, 39, 69] = 1e-38
    assert not fits(x)
    x[:, 39, 69] = 1e38
    assert not fits(x)
