"""Products of matrices of codes on the CPU: packs both operands and multiplies them on as many threads as torch uses."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.products.units import (
    GROUP,
    LARGEST_DEPTH,
    OFFSET,
    Unit,
    exponents_that_fit,
    facts,
    has_wide_vectors,
    on_this_cpu,
    payloads,
    power,
)

KEPT_BYTES = 7 << 20  # of memory for packed operands and passing codes that a thread keeps from one product to the next
PIECE_BYTES = (
    3 << 20
)  # of packed operands, about: long reductions are packed and multiplied piece by piece, near the cores
PIECE_DEPTH = 384  # terms that a piece has at least, as its sums go through memory
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
        self.tables = np.zeros(0, np.int64)

    def filled(self, template: np.ndarray) -> np.ndarray:
        """The tables, as a template has them."""
        if len(self.tables) != len(template):
            self.tables = np.empty_like(template)
        self.tables[:] = template
        return self.tables

    def room(self, size: int) -> Tensor:
        """At least `size` bytes."""
        if self.memory.numel() >= size:
            return self.memory
        found = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= KEPT_BYTES:
            self.memory = found
        return found


def room_kept() -> int:
    """Bytes that this thread keeps for packed operands."""
    return workspace.memory.numel()


def leave_room() -> None:
    """Give back what this thread keeps for packed operands."""
    workspace.memory = torch.empty(0, dtype=torch.uint8)


class Plan(NamedTuple):
    """A product resolved for shapes, strides and formats: all that the loops read but addresses and the factor.

    template: tables of the left, the right and the product, in this order. loops, units: those that pack left and right
    and multiply, and how much work each has. pieces: slices of the reduction to begin at, so many of which are packed and
    multiplied together. sizes: bytes of the left operand's part of a piece when packed, and of both.
    """

    template: np.ndarray
    address: int  # of the template
    loops: tuple[int, int, int]
    units: tuple[int, int, int]
    pieces: range
    sizes: tuple[int, int]
    shape: tuple[int, ...]
    exponent: int  # of the power of two that both operands carry
    workers: int
    formats: tuple  # kept alive, as a plan goes by their ids


workspace = _Workspace()
_plans: dict[tuple, Plan] = {}
PLANS_KEPT = 1024
if hasattr(os, "register_at_fork"):  # a plan holds how many threads work, and a forked child has no others
    os.register_at_fork(after_in_child=_plans.clear)


@cache
def _machinery():
    """The modules of the loops, which import Numba."""
    from altgrad.jit import threads
    from altgrad.quantization.products import loops, panels

    return loops, panels, threads


@cache
def _packing(fmt: FloatFormat | BlockFormat, unit: Unit, by_steps: bool, scaled: bool) -> tuple:
    """(loop, addresses of the facts, of the payloads and of the values of scales) of an operand."""
    from altgrad.jit.code_table import decoding_of

    _, panels, _ = _machinery()
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    variant = panels.Variant(panels.UNITS.index(unit), int(decoding_of(element)), by_steps, scaled)
    scales = payloads(fmt.scale_format, Unit.BF16, 0).ctypes.data if isinstance(fmt, BlockFormat) else 0
    return panels.compiled(variant), facts(fmt, unit).ctypes.data, payloads(fmt, unit).ctypes.data, scales


@cache
def _multiplying(unit: Unit, emulated: bool, narrow: bool) -> int:
    loops, panels, _ = _machinery()
    return loops.compiled(loops.Variant(panels.UNITS.index(unit), emulated, narrow))


def multiply(a: Codes, b: Codes, unit: Unit, *, bias: Tensor | None = None, emulated: bool | None = None) -> Tensor:
    """a @ b, plus a bias for each column, in float32, for matrices [..., m, k] and [..., k, n] on the CPU.

    Integer sums are exact, and k is at most `LARGEST_DEPTH`; on the other units products are, which are summed in float32
    in slices along k. Sums times both scales are rounded once. Results do not depend on the number of threads.

    Args:
        unit: one that multiplies both formats (`units.common_unit`).
        bias: float32 [n].
        emulated: spell the unit's instruction out; None: where the CPU lacks it.
    """
    if emulated is None:
        emulated = not on_this_cpu(unit)
    if a.codes.ndim > 2 or b.codes.ndim > 2:
        return _batched(a, b, unit, bias, emulated)
    return _multiply(a, b, unit, bias, emulated, ())


def _multiply(a: Codes, b: Codes, unit: Unit, bias: Tensor | None, emulated: bool, batch: tuple[int, ...]) -> Tensor:
    """The product of matrices, or of stacks of them, `batch` of them in all."""
    a, b = _readable(a), _readable(b)
    own = (*_layout(a), *_layout(b), batch, id(unit), emulated, torch.get_num_threads())
    plan = _plans.get(own)
    if plan is None:
        if len(_plans) >= PLANS_KEPT:
            _plans.clear()
        plan = _plans[own] = plan_of(a, b, unit, emulated, batch)
    out = torch.empty(plan.shape, dtype=torch.float32, device="cpu")
    if not plan.units[2]:
        return out.zero_() if bias is None else out.zero_().add_(bias)
    assert bias is None or bias.shape == plan.shape[-1:], "the loops read one bias for each column"
    loops, _, threads = _machinery()
    left_bytes, bytes_ = plan.sizes
    memory = workspace.room(bytes_)  # owned here until the loops are through: the workspace keeps no large one
    packed = (memory.data_ptr() + 63) & -64
    factor = math.ldexp(a.scale * b.scale, plan.exponent)
    given = (
        a.codes.data_ptr(),
        0 if a.blocks is None else a.blocks.data_ptr(),
        b.codes.data_ptr(),
        0 if b.blocks is None else b.blocks.data_ptr(),
        packed,
        packed + left_bytes,
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    crew = threads.crew_of(plan.workers)
    if crew is not None:
        loops.run_all()(crew, plan.address, *given, factor, *plan.loops, *plan.units)
        return out
    tables = workspace.filled(plan.template)
    for place, value in zip(_given(), given, strict=True):
        for index in place:
            tables[index] = value
    tables[-1:].view(np.float64)[0] = factor
    address, row = tables.ctypes.data, 8 * _packing_words()
    starts = (address, address + row, address + 2 * row)
    for first in plan.pieces:
        for index in _given_first():
            tables[index] = first
        for loop, table, units in zip(plan.loops, starts, plan.units, strict=True):
            threads.run_table(loop, table, units, threads=plan.workers)
    return out


def fits_exponents(operand: Codes) -> bool:
    """Whether elements times their blocks' E8M0 scales are normal numbers or 0, finite times any payload of another format."""
    fmt, blocks, (tile_rows, tile_columns) = operand.fmt, operand.blocks, operand.tile
    assert isinstance(fmt, BlockFormat)
    assert blocks is not None
    rows, columns = operand.codes.shape[-2:] if operand.codes.ndim > 1 else (1, operand.codes.shape[0])
    where = (operand.codes.data_ptr(), blocks.data_ptr(), blocks.numel(), *exponents_that_fit(fmt))
    tables = payloads(fmt, Unit.BF16).ctypes.data
    return bool(_machinery()[0].all_blocks_fit()(*where, rows, columns, tile_rows, tile_columns, tables))


@cache
def _packing_words() -> int:
    return len(_machinery()[1].Packing._fields)


@cache
def _given() -> tuple[tuple[int, ...], ...]:
    """Where in the tables each address of a call goes."""
    loops, panels, _ = _machinery()
    words = _packing_words()
    left = [panels.Packing._fields.index(name) for name in ("codes", "scales", "packed")]
    right = [words + index for index in left]
    names = ("left", "right", "out", "bias")
    product = [2 * words + loops.Product._fields.index(name) for name in names]
    packed = ((left[2], product[0]), (right[2], product[1]))
    return (left[0],), (left[1],), (right[0],), (right[1],), *packed, (product[2],), (product[3],)


@cache
def _given_first() -> tuple[int, ...]:
    """Where in the tables the first slice of a piece goes."""
    loops, panels, _ = _machinery()
    words, first = _packing_words(), panels.Packing._fields.index("first")
    return first, words + first, 2 * words + loops.Product._fields.index("first")


def _layout(operand: Codes) -> tuple:
    codes, fmt, _, blocks, tile = operand
    return codes.shape, codes.stride(), id(fmt), None if blocks is None else blocks.stride(), tile


def _readable(operand: Codes) -> Codes:
    """The operand with codes that are neighbours along one of the last two axes."""
    strides = operand.codes.stride()
    if strides[-1] == 1 or strides[-2] == 1:
        return operand
    return operand._replace(codes=operand.codes.contiguous())


def plan_of(a: Codes, b: Codes, unit: Unit, emulated: bool | None = None, batch: tuple[int, ...] = ()) -> Plan:
    """A product resolved, whatever memory its operands lie in; arguments as for `multiply`."""
    emulated = not on_this_cpu(unit) if emulated is None else emulated
    _, panels, threads = _machinery()
    rows, depth, columns = a.codes.shape[-2], a.codes.shape[-1], b.codes.shape[-1]
    assert depth == b.codes.shape[-2]
    assert not unit.sums_integers or depth <= LARGEST_DEPTH
    count = math.prod(batch)
    left_count, right_count = (count if one.codes.ndim == 3 else 1 for one in (a, b))
    words = -(-depth // GROUP[unit])
    slices = -(-words // panels.SLICE)
    down, across = -(-rows // panels.PANEL_ROWS), -(-columns // panels.PANEL_ROWS)
    left_slice, right_slice = (n * panels.PANEL_BYTES for n in (left_count * down, right_count * across))
    least = -(-PIECE_DEPTH // (panels.SLICE * GROUP[unit]))
    together = max(min(max(PIECE_BYTES // max(left_slice + right_slice, 1), least), slices), 1)
    flips = OFFSET if unit is Unit.INT8 else 0
    pack_left, left_row = _row(a, unit, (-2, -1), flips, 0, together)
    pack_right, right_row = _row(b, unit, (-1, -2), 0, int(not unit.by_matrices), together)
    workers = threads.threads_for(count * rows * columns * depth // WORK_PER_ELEMENT)
    block_rows, block_columns = _blocks(down, across, -(-4 * workers // max(count, 1)) if workers > 1 else 1)
    blocks = -(-down // block_rows) * -(-across // block_columns) if rows and columns and depth else 0
    stacked = (int(left_count > 1), int(right_count > 1))
    product = (0, 0, 0, 0, rows, columns, words, *stacked, block_rows, block_columns, 0, together, 0)
    template = np.array([*left_row, *right_row, *product], np.int64)
    return Plan(
        template,
        template.ctypes.data,
        (pack_left, pack_right, _multiplying(unit, emulated, not has_wide_vectors())),
        (left_count * down, right_count * across, count * blocks),
        range(0, slices, together),
        (left_slice * together, (left_slice + right_slice) * together + 64),
        (*batch, rows, columns),
        -power(a.fmt, unit) - power(b.fmt, unit),
        workers,
        (a.fmt, b.fmt),
    )


def _batched(a: Codes, b: Codes, unit: Unit, bias: Tensor | None, emulated: bool) -> Tensor:
    """The product of stacks of matrices, whose batch axes broadcast."""
    batch = tuple(torch.broadcast_shapes(a.codes.shape[:-2], b.codes.shape[:-2]))
    return _multiply(_stack(a, batch), _stack(b, batch), unit, bias, emulated, batch)


def _stack(operand: Codes, batch: Sequence[int]) -> Codes:
    """The operand as [matrices, rows, columns], or as [rows, columns] if one matrix serves all."""
    codes = operand.codes
    if codes.ndim == 2:
        return operand
    if math.prod(codes.shape[:-2]) == 1:
        return _reshaped(operand, lambda part: part.reshape(part.shape[-2:]))
    return _reshaped(operand, lambda part: part.expand(*batch, *part.shape[-2:]).reshape(-1, *part.shape[-2:]))


def _reshaped(operand: Codes, change: Callable[[Tensor], Tensor]) -> Codes:
    """The operand with its codes and blocks changed alike."""
    blocks = None if operand.blocks is None else change(operand.blocks)
    return operand._replace(codes=change(operand.codes), blocks=blocks)


def _row(
    operand: Codes, unit: Unit, axes: tuple[int, int], flips: int, sums: int, slices: int
) -> tuple[int, tuple[int, ...]]:
    """(packing loop, its table without addresses of a call); axes: which of the last two are rows and steps."""
    codes, fmt, _, blocks, tile = operand
    row, step = axes
    strides = codes.stride()
    loop, facts_address, payloads_address, scales_address = _packing(fmt, unit, strides[step] == 1, blocks is not None)
    scale_strides = (0, 0, 0) if blocks is None else blocks.stride()
    table = (
        0,
        0,
        facts_address,
        payloads_address,
        0,
        scales_address,
        codes.shape[row],
        codes.shape[step],
        strides[row],
        strides[step],
        strides[0] if codes.ndim == 3 else 0,
        scale_strides[row],
        scale_strides[step],
        scale_strides[0] if blocks is not None and blocks.ndim == 3 else 0,
        tile[row],
        tile[step],
        flips,
        sums,
        int(unit.by_matrices and axes == (-2, -1)),
        0,
        slices,
    )
    return loop, table


def _blocks(down: int, across: int, wanted: int) -> tuple[int, int]:
    """Panels of rows and of columns in a block, so that there are about `wanted` blocks or more where possible."""
    rows, columns = max(min(down, MOST_BLOCK_ROWS), 1), max(across, 1)
    while -(-down // rows) * -(-across // columns) < wanted and (rows > 1 or columns > 1):
        if rows > 1:
            rows = (rows + 1) // 2
        else:
            columns = (columns + 1) // 2
    return rows, columns
