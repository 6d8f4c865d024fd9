"""Questions of our own, asked like others' claims: criteria first; three with rates tuned on a seed that does not
count, arms of two of them again at one rate, and three on what the first study of custom formats left open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.quantization import E4M3, amax_scale, get_format, grid_spacing, quantize
from altgrad.reproduce.claim import Claim, Criterion, Facts, Protocol, Values
from altgrad.reproduce.small_gpt import step, trained, trainer_of, validation_loss
from altgrad.reproduce.tensors import drawing
from altgrad.reproduce.training import differences, final_loss, losses, stored
from altgrad.training.trainer import Trainer

Arms = Mapping[str, Values]


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 2}


# -- is stall harmful ---------------------------------------------------------------------------------------------


class _Rounding:
    """Rounds a float32 model's matrices to a format after each step, all but the coordinates that are free of it."""

    def __init__(self, trainer: Trainer, fmt: str, refreshed: bool) -> None:
        self.trainer, self.form, self.refreshed = trainer, get_format(fmt), refreshed
        self.free: dict[str, Tensor] = {}
        self.matrices = _matrices(trainer.model)
        self.stalls = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.rescale()
        self.round()

    def rescale(self) -> None:
        """Power-of-two scales of the present largest weights."""
        self.scales = {
            name: 1.0 if self.form.emax >= 127 else amax_scale(p.detach(), self.form, power_of_two=True)
            for name, p in self.matrices.items()
        }

    @torch.no_grad()
    def round(self) -> None:
        """Put every weight that is not free on its grid, to nearest."""
        for name, p in self.matrices.items():
            low = quantize(p, self.form, self.scales[name], overflow="saturate")
            p.copy_(torch.where(self.free[name], p, low) if name in self.free else low)

    def step(self) -> None:
        """A training step; counts the updates that rounding takes back."""
        before = {name: p.detach().clone() for name, p in self.matrices.items()}
        step(self.trainer)
        tried = {name: p.detach() != before[name] for name, p in self.matrices.items()}
        if self.refreshed and self.trainer.step % 10 == 0:
            self.rescale()
        self.round()
        for name, p in self.matrices.items():
            self.stalls[name] += tried[name] & (p.detach() == before[name])


def freed(facts: Facts, seed: int, quick: bool) -> Values:
    """Validation loss at the end with weights stored to nearest, and where half-way some coordinates are let go.

    Forks from one state: nothing; those coordinates that stalled in at least half of the 20 steps before; as many others drawn at
    random. What is let go moves in float32 from there on, its residual included.
    """
    changes = {"optimizer.lr": facts["lr"], "optimizer.decay": facts["decay"]}
    trainer = trainer_of(changes, seed, quick)
    rounding = _Rounding(trainer, facts["format"], facts["scale"] == "refreshed")
    half, window = trainer.config.max_steps // 2, 2 if quick else 20
    for number in range(1, half + 1):
        if number == half - window + 1:
            rounding.stalls = {name: torch.zeros_like(p) for name, p in rounding.matrices.items()}
        rounding.step()
    stalled = {name: count >= window / 2 for name, count in rounding.stalls.items()}
    generator = drawing(seed, 5)
    others = {
        name: (torch.randperm(m.numel(), generator=generator) < int(m.sum())).view_as(m) for name, m in stalled.items()
    }
    state, scales, found = trainer.capture(), dict(rounding.scales), {}
    for name, free in (("none", {}), ("stalled", stalled), ("random", others)):
        trainer.restore(state)
        rounding.free, rounding.scales = free, dict(scales)
        for _ in range(trainer.config.max_steps - half):
            rounding.step()
        found[name] = validation_loss(trainer)
    share = sum(float(m.sum()) for m in stalled.values()) / sum(m.numel() for m in stalled.values())
    return {**found, "loss": found["none"], "share": share}


def _harm(arms: Arms) -> Values:
    gains = {name: values["random"] - values["stalled"] for name, values in arms.items()}
    told = {f"gain, {name}": values["none"] - values["stalled"] for name, values in arms.items()}
    return {**{f"more, {name}": gain for name, gain in gains.items()}, **told}


# -- the spacing before the moments -------------------------------------------------------------------------------


def spacing_of(weight: Tensor) -> Tensor:
    """The E4M3 grid's spacing at each weight under a power-of-two amax scale, over its mean in the tensor."""
    spacing = grid_spacing(weight, E4M3, amax_scale(weight, E4M3, power_of_two=True)).float()
    return spacing / spacing.mean()


def _factors(kind: str, weights: Mapping[str, nn.Parameter], seed: int) -> Callable[[str], Tensor | None]:
    start = {name: spacing_of(p.detach()) for name, p in weights.items()}
    generator = drawing(seed, 11)
    mixed = {name: torch.randperm(p.numel(), generator=generator) for name, p in weights.items()}
    drawn = {name: torch.exp(s.log().std() * torch.randn(s.shape, generator=generator)) for name, s in start.items()}
    made: Mapping[str, Callable[[str], Tensor | None]] = {
        "none": lambda name: None,
        "spacing": lambda name: spacing_of(weights[name].detach()),
        "frozen": start.__getitem__,
        "permuted": lambda name: spacing_of(weights[name].detach()).flatten()[mixed[name]].view_as(weights[name]),
        "lognormal": drawn.__getitem__,
    }
    return made[kind]


def factor_before_moments(facts: Facts, seed: int, quick: bool) -> Values:
    """Validation loss of float32 AdamW whose gradients of matrices are multiplied by a factor before they enter the moments."""
    changes = {"optimizer.lr": facts["lr"], "optimizer.betas": [0.9, facts["beta2"]], "optimizer.eps": 1e-12}
    trainer = trainer_of(changes, seed, quick)
    weights = _matrices(trainer.model)
    factor = _factors(facts["factor"], weights, seed)

    def before(*_: Any) -> None:
        for name, p in weights.items():
            if p.grad is not None and (chosen := factor(name)) is not None:
                p.grad.mul_(chosen)

    handle = trainer.optimizer.register_step_pre_hook(before)
    try:
        return {"loss": trained(trainer)}
    finally:
        handle.remove()


_FACTORS = ("none", "spacing", "frozen", "permuted", "lognormal")
_BETAS = (0.95, 0.999)


def at_one_rate(facts: Facts, seed: int, quick: bool) -> Values:
    """The loss of an arm with a factor before the moments, or of one with a config."""
    return (factor_before_moments if "factor" in facts else final_loss)(facts, seed, quick)


def _by_factor(arms: Arms) -> Values:
    found = losses(arms)
    return {
        f"{other} - spacing, {beta}": found[f"{other}, {beta}"] - found[f"spacing, {beta}"]
        for beta in _BETAS
        for other in _FACTORS
        if other != "spacing"
    }


# -- what E7M0 costs ----------------------------------------------------------------------------------------------


def _parts(arms: Arms) -> Values:
    found = losses(arms)
    parts = {
        "representation": found["master"] - found["float32"],
        "noise": found["stochastic"] - found["master"],
        "stall": found["nearest"] - found["stochastic"],
    }
    return {**parts, "most": parts["stall"] - max(parts["representation"], parts["noise"])}


# -- corrections of the first study of custom formats --------------------------------------------------------------


def _moved(arms: Arms) -> Values:
    above = differences(refreshed="refreshed - float32", fixed="fixed - float32")(arms)
    return {"moves": (above["refreshed"] - above["fixed"]) / above["refreshed"], **above}


def _shares(arms: Arms) -> Values:
    """Of the gap of all layers to float32, what is gone where one kind of layer, or both, stay in float32."""
    found = losses(arms)
    gap = found["all"] - found["float32"]
    return {
        "gap": gap,
        **{name: (found["all"] - found[f"{name} kept"]) / gap for name in ("embedding", "head", "both")},
    }


_ON_GRID = {"fp8_format": "E5M2", "weight_storage": "grid", "optimizer.lr": 1e-3}
_KEPT = {"embedding kept": ["embedding"], "head kept": ["head"], "both kept": ["embedding", "head"]}
_UNIFORM = {"fp8_format": "E0M7", "weight_storage": "grid", "optimizer.lr": 1e-3}

_UNSCALED = {"format": "E1M6", "scaling": "none"}
_AFTER_NORM = {
    "forward": {"input": _UNSCALED, "weight": "FP32"},
    "input_grad": {"grad_output": "FP32", "weight": "FP32"},
    "weight_grad": {"grad_output": "FP32", "input": _UNSCALED},
}
_LAYERNORM = {"model.norm": "layernorm", "optimizer.lr": 1e-3}

_RATES = [1e-3, 3e-3, 1e-2, 3e-2]
_CELLS = {
    f"{fmt}, {decay}, {scale}": {"format": fmt, "decay": decay, "scale": scale, "rates": [1e-3, 3e-3, 1e-2]}
    for fmt in ("E4M3", "E7M0")
    for decay in ("constant", "cosine")
    for scale in ("fixed", "refreshed")
}

OWN: tuple[Claim, ...] = (
    Claim(
        "own_stall_is_harmful",
        "own a",
        "AltGrad",
        "Stall itself costs loss: letting only stalled coordinates move gains more than letting as many random ones move.",
        (
            *(
                Criterion(f"more, {name}", f"loss, random ones freed minus stalled ones freed, {name}", low=0.0)
                for name in _CELLS
            ),
            *(Criterion(f"gain, {name}", f"loss, none freed minus stalled ones freed, {name}") for name in _CELLS),
        ),
        10,
        Protocol(
            "0.13M, matrices stored to nearest in E4M3 or E7M0, constant or cosine rate, scale fixed or renewed every 10 steps; three "
            "forks at step 150 of 300, in which no, the stalled, or as many random coordinates go on in float32.",
            freed,
            _CELLS,
            _harm,
            seeds=8,
            tuned_by="loss",
        ),
        watch="Seen after the run: where most coordinates stall, as many random ones are mostly the same; and E7M0 has no scale to renew, "
        "so two of its cells repeat the other two.",
    ),
    Claim(
        "own_spacing_before_moments",
        "own b",
        "AltGrad",
        "Multiplying gradients by the grid's spacing before Adam's moments helps without any low precision, because the spacing "
        "follows the weight.",
        (
            *(
                Criterion(f"none - spacing, {beta}", f"loss, plain minus spacing, beta2 {beta}", low=0.0)
                for beta in _BETAS
            ),
            *(
                Criterion(f"{other} - spacing, {beta}", f"loss, {other} minus spacing, beta2 {beta}", low=0.0)
                for beta in _BETAS
                for other in ("frozen", "permuted", "lognormal")
            ),
        ),
        5,
        Protocol(
            "0.13M in float32, 300 steps: AdamW with gradients times the E4M3 spacing at each weight, times that of the start, times it "
            "permuted within the tensor, times a lognormal factor of the same spread, or plain; beta2 0.95 and 0.999, each at the best "
            "of four rates.",
            factor_before_moments,
            {f"{f}, {beta}": {"factor": f, "beta2": beta, "rates": _RATES} for f in _FACTORS for beta in _BETAS},
            _by_factor,
            seeds=8,
            tuned_by="loss",
        ),
        watch="Seen after the run: a factor that stays the same for a weight cancels in Adam, so the frozen and the lognormal one are "
        "plain AdamW. For all arms at one rate see row own f.",
    ),
    Claim(
        "own_parts_of_e7m0",
        "own c",
        "AltGrad",
        "Of what powers of two as stored weights cost, stall is the largest part, before representation and rounding noise.",
        (
            Criterion("most", "stall minus the larger of the two other parts, nats", low=0.0),
            Criterion("representation", "loss, masters used in E7M0 minus float32"),
            Criterion("noise", "loss, stored stochastically minus masters"),
            Criterion("stall", "loss, stored to nearest minus stored stochastically"),
        ),
        2.5,
        Protocol(
            "0.13M, 300 steps, weights of linear layers in E7M0, other operands in float32, every arm at the best of its rates.",
            final_loss,
            {
                "float32": {"rates": _RATES},
                "master": {"config": {"formats": "x:FP32 w:E7M0 dy:FP32"}, "rates": _RATES},
                "stochastic": {"config": stored("E7M0", "stochastic"), "rates": _RATES},
                "nearest": {"config": stored("E7M0", "nearest_even"), "rates": [1e-2, 3e-2, 1e-1, 3e-1]},
            },
            _parts,
            seeds=8,
            tuned_by="loss",
        ),
        watch="Seen after the run: the stochastic arm's rate is at an edge for most seeds, so its noise is told too large; see row own f.",
    ),
    Claim(
        "own_embedding_and_head",
        "own d",
        "AltGrad",
        "Of what E5M2 on the grid costs in the first study's setting, embedding and head are the smaller part.",
        (
            Criterion("both", "share of the gap that goes where both stay in float32", high=0.5),
            Criterion("embedding", "the same, embedding alone"),
            Criterion("head", "the same, head alone"),
            Criterion("gap", "loss, all layers minus float32"),
        ),
        1.3,
        Protocol(
            "0.13M, 300 steps at 1e-3, all operands in E5M2 and weights stored to nearest on its grid, scale renewed every 10 steps, as in "
            "docs/findings/custom-formats.md on 0.85M: all layers, without the embedding, without the head, without both; float32.",
            final_loss,
            {
                "float32": {"lr": 1e-3},
                "all": {"config": _ON_GRID},
                **{name: {"config": {**_ON_GRID, "exclude": names}} for name, names in _KEPT.items()},
            },
            _shares,
        ),
    ),
    Claim(
        "own_scale_refresh",
        "own e",
        "AltGrad",
        "What E0M7 loses on the grid is its stall and not the renewal of its scale, which rounds stored weights anew.",
        (
            Criterion("moves", "share of the gap that goes where the first scale is kept", -0.25, 0.25),
            Criterion("refreshed", "loss above float32, scale renewed every 10 steps"),
            Criterion("fixed", "loss above float32, first scale kept"),
        ),
        0.8,
        Protocol(
            "0.13M, 300 steps at 1e-3, all operands in E0M7 and weights stored to nearest on its grid, as in "
            "docs/findings/custom-formats.md on 0.85M: scale renewed every 10 steps, or never; float32.",
            final_loss,
            {
                "float32": {"lr": 1e-3},
                "refreshed": {"config": _UNIFORM},
                "fixed": {"config": {**_UNIFORM, "storage_refresh_interval": 0}},
            },
            _moved,
        ),
    ),
    Claim(
        "own_at_one_rate",
        "own f",
        "AltGrad",
        "At plain AdamW's best rate, too, the spacing before Adam's moments helps, and helps more than the same factors of other weights.",
        (
            Criterion("none - spacing", "loss, plain minus spacing", low=0.0),
            Criterion("permuted - spacing", "loss, permuted minus spacing", low=0.0),
            Criterion("noise", "loss, weights stored stochastically in E7M0 minus plain"),
        ),
        1.7,
        Protocol(
            "Arms of rows own b and own c again, 0.13M, 300 steps, all at 3e-3 with beta2 0.95: where rates were tuned on one seed, "
            "two arms got one at which other seeds are unstable.",
            at_one_rate,
            {
                **{name: {"factor": name, "beta2": 0.95, "lr": 3e-3} for name in ("none", "spacing", "permuted")},
                "stochastic": {"config": stored("E7M0", "stochastic"), "lr": 3e-3},
            },
            differences("none - spacing", "permuted - spacing", noise="stochastic - none"),
            seeds=8,
        ),
    ),
    Claim(
        "own_unscaled_after_norm",
        "own g",
        "AltGrad",
        "On inputs that come straight from a LayerNorm E1M6 needs no scale: it trains like float32.",
        (
            Criterion("after", "loss, unscaled E1M6 behind LayerNorms minus float32", -0.02, 0.02),
            Criterion("everywhere", "loss, unscaled E1M6 on every operand (chance is 5.545)"),
            Criterion("float32", "loss, float32"),
        ),
        1.2,
        Protocol(
            "Experiment b of docs/findings/custom-formats.md, which has five seeds of 0.85M, on 0.13M with LayerNorm: 300 steps at 1e-3; E1M6 "
            "without scales on the inputs of layers behind a norm, or on all operands of all layers; float32.",
            final_loss,
            {
                "float32": {"config": _LAYERNORM},
                "after": {
                    "config": {
                        **_LAYERNORM,
                        "formats": {"default": None, "overrides": [{"position": "after_norm", "recipe": _AFTER_NORM}]},
                    }
                },
                "everywhere": {"config": {**_LAYERNORM, "fp8_format": "E1M6", "scaling": "none"}},
            },
            lambda arms: {**losses(arms), **differences(after="after - float32")(arms)},
            seeds=8,
        ),
    ),
)
