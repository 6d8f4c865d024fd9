"""Claims that single tensors decide: what a cast does to drawn values, or to the operands of a small trained GPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.quantization import block_format, quantize
from altgrad.quantization.hadamard import Hadamard
from altgrad.report.numbers import plural
from altgrad.reproduce.claim import Claim, Criterion, Facts, Protocol, Values
from altgrad.reproduce.small_gpt import operands


def drawing(seed: int, *words: int) -> torch.Generator:
    """A generator for drawn tensors, one for each seed and further numbers."""
    generator = torch.Generator()
    for word in (seed, *words):
        generator.manual_seed((generator.initial_seed() * 1_000_003 + word) % 2**63)
    return generator


def sqnr_db(x: Tensor, q: Tensor) -> float:
    """10 log10(sum x^2 / sum (x - q)^2)."""
    return float(10 * torch.log10(x.double().square().sum() / (x.double() - q.double()).square().sum()))


# -- few random bits ----------------------------------------------------------------------------------------------

_BITS = (1, 2, 4, 8, 24)


def rounding_bias(facts: Facts, seed: int, quick: bool) -> Values:
    """Mean error in ULP of stochastic rounding with so many random bits, on numbers spread evenly between grid values."""
    x = 1 + torch.rand(1 << (14 if quick else 20), generator=drawing(seed))
    key = (seed, facts["bits"])
    q = quantize(x, "E4M3", 1.0, rounding="stochastic", random_bits=facts["bits"], key=key)
    return {"bias": ((q.double() - x.double()) * 8).mean().item()}  # a step of E4M3 in [1, 2) is 1/8


def _bias_by_bits(arms: Mapping[str, Values]) -> Values:
    return {f"bias_{bits}": arms[plural(bits, "bit")]["bias"] for bits in _BITS}


# -- E2M1 against E1M2 --------------------------------------------------------------------------------------------


def _drawn(kind: str, seed: int, quick: bool) -> list[Tensor]:
    if kind == "operands of a GPT":
        return [x for x in operands(seed, 20 if quick else 150) if x.shape[-1] % 16 == 0]
    size, generator = (64 if quick else 1024, 256), drawing(seed)
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    if kind == "Laplace":
        return [-torch.log1p(-torch.rand(size, generator=generator)) * signs]
    normal = torch.randn(size, generator=generator)
    chi = torch.randn(3, *size, generator=generator).square().mean(dim=0)
    return [normal] if kind == "normal" else [normal / chi.sqrt()]


def four_bit_order(facts: Facts, seed: int, quick: bool) -> Values:
    """Mean SQNR of E2M1 and E1M2 in blocks of 16 under float32 scales, before and after a random Hadamard transform."""
    found: dict[str, list[float]] = {}
    mix = Hadamard(16, signs="random")  # type: ignore[arg-type]
    signs = mix.draw(torch.tensor([seed, 7]), torch.device("cpu"))
    for x in _drawn(facts["tensors"], seed, quick):
        for state, values in (("plain", x), ("mixed", mix(x, signs))):
            for element in ("E2M1", "E1M2"):
                q = quantize(values, block_format(element, 16, "FP32").name)
                found.setdefault(f"{element}_{state}", []).append(sqnr_db(values, q))
                shrinks = float((q.double() * values).sum() / values.double().square().sum())
                found.setdefault(f"{element}_{state}_kept", []).append(shrinks)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _orders(arms: Mapping[str, Values]) -> Values:
    found: dict[str, float] = {}
    for name, values in arms.items():
        for state in ("plain", "mixed"):
            found[f"{state}, {name}"] = values[f"E1M2_{state}"] - values[f"E2M1_{state}"]
        found[f"kept, {name}"] = values["E2M1_plain_kept"]
    return found


# -- norm weights in MX -------------------------------------------------------------------------------------------


def clamped_norm_weights(facts: Facts, seed: int, quick: bool) -> Values:
    """Share of 32-element blocks of weights, all within `interval`, of which one value is left."""
    low, high = facts["interval"]
    blocks = low + (high - low) * torch.rand(64 if quick else 4096, 32, generator=drawing(seed)).clamp(1e-4, 1 - 1e-4)
    fmt = facts["format"]
    q = quantize(blocks, fmt)
    one = (q == q[:, :1]).all(dim=1)
    return {
        "one_value": one.double().mean().item(),
        "value": q[one].double().mean().item() if bool(one.any()) else -1.0,
    }


# -- attention with tied maxima -----------------------------------------------------------------------------------


def attention_bias(facts: Facts, seed: int, quick: bool) -> Values:
    """Mean rounding error of a row of P V in bf16, in ULP away from zero, against the exact sum of the same factors.

    Rows of 64 scores: a maximum m, a second one that is equal or lower, all others 10 to 14 below; values V negative, of
    one binade, in bf16; P = exp(S - m) in bf16, or exp(S - beta m) where the maximum is shifted.
    """
    rows, keys, wide = 256 if quick else 8192, 64, 16
    generator = drawing(seed)
    top = 1 + torch.rand(rows, 1, generator=generator)
    scores = top - 10 - 4 * torch.rand(rows, keys, generator=generator)
    lower = 0.0 if facts["tied"] else 0.05 + torch.rand(rows, 1, generator=generator)
    scores[:, :1], scores[:, 1:2] = top, top - lower
    p = torch.exp(scores - facts["beta"] * top).bfloat16().double()
    v = -(1 + torch.rand(rows, keys, wide, generator=generator)).bfloat16().double()
    exact = (p[:, :, None] * v).sum(dim=1)
    rounded = exact.float().bfloat16().double()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    return {
        "bias": ((rounded - exact) * exact.sign() / ulp).mean().item(),
        "ones": (p == 1).sum(1).double().mean().item(),
    }


def _attention(arms: Mapping[str, Values]) -> Values:
    return {name: values["bias"] for name, values in arms.items()}


_ARMS_OF_FOUR_BITS: Mapping[str, Any] = {
    kind: {"tensors": kind} for kind in ("operands of a GPT", "Laplace", "Student's t (3)", "normal")
}

TENSORS: tuple[Claim, ...] = (
    Claim(
        "mx_norm_clamp",
        "9a",
        "2506.20752",
        "A block of LayerNorm weights that all lie between 0.875 and 1 becomes 0.875 in MX with E4M3 elements: the floor "
        "rule's scale leaves no room above 448.",
        (
            Criterion("MXFP8 one_value", "share of such blocks of which one value is left", 1.0, 1.0),
            Criterion("MXFP8 value", "that value", 0.875, 0.875),
            Criterion("BF16 one_value", "the same share for weights in BF16", 0.0, 0.0),
            Criterion("ceil one_value", "the same share under scales rounded up"),
        ),
        0.1,
        Protocol(
            "4096 blocks of 32 weights, drawn evenly between 0.875 and 1, cast to MXFP8 (floor rule), to the same with scales "
            "rounded up, and to BF16.",
            clamped_norm_weights,
            {
                "MXFP8": {"format": "MXFP8", "interval": [0.875, 1.0]},
                "ceil": {"format": "MXFP8:ceil", "interval": [0.875, 1.0]},
                "BF16": {"format": "BF16", "interval": [0.875, 1.0]},
            },
            lambda arms: {f"{arm} {name}": value for arm, values in arms.items() for name, value in values.items()},
        ),
        watch="The mechanism alone; whether it makes training diverge is row 9b.",
    ),
    Claim(
        "hadamard_flips_four_bits",
        "10",
        "2606.20381",
        "E2M1 is better than E1M2 on a model's tensors and shrinks them; after a random Hadamard transform E1M2 is better "
        "(21.90 and 19.94 dB become 20.00 and 23.19).",
        (
            Criterion("plain, operands of a GPT", "E1M2 minus E2M1, dB, before the transform", high=0.0),
            Criterion("mixed, operands of a GPT", "E1M2 minus E2M1, dB, after it", low=0.0),
            Criterion("kept, operands of a GPT", "<q, x> / <x, x> of E2M1: below 1 it shrinks", high=1.0),
            Criterion("plain, Laplace", "E1M2 minus E2M1, dB, Laplace numbers"),
            Criterion("mixed, Laplace", "the same after the transform"),
            Criterion("plain, Student's t (3)", "E1M2 minus E2M1, dB, Student's t with 3 degrees"),
            Criterion("mixed, Student's t (3)", "the same after the transform"),
            Criterion("plain, normal", "E1M2 minus E2M1, dB, normal numbers"),
        ),
        1,
        Protocol(
            "Inputs, weights and output gradients of every linear layer of a GPT of 0.13M parameters after 150 float32 steps, "
            "in blocks of 16 along their last axis under float32 scales; the transform mixes the same 16. Drawn tensors "
            "beside them.",
            four_bit_order,
            _ARMS_OF_FOUR_BITS,
            _orders,
        ),
        secondary=True,
        watch="The order is tried, not the decibels, which are another model's.",
    ),
    Claim(
        "few_random_bits",
        "19",
        "2504.20634",
        "Stochastic rounding with few random bits is biased towards zero: with 2 bits by 0.124 ULP.",
        (
            Criterion("bias_2", "mean error in ULP with 2 random bits", -0.130, -0.119),
            Criterion("bias_4", "with 4 bits (half of a sixteenth expected)", -0.0328, -0.0297),
            Criterion("bias_24", "with 24 bits, the default here", -0.002, 0.002),
            Criterion("bias_1", "with 1 bit"),
            Criterion("bias_8", "with 8 bits"),
        ),
        0.1,
        Protocol(
            "A million numbers drawn evenly from [1, 2), rounded stochastically to E4M3 with 1, 2, 4, 8 and 24 random bits.",
            rounding_bias,
            {plural(bits, "bit"): {"bits": bits} for bits in _BITS},
            _bias_by_bits,
            before={"1 bit": "1 bits"},
        ),
        secondary=True,
    ),
    Claim(
        "attention_ties",
        "20",
        "2510.04212",
        "In bf16 attention tied row maxima make weights of exactly 1; with values of one sign the rounding of P V is then "
        "biased, and an equivalent shift of the maximum removes the bias.",
        (
            Criterion("tied", "mean error away from zero in ULP, two tied maxima", low=0.1),
            Criterion("lower", "the same row with its second maximum 0.05 to 1.05 lower", -0.02, 0.02),
            Criterion("shifted", "tied, with exp(S - 2 m) in place of exp(S - m)", -0.02, 0.02),
        ),
        0.2,
        Protocol(
            "8192 rows of 64 scores with 16 value columns; the exact sum of the bf16 factors is rounded once to bf16.",
            attention_bias,
            {
                "tied": {"tied": True, "beta": 1.0},
                "lower": {"tied": False, "beta": 1.0},
                "shifted": {"tied": True, "beta": 2.0},
            },
            _attention,
        ),
        watch="The rounding alone, in rows whose other weights are negligible. That it blows training up takes a day of an A100.",
    ),
)
