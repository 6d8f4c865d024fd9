"""Instructions per element of the Triton kernels, counted in the machine code for compute capability 9.0; needs no GPU.

    python -m benchmarks.cuda_instructions

A kernel that streams through memory is limited by the issue of instructions where there are too many. An H100 issues 4
warps of 32 in each of 132 multiprocessors at 1.75 GHz and copies at 3.35 TB/s: float32 in and out leaves room for 70
instructions an element, bf16 for 35, at the full rate that products of integers and conversions do not have. Counted is
every instruction of the program but padding, slow paths included, divided by the elements of a thread. Triton's own
compiler and the tools in its package do the work.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from altgrad.quantization.kernels.cuda import scalar
from altgrad.quantization.kernels.cuda.bits import ADDITION, SHORT_CHANCE

TARGET = GPUTarget("cuda", 90, 32)
THREADS = 128
NVIDIA_TOOLS = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"

POINTERS = {
    "x": "*fp32",
    "out": "*fp32",
    "codes": "*u8",
    "problems": "*i32",
    "partials": "*fp64",
    "scales": "*fp32",
    "table": "*i64",
    "key": "*i64",
}
SMALL_INTEGERS = ("random_bits", "emax", "up_from", "outer_tiles")
FLOATS = ("element_max", "smallest")
ALIGNED = ("rows", "columns", "size")  # integers that are taken to be multiples of 16


def compiled(kernel, pointers: Mapping[str, str], constants: Mapping[str, object]):
    """A kernel as Triton compiles it for the target: other integers are int64, and those in `constants` are known."""
    known = {**dict.fromkeys(SMALL_INTEGERS, "i32"), **dict.fromkeys(FLOATS, "fp32"), **pointers}
    signature = {name: known.get(name, "i64") for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    place = kernel.arg_names.index
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or (n in ALIGNED and kind != "constexpr")]
    source = ASTSource(
        kernel,
        signature,
        {(place(name),): value for name, value in constants.items()},
        {(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=TARGET, options={"enable_fp_fusion": False})


def instructions(cubin: bytes) -> list[str]:
    """Names of the instructions of a program, as the disassembler prints them, without padding."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    return [name for name in names if name != "NOP"]


class Row(NamedTuple):
    """A cast: what it is, the dtype of x, its arithmetic (`kernels.cuda.bits`), whether it makes codes, and its budget."""

    name: str
    dtype: str
    mode: int
    codes: bool
    budget: int

    def constants(self) -> dict[str, object]:
        """The kernel's compile-time facts, as `scalar.run` sets them for E4M3."""
        wanted = {"VALUES": not self.codes, "CODES": self.codes, "STATS": False, "LACKS": self.codes}
        facts = {"LEAN": True, "KEEPS_INF": True, "WIDE": False, "DOUBLE": False, "ONE_SCALE": True}
        return {**wanted, **facts, "MODE": self.mode, "ELEMENTS": scalar.ELEMENTS}

    def per_element(self) -> float:
        """Instructions per element of the machine code."""
        kernel = compiled(
            scalar._process, {**POINTERS, "x": f"*{self.dtype}", "out": f"*{self.dtype}"}, self.constants()
        )
        return len(instructions(kernel.asm["cubin"])) * THREADS / scalar.ELEMENTS


NEAREST, STOCHASTIC = ADDITION.value, SHORT_CHANCE.value
ROWS = [
    Row("nearest even", "fp32", NEAREST, False, 25),
    Row("nearest even", "bf16", NEAREST, False, 25),
    Row("stochastic", "fp32", STOCHASTIC, False, 45),
    Row("stochastic", "bf16", STOCHASTIC, False, 45),
    Row("encode", "fp32", NEAREST, True, 35),
    Row("encode", "bf16", NEAREST, True, 35),
]


def main() -> None:
    """Compile, count and print."""
    table = Table(title=f"Instructions per element, sm_90, Triton {triton.__version__}")
    for column in ("cast to 8 bits", "tensor", "instructions", "budget"):
        table.add_column(column, justify="left" if column.startswith(("cast", "tensor")) else "right")
    for row in ROWS:
        found = row.per_element()
        verdict = "holds" if found <= row.budget else "MISSED"
        table.add_row(row.name, row.dtype, f"{found:.1f}", f"{row.budget} {verdict}")
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
