"""Products of codes: exact on every unit, for every format, layout, shape and number of threads.

The units' instructions are run where this CPU has them and spelled out everywhere: both by the same packing code.
"""

import copy
import gc
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch

from altgrad.nn import change_format, functional, layer_recipe, quantize_model, uniform
from altgrad.nn.layer import at_once, gemm
from altgrad.quantization import FORMAT_REGISTRY, Cast, CurrentScaling, amax_scale, decode, encode, get_format
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
    assert torch.equal(multiply(a, b, Unit.INT8), multiply(a, b, Unit.INT16))


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


# -- layers whose products are of codes, against the same layers on float32 ----------------------------------------------


def of_both_routes(monkeypatch, processor, x, w, recipe, bias=None):
    """(y, dx, dw) by codes and by float32, with what each element may differ by."""
    found = []
    for each in (processor, gemm.Processor()):
        monkeypatch.setattr(gemm, "PROCESSOR", each)
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = functional.linear(a, b, bias, recipe=recipe)
        y.sum().backward()
        found.append((y.detach(), a.grad, b.grad))
    a, b, ones = x.double().abs(), w.double().abs(), torch.ones(len(x), len(w), dtype=torch.float64)
    bounds = [p.amax(1)[:, None] * q.amax(1) * p.shape[1] * 2e-6 for p, q in ((a, b), (ones, b.t()), (ones.t(), a.t()))]
    return list(zip(*found, bounds, strict=True))


def rows_of_their_own(x, w):
    x, w = x.clone(), w.clone()
    x[3], x[5], w[7], w[8] = x[3] * 1e30, x[5] * 1e-30, w[7] * 1e-20, 0
    return x, w


PRODUCTS_OF_LAYERS = {
    "tiles of odd sides": ("E4M3/1x128", lambda x, w: (x * torch.linspace(-3, 3, len(x)).exp()[:, None], w)),
    "blocks of odd sides": ("E4M3/7", lambda x, w: (x, w)),
    "blocks of large scales beside one scale": (("MXFP8", "E4M3"), lambda x, w: (x * 1e25, w * 1e-25)),
    "blocks of small scales": ("MXFP8", lambda x, w: (x * 1e-41, w * 1e30)),
    "scales of rows far apart": (("E4M3", "rows"), rows_of_their_own),
    "integers with scales of rows far apart": (("INT8", "rows"), rows_of_their_own),
    "scales of rows that overflow together": (("E4M3", "rows"), lambda x, w: (x * torch.tensor([1e30] + [1.0] * 95)[:, None], w * torch.tensor([1e15] + [1.0] * 63)[:, None])),
}  # fmt: skip


@pytest.mark.parametrize("processor", [LIKE_ZEN5, LIKE_HASWELL], ids=str)
@pytest.mark.parametrize("case", PRODUCTS_OF_LAYERS)
def test_a_layer_by_codes_is_the_layer_by_float32(case, processor, monkeypatch):
    spelled, change = PRODUCTS_OF_LAYERS[case]
    fmt, other = spelled if isinstance(spelled, tuple) else (spelled, None)
    options = {"scaling": CurrentScaling(axis=0)} if other == "rows" else {"weight": other} if other else {}
    generator = torch.Generator().manual_seed(0)
    x, w = change(torch.randn(96, 256, generator=generator), torch.randn(64, 256, generator=generator))
    for codes, reference, bound in of_both_routes(monkeypatch, processor, x, w, layer_recipe(fmt, **options)):
        finite = torch.isfinite(reference)
        assert torch.equal(torch.isfinite(codes), finite)
        assert bool(((codes.double() - reference.double()).abs() <= bound)[finite].all())


@pytest.mark.parametrize("shape", [(), (1,), (1, 64), (96, 64)], ids=str)
def test_a_bias_that_torch_broadcasts_is_added_and_has_its_gradient(shape, monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    x, w = torch.randn(96, 256), torch.randn(64, 256)
    bias = torch.randn(shape, requires_grad=True)
    y = functional.linear(x, w, bias, recipe=layer_recipe("E4M3"))
    assert torch.equal(y, functional.linear(x, w, recipe=layer_recipe("E4M3")) + bias)
    y.sum().backward()
    assert bias.grad is not None
    assert float(bias.grad.sum()) == pytest.approx(96 * 64)


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
        "x = Codes(torch.zeros(512, 512, dtype=torch.uint8), get_format('E4M3'))",
        "multiply(x, x, Unit.BF16)",
        "child = os.fork()",
        "if child == 0: multiply(x, x, Unit.BF16); os._exit(7)",
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7",
    ])  # fmt: skip
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=100)


# -- small layers, whose products and quantizations are one call ---------------------------------------------------------


def at_once_and_not(monkeypatch, recipe, x, w, bias=None, grad=None, needs=(True, True), processor=LIKE_ZEN5):
    """[(y, dx, dw, db) in one call, the same step by step], and how many calls were one."""
    monkeypatch.setattr(gemm, "PROCESSOR", processor)
    monkeypatch.setattr(gemm, "CPU_CODES_MIN_PRODUCTS", 0)
    found, runs = [], []
    real = at_once.Plan.run
    for run in (lambda *given: runs.append(real(*given)) or runs[-1], lambda *_: None):
        with monkeypatch.context() as patched:
            patched.setattr(at_once.Plan, "run", run)
            leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=True)]
            shift = None if bias is None else bias.clone().requires_grad_()
            y = functional.linear(*leaves, shift, recipe=recipe)
            y.backward(torch.ones_like(y) if grad is None else grad)
        found.append([y.detach(), *(t.grad for t in (*leaves, shift) if t is not None)])
    return found, len([made for made in runs if made is not None])


def agree(found):
    for once, steps in zip(*found, strict=True):
        assert (once is None) == (steps is None)
        if once is not None:
            torch.testing.assert_close(once, steps, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("processor", [LIKE_ZEN5, LIKE_HASWELL], ids=str)
@pytest.mark.parametrize("shape", [(128, 64, 192), (1, 1, 1), (37, 65, 50), (33, 130, 7)], ids=str)
@pytest.mark.parametrize("fmt", ["E4M3", "E0M7", "MXFP8", "MXINT8", "E4M3/6:E8M0", "E2M1/16x16:E8M0"])
def test_a_small_layer_in_one_call_has_the_bits_of_its_steps(fmt, shape, processor, monkeypatch):
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(rows)
    x, w, dy = (torch.randn(s, generator=generator) for s in ((rows, depth), (columns, depth), (rows, columns)))
    for bias in (None, torch.randn(columns, generator=generator)):
        found, runs = at_once_and_not(monkeypatch, layer_recipe(fmt), x, w, bias, dy, processor=processor)
        assert runs == 1
        agree(found)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x", "w"])
@pytest.mark.parametrize("recipe", [("E4M3", "E5M2"), ("MXFP8", "E0M7"), ("E4M3", "MXFP8")], ids=str)
def test_one_call_serves_formats_of_their_own_and_one_gradient(recipe, needs, monkeypatch):
    x, w, dy = (matrix(s, i, None) for i, s in enumerate([(64, 96), (80, 96), (64, 80)]))
    for wanted in (needs, (True, True)):
        spelled = layer_recipe(recipe[0], grad=recipe[1])
        found, runs = at_once_and_not(monkeypatch, spelled, x, w, None, dy, wanted)
        assert runs == 1
        agree(found)


@pytest.mark.parametrize("shape", [(2, 33, 64), (2, 3, 11, 64), (1, 66, 64), (0, 5, 64)], ids=str)
@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
def test_leading_axes_count_rows_in_one_call(fmt, shape, monkeypatch):
    x, w, bias = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        matrix((80, 64), 1, None),
        torch.ones(80),
    )
    dy = torch.randn((*shape[:-1], 80), generator=torch.Generator().manual_seed(2))
    found, runs = at_once_and_not(monkeypatch, layer_recipe(fmt), x, w, bias, dy)
    assert runs == (x.numel() > 0)
    agree(found)
    flat, _ = at_once_and_not(monkeypatch, layer_recipe(fmt), x.reshape(-1, 64), w, bias, dy.reshape(-1, 80))
    for one, two in zip(found[0], flat[0], strict=True):
        assert torch.equal(one.reshape(two.shape), two)
    strided = at_once_and_not(
        monkeypatch, layer_recipe(fmt), x, w, bias, dy.transpose(0, 1).contiguous().transpose(0, 1)
    )
    agree([found[0], strided[0][0]])


@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
def test_a_backward_of_one_call_is_differentiated_through_leading_axes(fmt, monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    monkeypatch.setattr(gemm, "CPU_CODES_MIN_PRODUCTS", 0)
    found = []
    for shape in ((2, 33, 64), (66, 64)):
        x, w = (matrix((66, 64), 0, None).view(shape), matrix((80, 64), 1, None))
        leaves = [x.requires_grad_(), w.requires_grad_()]
        y = functional.linear(*leaves, recipe=layer_recipe(fmt))
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        found.append([t.detach().reshape(-1) for t in (*grads, *again)])
    assert all(map(torch.equal, *found))


HARD = {
    "inf": lambda t: t.index_fill(0, torch.tensor([1]), math.inf),
    "NaN": lambda t: t.index_fill(1, torch.tensor([2]), math.nan),
    "zeros": torch.zeros_like,
    "subnormal": lambda t: t * 1e-42,
    "huge": lambda t: t.clamp(-3, 3) * 1e38,
    "transposed": lambda t: t.t().contiguous().t(),
    "a view in a larger matrix": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("fmt", ["E4M3", "E0M7", "E3M4", "MXFP8", "MXFP4"])
@pytest.mark.parametrize("change", HARD)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "w", "dy"])
def test_what_one_call_does_not_serve_goes_step_by_step(fmt, change, which, monkeypatch):
    tensors = [matrix(s, i, None) for i, s in enumerate([(64, 96), (80, 96), (64, 80)])]
    tensors[which] = HARD[change](tensors[which])
    agree(at_once_and_not(monkeypatch, layer_recipe(fmt), *tensors[:2], None, tensors[2])[0])


def test_blocks_of_zeros_are_multiplied_as_codes(monkeypatch):
    x, w = matrix((64, 96), 0, None), matrix((80, 96), 1, None)
    x[:32] = 0  # as the gradients of what attention's first token asks for
    found, runs = at_once_and_not(monkeypatch, layer_recipe("MXFP8"), x, w)
    assert runs == 1
    agree(found)


def test_a_copied_or_changed_layer_makes_plans_of_its_own(monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256))
    quantize_model(model, uniform("E4M3"))
    x = matrix((128, 64), 0, None)
    y = model(x)
    state = model[0].quantization
    assert len(state.plans) == 1
    twin = copy.deepcopy(model)
    assert not twin[0].quantization.plans
    assert torch.equal(twin(x), y)
    change_format(model, "E5M2")
    assert not model[0].quantization.plans
    assert not torch.equal(model(x), y)


def test_nothing_of_a_call_outlives_its_result(monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256))
    quantize_model(model, uniform("E4M3"))
    made = []
    real = at_once.Plan.run
    monkeypatch.setattr(at_once.Plan, "run", lambda *given: made.append(real(*given)) or made[-1])
    gc.disable()
    try:
        y = model(matrix((128, 64), 0, None).requires_grad_())
        kept = weakref.ref(made.pop().kept)
        assert kept() is not None
        y.sum().backward()
        assert kept() is None, "codes are freed by the backward"
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
        y = model(matrix((128, 64), 0, None).requires_grad_())
        kept = weakref.ref(made.pop().kept)
        del y
        assert kept() is None, "and by the end of the result"
    finally:
        gc.enable()


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
