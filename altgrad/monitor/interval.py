"""What several steps left on the device goes to the host in one copy and becomes records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.diagnostics.fields import UPDATE_FIELDS
from altgrad.monitor.records import Record, Watched, operand_records, update_records
from altgrad.records.metrics import Metric

OPERAND_COLUMNS = 8  # the fields of QuantStats and the last scale


class Step:
    """What one step left on the device; `extra` are records that were made on the host."""

    def __init__(self, step: int, extra: list[Record], added: tuple[Metric, ...] = ()) -> None:
        self.step, self.extra, self.added = step, extra, added
        self.slots: list[tuple[str, str, str]] = []  # layer, role, format
        self.operands: Tensor | None = None  # float64 [slots, OPERAND_COLUMNS]
        self.watched: list[Watched] = []
        self.vectors: Tensor | None = None  # float64 [parameters, len(UPDATE_FIELDS) + added]
        self.predicted: Tensor | None = None  # float64 [parameters]

    def take_operands(self, entries: list[tuple[tuple[str, str, str], Tensor, Tensor | float]]) -> None:
        """Sum the micro-batches of each operand; entries are (slot, vector of QuantStats, scale)."""
        if not entries:
            return
        index = {slot: i for i, slot in enumerate(dict.fromkeys(entry[0] for entry in entries))}
        rows = torch.stack([entry[1] for entry in entries])
        where = torch.tensor([index[entry[0]] for entry in entries], device=rows.device)
        total = rows.new_zeros(len(index), OPERAND_COLUMNS)
        total[:, :7].index_add_(0, where, rows)
        total[:, 0] = rows.new_zeros(len(index)).scatter_reduce_(0, where, rows[:, 0], "amax", include_self=True)
        last = {entry[0]: entry[2] for entry in entries}
        total[:, 7] = _scales(list(last.values()), rows)
        self.slots, self.operands = list(index), total


def _scales(scales: list[Any], like: Tensor) -> Tensor:
    """Numbers and tensors as one tensor like `like`; NaN for a tensor of several."""
    if all(isinstance(scale, float | int) for scale in scales):
        return torch.tensor(scales, dtype=like.dtype, device=like.device)
    several = torch.tensor(torch.nan)
    single = (torch.as_tensor(scale).reshape(-1) for scale in scales)
    return torch.stack([(one[0] if one.numel() == 1 else several).to(like) for one in single])


def to_records(steps: Sequence[Step]) -> list[Record]:
    """Everything of the interval in one copy to the host, cut up again into each step's records."""
    parts = [t.flatten() for s in steps for t in (s.operands, s.vectors, s.predicted) if t is not None]
    host = torch.cat(parts).cpu().numpy() if parts else None
    records: list[Record] = []
    at = 0
    for s in steps:
        if s.operands is not None and host is not None:
            size = s.operands.numel()
            records += operand_records(s.step, s.slots, host[at : at + size].reshape(-1, OPERAND_COLUMNS))
            at += size
        if s.vectors is not None and host is not None:
            size, n = s.vectors.numel(), len(s.watched)
            raw = host[at : at + size].reshape(n, len(UPDATE_FIELDS) + len(s.added))
            records += update_records(s.step, s.watched, raw, host[at + size : at + size + n], s.added)
            at += size + n
        records += s.extra
    return records
