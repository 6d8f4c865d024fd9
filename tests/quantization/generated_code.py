"""What torch's compiler writes for a GPU where it rounds in pointwise operations, run in Triton's interpreter.

Part of `interpreter_checks`.
"""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._inductor.runtime import triton_heuristics

from altgrad.quantization import Cast, pointwise, tensor_cores
from altgrad.quantization.kernels.cuda.bits import signed_as
from benchmarks import cuda_fusion
from tests.quantization.oracles import same


def generated(function, out: torch.dtype, *like: torch.Tensor):
    """The first kernel that torch's compiler writes for a function of such CUDA tensors, as a function of them."""
    code = cuda_fusion.lowered(function, *((tuple(t.shape), t.dtype) for t in like))
    name, source = next(iter(cuda_fusion.sources(code).items()))
    with mock.patch.object(triton_heuristics, "pointwise", return_value=lambda kernel: kernel):
        module = cuda_fusion.loaded(name, source)
    module.libdevice = SimpleNamespace(copysign=signed_as)  # machine code, which the interpreter has not
    kernel = getattr(module, name)

    def run(*given: torch.Tensor) -> torch.Tensor:
        made, inputs = torch.empty(given[0].shape, dtype=out), iter(given)
        pointers = [next(inputs) if arg.startswith("in_ptr") else made for arg in kernel.arg_names if "ptr" in arg]
        kernel[(triton.cdiv(made.numel(), 1024),)](*pointers, made.numel(), XBLOCK=1024)
        return made

    return run


def ties(fmt, scale: torch.Tensor) -> torch.Tensor:
    """1023 float32 numbers at and right beside scale times what lies halfway between two neighbours of a format."""
    odd = torch.arange(1, 2 ** (fmt.mantissa_bits + 1), 2) + 2 ** (fmt.mantissa_bits + 1)
    halves = (
        odd * torch.exp2(torch.arange(min(fmt.emin, fmt.emax), fmt.emax + 1) - fmt.mantissa_bits - 1.0)[:, None]
    ).flatten()
    at = halves[torch.arange(341) * len(halves) // 341] * scale
    return torch.cat([at, at.nextafter(at * 2), at.nextafter(at * 0)])


def check_generated(x: torch.Tensor) -> list[str]:
    """Rounding in pointwise operations, as torch's compiler writes it for a GPU, against the kernels."""
    bad = []
    for name in ("E4M3", "E0M7", "E7M0", "E2M1", "E7M10"):
        cast = Cast(name, overflow="saturate_finite")
        facts = pointwise.facts_of(cast.format, cast.grid, cast.rounding, cast.overflow)
        assert facts is not None
        assert facts.short == (name != "E7M10")
        nearest = generated(partial(pointwise.nearest, facts=facts), x.dtype, x, torch.ones(()))
        for given in (1.0, 0.3, 1.9999999, 1e-40, 1.5 * 2.0**-126, 3e38):
            scale = torch.tensor(given)
            x[3, :1023] = ties(cast.format, scale)
            if not same(nearest(x, scale), cast(x, scale, kernel="eager").values):
                bad.append(f"generated {name} scale {given}")
        for values in (x, x.bfloat16()) if name == "E4M3" else ():
            powers, scale = (-117, 119), torch.tensor(0.3)
            operand = generated(lambda x, s: pointwise.payload(x, s, facts, powers)[0], torch.bfloat16, values, scale)  # noqa: B023
            if not same(operand(values, scale), tensor_cores.payload(values, cast, scale, powers)[0]):
                bad.append(f"generated payload {values.dtype}")
    return bad
