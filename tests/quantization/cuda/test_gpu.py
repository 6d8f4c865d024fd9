"""The Triton kernels on a real GPU: the CPU's bits, through the same checks as in the interpreter and the public calls."""

import pytest
import torch

from altgrad.quantization import amax_scale, decode, encode, quantize
from tests.quantization.blocks.oracle import same_bits

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

SCALAR_NAMES = ("E4M3", "E5M2", "E3M4", "INT8", "E0M7", "E7M0", "E2M1", "BF16", "FP16", "binary8p3", "E4M3FNUZ")
BLOCK_NAMES = ("MXFP8", "MXFP8_E5M2", "MXFP6", "MXINT8", "NVFP4", "MXFP4:ceil", "E3M4/24:even", "E4M3/128x128:FP32")


@pytest.fixture(scope="module")
def checks():
    from tests.quantization.cuda import interpreter_checks

    return interpreter_checks


def test_scalar_kernel_on_the_gpu(checks):
    assert checks.check_scalars("cuda", SCALAR_NAMES) == []


def test_block_kernels_on_the_gpu(checks):
    assert checks.check_blocks("cuda", BLOCK_NAMES) == []
    assert checks.check_blocks("cuda", ("MXFP8", "NVFP4"), (torch.bfloat16, torch.float16)) == []


@pytest.mark.parametrize("name", ["E4M3", "MXFP8", "NVFP4", "E4M3/128x128:FP32"])
def test_public_calls_give_the_cpus_bits(name):
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    on_gpu = x.cuda()
    scale = amax_scale(x, name) if name == "E4M3" else 1.0
    for options in ({}, {"rounding": "stochastic", "key": (1, 2)}):
        expected = quantize(x, name, scale, **options)
        assert same_bits(quantize(on_gpu, name, scale, **options).cpu(), expected)
    if name != "E4M3":
        assert same_bits(decode(encode(on_gpu, name)).cpu(), quantize(x, name))
