"""The scalar kernels as torch operators, so that torch.compile traces each call as one node.

Each operator takes (x, scale, key or None, format spec, rounding, overflow, random_bits, clamp, kernel): what `ops` has
checked. A key is a tensor, so that a new key does not recompile. Outside of tracing the kernels are called directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import format_from_spec
from altgrad.quantization.checks import check_problems
from altgrad.quantization.codec import code_dtype
from altgrad.quantization.kernels import choose as dispatch
from altgrad.quantization.quantized import Outputs
from altgrad.quantization.stats import FIELDS

_ARGUMENTS = (
    "Tensor x, Tensor scale, Tensor? key, str spec, str rounding, str overflow, int random_bits, bool clamp, str kernel"
)


def _like(x: Tensor, result: Tensor) -> Tensor:
    """`result` in the memory layout that the operator promises: that of `torch.empty_like(x)`."""
    promised = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _define(name: str, **wanted: bool):
    """Register one operator that returns the wanted outputs, in the order values, codes, statistics."""
    results = sum(wanted.values())
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"

    def run(x, scale, key, spec, rounding, overflow, random_bits, clamp, kernel):
        words = None if key is None else tuple(key.tolist())
        outputs: Outputs = dispatch.load(kernel).process(
            x,
            format_from_spec(spec),
            scale,
            rounding=Rounding(rounding),
            overflow=Overflow(overflow),
            key=words,
            random_bits=random_bits,
            clamp=clamp,
            **wanted,
        )
        kept = [_like(x, part) for part in outputs[:2] if part is not None]
        kept += [outputs.stats] if outputs.stats is not None else []
        if not wanted["values"]:
            check_problems(outputs.problems, format_from_spec(spec))
        return kept[0] if results == 1 else tuple(kept)

    def fake(x, scale, key, spec, rounding, overflow, random_bits, clamp, kernel):
        parts = []
        if wanted.get("values"):
            parts.append(torch.empty_like(x))
        if wanted.get("codes"):
            parts.append(torch.empty_like(x, dtype=code_dtype(format_from_spec(spec))))
        if wanted.get("stats"):
            parts.append(x.new_empty(len(FIELDS), dtype=torch.float64))
        return parts[0] if results == 1 else tuple(parts)

    operator = torch.library.custom_op(f"altgrad::{name}", run, mutates_args=(), schema=f"({_ARGUMENTS}) -> {returns}")
    operator.register_fake(fake)
    return operator


BY_OUTPUTS = {
    (True, False, False): _define("quantize", values=True, codes=False),
    (False, True, False): _define("encode", values=False, codes=True),
    (True, True, False): _define("quantize_and_encode", values=True, codes=True),
    (True, False, True): _define("quantize_with_stats", values=True, codes=False, stats=True),
    (False, True, True): _define("encode_with_stats", values=False, codes=True, stats=True),
    (True, True, True): _define("quantize_and_encode_with_stats", values=True, codes=True, stats=True),
}


@torch.library.custom_op("altgrad::decode", mutates_args=())
def decode(codes: Tensor, scale: Tensor, spec: str, dtype: torch.dtype, kernel: str) -> Tensor:
    """scale * value(code) in `dtype`."""
    return _like(codes, dispatch.load(kernel).decode(codes, format_from_spec(spec), scale, dtype, None))


@decode.register_fake
def _(codes, scale, spec, dtype, kernel):
    return torch.empty_like(codes, dtype=dtype)
