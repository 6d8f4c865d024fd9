"""The casts as torch operators, so that torch.compile traces each call as one node: one to cast, one to decode.

An operator takes the text of its cast, so formats of one's own trace like those of the catalog; a key is a tensor, so that
a new one does not recompile. Both end in the call that runs outside of tracing. `Cast` calls them by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.errors import CodeError
from altgrad.quantization.cast import Cast, outputs_of
from altgrad.quantization.codec import code_dtype, stored_scale_dtype
from altgrad.quantization.memory import readable
from altgrad.quantization.quantized import Want
from altgrad.quantization.stats import FIELDS


def _like(x: Tensor, result: Tensor) -> Tensor:
    """`result` in the memory layout that the operator promises: that of `torch.empty_like(x)`."""
    promised = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == promised.stride() else promised.copy_(result)


@torch.library.custom_op(
    "altgrad::cast",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor? key, str spec, int want, str? kernel) -> Tensor[]",
)
def cast(x: Tensor, scale: Tensor | None, key: Tensor | None, spec: str, want: int, kernel: str | None) -> list[Tensor]:
    """The outputs that `outputs_of` lists; `scale` None is for block formats that find their scales themselves."""
    plain = readable(x).as_subclass(Tensor)  # so that the gate reads scale and key
    found = Cast.parse(spec).run(plain, scale, key, None, Want(want), kernel)
    parts = [_like(x, part) for part in found[:2] if part is not None]
    parts += [found.scales] if found.scales is not None else []
    parts += [found.stats.vector] if found.stats is not None else []
    parts += [found.tensor_scale.clone()] if found.tensor_scale is not None else []
    return parts


@cast.register_fake
def _(x, scale, key, spec, want, kernel):
    made = Cast.parse(spec)
    made.check(x.dtype, x.device, Want(want), kernel)
    values, codes, scales, stats, tensor_scale = outputs_of(made, Want(want))
    parts = []
    if values:
        parts.append(torch.empty_like(x))
    if codes:
        parts.append(torch.empty_like(x, dtype=code_dtype(made.grid)))
    if scales:
        parts.append(x.new_empty(made.layout(x.shape).scale_shape, dtype=stored_scale_dtype(made.format)))
    if stats:
        parts.append(x.new_empty(len(FIELDS), dtype=torch.float64))
    if tensor_scale:
        parts.append(x.new_empty((), dtype=torch.float32))
    return parts


@cast.register_vmap
def _(info, in_dims, x, scale, key, spec, want, kernel):
    made = Cast.parse(spec)
    x_dim, scale_dim = in_dims[:2]
    if want & Want.STATS or made.is_block or key is not None:
        rows = [
            torch.ops.altgrad.cast(*(_row(t, d, i) for t, d in zip((x, scale, key), in_dims[:3])), spec, want, kernel)
            for i in range(info.batch_size)
        ]
        stacked = [torch.stack(parts) for parts in zip(*rows)]
        return stacked, [0] * len(stacked)
    x, scale = _batched(info, x, x_dim), _under(scale, scale_dim, x.ndim + (x_dim is None))
    found = torch.ops.altgrad.cast(x, scale, None, spec, want, kernel)
    return found, [0] * len(found)


def _row(tensor: Tensor | None, dim: int | None, index: int) -> Tensor | None:
    return tensor if tensor is None or dim is None else tensor.select(dim, index)


def _batched(info, x: Tensor, dim: int | None) -> Tensor:
    """x with the batch in front."""
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def _under(scale: Tensor, dim: int | None, axes: int) -> Tensor:
    """A scale that broadcasts to a tensor of so many axes, the batch in front."""
    if dim is None:
        return scale
    scale = scale.movedim(dim, 0)
    return scale.reshape(len(scale), *[1] * (axes - scale.ndim), *scale.shape[1:])


@torch.library.custom_op(
    "altgrad::decode",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor? upper, str spec, ScalarType dtype, str? kernel) -> Tensor",
)
def decode(
    codes: Tensor, scale: Tensor, upper: Tensor | None, spec: str, dtype: torch.dtype, kernel: str | None
) -> Tensor:
    """scale * value(code) in `dtype`; for block formats `scale` has the stored scales, `upper` the tensor scale."""
    codes = readable(codes, "codes", CodeError).as_subclass(Tensor)
    return _like(codes, Cast.parse(spec).run_decode(codes, scale, upper, dtype, None, kernel))


@decode.register_fake
def _(codes, scale, upper, spec, dtype, kernel):
    made = Cast.parse(spec)
    made.check(dtype, codes.device, Want(0), kernel)
    if made.is_block:
        made.check_stored_scales(codes.shape, scale.shape)
    return torch.empty_like(codes, dtype=dtype)


@decode.register_vmap
def _(info, in_dims, codes, scale, upper, spec, dtype, kernel):
    if Cast.parse(spec).is_block:
        given = list(zip((codes, scale, upper), in_dims[:3]))
        rows = [
            torch.ops.altgrad.decode(*(_row(t, d, i) for t, d in given), spec, dtype, kernel)
            for i in range(info.batch_size)
        ]
        return torch.stack(rows), 0
    axes = codes.ndim + (in_dims[0] is None)
    codes, scale = _batched(info, codes, in_dims[0]), _under(scale, in_dims[1], axes)
    return torch.ops.altgrad.decode(codes, scale, None, spec, dtype, kernel), 0
