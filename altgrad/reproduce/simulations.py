"""Claims on dynamics that a quadratic or a stream of numbers already has: what an update rule does in thousands of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from altgrad.optim import ECO, SRAdamW, moments
from altgrad.quantization import E4M3, DelayedScaling, get_format, quantize
from altgrad.reproduce.claim import Claim, Criterion, Facts, Protocol, Values
from altgrad.reproduce.tensors import drawing

_COORDINATES = 4096


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line through (log x, log y)."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# -- without masters ----------------------------------------------------------------------------------------------

_RATES_OF_QUADRATIC = tuple(2.0**-k for k in (3, 4, 5, 6))
_STEP = 4 / 128  # E0M7 under the scale 4


def quadratic_without_masters(facts: Facts, seed: int, quick: bool) -> Values:
    """Loss at rest of (w - c)^2 / 2 under momentum with gradient noise of 0.02, the weights on a grid of steps 1/32.

    Adam's eps is so large that its second moment does nothing: SGD with momentum 0.9 at the rates given.
    """
    found = {}
    for rate in _RATES_OF_QUADRATIC[: 2 if quick else None]:
        generator = drawing(seed, int(1 / rate))
        target = 2 * torch.rand(_COORDINATES, generator=generator) - 1
        start = 7.8 * torch.rand(_COORDINATES, generator=generator) - 3.9
        weight = torch.nn.Parameter(quantize(start, "E0M7", 4.0) if facts["rule"] != "float32" else start)
        big = 1e4
        options = {"lr": rate * big, "betas": (0.9, 0.999), "eps": big, "weight_decay": 0.0}
        if facts["rule"] == "float32":
            optimizer = torch.optim.AdamW([weight], **options)
        else:
            kind = ECO if facts["rule"] == "eco" else SRAdamW
            optimizer = kind([weight], "E0M7", scale=4.0, rounding="nearest_even", **options)
        steps, losses = (40 if quick else round(40 / rate)), []
        for step in range(steps):
            weight.grad = weight.detach() - target + 0.02 * torch.randn(_COORDINATES, generator=generator)
            optimizer.step()
            if step >= steps // 2:
                losses.append(float((weight.detach() - target).square().mean() / 2))
        found[f"loss_{rate:g}"] = sum(losses) / len(losses)
    return found


def _rates_of_loss(arms: Mapping[str, Values]) -> Values:
    rates = [rate for rate in _RATES_OF_QUADRATIC if f"loss_{rate:g}" in arms["nearest"]]
    of = {name: [values[f"loss_{rate:g}"] for rate in rates] for name, values in arms.items()}
    excess = [a - b for a, b in zip(of["eco"], of["float32"], strict=True)]
    return {
        "slope_nearest": slope(rates, of["nearest"]),
        "slope_eco": slope(rates, of["eco"]),
        "excess": excess[-1] / (_STEP**2 / 24),
        "gained": of["nearest"][-1] / of["eco"][-1],
    }


# -- stochastic rounding does not anneal --------------------------------------------------------------------------

_ANNEALED = tuple(2.0**-k for k in (6, 7, 8, 9, 10))


def stochastic_plateau(facts: Facts, seed: int, quick: bool) -> Values:
    """Loss at rest of w^2 / 2 under SGD with gradient noise of 0.05, the weights rounded stochastically to steps of 1/128."""
    found, spread = {}, 0.05
    for number, rate in enumerate(_ANNEALED[: 2 if quick else None]):
        generator = drawing(seed, number)
        w = torch.zeros(_COORDINATES)
        steps, losses, sizes = (40 if quick else round(12 / rate)), [], []
        for step in range(steps):
            g = w + spread * torch.randn(_COORDINATES, generator=generator)
            w = w - rate * g
            if facts["rounding"] != "float32":
                key = (seed * 1000 + number, step)
                w = quantize(w, "E0M7", 1.0, rounding=facts["rounding"], overflow="saturate", key=key)
            if step >= steps // 2:
                losses.append(float(w.square().mean() / 2))
                sizes.append(float(g.abs().mean()))
        found[f"loss_{rate:g}"] = sum(losses) / len(losses)
        found[f"predicted_{rate:g}"] = sum(sizes) / len(sizes) / 128 / 4
    return found


def _annealing(arms: Mapping[str, Values]) -> Values:
    rates = [rate for rate in _ANNEALED if f"loss_{rate:g}" in arms["stochastic"]]
    of = {name: [values[f"loss_{rate:g}"] for rate in rates] for name, values in arms.items()}
    last = arms["stochastic"]
    return {
        "slope_stochastic": slope(rates, of["stochastic"]),
        "slope_float32": slope(rates, of["float32"]),
        "plateau": last[f"loss_{rates[-1]:g}"] / last[f"predicted_{rates[-1]:g}"],
        "loss": last[f"loss_{rates[-1]:g}"],
    }


# -- gradient norm against quantization noise ---------------------------------------------------------------------


def progress_under_noise(facts: Facts, seed: int, quick: bool) -> Values:
    """The ratio of gradient norm to quantization noise at which the best step's progress falls most steeply.

    A quadratic of unit curvature, its gradient g rounded stochastically to E2M1 under a fixed scale. For each size of g the
    best single rate is taken, and progress is the share of the loss that it removes: <g, q>^2 / (<g, g> <q, q>).
    """
    d = 1 << (12 if quick else 17)
    generator = drawing(seed)
    noise, progress = [], []
    for number, size in enumerate(np.geomspace(0.02, 3.0, 60)):
        g = float(size) * torch.randn(d, generator=generator)
        q = quantize(g, "E2M1", 1.0, rounding="stochastic", overflow="saturate", key=(seed, number))
        inner, gg, qq = (float((a.double() * b.double()).sum()) for a, b in ((g, q), (g, g), (q, q)))
        noise.append(float((q.double() - g.double()).norm()) / math.sqrt(gg))
        progress.append(inner**2 / (gg * qq))
    order = np.argsort(noise)
    s, p = np.asarray(noise)[order], np.asarray(progress)[order]
    inside = (s > 0.25) & (s < 1.4)
    fall = np.polyder(np.poly1d(np.polyfit(s[inside], p[inside], 5)))
    at = np.linspace(s[inside].min(), s[inside].max(), 2001)
    return {"knee": 1 / float(at[np.argmin(fall(at))]), "progress": float(np.interp(1 / math.sqrt(3), s, p))}


# -- moments that stall -------------------------------------------------------------------------------------------

_PERIODS = (25, 50, 100, 200, 300, 500, 1000, 2000)


def _kept(state: dict, fmt: str, value: Tensor) -> Tensor:
    """The moment as it is read back after it was stored."""
    form = get_format(fmt)
    moments.create(state, "v", value, form)  # type: ignore[arg-type]
    moments.write(state, "v", value, form, "nearest_even", None)  # type: ignore[arg-type]
    return moments.read(state, "v", value, form).clone()  # type: ignore[arg-type]


def stalled_decay(quick: bool) -> Values:
    """How often the threshold of decay errs: v <- round(beta v) moves for no v below it and for v = 1 above it."""
    wrong = 0.0
    for bits in (7, 5, 3, 2):
        fmt, limit = f"E8M{bits}_IEEE", 2.0 ** -(bits + 2)
        values = 1 + torch.arange(2**bits) / 2**bits
        below, above = (_kept({}, fmt, values * (1 - limit * factor)) for factor in (0.98, 1.02))
        wrong += float((below != values).sum()) + float(above[0] == 1)
    return {"wrong": wrong}


def second_moment(facts: Facts, seed: int, quick: bool) -> Values:
    """An average of squares of normal gradients (beta2 = 0.999) whose value is stored in a format after each step."""
    if facts["format"] == "threshold":
        return stalled_decay(quick)
    fmt, beta, n = facts["format"], 0.999, 64 if quick else 2048
    found: dict[str, float] = {}
    generator = drawing(seed)
    steps = 100 if quick else 5000
    for period in (0, *_PERIODS):
        if period > steps:
            continue
        state: dict = {}
        v, age, errors, total = torch.zeros(n), 0, 0.0, 2 * period if period else steps
        for step in range(total):
            if period and step % period == 0:
                v, age = torch.zeros(n), 0
            g = torch.randn(n, generator=generator)
            age += 1
            v = _kept(state, fmt, beta * v + (1 - beta) * g * g)
            errors += float((v / (1 - beta**age) - 1).abs().mean())
        if not period:
            found["bias"] = float(v.mean() / (1 - beta**steps))
        found[f"error_{period}"] = errors / total
    return found


def _resets(arms: Mapping[str, Values]) -> Values:
    best, helps = {}, {}
    for name in ("BF16", "E4M3", "E2M1"):
        errors = {period: arms[name][f"error_{period}"] for period in _PERIODS if f"error_{period}" in arms[name]}
        best[name] = min(errors, key=errors.__getitem__)
        helps[f"helps_{name}"] = errors[best[name]] / arms[name]["error_0"]
    return {
        "wrong": arms["threshold"]["wrong"],
        "bias": arms["BF16"]["bias"],
        "bf16_over_fp8": math.log2(best["BF16"] / best["E4M3"]),
        "fp8_over_fp4": math.log2(best["E4M3"] / best["E2M1"]),
        **helps,
        **{f"best_{name}": float(period) for name, period in best.items()},
    }


# -- delayed scaling ----------------------------------------------------------------------------------------------


def delayed_saturation(facts: Facts, seed: int, quick: bool) -> Values:
    """Share of steps whose tensor exceeds the format's max under delayed scaling; independent normal tensors."""
    policy, steps = DelayedScaling(history=facts["history"]), 300 if quick else 10_000
    largest = torch.randn(steps, 256, generator=drawing(seed)).abs().amax(dim=1)
    state, beyond, seen = policy.init(), 0, 0
    for number, amax in enumerate(largest):
        scale, state = policy.update(amax, state, E4M3)
        if number >= facts["history"]:
            seen += 1
            beyond += bool(amax / scale > E4M3.max * (1 + 1e-6))
    return {"saturated": beyond / seen}


SIMULATIONS: tuple[Claim, ...] = (
    Claim(
        "quadratic_without_masters",
        "5a",
        "2601.22101",
        "Without master weights and under nearest rounding the error grows as the rate falls; feeding the rounding error into "
        "the momentum (ECO) takes that away.",
        (
            Criterion("slope_nearest", "slope of log loss over log rate, nearest rounding (-2 expected)", -2.3, -1.5),
            Criterion("slope_eco", "the same with ECO: not falling", low=-0.25),
            Criterion("excess", "ECO's loss above float32's at rate 1/64, in units of step^2 / 24", 0.5, 2.5),
            Criterion("gained", "nearest's loss over ECO's at rate 1/64"),
        ),
        0.5,
        Protocol(
            "4096 quadratics of unit curvature with targets drawn from [-1, 1], starts from [-3.9, 3.9], momentum 0.9, gradient "
            "noise 0.02, weights on a grid of 1/32; rates 1/8 to 1/64; mean loss of the last half of 40 / rate steps.",
            quadratic_without_masters,
            {rule: {"rule": rule} for rule in ("nearest", "eco", "float32")},
            _rates_of_loss,
        ),
        watch="step^2 / 24 is the loss of a weight that rests at the grid value nearest to its target; one that moves between "
        "both neighbours so that its mean is right has twice that.",
    ),
    Claim(
        "stochastic_does_not_anneal",
        "6",
        "NIPS 2017, Training Quantized Nets",
        "Stochastic rounding does not anneal: below some rate a lower one only slows learning down; the loss stays at grid step "
        "x mean |g| / 4.",
        (
            Criterion("slope_stochastic", "slope of log loss over log rate, 1/64 to 1/1024", -0.1, 0.1),
            Criterion("slope_float32", "the same in float32, which anneals", 0.9, 1.1),
            Criterion("plateau", "loss at rate 1/1024 over step x E|g| / 4", 0.9, 1.1),
            Criterion("loss", "that loss"),
        ),
        0.5,
        Protocol(
            "4096 quadratics of unit curvature under SGD, gradient noise 0.05, weights rounded stochastically to steps of "
            "1/128; mean loss of the last half of 12 / rate steps.",
            stochastic_plateau,
            {rounding: {"rounding": rounding} for rounding in ("stochastic", "float32")},
            _annealing,
        ),
    ),
    Claim(
        "noise_knee",
        "11a",
        "2505.19115",
        "Training in FP4 stalls where the gradient's norm falls below sqrt(3) times the quantization noise.",
        (
            Criterion("knee", "gradient norm over noise where progress falls most steeply", 1.4, 2.2),
            Criterion("progress", "progress there, as a share of that without noise"),
        ),
        0.2,
        Protocol(
            "A quadratic of unit curvature and 131,072 coordinates; gradients of 60 sizes rounded stochastically to E2M1 under a "
            "fixed scale; the best single rate for each; the steepest point of a polynomial of degree 5 through progress over "
            "relative noise.",
            progress_under_noise,
        ),
        watch="The quadratic half: sqrt(3) is the inflection of 1 / (1 + s^2). On a model a knee is claimed, not the constant.",
    ),
    Claim(
        "moments_stall",
        "16",
        "2603.16731",
        "Moments kept in few bits stall, and resets help: after about 1,000, 300 and 200 steps in BF16, FP8 and FP4.",
        (
            Criterion("wrong", "errors of the threshold: v <- beta v moves no v if 1 - beta < 2^-(M+2)", 0.0, 0.0),
            Criterion("bias", "BF16 second moment over the truth after 5,000 steps", 1.7, 1.96),
            Criterion("bf16_over_fp8", "best reset period, BF16 over E4M3, in octaves", low=0.25),
            Criterion("fp8_over_fp4", "best reset period, E4M3 over E2M1, in octaves", low=0.25),
            Criterion("helps_BF16", "mean error at the best period over that without resets, BF16", high=1.0),
            Criterion("helps_E4M3", "the same, E4M3", high=1.0),
            Criterion("helps_E2M1", "the same, E2M1", high=1.0),
            Criterion("best_BF16", "best period in steps, BF16"),
            Criterion("best_E4M3", "best period in steps, E4M3"),
            Criterion("best_E2M1", "best period in steps, E2M1"),
        ),
        2,
        Protocol(
            "2,048 second moments of normal gradients, beta2 = 0.999, stored after every step to nearest (E4M3 and E2M1 under an "
            "amax scale) and set to zero, with Adam's correction, every 25 to 2,000 steps or never; the mean of |v / truth - 1| "
            "over two periods.",
            second_moment,
            {name: {"format": name} for name in ("threshold", "BF16", "E4M3", "E2M1")},
            _resets,
            seeds=5,
        ),
        watch="The order of the periods is tried. The figures are those of a LLaMA.",
    ),
    Claim(
        "delayed_scaling_saturates",
        "18",
        "exact",
        "Delayed scaling without a margin saturates in 1 of H + 1 steps when a tensor's largest values are independent.",
        (
            Criterion("H=16", "share of steps with saturation, H = 16 (1/17 = 0.0588)", 0.0553, 0.0623),
            Criterion("H=4", "the same for H = 4 (1/5)", 0.188, 0.212),
            Criterion("H=1", "the same for H = 1 (1/2)", 0.47, 0.53),
        ),
        0.3,
        Protocol(
            "10,000 independent normal tensors of 256 numbers under `DelayedScaling` with histories of 1, 4 and 16.",
            delayed_saturation,
            {f"H={history}": {"history": history} for history in (1, 4, 16)},
            lambda arms: {name: values["saturated"] for name, values in arms.items()},
            seeds=10,
        ),
        watch="A model's largest values are not independent from step to step.",
    ),
)
