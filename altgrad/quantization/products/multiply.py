"""Products of matrices of codes on the CPU: packs both operands and multiplies them on as many threads as torch uses."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.code_table import decoding_of
from altgrad.quantization.products.units import GROUP, LARGEST_DEPTH, Unit, facts, on_this_cpu, payloads, power

KEPT_BYTES = 1 << 25  # of the memory for packed operands that a thread keeps from one product to the next
WORK_PER_ELEMENT = 64  # multiplications that take about as long as one element of a loop over memory
MOST_BLOCK_ROWS = 4  # panels of rows in a block: their slices stay in the second-level cache


class Codes(NamedTuple):
    """A matrix of one-byte codes, or a batch of them, with what makes values of them.

    codes: uint8 [..., rows, columns], in any strides. fmt: its format. scale: multiplies everything. blocks: stored scales
    of a block format's blocks, uint8, with one entry for each `tile` (rows, columns) of the last two axes.
    """

    codes: Tensor
    fmt: FloatFormat | BlockFormat
    scale: float = 1.0
    blocks: Tensor | None = None
    tile: tuple[int, int] = (1, 1)

    def t(self) -> Codes:
        """The transposed matrix (last two axes)."""
        blocks = None if self.blocks is None else self.blocks.transpose(-2, -1)
        return Codes(self.codes.transpose(-2, -1), self.fmt, self.scale, blocks, (self.tile[1], self.tile[0]))


class _Workspace(threading.local):
    """What a thread keeps between products: room for packed operands, and for the tables that the loops read."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        words = np.zeros(64, np.int64)
        self.tables, self.address = memoryview(words), words.ctypes.data

    def room(self, size: int) -> Tensor:
        """At least `size` bytes."""
        if self.memory.numel() >= size:
            return self.memory
        found = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= KEPT_BYTES:
            self.memory = found
        return found


_workspace = _Workspace()
_PACKING, _PRODUCT = 18, 12
_TABLES = struct.Struct(f"{2 * _PACKING + _PRODUCT - 1}qd")


@cache
def _machinery():
    from altgrad.jit import threads
    from altgrad.quantization.products import loops, panels

    assert len(panels.Packing._fields) == _PACKING
    assert len(loops.Product._fields) == _PRODUCT
    return loops, panels, threads


@cache
def _packing(fmt: FloatFormat | BlockFormat, unit: Unit, by_steps: bool, scaled: bool) -> tuple:
    """(loop, addresses of the facts, of the payloads and of the values of scales) of an operand."""
    _, panels, _ = _machinery()
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    variant = panels.Variant(panels.UNITS.index(unit), int(decoding_of(element)), by_steps, scaled)
    scales = payloads(fmt.scale_format, Unit.BF16, 0).ctypes.data if isinstance(fmt, BlockFormat) else 0
    return panels.compiled(variant), facts(fmt, unit).ctypes.data, payloads(fmt, unit).ctypes.data, scales


@cache
def _multiplying(unit: Unit, emulated: bool) -> int:
    loops, panels, _ = _machinery()
    return loops.compiled(loops.Variant(panels.UNITS.index(unit), emulated))


def multiply(a: Codes, b: Codes, unit: Unit, *, bias: Tensor | None = None, emulated: bool | None = None) -> Tensor:
    """a @ b, plus a bias for each column, in float32, for matrices [..., m, k] and [..., k, n] on the CPU.

    On `INT8` the sums are exact and k is at most `LARGEST_DEPTH`; on `BF16` the products are, which are summed in float32
    in slices along k. Sums times both scales are rounded once. Results do not depend on the number of threads.

    Args:
        unit: one that multiplies both formats (`units.common_unit`).
        bias: float32 [n].
        emulated: spell the unit's instruction out; None: where the CPU lacks it.
    """
    if emulated is None:
        emulated = not on_this_cpu(unit)
    batch = () if a.codes.ndim == b.codes.ndim == 2 else torch.broadcast_shapes(a.codes.shape[:-2], b.codes.shape[:-2])
    a, left_count = _matrices(a, batch)
    b, right_count = _matrices(b, batch)
    rows, depth, columns = a.codes.shape[-2], a.codes.shape[-1], b.codes.shape[-1]
    assert depth == b.codes.shape[-2]
    assert unit is Unit.BF16 or depth <= LARGEST_DEPTH
    out = torch.empty((*batch, rows, columns), dtype=torch.float32, device="cpu")
    if not out.numel() or not depth:
        return out.zero_() if bias is None else out.zero_().add_(bias)
    loops, panels, threads = _machinery()
    words = -(-depth // GROUP[unit])
    slices = -(-words // panels.SLICE)
    panels_left, panels_right = -(-rows // panels.PANEL_ROWS), -(-columns // panels.PANEL_ROWS)
    left_bytes = left_count * slices * panels_left * panels.PANEL_BYTES
    right_bytes = right_count * slices * panels_right * panels.PANEL_BYTES
    memory = _workspace.room(left_bytes + right_bytes + 64)
    packed = -(-memory.data_ptr() // 64) * 64
    flips = 0x80808080 if unit is Unit.INT8 else 0
    pack_left, left_row, kept_left = _row(a, packed, unit, (0, 1), flips, 0)
    pack_right, right_row, kept_right = _row(b, packed + left_bytes, unit, (1, 0), 0, 1)
    count = math.prod(batch)
    workers = threads.threads_for(count * rows * columns * depth // WORK_PER_ELEMENT)
    block_rows, block_columns = _blocks(panels_left, panels_right, -(-4 * workers // count) if workers > 1 else 1)
    units = count * -(-panels_left // block_rows) * -(-panels_right // block_columns)
    factor = math.ldexp(float(a.scale) * float(b.scale), -power(a.fmt, unit) - power(b.fmt, unit))
    address = _workspace.address
    _TABLES.pack_into(
        _workspace.tables,
        0,
        *left_row,
        *right_row,
        packed,
        packed + left_bytes,
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        rows,
        columns,
        words,
        int(left_count > 1),
        int(right_count > 1),
        block_rows,
        block_columns,
        factor,
    )
    left_table, right_table, product_table = address, address + 8 * _PACKING, address + 2 * 8 * _PACKING
    units_left, units_right = left_count * panels_left, right_count * panels_right
    loop = _multiplying(unit, emulated)
    if workers == 1:
        loops.run_all()(
            pack_left, left_table, units_left, pack_right, right_table, units_right, loop, product_table, units
        )
    else:
        threads.run_table(pack_left, left_table, units_left, threads=workers)
        threads.run_table(pack_right, right_table, units_right, threads=workers)
        threads.run_table(loop, product_table, units, threads=workers)
    del kept_left, kept_right
    return out


def _matrices(operand: Codes, batch: Sequence[int]) -> tuple[Codes, int]:
    """The operand as [matrices, rows, columns], or as [rows, columns] if one serves all, and the number of matrices."""
    codes = operand.codes
    if codes.ndim == 2:
        return operand, 1
    if math.prod(codes.shape[:-2]) == 1:
        return _reshaped(operand, lambda part: part.reshape(part.shape[-2:])), 1
    each = _reshaped(operand, lambda part: part.expand(*batch, *part.shape[-2:]).reshape(-1, *part.shape[-2:]))
    return each, math.prod(batch)


def _reshaped(operand: Codes, change: Callable[[Tensor], Tensor]) -> Codes:
    """The operand with its codes and blocks changed alike."""
    blocks = None if operand.blocks is None else change(operand.blocks)
    return operand._replace(codes=change(operand.codes), blocks=blocks)


def _row(
    operand: Codes, packed: int, unit: Unit, axes: tuple[int, int], flips: int, sums: int
) -> tuple[int, tuple[int, ...], Tensor]:
    """(packing loop, its table, codes that must live while it runs); axes: which of the last two are rows and steps."""
    codes, fmt, _, blocks, tile = operand
    if codes.stride(-1) != 1 and codes.stride(-2) != 1:
        codes = codes.contiguous()
    row_axis, step_axis = axes
    sizes, strides = codes.shape[-2:], codes.stride()[-2:]
    by_steps = strides[step_axis] == 1
    loop, facts_address, payloads_address, scale_values_address = _packing(fmt, unit, by_steps, blocks is not None)
    scales, scale_strides, scale_batch = 0, (0, 0), 0
    if blocks is not None:
        scales, scale_strides = blocks.data_ptr(), blocks.stride()[-2:]
        scale_batch = blocks.stride(0) if blocks.ndim == 3 else 0
    table = (
        codes.data_ptr(),
        packed,
        facts_address,
        payloads_address,
        scales,
        scale_values_address,
        sizes[row_axis],
        sizes[step_axis],
        strides[row_axis],
        strides[step_axis],
        codes.stride(0) if codes.ndim == 3 else 0,
        scale_strides[row_axis],
        scale_strides[step_axis],
        scale_batch,
        tile[row_axis],
        tile[step_axis],
        flips,
        sums,
    )
    return loop, table, codes


def _blocks(down: int, across: int, wanted: int) -> tuple[int, int]:
    """Panels of rows and of columns in a block, so that there are about `wanted` blocks or more where possible."""
    rows, columns = min(down, MOST_BLOCK_ROWS), across
    while -(-down // rows) * -(-across // columns) < wanted and (rows > 1 or columns > 1):
        if rows > 1:
            rows = (rows + 1) // 2
        else:
            columns = (columns + 1) // 2
    return rows, columns
