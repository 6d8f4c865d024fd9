"""Accumulators: hand vectors, and the compiled sums against integers, another algorithm, and against torch's."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad.errors import AltGradError, KernelError, OptionError, RecipeError
from altgrad.formats.accumulator import ACCUMULATORS, Accumulator, chunked
from altgrad.nn import quantize_model, uniform
from altgrad.quantization import accumulate, get_format, quantize
from altgrad.quantization.accumulation import accumulate_terms, group_terms, terms
from altgrad.quantization.tensor_cores import fp8_product

KERNELS = ("cpu", "eager", "reference")


def power(exponent: int) -> tuple[float, float]:
    """Two factors whose product is 2^exponent."""
    return 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)


def minus(factors: tuple[float, float]) -> tuple[float, float]:
    return -factors[0], factors[1]


ONE, NONE = (1.0, 1.0), (0.0, 0.0)
HOPPER, ADA, BLACKWELL = "hopper_fp8", "ada_fp8", "blackwell_fp8"
H100, A100, V100 = "hopper_half", "ampere_half", "volta_half"


def one_and_a_half(exponent: int) -> tuple[float, float]:
    return 1.5 * power(exponent)[0], power(exponent)[1]


VECTORS = {
    "T1": ([ONE] + [power(-14)] * 31, {HOPPER: 1, ADA: 1, BLACKWELL: 1.00189208984375}),
    "T2": ([ONE] + [power(-13)] * 31, dict.fromkeys((HOPPER, ADA, BLACKWELL), 1.0037841796875)),
    "T3": (
        [ONE, one_and_a_half(-13)],
        {HOPPER: 1 + 2**-13, ADA: 1 + 2**-13, BLACKWELL: 1 + 1.5 * 2**-13},
    ),
    "T4": (
        [ONE, minus(one_and_a_half(-13))],
        {HOPPER: 1 - 2**-13, ADA: 1 - 2**-13, BLACKWELL: 1 - 1.5 * 2**-13},
    ),
    "T5": ([ONE, minus(power(-14))], {HOPPER: 1, ADA: 1, BLACKWELL: 1 - 2**-14}),
    "T6": (
        [(1.75, 1.75), (-1.75, 1.75), power(-13)],
        dict.fromkeys((HOPPER, ADA, BLACKWELL), 2**-13),
    ),
    "T6 smaller": ([(1.75, 1.75), (-1.75, 1.75), power(-14)], {HOPPER: 0, ADA: 0, BLACKWELL: 2**-14}),
    "T7": ([ONE, ONE, power(-13)], {HOPPER: 2, ADA: 2, BLACKWELL: 2.0001220703125}),
    "T8": ([ONE] * 32768, {HOPPER: 16384, ADA: 16384, BLACKWELL: 32768, "hopper_fp8_promoted": 32768}),
    "T9": (
        [(448.0, 448.0)] + [NONE] * 31 + [ONE] * 3200,
        {HOPPER: 200704, ADA: 200704, BLACKWELL: 203904, "hopper_fp8_promoted": 203808},
    ),
    "T10": (
        [power(-14)] * 16 + [ONE] + [NONE] * 15,
        {HOPPER: 1, ADA: 1.0009765625, BLACKWELL: 1.0009765625},
    ),
    "T11": ([ONE] + [power(-24)] * 2, {H100: 1 + 2**-23, A100: 1 + 2**-23, V100: 1}),
    "T12": ([ONE] + [power(-25)] * 4, {H100: 1 + 2**-23, A100: 1, V100: 1}),
    "T13": (
        [(32.0, 64.0), ONE],
        dict.fromkeys(("hopper_half_fp16", "ampere_half_fp16", "volta_half_fp16"), 2048),
    ),
    "T14 in a row": ([ONE] * 4096, {"accumulator(output=E6M9,rounding=nearest_even)": 1024}),
    "T14 in chunks": ([ONE] * 4096, {"chunked(64,E6M9)": 4096}),
    "T15": (
        [ONE, power(-14)],
        {"accumulator(products=16,output=E8M13,rounding=nearest_away,promote_every=16)": 1 + 2**-13},
    ),
}
CASES = [(name, unit) for name, (_, expected) in VECTORS.items() for unit in expected]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "unit"), CASES)
def test_hand_vectors_separate_the_units(name, unit, kernel):
    products, expected = VECTORS[name]
    a, b = torch.tensor(products).T
    half = "half" in unit
    found = accumulate(a[None], b[:, None], unit, formats=("FP16",) * 2 if half else ("E4M3",) * 2, kernel=kernel)
    assert found.item() == expected[unit]


def test_a_product_has_the_exponent_of_its_factors_unless_it_is_normalised():
    a, b = torch.tensor([(1.75, 1.75), (-1.75, 1.75), power(-13)]).T
    normalised = Accumulator(32, 13, "E8M13", normalize_products=True)
    for kernel in KERNELS:
        assert accumulate(a[None], b[:, None], normalised, formats=("E4M3",) * 2, kernel=kernel).item() == 0


def draws(shape, fmt: str, seed: int) -> torch.Tensor:
    """Values on a format's grid over many binades, its subnormals and zeros among them."""
    g = torch.Generator().manual_seed(seed)
    grid = get_format(fmt)
    exponents = torch.randint(grid.emin - 3, min(grid.emax, 8), shape, generator=g)
    values = torch.randn(shape, generator=g) * torch.exp2(exponents.float())
    keep = torch.rand(shape, generator=g) < 0.9
    return quantize(torch.where(keep, values, 0), fmt)


UNITS = [
    *(name for name, unit in ACCUMULATORS.items() if unit.group == 1 and not unit.scaled_promotion),
    "chunked(16,E6M9)",
    "chunked(7,FP16)",
    "accumulator(products=16,output=E8M13,rounding=nearest_away,promote_every=16)",
    "accumulator(products=5,fraction_bits=9,output=E5M6,rounding=nearest_even,promote_every=20,main=E6M9)",
    "accumulator(products=8,fraction_bits=24,normalize_products=True)",
]


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_adds_as_integers_do(unit):
    pairs = [("E4M3", "E4M3"), ("E5M2", "E4M3"), ("FP16", "FP16"), ("E2M1", "E3M2")]
    for seed, formats in enumerate(pairs):
        a, b = draws((5, 77), formats[0], seed), draws((77, 66), formats[1], seed + 50)
        found = accumulate(a, b, unit, formats=formats)
        some = [0, 1, 31, 63, 64, 65]  # the panel's edges among them
        assert torch.equal(found[:, some], accumulate(a, b[:, some], unit, formats=formats, kernel="reference"))
        assert torch.equal(found, accumulate(a, b, unit, formats=formats, kernel="eager")), formats


def test_wide_exponents_align_as_integers_do():
    """bf16 products span more than float32 holds."""
    a, b = draws((4, 40), "BF16", 1), draws((40, 3), "BF16", 2)
    a = a * torch.exp2(torch.randint(-60, 60, a.shape, generator=torch.Generator().manual_seed(3)).float())
    for unit in ("hopper_half", "ampere_half"):
        found = [accumulate(a, b, unit, formats=("BF16", "BF16"), kernel=kernel) for kernel in KERNELS]
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("unit", ["deepgemm", "hopper_fp8_blocks"])
def test_scaled_promotion_adds_as_integers_do(unit):
    grid = get_format("E4M3")
    g = torch.Generator().manual_seed(5)
    a, b = draws((3, 300), "E4M3", 1), draws((66, 300), "E4M3", 2)
    left, right = (terms(x, grid, scales=torch.rand((len(x), 3), generator=g) + 0.01) for x in (a, b))
    found = [accumulate_terms(left, right, ACCUMULATORS[unit], kernel) for kernel in KERNELS]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_groups_of_fp4_add_as_integers_do():
    grid = get_format("E2M1")
    a, b = draws((3, 100), "E2M1", 1), draws((66, 100), "E2M1", 2)
    sa, sb = draws((3, 7), "E4M3", 3).abs(), draws((66, 7), "E4M3", 4).abs()
    left, right = group_terms(a, grid, sa, 16), group_terms(b, grid, sb, 16)
    found = [accumulate_terms(left, right, ACCUMULATORS["blackwell_fp4"], kernel) for kernel in KERNELS]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_exponents_of_block_scales_enter_the_sum():
    grid = get_format("E4M3")
    a, b = draws((5, 64), "E4M3", 1), draws((3, 64), "E4M3", 2)
    scales = torch.exp2(torch.tensor([[0.0, -90.0]])).repeat_interleave(32, 1)
    left, right = terms(a, grid, multipliers=scales), terms(b, grid, multipliers=torch.ones(1, 64))
    found = [accumulate_terms(left, right, ACCUMULATORS["blackwell_fp8"], kernel) for kernel in KERNELS]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    plain = accumulate(a[:, :32], b[:, :32].T, "blackwell_fp8", formats=("E4M3", "E4M3"))
    assert torch.equal(found[0].float(), plain), "what lies 90 binades lower is cut"


def test_threads_and_flushed_subnormals_change_nothing():
    a, b = draws((130, 96), "E5M2", 1), draws((96, 200), "E5M2", 2)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(accumulate(a, b, "hopper_fp8_promoted", formats=("E5M2", "E5M2")))
        torch.set_flush_denormal(True)
        found.append(accumulate(a, b, "hopper_fp8_promoted", formats=("E5M2", "E5M2")))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("unit", ["hopper_fp8", "hopper_fp8_promoted", "blackwell_fp8", "chunked(4,E6M9)"])
def test_nan_and_inf_go_where_they_would(unit):
    a, b = torch.ones(6, 64), torch.ones(64, 3)
    a[1, 3], a[2, 40], a[3, 5], a[4, 1] = math.nan, math.inf, -math.inf, math.inf
    a[4, 50] = -math.inf
    b[40, 2] = 0
    for kernel in KERNELS:
        found = accumulate(a, b, unit, formats=("E5M2", "E5M2"), kernel=kernel)
        plain = a @ b
        assert torch.equal(found.isnan(), plain.isnan()), kernel
        assert torch.equal(found[plain.isinf()], plain[plain.isinf()]), kernel
        assert torch.equal(found[plain.isfinite()], plain[plain.isfinite()]), kernel


def test_a_sum_beyond_its_format_is_infinite():
    a, b = torch.full((1, 8), 240.0), torch.full((8, 1), 240.0)
    for kernel in KERNELS:
        assert accumulate(a, b, "volta_half_fp16", formats=("FP16", "FP16"), kernel=kernel).item() == math.inf


def test_what_is_added_exactly_is_the_rounded_sum():
    a, b = draws((20, 50), "E5M2", 1), draws((50, 20), "E5M2", 2)
    exact = accumulate(a, b, "exact", formats=("E5M2", "E5M2"))
    assert torch.equal(exact, accumulate(a, b, "exact", formats=("E5M2", "E5M2"), kernel="reference"))
    sums = [[math.fsum(x * y for x, y in zip(row, column)) for column in b.T.tolist()] for row in a.tolist()]
    assert torch.equal(exact, torch.tensor(sums))


def test_batches_and_empty_products():
    a, b = draws((2, 1, 4, 10), "E4M3", 1), draws((3, 10, 5), "E4M3", 2)
    found = accumulate(a, b, "hopper_fp8", formats=("E4M3", "E4M3"))
    assert found.shape == (2, 3, 4, 5)
    assert torch.equal(found[1, 2], accumulate(a[1, 0], b[2], "hopper_fp8", formats=("E4M3", "E4M3")))
    for m, k, n in ((0, 3, 2), (2, 0, 3), (2, 3, 0)):
        made = accumulate(torch.ones(m, k), torch.ones(k, n), "hopper_fp8", formats=("E4M3", "E4M3"))
        assert torch.equal(made, torch.zeros(m, n))


@pytest.mark.parametrize("unit", [*UNITS, *ACCUMULATORS, "chunked(64,E6M9)"])
def test_an_accumulator_reads_back_from_its_text_and_its_mapping(unit):
    made = Accumulator.parse(unit)
    assert Accumulator.parse(str(made)) == made
    assert Accumulator.parse(made.to_config()) == made
    assert hash(Accumulator.parse(str(made))) == hash(made)


def test_the_presets_are_what_the_table_of_units_says():
    assert ACCUMULATORS["hopper_fp8"] == Accumulator(32, 13, "E8M13", "toward_zero")
    assert ACCUMULATORS["ada_fp8"].products == 16
    assert ACCUMULATORS["blackwell_fp8"] == Accumulator(32, 25, "FP32", "toward_zero")
    assert [ACCUMULATORS[f"{unit}_half"].fraction_bits for unit in ("hopper", "ampere", "volta")] == [25, 24, 23]
    assert str(chunked(64)) == "chunked(64,E6M9)"


def test_a_gpus_own_unit_gets_codes_and_sizes_that_its_library_takes(monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_scaled_mm" in func.name():
                given = dict(zip([arg.name for arg in func._schema.arguments], args, strict=False)) | (kwargs or {})
                seen.append((args[0], args[1], given.get("use_fast_accum", False), given["out_dtype"]))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        a, b = (
            torch.empty(shape, device="cuda", dtype=dtype)
            for shape, dtype in (((5, 20), torch.float8_e5m2), ((7, 20), torch.float8_e4m3fn))
        )
        one, rows = torch.empty((), device="cuda"), torch.empty(5, 1, device="cuda")
        product = fp8_product(a, b.t(), one, one, None, torch.bfloat16)
        of_rows = fp8_product(a, b.t(), rows, one, torch.empty(7, device="cuda"), torch.bfloat16)
        capability[0] = (10, 0)
        with pytest.raises(
            KernelError, match=r"capability 10\.0; the unit that it names is that of 9\.0 \(Hopper\); use"
        ):
            fp8_product(a, b.t(), one, one, None, torch.float32)
    assert product.shape == of_rows.shape == (5, 7)
    assert product.dtype == of_rows.dtype == torch.bfloat16
    assert [dtype for *_, dtype in seen] == [torch.bfloat16, torch.float32], "rows' scales and a bias follow the sums"
    for left, right, fast, _ in seen:
        assert not fast
        assert (left.dtype, right.dtype) == (torch.float8_e5m2, torch.float8_e4m3fn)
        assert left.shape[1] == right.shape[0] == 32
        assert right.shape[1] == 16
        assert (left.stride(1), right.stride(0)) == (1, 1), "rows by columns"


def test_a_recipe_that_asks_for_the_unit_emulates_it_on_a_cpu():
    made = {}
    for unit in ("fp8_unit", "hopper_fp8_promoted"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 8))
        manifest = quantize_model(model, uniform("E4M3").with_(accumulator=unit))
        assert unit in str(model)
        assert unit in str(manifest)
        x = torch.randn(4, 300, requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        made[unit] = [y, x.grad, model[0].weight.grad]
    assert all(map(torch.equal, *made.values()))
    with pytest.raises(RecipeError, match="has E5M2 and E5M2; that unit multiplies E4M3 by E4M3 or E5M2"):
        uniform("E5M2").with_(accumulator="fp8_unit")
    with pytest.raises(OptionError, match="by_unit is for Hopper's FP8 unit"):
        Accumulator(16, 13, "E8M13", by_unit=True)


@pytest.mark.parametrize(
    "wrong",
    [
        "hoper_fp8",
        "chunked()",
        "chunked(0)",
        "chunked(64,E6M9,3)",
        "accumulator(products=0)",
        "accumulator(products=32,bits=3)",
        "accumulator(products=32,promote_every=100)",
        "accumulator(fraction_bits=80)",
        "accumulator(output=E9M30)",
        "accumulator(output=MXFP8)",
        "accumulator(rounding=stochastic)",
        "accumulator(main=FP16)",
        "accumulator(products=64,group=16)",
        {"products": 2.5},
        {"promote": "twice", "promote_every": 1},
        None,
        3,
    ],
)
def test_what_is_no_accumulator_is_refused(wrong):
    with pytest.raises(AltGradError):
        Accumulator.parse(wrong)


def test_products_that_would_not_be_exact_are_refused():
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    with pytest.raises(OptionError, match="products of"):
        accumulate(a, b, "hopper_half", formats=("FP32", "FP32"))
    with pytest.raises(OptionError, match="span"):
        accumulate(a, b, "exact", formats=("BF16", "BF16"))
    with pytest.raises(OptionError, match="do not multiply"):
        accumulate(a, a, "hopper_fp8", formats=("E4M3", "E4M3"))
    with pytest.raises(OptionError, match="scales of blocks"):
        accumulate(a, b, "deepgemm", formats=("E4M3", "E4M3"))
    with pytest.raises(AltGradError, match="block format"):
        accumulate(a, b, "hopper_fp8", formats=("MXFP8", "E4M3"))
    with pytest.raises(AltGradError, match="floating tensor"):
        accumulate(a.int(), b, "hopper_fp8", formats=("E4M3", "E4M3"))
    with pytest.raises(AltGradError, match="kernel"):
        accumulate(a, b, "hopper_fp8", formats=("E4M3", "E4M3"), kernel="cuda")
