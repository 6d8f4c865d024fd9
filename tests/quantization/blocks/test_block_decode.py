"""Decoding of block formats: the compiled loops against plain torch, bit for bit, over formats, layouts and codes."""

import pytest
import torch

from altgrad.jit.code_table import Decoding, decoding_of
from altgrad.quantization import BLOCK_FORMATS, FORMAT_REGISTRY, decode, encode, get_format
from altgrad.quantization.kernels.cpu import blocks as compiled
from altgrad.quantization.kernels.eager import blocks as plain

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
