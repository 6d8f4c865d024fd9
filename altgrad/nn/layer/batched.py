"""Products of many matrices at once, each pair quantized by itself: batches, the groups of a mixture of experts, einsums.

Each matrix is quantized as that of a linear layer is, so each expert has scales of its own (delayed scaling keeps one
history for all). An expert without tokens multiplies nothing, and its weight's gradient is zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.nn.layer.linear import linear_forward
from altgrad.nn.layer.state import LayerState

_TWO = re.compile(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]*)")


def batched_forward(state: LayerState, x: Tensor, w: Tensor, training: bool) -> Tensor:
    """x [..., m, k] @ w^T for w [..., n, k], with broadcasting batch axes: [..., m, n]."""
    batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    count = math.prod(batch)
    xs = x.expand(*batch, *x.shape[-2:]).reshape(count, *x.shape[-2:]).unbind()
    ws = w.expand(*batch, *w.shape[-2:]).reshape(count, *w.shape[-2:]).unbind()
    products = [linear_forward(state, a, b, None, training) for a, b in zip(xs, ws, strict=True)]
    shape = (*batch, x.shape[-2], w.shape[-2])
    return torch.stack(products).reshape(shape) if products else x.new_zeros(shape)


def grouped_forward(state: LayerState, x: Tensor, w: Tensor, offsets: Tensor, training: bool) -> Tensor:
    """Rows of x [s, k] in groups that end at `offsets` [e], each times its own w[i]^T for w [e, n, k]: [s, n].

    Rows behind the last offset belong to no group and are zero. Waits for the device, which knows the offsets.

    Raises:
        OptionError: as many offsets as weights are wanted, ascending, within the rows of x.
    """
    if x.is_meta:
        return x.new_empty(len(x), w.shape[-2])
    ends = offsets.tolist()
    begins = [0, *ends[:-1]]
    if len(ends) != len(w) or any(b > e for b, e in zip(begins, ends, strict=True)) or (ends and ends[-1] > len(x)):
        raise OptionError(
            f"offsets {ends} for {len(w)} weights and {len(x)} rows; give the end of each weight's rows, ascending"
        )
    groups = zip(begins, ends, w.unbind(), strict=True)
    products = [linear_forward(state, x[begin:end], one, None, training) for begin, end, one in groups if end > begin]
    rest = len(x) - (ends[-1] if ends else 0)
    return torch.cat([*products, x.new_zeros(rest, w.shape[-2], dtype=products[0].dtype if products else x.dtype)])


@lru_cache(maxsize=256)
def as_batched(equation: str, a: torch.Size, b: torch.Size) -> Callable | None:
    """What computes the equation by `matmul(a, b)` of matrices or batches of them: called with a, b and `matmul`.

    None where it is none: an ellipsis, no "->", an index twice in one operand or in the result, an index of one operand
    that the result has not, or nothing to multiply over.
    """
    found = _TWO.fullmatch(equation.replace(" ", ""))
    if found is None:
        return None
    left, right, out = found.groups()
    if any(len(set(part)) != len(part) for part in (left, right, out)) or len(left) != len(a) or len(right) != len(b):
        return None
    batch = [i for i in left if i in right and i in out]
    reduced = [i for i in left if i in right and i not in out]
    rows = [i for i in left if i not in right]
    columns = [i for i in right if i not in left]
    if not reduced or set(rows + columns) - set(out) or set(out) - set(left + right):
        return None
    sizes = {**dict(zip(right, b, strict=True)), **dict(zip(left, a, strict=True))}

    def lengths(indices: list[str]) -> list[int]:
        return [sizes[i] for i in indices]

    def arranged(x: Tensor, now: str, wanted: list[str], first: list[str], last: list[str]) -> Tensor:
        x = x if list(now) == wanted else x.permute([now.index(i) for i in wanted])
        shape = [*lengths(batch), math.prod(lengths(first)), math.prod(lengths(last))]
        return x if list(x.shape) == shape else x.reshape(shape)

    def run(x: Tensor, y: Tensor, matmul: Callable):
        x = arranged(x, left, batch + rows + reduced, rows, reduced)
        y = arranged(y, right, batch + reduced + columns, reduced, columns)
        product = matmul(x, y)
        if product is NotImplemented:
            return product
        product = product.reshape(lengths(batch + rows + columns))
        return product.permute([(batch + rows + columns).index(i) for i in out])

    return run
