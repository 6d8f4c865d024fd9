"""The Triton kernels: the CPU's bits in Triton's interpreter and on a real GPU, and machine code that keeps them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from altgrad.quantization import amax_scale, decode, encode, quantize
from altgrad.quantization.kernels.cuda import blocks as cuda_blocks
from altgrad.quantization.kernels.cuda import scalar as cuda
from tests.quantization.oracles import same_bits

pytestmark = pytest.mark.filterwarnings("ignore")  # Triton's own deprecations
ROOT = Path(__file__).parents[2]


def test_kernels_have_the_cpus_bits_in_the_interpreter():
    command = [sys.executable, "-m", "tests.quantization.interpreter_checks"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"


SCALAR_NAMES = ("E4M3", "E5M2", "E3M4", "INT8", "E0M7", "E7M0", "E2M1", "BF16", "FP16", "binary8p3", "E4M3FNUZ")
BLOCK_NAMES = ("MXFP8", "MXFP8_E5M2", "MXFP6", "MXINT8", "NVFP4", "MXFP4:ceil", "E3M4/24:even", "E4M3/128x128:FP32")


def on_a_gpu(test):
    """A test that needs a GPU, and is skipped without."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")(test))


@pytest.fixture(scope="module")
def checks():
    from tests.quantization import interpreter_checks

    return interpreter_checks


@on_a_gpu
def test_scalar_kernel_on_the_gpu(checks):
    assert checks.check_scalars("cuda", SCALAR_NAMES) == []


@on_a_gpu
def test_block_kernels_on_the_gpu(checks):
    assert checks.check_blocks("cuda", BLOCK_NAMES) == []
    assert checks.check_blocks("cuda", ("MXFP8", "NVFP4"), (torch.bfloat16, torch.float16)) == []


@on_a_gpu
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


SHAPES = ("rows", "columns", "size")
SCALARS = dict.fromkeys(("random_bits", "emax", "up_from", "poison", "outer_tiles"), "i32")
FLOATS = dict.fromkeys(("element_max", "smallest"), "fp32")


def machine_code(kernel, pointers: dict[str, str], constants: dict) -> str:
    """PTX of a kernel for compute capability 9.0, after ptxas has accepted it."""
    signature = {name: pointers.get(name, {**SCALARS, **FLOATS}.get(name, "i64")) for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    place = kernel.arg_names.index
    aligned = [n for n in kernel.arg_names if signature[n].startswith("*") or n in SHAPES]
    source = ASTSource(
        kernel,
        signature,
        {(place(name),): value for name, value in constants.items()},
        {(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


BLOCK_POINTERS = {
    "x": "*fp32",
    "out": "*fp32",
    "codes": "*u8",
    "scales": "*u8",
    "problems": "*i32",
    "partials": "*fp64",
    "element_table": "*i64",
    "scale_table": "*i64",
    "upper": "*fp32",
    "key": "*i64",
}
ONLY_VALUES = {"VALUES": True, "CODES": False, "STATS": False}


def test_scalar_kernel():
    pointers = {**BLOCK_POINTERS, "scales": "*fp32", "table": "*i64"}
    constants = {"WIDE": False, "DOUBLE": False, "ONE_SCALE": True, "ELEMENTS": 2048}
    for mode, wanted in ((0, ONLY_VALUES), (7, dict.fromkeys(ONLY_VALUES, True))):
        ptx = machine_code(cuda._process, pointers, {**constants, **wanted, "MODE": mode})
        assert "div.rn.f32" in ptx
        assert "fma.rn" not in ptx
        assert "ld.global.v4.b32" in ptx


@pytest.mark.parametrize(
    ("name", "rows", "columns", "strips", "tiles", "elements", "scale"),
    [
        ("MXFP8", 1, 32, False, 64, 32, 0),
        ("MXFP8 down", 32, 1, True, 64, 32, 0),
        ("NVFP4", 1, 16, False, 128, 16, 2),
    ],
)
def test_block_kernel(name, rows, columns, strips, tiles, elements, scale):
    constants = {
        "TILE_ROWS": rows,
        "TILE_COLUMNS": columns,
        "STRIPS": strips,
        "TILES": tiles,
        "ELEMENTS": elements,
        "CHUNKS": 1,
        "MODE": 0,
        "SCALE": scale,
        "TWO_LEVELS": scale == 2,
    }
    ptx = machine_code(cuda_blocks._process, BLOCK_POINTERS, {**constants, **ONLY_VALUES})
    assert ("div.rn.f32" in ptx) == (scale != 0)
    assert "fma.rn" not in ptx
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
