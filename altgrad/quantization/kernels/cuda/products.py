"""A product of bf16 or float16 matrices in Triton that ends in the dtype it is wanted in: (sums * a) * b + bias in one pass.

Sums are float32 and are never written: what was pulled out of the scales, one factor for a matrix or one for each of its
rows or columns, multiplies them where they were added up. Results are those of a library's product into float32 and
`operands.finished`, up to the order of the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.quantization.kernels.cuda.bits import INTERPRETED, balanced, narrow, widen
from altgrad.quantization.kernels.cuda.launch import on_device
from altgrad.quantization.kernels.cuda.operands import epilogue

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a program's tile, and of what it multiplies at a time
GROUP = 8  # rows of tiles whose programs are neighbours, so that they find one another's operands in the cache
LEAST_PROGRAMS = 128  # with fewer most of a large GPU would idle, where a library's product splits the reduction


def programs_of(rows: int, columns: int) -> int:
    """Tiles of a result."""
    return -(-rows // ROWS) * -(-columns // COLUMNS)


def fills_a_gpu(rows: int, columns: int) -> bool:
    """Whether a result of that size has work for all multiprocessors of a large GPU."""
    return programs_of(rows, columns) >= LEAST_PROGRAMS


@triton.jit
def _product(
    a,
    b,
    out,
    of_a,
    of_b,
    bias,
    rows,
    columns,
    depth,
    a_row,
    a_depth,
    b_depth,
    b_column,
    a_step,
    b_step,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of ROWS x COLUMNS results; a_row .. b_column: strides; a_step, b_step: 0 for one factor, 1 for many."""
    program = tl.program_id(0)
    down, across = (rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    row = ((first + within % height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = ((within // height) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    in_rows, in_columns = row < rows, column < columns
    step = tl.arange(0, DEPTH)
    from_a = a + row[:, None] * a_row
    from_b = b + column[None, :] * b_column
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + step
        left = tl.load(
            from_a + k[None, :].to(tl.int64) * a_depth, mask=in_rows[:, None] & (k < depth)[None, :], other=0.0
        )
        right = tl.load(
            from_b + k[:, None].to(tl.int64) * b_depth, mask=(k < depth)[:, None] & in_columns[None, :], other=0.0
        )
        if INTERPRETED:  # which takes bf16 for integers here
            sums = tl.dot(widen(left), widen(right), sums, input_precision="ieee")
        else:
            sums = tl.dot(left, right, sums)
    if HAS_A and HAS_B:
        of_row = tl.load(of_a + row * a_step, mask=in_rows, other=1.0)[:, None]
        first, second = balanced(of_row, tl.load(of_b + column * b_step, mask=in_columns, other=1.0)[None, :])
        sums = (sums * first) * second
    elif HAS_A:
        sums = sums * tl.load(of_a + row * a_step, mask=in_rows, other=1.0)[:, None]
    elif HAS_B:
        sums = sums * tl.load(of_b + column * b_step, mask=in_columns, other=1.0)[None, :]
    if HAS_BIAS:
        sums = sums + widen(tl.load(bias + column, mask=in_columns, other=0.0))[None, :]
    place = out + row[:, None] * tl.cast(columns, tl.int64) + column[None, :]
    tl.store(place, narrow(sums, out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def product(
    a: Tensor, b: Tensor, of_a: Tensor | None, of_b: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """((a @ b) * of_a) * of_b + bias for bf16 or float16 matrices, in `dtype`.

    Args:
        a, b: [rows, depth] and [depth, columns], with any strides.
        of_a, of_b: one factor each, or one for each row (of_a) or column (of_b). bias: [columns].
    """
    (rows, depth), columns = a.shape, b.shape[1]
    out = torch.empty((rows, columns), dtype=dtype, device=a.device)
    programs = programs_of(rows, columns)
    if programs:
        with on_device(a):
            _product[(programs,)](
                a,
                b,
                out,
                rows=rows,
                columns=columns,
                depth=depth,
                a_row=a.stride(0),
                a_depth=a.stride(1),
                b_depth=b.stride(0),
                b_column=b.stride(1),
                **epilogue(of_a, of_b, bias),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                DEPTH=DEPTH,
                GROUP=GROUP,
                num_warps=8,
                num_stages=3,
                enable_fp_fusion=False,
            )
    return out
