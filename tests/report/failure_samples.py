"""Failure data for tests: one complete freeze, one run whose gradients are all NaN, one with nothing measured."""

import numpy as np

from altgrad.report.numbers import Unit
from altgrad.report.pages.failure import (
    FailureData,
    GradientFacts,
    Intervention,
    LayerColumn,
    LayerRow,
    LossAround,
    RunFacts,
    Trend,
    VerdictFacts,
)

NAMES = [f"blocks.{i}.{part}" for i in range(4) for part in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")]


def frozen_run() -> FailureData:
    rng = np.random.default_rng(1)
    steps = np.arange(1, 461)
    losses = 3.2 + 2.3 * np.exp(-steps / 60) + 0.05 * rng.standard_normal(len(steps))
    recent = list(range(360, 461, 5))
    rows = [
        LayerRow(
            name,
            role,
            {"overflow": 0.0, "underflow": 0.02 * i, "sqnr_db": 11.0 - 0.1 * i}
            | ({"stall": 0.98} if role == "weight" else {}),
        )
        for i, name in enumerate(NAMES)
        for role in ("weight", "input", "grad_output")
    ]
    trends = [
        Trend("stall_rate", recent, list(np.linspace(0.6, 0.985, len(recent)))),
        Trend("flip_rate", recent, list(np.linspace(0.4, 0.015, len(recent)))),
        Trend("underflow", recent, [0.1] * len(recent), NAMES[0], "grad_output"),
        Trend("sqnr_db", recent, [10.0] * 15 + [float("nan")] * (len(recent) - 15), NAMES[1], "input"),
    ]
    return FailureData(
        run=RunFacts("e7m0_uniform", "e7m0_uniform-s42-1a2b3c4d", 42, "E7M0", "grid", "nearest_even", 460, 500),
        verdict=VerdictFacts(
            "freeze",
            410,
            460,
            "stall_rate",
            0.985,
            0.95,
            "Weights stopped moving: nearly every update was lost in rounding.",
        ),
        loss=LossAround((400, 3.21), (410, 3.2), (460, 3.2), (402, 3.11)),
        loss_steps=steps,
        loss_values=losses,
        gradient=GradientFacts(460, 0.0123, 0.21, 1e-8, 0.0, 812_544),
        zero_update_layers=NAMES[:5],
        layers_measured=len(NAMES),
        layers=rows,
        layer_columns=[
            *(LayerColumn(n, n.capitalize(), Unit.FRACTION, lost=True) for n in ("overflow", "underflow", "stall")),
            LayerColumn("sqnr_db", "SQNR", Unit.DECIBEL),
        ],
        layers_step=460,
        trends=trends,
        interventions=[
            Intervention(120, "clip", "threshold 0.5, norm 2.1", "gradient norm 2.1 to 0.5"),
            Intervention(430, "shift", "E7M0 to E5M2", None),
        ],
        checkpoint_good=("checkpoints/step000400", 400),
        checkpoint_collapsed=("checkpoints/step000460", 460),
        continue_with="altgrad run config.yaml --resume checkpoints/step000400",
        reproduce="altgrad run experiments/configs/e7m0_uniform.yaml seed=42",
        environment={"torch": "2.13.0", "device": "cpu"},
        config={"seed": 42, "optimizer": {"name": "adamw", "lr": 1e-3}},
    )


def all_nan_run() -> FailureData:
    return FailureData(
        run=RunFacts("e5m2_unscaled", "e5m2_unscaled-s1-00ff00ff", 1, "E5M2"),
        verdict=VerdictFacts("nonfinite", 37, 39, "nonfinite_steps", 3, 3),
        loss=LossAround(before=(36, 2.5), at=(37, float("nan"))),
        gradient=GradientFacts(39, nonfinite_frac=1.0),
        zero_update_layers=[],
        interventions=[],
    )


def nothing_measured() -> FailureData:
    return FailureData(RunFacts("run", "run-s0-00000000"), VerdictFacts("divergence", None, None))
