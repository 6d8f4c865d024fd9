"""What several steps left on the device goes to the host in one copy and becomes records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.diagnostics.fields import UPDATE_FIELDS
from altgrad.monitor.records import Record, Watched, operand_records, update_records
from altgrad.quantization.block_stats import COLUMNS as BLOCK_COLUMNS
from altgrad.records.metrics import Metric

OPERAND_COLUMNS = 8  # the fields of QuantStats and the last scale
PLACES_KEPT = 256  # steps ask for the same ones again; a model whose uses change must not keep them without end


@lru_cache(maxsize=PLACES_KEPT)
def places(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices as int64 on a device, copied there once: each copy of host memory waits for a GPU."""
    return torch.tensor(indices, dtype=torch.int64, device=device)


class Published(NamedTuple):
    """One quantization of an operand: its slot (layer, role, format), the vectors of its statistics, its scale."""

    slot: tuple[str, str, str]
    vector: Tensor
    scale: Tensor | float
    blocks: Tensor | None = None


class Step:
    """What one step left on the device; `extra` are records that were made on the host."""

    def __init__(self, step: int, extra: list[Record], added: tuple[Metric, ...] = ()) -> None:
        self.step, self.extra, self.added = step, extra, added
        self.slots: list[tuple[str, str, str]] = []  # layer, role, format
        self.operands: Tensor | None = None  # float64 [slots, OPERAND_COLUMNS]
        self.in_blocks: list[int] = []  # which slots are of block formats
        self.blocks: Tensor | None = None  # float64 [in_blocks, BLOCK_COLUMNS]
        self.watched: list[Watched] = []
        self.vectors: Tensor | None = None  # float64 [parameters, len(UPDATE_FIELDS) + added]
        self.of_histograms: Tensor | None = None  # float64 [parameters, 2]
        self.later: list[
            tuple[Record, tuple[str, ...]]
        ] = []  # records whose numbers were left on the device, their names
        self.of_later: Tensor | None = None  # float64, one after the other

    def on_device(self) -> list[Tensor | None]:
        """What is copied to the host, in the order in which `to_records` takes it up."""
        return [self.operands, self.blocks, self.vectors, self.of_histograms, self.of_later]

    def take_operands(self, entries: list[Published]) -> None:
        """Sum the micro-batches of each operand."""
        if not entries:
            return
        index = {slot: i for i, slot in enumerate(dict.fromkeys(entry.slot for entry in entries))}
        rows = torch.stack([entry.vector for entry in entries])
        where = places(tuple(index[entry.slot] for entry in entries), rows.device)
        total = rows.new_zeros(len(index), OPERAND_COLUMNS)
        total[:, :7].index_add_(0, where, rows)
        total[:, 0] = rows.new_zeros(len(index)).scatter_reduce_(0, where, rows[:, 0], "amax", include_self=True)
        last = {entry.slot: entry.scale for entry in entries}
        total[:, 7] = _scales(list(last.values()), rows)
        self.slots, self.operands = list(index), total
        of_blocks: dict[int, Tensor] = {}
        for entry in entries:
            if entry.blocks is not None:
                before = of_blocks.get(index[entry.slot])
                of_blocks[index[entry.slot]] = entry.blocks if before is None else before + entry.blocks
        if of_blocks:
            self.in_blocks, self.blocks = list(of_blocks), torch.stack(list(of_blocks.values()))


def _scales(scales: list[Any], like: Tensor) -> Tensor:
    """Numbers and tensors as one tensor like `like`; NaN for a tensor of several."""
    if like.device.type == "cpu" and all(isinstance(scale, float | int) for scale in scales):
        return torch.tensor(scales, dtype=like.dtype)
    found = []
    for scale in scales:
        if isinstance(scale, Tensor):
            found.append(scale.reshape(()).to(like) if scale.numel() == 1 else like.new_full((), torch.nan))
        else:
            found.append(like.new_full((), scale))  # a copy of host memory would wait
    return torch.stack(found)


def to_records(steps: Sequence[Step]) -> list[Record]:
    """Everything of the interval in one copy to the host, cut up again into each step's records."""
    parts = [t.flatten() for s in steps for t in s.on_device() if t is not None]
    host = torch.cat(parts).cpu().numpy() if parts else None
    records: list[Record] = []
    at = 0
    for s in steps:
        if s.operands is not None and host is not None:
            size = s.operands.numel()
            raw, at = host[at : at + size].reshape(-1, OPERAND_COLUMNS), at + size
            of_blocks = host[at : at + len(s.in_blocks) * BLOCK_COLUMNS].reshape(-1, BLOCK_COLUMNS)
            records += operand_records(s.step, s.slots, raw, dict(zip(s.in_blocks, of_blocks, strict=True)))
            at += of_blocks.size
        if s.vectors is not None and host is not None:
            size, n = s.vectors.numel(), len(s.watched)
            raw = host[at : at + size].reshape(n, len(UPDATE_FIELDS) + len(s.added))
            of_histograms = host[at + size : at + size + 2 * n].reshape(n, 2)
            records += update_records(s.step, s.watched, raw, of_histograms, s.added)
            at += size + 2 * n
        for record, names in s.later:
            assert host is not None
            values, at = host[at : at + len(names)].tolist(), at + len(names)
            records.append(
                {**record, **{name: value for name, value in zip(names, values, strict=True) if value == value}}
            )
        records += s.extra
    return records
