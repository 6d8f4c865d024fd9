"""The Triton kernels compile to machine code for NVIDIA GPUs; no GPU is needed for that.

What the compiler's output must have: IEEE division, no fused multiply-add (which would change bits), and 16-byte
accesses to memory.
"""

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from altgrad.quantization.kernels.cuda import blocks as cuda_blocks  # noqa: E402
from altgrad.quantization.kernels.cuda import scalar as cuda  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Triton's own deprecations
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
