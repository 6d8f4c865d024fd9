"""Makes synthetic run folders with the files and fields that real runs leave, for tests of everything that reads them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

ROLES = ("weight", "input", "grad_output")
LAYERS = tuple(f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down"))

# How much worse than FP32 each format ends, in nats: made up, plausible, and far apart enough to rank.
EXCESS = {"FP32": 0.0, "E4M3": 0.02, "E3M4": 0.01, "E5M2": 0.05, "E1M6": 0.16, "E0M7": 0.16, "E7M0": 1.1}


def jsonable(value: Any) -> Any:
    """Non-finite floats as the strings that run folders use."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(jsonable(value), indent=1), "utf-8")


def grid_values(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """Nonnegative values of an IEEE-biased finite-only format, for the rug."""
    bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits else 0
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            if exponent_bits == 0:
                values.append(mantissa / 2**mantissa_bits)
            elif exponent == 0:
                values.append(mantissa / 2**mantissa_bits * 2.0 ** (1 - bias) if mantissa_bits else 0.0)
            else:
                values.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
    return sorted(set(values))


def make_run(
    root: Path,
    fmt: str = "FP32",
    *,
    seed: int = 42,
    steps: int = 500,
    name: str | None = None,
    storage: str = "grid",
    rounding: str = "nearest_even",
    optimizer: str = "adamw",
    excess: float | None = None,
    collapse: str | None = None,
    onset: int | None = None,
    finished: bool = True,
    eval_interval: int = 50,
    monitor_interval: int = 0,
    layers: Sequence[str] = LAYERS,
    roles: Sequence[str] = ROLES,
    events: Sequence[Mapping[str, Any]] = (),
    interventions: Sequence[Mapping[str, Any]] = (),
    data_fingerprint: str = "d41d8cd98f00b204",
    numerics_version: str = "1",
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    noise_seed: int = 0,
) -> Path:
    """A run folder under `root`. `collapse`: "freeze", "divergence" or "nonfinite", beginning at step `onset`."""
    name = name or (f"{fmt.lower()}_uniform" if fmt != "FP32" else "fp32_baseline")
    rng = np.random.default_rng([seed, sum(map(ord, fmt + storage + optimizer)), noise_seed])
    shared = np.random.default_rng([seed, 7])
    excess = EXCESS.get(fmt, 0.1) if excess is None else excess
    config_hash = f"{zlib.crc32(repr((fmt, storage, rounding, optimizer, seed, name, steps)).encode()):08x}"
    folder = root / f"{name}-s{seed}-{config_hash}"
    folder.mkdir(parents=True)

    step = np.arange(1, steps + 1)
    clean = 1.9 + 3.6 * np.exp(-step / (0.11 * steps)) + 0.35 * np.exp(-step / (0.6 * steps))
    seed_effect = 0.01 * shared.standard_normal() + 0.004 * rng.standard_normal()
    loss = clean + excess * (1 - np.exp(-step / (0.2 * steps))) + seed_effect
    loss = loss + 0.06 * shared.standard_normal(steps) + 0.01 * rng.standard_normal(steps)
    onset = onset or int(0.3 * steps)
    detected = min(steps, onset + (3 if collapse == "nonfinite" else 50))
    stall = np.clip(0.08 + 0.3 * excess + 0.25 * step / steps + 0.01 * rng.standard_normal(steps), 0, 1)
    last = steps
    if collapse == "freeze":
        frozen = step >= onset
        loss[frozen] = loss[onset - 1] + 0.06 * shared.standard_normal(int(frozen.sum()))
        stall = np.where(frozen, 0.985, stall)
    elif collapse == "divergence":
        grow = np.maximum(0, step - onset)
        loss = loss + np.expm1(np.minimum(grow * 12 / steps, 30))
    elif collapse == "nonfinite":
        loss[step >= onset] = np.nan
    if collapse:
        last = detected
    if not finished:
        last = int(0.42 * steps)

    lines: list[dict[str, Any]] = []
    recorded = {int(event["step"]): event for event in events}
    for i in range(last):
        at = int(step[i])
        lines.append(
            {
                "kind": "step",
                "step": at,
                "loss": float(loss[i]),
                "lr": 1e-3 * min(1.0, at / (0.1 * steps)),
                "grad_norm": float(0.8 + 0.2 * rng.random()),
                "finite": bool(np.isfinite(loss[i])),
                "tokens_per_s": 9000.0 + 300 * float(rng.random()),
                "stall_rate": None if fmt == "FP32" else float(stall[i]),
                "flip_rate": None if fmt == "FP32" else float(1 - stall[i]),
                "overflow_rate": None if fmt == "FP32" else float(0.001 * rng.random()),
                "elapsed_s": 0.11 * at,
            }
        )
        if at % eval_interval == 0 or at == steps:
            value = float(loss[max(0, i - 10) : i + 1].mean() + 0.05)
            lines.append({"kind": "eval", "step": at, "val_loss": value, "perplexity": float(np.exp(min(value, 50)))})
        if monitor_interval and at % monitor_interval == 0:
            for j, layer in enumerate(layers):
                for role in roles:
                    lines.append(
                        {
                            "kind": "monitor",
                            "step": at,
                            "layer": layer,
                            "role": role,
                            "overflow": 1e-4 * j,
                            "underflow": min(1.0, 0.01 * j + 0.3 * at / steps),
                            "stall": float(np.clip(stall[i] * (0.6 + 0.05 * j), 0, 1)) if role == "weight" else None,
                            "sqnr_db": 24.0 - j,
                        }
                    )
        if at in recorded:
            lines.append({"kind": "event", **recorded[at]})
    verdict = None
    if collapse and finished:
        metric, value, threshold, reason = {
            "freeze": (
                "stall_rate",
                0.985,
                0.95,
                "stall rate at or above 0.95 and loss improved by < 0.1% over 50 steps",
            ),
            "divergence": ("loss", float(loss[last - 1]), 5.9, "loss stays above where the run started"),
            "nonfinite": ("nonfinite_steps", 3.0, 3.0, "3 steps in a row had non-finite gradients"),
        }[collapse]
        verdict = {
            "kind": collapse,
            "onset_step": onset,
            "detected_step": detected,
            "metric": metric,
            "value": value,
            "threshold": threshold,
            "reason": reason,
        }
        lines.append({"kind": "event", "step": last, "event": "verdict", **verdict})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(jsonable(line)) + "\n" for line in lines), "utf-8")

    evaluations = [(line["step"], line["val_loss"]) for line in lines if line["kind"] == "eval"]
    finite = loss[:last][np.isfinite(loss[:last])]
    best = int(np.nanargmin(loss[:last])) if len(finite) else 0
    full_config = {
        "name": name,
        "seed": seed,
        "max_steps": steps,
        "fp8_format": None if fmt == "FP32" else fmt,
        "weight_storage": storage,
        "rounding": rounding,
        "scaling": "amax",
        "enable_partition_clipping": False,
        "enable_emergency_shift": False,
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
        "optimizer": {"name": optimizer, "lr": 1e-3, "weight_decay": 0.1},
        "data": {"source": "stdlib"},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(to_yaml(full_config), "utf-8")
    bits = [int(c) for c in fmt if c.isdigit()] if fmt[0] == "E" and len(fmt) == 4 else None
    facts = {
        "python": "3.11.7",
        "torch": "2.13.0",
        "numpy": "2.4.6",
        "numba": "0.62.1",
        "altgrad": "0.1.0",
        "commit": "0f3c2a9",
        "device": "cpu",
        "threads": 2,
        "data_fingerprint": data_fingerprint,
        "numerics_version": numerics_version,
    }
    if bits:
        values = grid_values(*bits)
        smallest = min(v for v in values if v > 0)
        facts["format"] = {
            "name": fmt,
            "exponent_bits": bits[0],
            "mantissa_bits": bits[1],
            "max": max(values),
            "smallest": smallest,
            "values": values,
        }
    dump(folder / "env.json", {**facts, **(environment or {})})
    if finished:
        dump(
            folder / "result.json",
            {
                "name": name,
                "run_id": folder.name,
                "seed": seed,
                "format": fmt,
                "storage": storage,
                "rounding": rounding,
                "status": "collapsed" if collapse else "completed",
                "verdict": verdict,
                "steps": last,
                "max_steps": steps,
                "final_loss": float(loss[last - 1]),
                "best_loss": float(loss[best]),
                "best_step": best + 1,
                "final_val_loss": evaluations[-1][1] if evaluations else None,
                "best_val_loss": min((v for _, v in evaluations), default=None),
                "stall_rate": None if fmt == "FP32" else float(stall[max(0, last - 50) : last].mean()),
                "wall_s": 0.11 * last,
                "tokens_per_s": 9150.0,
                "interventions": list(interventions),
                "config_hash": config_hash,
                "data_fingerprint": data_fingerprint,
                "numerics_version": numerics_version,
                "details": {},
            },
        )
    if collapse and finished:
        reports = folder / "checkpoints" / "failure_reports"
        reports.mkdir(parents=True)
        (reports / f"step{detected:06d}-{collapse}.html").write_text("<!doctype html><title>failure</title>", "utf-8")
    return folder


def to_yaml(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False)


def demo_runs(root: Path, *, steps: int = 500, seed: int = 42, **options: Any) -> list[Path]:
    """The six runs of the demo: the baseline, four formats that train, and E7M0, which freezes."""
    runs = [make_run(root, fmt, steps=steps, seed=seed, **options) for fmt in ("FP32", "E5M2", "E3M4")]
    # Under amax scaling E1M6 and E0M7 are the same grid: same losses to the last bit.
    for fmt in ("E1M6", "E0M7"):
        run = make_run(root, fmt, steps=steps, seed=seed, **options)
        if fmt == "E0M7":
            twin = runs[-1]
            (run / "metrics.jsonl").write_bytes((twin / "metrics.jsonl").read_bytes())
            result = json.loads((run / "result.json").read_text())
            same = json.loads((twin / "result.json").read_text())
            copied = ("final_loss", "best_loss", "best_step", "final_val_loss", "best_val_loss", "stall_rate")
            dump(run / "result.json", {**result, **{key: same[key] for key in copied}})
        runs.append(run)
    runs.append(make_run(root, "E7M0", steps=steps, seed=seed, collapse="freeze", onset=int(0.3 * steps), **options))
    return runs


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
        Trend("stall_rate", recent, list(np.linspace(0.6, 0.985, len(recent))), unit=Unit.FRACTION),
        Trend("flip_rate", recent, list(np.linspace(0.4, 0.015, len(recent))), unit=Unit.FRACTION),
        Trend("underflow", recent, [0.1] * len(recent), NAMES[0], "grad_output", Unit.FRACTION),
        Trend("sqnr_db", recent, [10.0] * 15 + [np.nan] * (len(recent) - 15), NAMES[1], "input", Unit.DECIBEL, "SQNR"),
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
