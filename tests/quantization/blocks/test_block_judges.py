"""Block formats against outside implementations, where they agree with OCP MX 1.0; where not, the clause that decides.

- gfloat: scales, elements and the scale of a zero block agree for the six concrete MX formats. It clamps an overflowing
  scale exponent as we do, raises on non-finite input (left out here).
- torchao MX: agrees on finite tensors, in the rules it calls FLOOR (ours: floor), RCEIL (ceil) and EVEN (even). Not where
  scales reach float32's subnormals, which it lifts to 2^-126 (5.4.1 gives E8M0 the exponent -127), nor where a NaN sits
  beside E4M3 or E5M2 elements: it makes the whole block NaN, while 5.1 lets an element be NaN by itself, nor for an inf,
  which it lets into the amax (6.3 speaks of the largest magnitude; 4 leaves the algorithm out of scope).
- torchao NVFP4: multiplies by a rounded reciprocal where we divide, so values one rounding from a tie may differ; with
  a power-of-two tensor scale and block scales both agree. It keeps block scales at or above 2^-6, E4M3's smallest
  normal number, while the format's subnormal scales are ours down to 2^-9.
"""

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch

from altgrad.quantization import decode, encode, quantize
from tests.quantization.blocks.oracle import same_bits

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
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    return mx_tensor


ELEMENTS = {
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


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize(("rule", "mode"), [("floor", "FLOOR"), ("ceil", "RCEIL"), ("even", "EVEN")])
def test_torchao_mx(mx, name, rule, mode):
    x = samples(200)
    x = x[x.abs().amax(1) > 2.0**-100]
    scales, data = mx.to_mx(x, ELEMENTS[name], 32, scaling_mode=mx.ScaleCalculationMode[mode])
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
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
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
