"""What the study of advice found, from its record: the criteria, written before the first run, and the tables.

    stall     mean absolute error of the run's mean stall at most 0.05 on the formats of development, 0.07 on formats and
              models held out; for each storage
    sqnr      mean absolute error against direct quantization of the next batch at most 1 dB
    rank      mean Spearman correlation over formats between prediction and the loss above float32, over models, seeds and
              schedules, at least 0.8 for each storage, and no baseline's is higher. Predictor: mean stall for nearest
              storage, gradient damage for stochastic and master
    regret    of the six-bit recipe with least predicted damage, against the best of all 36: at most a quarter of the
              median recipe's, and no baseline's is lower
    freeze    where a run freezes (stall at or above 0.95 to its end), the predicted step is within 10 steps of 100 in 80%
              of the runs, and a freeze is predicted for at most 20% of the runs that have none
    ratchet   where a second moment runs 1.25 times away from float32's, the step predicted is within a factor 1.5 in 80%

Baselines: more mantissa is better; best mean SQNR; E4M3 everywhere (regret: E2M3, its six-bit kin); the Hessian's trace
times the squared error of weights, SQNR for the rest (regret); a true run of 20 steps. A difference below 0.001 nats of
two baselines' regrets is no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from altgrad.formats.catalog import get_format
from altgrad.formats.spectrum import STORAGES
from altgrad.records.metrics import OPERANDS
from altgrad.report.tables import Column, Table, table_markdown
from experiments.advice import DECAYS, DY, FORMATS, GPTS, HELD_OUT, HELD_OUT_MODEL, SEEDS, STEPS, W, X

Record = Mapping[str, Mapping[str, Any]]
MODELS = (*GPTS, HELD_OUT_MODEL)
ALL = (*FORMATS, *HELD_OUT)


def groups(record: Record, storage: str) -> list[tuple[str, dict[str, Mapping[str, Any]], Mapping[str, Any], float]]:
    """(model|seed|decay, run by format, prediction, float32's loss) wherever all of them are there."""
    found = []
    for model in MODELS:
        for seed in SEEDS:
            for decay in DECAYS:
                where = f"{model}|{seed}|{decay}"
                runs = {f: record.get(f"{where}|{storage}|{f}") for f in ALL}
                said, base = record.get(f"{where}|advice"), record.get(f"{where}|FP32|FP32")
                if said and base and all(r is not None and "refused" not in r for r in runs.values()):
                    found.append((where, runs, said, base["loss"]))
    return found


def stall_table(record: Record) -> Table:
    """Mean absolute error of predicted stall."""
    rows = []
    for storage in STORAGES:
        for model in MODELS:
            for label, formats in (("development", FORMATS), ("held out", HELD_OUT)):
                errors = [
                    abs(run["stall"] - said["stall"][f"{storage}|{f}"][0])
                    for where, runs, said, _ in groups(record, storage)
                    if where.startswith(model + "|")
                    for f, run in runs.items()
                    if f in formats and run["stall"] is not None
                ]
                if errors:
                    limit = 0.05 if label == "development" and model in GPTS else 0.07
                    mean = float(np.mean(errors))
                    rows.append(
                        [
                            storage,
                            model,
                            label,
                            str(len(errors)),
                            f"{mean:.3f}",
                            f"{max(errors):.3f}",
                            _met(mean <= limit, f"{limit:g}"),
                        ]
                    )
    heads = ("storage", "model", "formats", "runs", "mean error", "largest", "criterion")
    return Table([Column(h, i > 2) for i, h in enumerate(heads)], rows, sortable=False)


def sqnr_table(record: Record) -> Table:
    """Error of predicted SQNR on the next batch."""
    rows = []
    for model in MODELS:
        for label, formats in (("development", FORMATS), ("held out", HELD_OUT)):
            errors = [
                v["sqnr_error"][f]
                for k, v in record.items()
                if k.startswith(model) and k.endswith("advice")
                for f in formats
            ]
            if errors:
                rows.append(
                    [
                        model,
                        label,
                        str(len(errors)),
                        f"{np.mean(errors):.2f} dB",
                        f"{max(errors):.2f} dB",
                        _met(float(np.mean(errors)) <= 1, "1 dB"),
                    ]
                )
    return Table(
        [Column(h, i > 1) for i, h in enumerate(("model", "formats", "cases", "mean error", "largest", "criterion"))],
        rows,
        sortable=False,
    )


def predictors(said: Mapping[str, Any], storage: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """A number by format, larger for worse, of the advice and of every baseline."""
    advice = [said["stall"][f"{storage}|{f}"][0] if storage == "nearest" else said["damage"][f] for f in ALL]
    return {
        "advice": advice,
        "more mantissa": [-get_format(f).mantissa_bits for f in ALL],
        "best SQNR": [-said["sqnr"][f] for f in ALL],
        "20-step run": [runs[f]["loss20"] for f in ALL],
    }


def rank_table(record: Record) -> Table:
    """Mean Spearman correlation with the true loss, and what the same runs from another seed would have said of it."""
    rows = []
    for storage in STORAGES:
        for model in MODELS:
            scores: dict[str, list[float]] = {}
            gaps: dict[str, list[list[float]]] = {}
            for where, runs, said, base in groups(record, storage):
                if where.startswith(model + "|"):
                    truth = [runs[f]["loss"] for f in ALL]
                    gaps.setdefault(where.rsplit("|", 1)[1], []).append([loss - base for loss in truth])
                    for name, values in predictors(said, storage, runs).items():
                        scores.setdefault(name, []).append(_rank(values, truth))
            if scores:
                means = {name: float(np.mean(v)) for name, v in scores.items()}
                best = max(means, key=lambda name: means[name])
                won = means["advice"] >= 0.8 and means["advice"] >= means[best] - 1e-9
                rows.append(
                    [
                        storage,
                        model,
                        str(len(scores["advice"])),
                        *(f"{means[n]:.2f}" for n in means),
                        _another_seed(gaps.values()),
                        _met(won, "0.8, none higher"),
                    ]
                )
    heads = (
        "storage",
        "model",
        "cases",
        "advice",
        "more mantissa",
        "best SQNR",
        "20-step run",
        "another seed",
        "criterion",
    )
    return Table([Column(h, i > 1) for i, h in enumerate(heads)], rows, sortable=False)


def _another_seed(by_decay: Iterable[Sequence[Sequence[float]]]) -> str:
    """Mean correlation of one seed's gaps with the mean of the other seeds': about the most that a prediction can reach."""
    found = [
        _rank(np.mean(np.delete(gaps, i, 0), 0).tolist(), gaps[i])
        for gaps in by_decay
        if len(gaps) > 1
        for i in range(len(gaps))
    ]
    return f"{np.mean(found):.2f}" if found else "–"


def _rank(values: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's correlation; 0 for a predictor that tells nothing apart."""
    return float(spearmanr(values, truth)[0]) if len(set(values)) > 1 and len(set(truth)) > 1 else 0.0  # type: ignore[arg-type]


def gap_table(record: Record) -> Table:
    """Mean loss of every format above float32, with the standard error over seeds (the mean of both schedules each)."""
    rows = []
    for storage in STORAGES:
        for model in MODELS:
            by_seed: dict[str, list[list[float]]] = {}
            for where, runs, _, base in groups(record, storage):
                if where.startswith(model + "|"):
                    by_seed.setdefault(where.split("|")[1], []).append([runs[f]["loss"] - base for f in ALL])
            if len(by_seed) > 1:
                gaps = np.array([np.mean(found, 0) for found in by_seed.values()])
                errors = gaps.std(0, ddof=1) / math.sqrt(len(gaps))
                cells = [f"{mean:+.3f} ({error:.3f})" for mean, error in zip(gaps.mean(0), errors, strict=True)]
                rows.append([storage, model, str(len(gaps)), *cells])
    return Table([Column(h, i > 1) for i, h in enumerate(("storage", "model", "seeds", *ALL))], rows, sortable=False)


def regret_table(record: Record) -> Table | None:
    """Loss of each method's recipe above the best of all, by seed."""
    regrets: dict[str, list[float]] = {}
    for seed in SEEDS:
        runs = {
            (x, w, dy): record.get(f"recipe|gpt-S|{seed}|{x},{w},{dy}", {}).get("loss")
            for x in X
            for w in W
            for dy in DY
        }
        said = record.get(f"choice|gpt-S|{seed}")
        if said is None or any(loss is None for loss in runs.values()):
            continue
        losses = {key: float(loss) for key, loss in runs.items()}  # type: ignore[arg-type]
        short = {key: record[f"recipe|gpt-S|{seed}|{','.join(key)}"]["loss20"] for key in losses}
        best = min(losses.values())
        mantissa = {f: get_format(f).mantissa_bits for f in (*X, *DY)}
        sqnr, damage = said["sqnr"], said["damage"]
        by_sqnr = tuple(max(sqnr[role], key=sqnr[role].get) for role in OPERANDS)
        picks = {
            "advice": tuple(min(damage[role], key=damage[role].get) for role in OPERANDS),
            "more mantissa": tuple(max(offered, key=mantissa.get) for offered in (X, W, DY)),  # type: ignore[arg-type]
            "best SQNR": by_sqnr,
            "E2M3 everywhere": ("E2M3", "E2M3", "E2M3"),
            "Hessian trace": (by_sqnr[0], min(said["hawq"], key=said["hawq"].get), by_sqnr[2]),
            "20-step run": min(short, key=lambda key: short[key]),
        }
        for name, pick in picks.items():
            regrets.setdefault(name, []).append(losses[pick] - best)  # type: ignore[index]
        regrets.setdefault("the median recipe", []).append(float(np.median(list(losses.values()))) - best)
    if not regrets:
        return None
    median = float(np.mean(regrets["the median recipe"]))
    least = min(float(np.mean(v)) for name, v in regrets.items() if name not in ("advice", "the median recipe"))
    rows = []
    for name, values in regrets.items():
        mean = float(np.mean(values))
        verdict = (
            _met(mean <= median / 4 and mean <= least + 0.001, "a quarter of the median, none lower")
            if name == "advice"
            else ""
        )
        rows.append([name, str(len(values)), f"{mean:.4f}", f"{max(values):.4f}", verdict])
    heads = ("method", "seeds", "mean regret", "largest", "criterion")
    return Table([Column(h, i > 0) for i, h in enumerate(heads)], rows, sortable=False)


def freeze_table(record: Record) -> Table:
    """Predicted step of a freeze against the measured one."""
    rows = []
    for storage in ("nearest", "stochastic"):
        for model in MODELS:
            off: list[float] = []
            late = missed = false = quiet = 0
            for where, runs, said, _ in groups(record, storage):
                if not where.startswith(model + "|"):
                    continue
                for f, run in runs.items():
                    told = said["stall"][f"{storage}|{f}"][1]
                    if run["freeze"] is None:
                        quiet += 1
                        false += told is not None
                    elif told is None:
                        missed += 1
                    else:
                        off.append(abs(told - run["freeze"]))
                        late += off[-1] <= STEPS // 10
            froze = len(off) + missed
            if froze or quiet:
                good = (not froze or late / froze >= 0.8) and (not quiet or false / quiet <= 0.2)
                rows.append(
                    [
                        storage,
                        model,
                        str(froze),
                        str(late),
                        str(missed),
                        f"{np.median(off):.0f}" if off else "–",
                        f"{false} of {quiet}",
                        _met(good, "80%, 20%"),
                    ]
                )
    heads = (
        "storage",
        "model",
        "froze",
        "within 10 steps",
        "not predicted",
        "median error",
        "false alarms",
        "criterion",
    )
    return Table([Column(h, i > 1) for i, h in enumerate(heads)], rows, sortable=False)


def ratchet_table(record: Record, limit: float = 1.25) -> Table:
    """Predicted and measured step from which a second moment is `limit` times too large (in its root)."""
    rows = []
    found: dict[tuple[str, str], list[tuple[int | None, int | None]]] = {}
    for key, entry in record.items():
        if key.startswith("moments|") and "measured" in entry:
            for fmt, series in entry["measured"].items():
                pair = (_first(entry["predicted"][fmt], limit), _first(series, limit))
                found.setdefault((key.split("|")[1], fmt), []).append(pair)
    for (model, fmt), pairs in found.items():
        reached = [(p, m) for p, m in pairs if m is not None]
        near = sum(p is not None and max(p, m) <= 1.5 * min(p, m) for p, m in reached)
        false = sum(p is not None and m is None for p, m in pairs)
        shown = ", ".join(f"{_step(p)}/{_step(m)}" for p, m in pairs)
        good = (not reached or near / len(reached) >= 0.8) and not false
        rows.append([model, fmt, str(len(pairs)), str(len(reached)), str(near), str(false), shown, _met(good, "80%")])
    heads = (
        "model",
        "second moment",
        "runs",
        "ran away",
        "step right",
        "false alarms",
        "predicted/measured",
        "criterion",
    )
    return Table([Column(h, 1 < i < 6) for i, h in enumerate(heads)], rows, sortable=False)


def _first(series: Sequence[float], limit: float) -> int | None:
    """Step of the first value at or above the limit; every fifth step was kept."""
    return next((5 * (i + 1) for i, value in enumerate(series) if value >= limit), None)


def _step(step: int | None) -> str:
    return "never" if step is None else str(step)


def _met(met: bool, what: str) -> str:
    return f"{'met' if met else 'missed'} ({what})"


def tell(record: Record, asked: Sequence[int] = SEEDS) -> str:
    """All tables as Markdown, with how much of what these seeds are to have there is."""
    from experiments.advice import jobs, seed_of

    record = {key: entry for key, entry in record.items() if seed_of(key) in asked}
    total = [key for key, _ in jobs() if seed_of(key) in asked]
    seeds = [s for s in asked if all(k in record for k in total if f"|{s}|" in f"{k}|")]
    there = sum(k in record for k in total)
    parts = [
        f"{there} of {len(total)} entries are there; of seeds {', '.join(map(str, seeds)) or 'none'} all of them.",
        "### Stall\n\n" + table_markdown(stall_table(record)),
        "### SQNR\n\n" + table_markdown(sqnr_table(record)),
        "### Order of formats\n\n" + table_markdown(rank_table(record)),
    ]
    parts += ["### Loss above float32, nats (standard error)\n\n" + table_markdown(gap_table(record))]
    regret = regret_table(record)
    parts += ["### Regret\n\n" + (table_markdown(regret) if regret else "No seed is complete.")]
    parts += [
        "### Freezes\n\n" + table_markdown(freeze_table(record)),
        "### Moments\n\n" + table_markdown(ratchet_table(record)),
    ]
    return "\n\n".join(parts)
