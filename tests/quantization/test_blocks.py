"""Block formats: names and facts, what other projects compute, decoding on every kernel, and torch.compile."""

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from altgrad.cli import app
from altgrad.errors import FormatError
from altgrad.formats.block import block_format_from_spec
from altgrad.jit.code_table import Decoding, decoding_of
from altgrad.quantization import (
    BLOCK_FORMATS,
    FORMAT_REGISTRY,
    BlockFormat,
    block_format,
    decode,
    encode,
    fake_quantize,
    get_format,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.kernels.cpu import blocks as compiled
from altgrad.quantization.kernels.eager import blocks as plain
from tests.quantization.oracles import power_of_two_exponent, same_bits

RULES = ("floor", "ceil", "nearest", "even")
TURNS = (0, 64, 96, 112, 120, 124, 126, 127, 128, 160, 192, 224, 240, 248, 252, 254, 255)  # of 256
ELEMENTS = ("E4M3", "E5M2", "E2M3", "E3M2", "E2M1", "INT8", "E3M4", "E0M7", "E7M0", "binary8p3")


@pytest.mark.parametrize(
    ("name", "element", "block", "scale", "bits"),
    [
        ("MXFP8", "E4M3", 32, "E8M0", 8.25),
        ("MXFP8_E5M2", "E5M2", 32, "E8M0", 8.25),
        ("MXFP6", "E2M3", 32, "E8M0", 6.25),
        ("MXFP6_E3M2", "E3M2", 32, "E8M0", 6.25),
        ("MXFP4", "E2M1", 32, "E8M0", 4.25),
        ("MXINT8", "INT8", 32, "E8M0", 8.25),
        ("NVFP4", "E2M1", 16, "E4M3", 4.5),
    ],
)
def test_catalog_follows_its_standards(name, element, block, scale, bits):
    fmt = get_format(name)
    assert (fmt.element.name, fmt.block, fmt.scale_format.name, fmt.bits_per_value) == (element, block, scale, bits)
    assert str(fmt) == name
    assert fmt.source
    assert fmt.tensor_scale == (name == "NVFP4")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mxfp8_e4m3", "MXFP8"),
        ("MXFP6_E2M3", "MXFP6"),
        ("mxfp4:ceil", "MXFP4:ceil"),
        ("MXFP4:floor", "MXFP4"),
        ("E2M1/32", "MXFP4"),
        ("e2m1/32:e8m0:even", "MXFP4:even"),
        ("E2M1/16:E4M3:tensor", "NVFP4"),
        ("E2M1/16:E4M3", "E2M1/16:E4M3"),
        ("E3M4/64:ceil", "E3M4/64:E8M0:ceil"),
        ("float8_e4m3fn/128x128:float32", "E4M3/128x128:FP32"),
    ],
)
def test_names_parse_to_one_canonical_form_and_back(text, name):
    fmt = get_format(text)
    assert fmt.name == name
    assert get_format(name) == fmt
    assert get_format(fmt) is fmt


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "E3M4/64:E8M0:ceil", "E4M3/128x128:FP32", "E2M1/16:E5M2:tensor"])
def test_spec_reads_back(name):
    fmt = get_format(name)
    assert block_format_from_spec(fmt.spec) == fmt


def test_constructor_finds_the_catalog_row():
    assert block_format("E2M1") is BLOCK_FORMATS["MXFP4"]
    assert block_format("E4M3", (128, 128), "FP32").tile == (128, 128)
    assert isinstance(block_format("E3M4", 20), BlockFormat)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_rule_as_one_comparison_equals_its_definition(element, rule):
    """`round_up_from` against exact fractions, at every significand where a rule could turn, with its neighbours."""
    fmt = block_format(element, 32, "E8M0", rule)
    for bits in (23, 52):
        for eighth in TURNS:
            for nudge in (-1, 0, 1):
                fraction = (eighth << (bits - 8)) + nudge
                if 0 <= fraction < 2**bits:
                    up = fraction >= fmt.round_up_from(bits)
                    amax = 1 + fraction / 2**bits
                    assert power_of_two_exponent(amax, fmt) == up - fmt.element_emax, (amax, bits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MXFP5", "did you mean MXFP"),
        ("E3M4/64:E8M0:up", "is not a rule"),
        ("E4M3/32:FP32:ceil", "needs an E8M0 scale"),
        ("E4M3/0", "outside 1"),
        ("E8M0/32", "scale format"),
        ("E4M3/32:FP32:tensor", "no use"),
        ("FP32/32", "at most 16"),
    ],
)
def test_wrong_names_say_what_is_wrong(name, message):
    with pytest.raises(FormatError, match=message):
        get_format(name)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "MXFP4:ceil", "E4M3/128x128:FP32"])
def test_cli_prints_the_facts(name):
    result = CliRunner().invoke(app, ["formats", name])
    assert result.exit_code == 0, result.output
    fmt = get_format(name)
    for word in (fmt.element.name, fmt.scale_format.name, fmt.rule.value, "saturates"):
        assert word in result.output


GFLOAT = {
    "MXFP8": "mxfp8_e4m3",
    "MXFP8_E5M2": "mxfp8_e5m2",
    "MXFP6": "mxfp6_e2m3",
    "MXFP6_E3M2": "mxfp6_e3m2",
    "MXFP4": "mxfp4_e2m1",
    "MXINT8": "mxint8",
}


def samples(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 32, generator=generator) * torch.exp2(torch.arange(rows) % 40 - 20.0)[:, None]
    x[0] = 0
    x[1] = torch.arange(32) / 16 - 1
    x[2] = torch.exp2(torch.arange(32.0) - 16)
    x[3] = 2.0**-140
    x[4] = torch.arange(32) / 4 - 4
    return x


@pytest.mark.parametrize("name", GFLOAT)
def test_gfloat(name):
    info = next(f for f in gfloat.formats.all_block_formats if f.name == GFLOAT[name])
    x = samples(12)
    encoded = encode(x, name)
    for row, ours, codes, scale in zip(x, decode(encoded), encoded.codes, encoded.scales.flatten(), strict=True):
        block = row.numpy().astype(np.float64)
        theirs = gfloat.quantize_block(info, block, gfloat.compute_scale_amax)
        if name == "MXINT8":  # gfloat uses code -128; 5.3.4 lets it be left unused, for a symmetric range
            theirs = np.maximum(theirs, -127 / 64 * gfloat.compute_scale_amax(info.etype.emax, block))
        assert np.array_equal(ours.numpy().astype(np.float64), theirs)
        shared = gfloat.compute_scale_amax(info.etype.emax, block)
        assert gfloat.decode_float(info.stype, int(scale)).fval == shared
        assert list(gfloat.decode_block(info, [int(scale), *codes.tolist()])) == theirs.tolist()


@pytest.fixture(scope="module")
def mx():
    from torchao.prototype.mx_formats import mx_tensor

    return mx_tensor


TORCHAO_ELEMENTS = {
    "MXFP8": torch.float8_e4m3fn,
    "MXFP8_E5M2": torch.float8_e5m2,
    "MXFP6": "fp6_e2m3",
    "MXFP6_E3M2": "fp6_e3m2",
    "MXFP4": torch.float4_e2m1fn_x2,
}


def torchao_codes(mx, data: torch.Tensor, name: str) -> torch.Tensor:
    if name == "MXFP4":
        return mx.unpack_uint4(data)
    return data.view(torch.uint8)


@pytest.mark.parametrize("name", TORCHAO_ELEMENTS)
@pytest.mark.parametrize(("rule", "mode"), [("floor", "FLOOR"), ("ceil", "RCEIL"), ("even", "EVEN")])
def test_torchao_mx(mx, name, rule, mode):
    x = samples(200)
    x = x[x.abs().amax(1) > 2.0**-100]
    scales, data = mx.to_mx(x, TORCHAO_ELEMENTS[name], 32, scaling_mode=mx.ScaleCalculationMode[mode])
    encoded = encode(x, f"{name}:{rule}")
    assert torch.equal(scales.view(torch.uint8), encoded.scales)
    assert torch.equal(torchao_codes(mx, data, name), encoded.codes)


def test_where_torchao_leaves_the_standard(mx):
    tiny = torch.full((1, 32), 2.0**-126)
    scales, data = mx.to_mx(tiny, torch.float8_e4m3fn, 32)
    assert scales.view(torch.uint8).item() == 0
    assert bool((data.float() == 1.0).all())  # divided by 2^-126 under a scale that reads 2^-127: a factor of two lost
    assert quantize(tiny, "MXFP8").unique().item() == 2.0**-126
    poisoned = torch.ones(1, 32)
    poisoned[0, 3] = torch.nan
    assert mx.to_mx(poisoned, torch.float8_e4m3fn, 32)[0].view(torch.uint8).item() == 255
    assert quantize(poisoned, "MXFP8").isnan().sum() == 1


def test_torchao_nvfp4():
    from torchao.prototype.mx_formats import kernels
    from torchao.prototype.mx_formats import nvfp4_tensor as nvfp4

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 128, generator=generator)
    x[0, 0] = 448 * 6 * 2.0**-8  # makes the tensor scale the power of two 2^-8
    upper = torch.tensor(2.0**-8)
    scales, packed = nvfp4.nvfp4_quantize(x, 16, upper)
    encoded = encode(x, "NVFP4")
    assert encoded.tensor_scale == upper
    assert torch.equal(scales.view(torch.uint8), encoded.scales)
    codes = kernels.unpack_uint4(packed)
    agree = codes == encoded.codes
    exponents = torch.frexp(encoded.scale_values)[0].repeat_interleave(16, -1)
    assert bool(agree[exponents == 0.5].all())  # power-of-two scales: dividing is multiplying
    assert agree.float().mean() > 0.999
    assert ((codes.int() & 7) - (encoded.codes.int() & 7)).abs().max() <= 1


def test_torch_casts_under_given_scales():
    """The elements by PyTorch's own float8 casts (which agree with OFP8 below max) under our scales."""
    x = samples(100)
    for name, dtype in (("MXFP8", torch.float8_e4m3fn), ("MXFP8_E5M2", torch.float8_e5m2)):
        encoded = encode(x, name)
        largest = torch.finfo(dtype).max
        cast = (x / encoded.scale_values).clamp(-largest, largest).to(dtype)
        assert torch.equal(cast.view(torch.uint8), encoded.codes)
        assert same_bits(cast.float() * encoded.scale_values, decode(encoded))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = [*BLOCK_FORMATS, "E3M4/16x32:FP32", "E5M10/32"]


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns; every NaN counts as the same."""
    return torch.where(x.isnan(), torch.nan, x).view({4: torch.int32, 2: torch.int16}[x.dtype.itemsize])


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_has_the_bits_of_plain_torch(name):
    fmt = get_format(name)
    shapes = [((70, 100), -1), ((5, 64, 96), -1)] + [((70, 100), 0), ((3, 70, 33), 1)] * (not fmt.is_tile)
    for shape, axis in shapes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-140, 100, shape, generator=generator))
        quantized = encode(x, fmt, axis=axis, pad=True)
        for dtype in DTYPES if name == "MXFP8" else DTYPES[:1]:
            expected = decode(quantized, dtype=dtype, kernel="eager")
            assert torch.equal(bits(decode(quantized, dtype=dtype, kernel="cpu")), bits(expected)), (shape, axis, dtype)
            out = torch.empty(*shape, 2, dtype=dtype)[..., 0]
            assert decode(quantized, dtype=dtype, out=out) is out
            assert torch.equal(bits(out.contiguous()), bits(expected))


def test_arithmetic_decodes_all_formats_of_a_byte_that_have_zero():
    tables = {name for name, f in FORMAT_REGISTRY.items() if f.bits <= 8 and decoding_of(f) is Decoding.BY_TABLE}
    assert tables == {"E8M0"}


@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_are_decoded_by_any_number_of_threads(threads):
    x = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(threads)
    for axis in (-1, 0):
        quantized = encode(x, "MXFP8", axis=axis, pad=True)
        assert torch.equal(decode(quantized), decode(quantized, kernel="eager"))


def test_the_kernel_asked_for_runs(monkeypatch):
    quantized = encode(torch.ones(64), "MXFP8")
    ran = []
    for kernel in (plain, compiled):
        inner = kernel.decode
        monkeypatch.setattr(kernel, "decode", lambda *a, inner=inner, kernel=kernel: (ran.append(kernel), inner(*a))[1])
    for asked in ("eager", "cpu", None):
        decode(quantized, kernel=asked)
    assert ran == [plain, compiled, compiled]


def test_values_go_straight_to_out_and_its_version_moves():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    quantized = encode(x, "MXFP8")
    out = torch.empty_like(x)
    before = out._version
    assert decode(quantized, out=out) is out
    assert out._version > before
    assert torch.equal(out, decode(quantized))


def test_an_empty_tensor_decodes_to_an_empty_tensor():
    quantized = encode(torch.empty(0, 64), "MXFP8")
    assert decode(quantized).shape == (0, 64)


@pytest.fixture
def x():
    torch.compiler.reset()
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["MXFP8", "NVFP4"])
def test_compiles_without_a_graph_break(x, name):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, key):
        rounded = quantize(x, name, rounding="stochastic", key=key, axis=0, pad=True)
        back = decode(encode(x, name))
        values, stats = quantize_with_stats(x, name)
        return rounded * 2, back, values, stats.vector

    key = torch.tensor([3, 4])
    rounded, back, values, vector = step(x, key)
    assert same_bits(rounded, quantize(x, name, rounding="stochastic", key=key, axis=0, pad=True) * 2)
    assert same_bits(back, quantize(x, name))
    assert same_bits(values, back)
    assert torch.equal(vector, quantize_with_stats(x, name)[1].vector)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
def test_gradient_through_a_compiled_graph(x):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        return (fake_quantize(x, "MXFP8", mask_saturated=True) ** 2).sum()

    x.requires_grad_()
    loss(x).backward()
    compiled, x.grad = x.grad, None
    (fake_quantize(x, "MXFP8", mask_saturated=True) ** 2).sum().backward()
    assert same_bits(compiled, x.grad)


@pytest.mark.parametrize("name", ["MXFP8", "NVFP4"])
def test_operators_keep_their_promises(x, name):
    upper = torch.tensor(0.01) if name == "NVFP4" else None
    for want in (1, 2, 3, 5, 6, 7):
        torch.library.opcheck(torch.ops.altgrad.cast, (x, upper, None, f"{name}(saturate)", want, "eager"))
    found = encode(x, name)
    parts = (found.codes, found.scales, found.tensor_scale)
    torch.library.opcheck(torch.ops.altgrad.decode, (*parts, name, torch.float32, "eager"))
