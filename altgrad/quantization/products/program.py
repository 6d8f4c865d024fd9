"""Programs: encode some matrices and multiply them, in one compiled call, each step on as many threads as it pays for.

For a small layer the way from Python to each loop costs more than the loop. A program is a table that says which loops
run one after the other, on which of a call's six addresses, and at which place behind each:

    FIRST, SECOND   matrices of float32
    KEPT            what outlives the call: codes and stored scales
    ROOM            what does not: codes, stored scales, packed operands
    OUT, OTHER      results, or a bias

The loops and their tables are those of the calls they replace (`cpu.scalar.encode_by_amax`, `cpu.blocks.run`, `multiply`),
and so are the bits. A program stops where one of those would not have gone on with codes: at a value without a code, a scale
that is not finite, or blocks whose scales are extreme.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from altgrad.jit.storage import KINDS
from altgrad.jit.threads import crew_of, threads_for
from altgrad.quantization.cast import Cast
from altgrad.quantization.kernels.cpu import blocks, loops, scalar
from altgrad.quantization.products.crossing import (
    FIRST,
    KEPT,
    NOTHING,
    OTHER,
    OUT,
    ROOM,
    ROW_WORDS,
    SECOND,
    Encoding,
    Multiplication,
    run,
)
from altgrad.quantization.products.multiply import Codes, plan_of, workspace
from altgrad.quantization.products.units import Unit, exponents_that_fit, payloads
from altgrad.quantization.quantized import Want

__all__ = ["FIRST", "KEPT", "NOTHING", "OTHER", "OUT", "ROOM", "SECOND", "Coded", "Program"]

ALIGNED = 64  # bytes: where packed operands begin


class Coded(NamedTuple):
    """A matrix of codes behind one of a call's addresses: its format, shape and blocks are those of `like`."""

    where: int
    codes_at: int
    scales_at: int
    scale: int
    like: Codes  # without memory

    def t(self) -> Coded:
        """The transposed matrix."""
        return self._replace(like=self.like.t())

    def saved(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The codes, and the stored scales, as parts of what KEPT was."""
        parts = [(self.codes_at, self.like.codes.shape)]
        if self.like.blocks is not None:
            parts.append((self.scales_at, self.like.blocks.shape))
        return tuple(memory[at : at + math.prod(shape)].view(shape) for at, shape in parts)


class Program:
    """A program, written by `encode` and then `multiply`, and run by calling it.

    fits: whether the threads that it wants can be had in compiled code, and there is something to do, as far as written.
    """

    def __init__(self) -> None:
        self.fits = True
        self._sizes = {KEPT: 0, ROOM: 0}
        self._encodings: list[Encoding] = []
        self._multiplications: list[Multiplication] = []
        self._packed = 0
        self._threads = 1
        self._alive: list = []  # whose addresses the rows hold
        self._table = np.zeros(0, np.int64)

    def _place(self, where: int, size: int) -> int:
        found = self._sizes[where]
        self._sizes[where] = -(-(found + size) // ALIGNED) * ALIGNED
        return found

    @property
    def kept(self) -> int:
        """Bytes of KEPT, as far as written."""
        return self._sizes[KEPT]

    def leave_room(self, size: int) -> None:
        """Leave so many bytes of KEPT alone, behind what is there."""
        self._place(KEPT, size)

    def _threads_for(self, elements: int) -> int:
        """How many threads work on so many elements."""
        return self._with(threads_for(elements))

    def _with(self, threads: int) -> int:
        self.fits &= crew_of(threads) is not None
        self._threads = max(self._threads, threads)
        return threads

    def encode(
        self, cast: Cast, power_of_two: bool, shape: torch.Size, x: int, where: int, scale: int, *, given: bool = False
    ) -> Coded:
        """Have the float32 matrix of that shape at address x encoded.

        Args:
            where: KEPT or ROOM. scale: which of the call's scales its own is; of scalar formats that of its amax, or
            (`given`) one that the call is handed.
        """
        like = torch.empty(shape, device="meta")
        plan = cast.plan(torch.float32, torch.device("cpu"), Want.CODES)
        count = like.numel()
        row = dict.fromkeys(Encoding._fields, 0) | {"x": x, "codes": where, "codes_at": self._place(where, count)}
        row["scale"] = scale
        self._alive.append(plan)
        codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        if cast.is_block:
            ready, layout, fmt = blocks.prepared(plan, like), cast.layout(shape), cast.format
            self._alive.append(ready)
            scales = torch.empty(layout.scale_shape, dtype=torch.uint8, device="meta")
            lowest, highest = exponents_that_fit(fmt)
            row |= {
                "scales_at": self._place(where, scales.numel()),
                "block_loop": ready.loop,
                "table": ready.address,
                "units": ready.units,
                "scales": scales.numel(),
                "lowest": lowest,
                "highest": highest,
                "rows": layout.rows,
                "columns": layout.columns,
                "tile_rows": layout.tile_rows,
                "tile_columns": layout.tile_columns,
                "payloads": payloads(fmt, Unit.BF16).ctypes.data,
                "threads": self._threads_for(count) if ready.threads_matter else 1,
                "group": ready.group,
            }
            found = Codes(codes, fmt, 1.0, scales, (layout.tile_rows, layout.tile_columns))
        else:
            loop, table, _, _ = plan.prepared or scalar.prepare(plan)
            row |= {
                "loop": loop,
                "table": table,
                "units": count,
                "amax_loop": loops.compiled_amax(KINDS[torch.float32]),
                "top": 0 if given else int(np.float64(plan.grid.max).view(np.int64)),
                "power_of_two": int(power_of_two),
                "threads": self._threads_for(count),
                "amaxes_at": self._place(ROOM, 8 * loops.amax_words(count)),
            }
            found = Codes(codes, cast.format)
        self._encodings.append(Encoding(**row))
        return Coded(where, row["codes_at"], row["scales_at"], scale, found)

    def multiply(self, a: Coded, b: Coded, unit: Unit, out: int, bias: int = NOTHING) -> None:
        """Have a @ b, plus a bias for each column, written to the address `out`."""
        plan = plan_of(a.like, b.like, unit)
        self.fits &= plan.units[2] > 0
        self._alive.append(plan)
        left = self._sizes[ROOM]
        self._packed = max(self._packed, plan.sizes[1])
        self._multiplications.append(
            Multiplication(
                plan.address,
                *a[:4],
                *b[:4],
                out,
                bias,
                left,
                left + plan.sizes[0],
                plan.exponent,
                *plan.loops,
                *plan.units,
                self._with(plan.workers),
            )
        )

    def close(self) -> Program:
        """The program as it is run."""
        rows = [*self._encodings, *self._multiplications]
        self._table = np.array([row + (0,) * (ROW_WORDS - len(row)) for row in rows], np.int64).reshape(-1)
        self._given = (self._table.ctypes.data, len(self._encodings), len(self._multiplications))
        self._alive.append(self._table)
        self.room = self._sizes[ROOM] + self._packed + ALIGNED
        self._run, self._crew = run(), crew_of(self._threads)
        return self

    def __call__(self, first, second, kept, out, other, scales=(1.0, 1.0)) -> tuple[float, ...] | None:
        """Run it on six addresses, as the module says, but for the ROOM; returns the scales, or None where it stopped."""
        memory = workspace.room(self.room)
        room = (memory.data_ptr() + ALIGNED - 1) & -ALIGNED
        done, *found = self._run(self._crew, *self._given, first, second, kept, room, out, other, *scales)
        return found if done else None  # type: ignore[return-value]
