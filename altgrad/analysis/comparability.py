"""Says whether runs may stand in one comparison: same corpus, same numerics, same version of the code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from altgrad.errors import ReportError
from altgrad.records.run import Run
from altgrad.report.numbers import listing

IDENTITY = {
    "data_fingerprint": "the corpus",
    "numerics_version": "the version of the numerics",
    "altgrad": "the version of AltGrad",
}
"""Facts that must agree: a loss on another corpus, or of other arithmetic, is another quantity."""

CIRCUMSTANCES = {
    "commit": "the commit",
    "device": "the device",
    "torch": "the version of PyTorch",
    "threads": "the number of threads",
}
"""Facts that may differ, and are then pointed out: they can move losses in the last digits, and times a lot."""


@dataclass(frozen=True)
class Disagreement:
    """A fact that differs: `values` maps each value to the names of its runs."""

    fact: str
    words: str
    values: dict[str, list[str]]

    def sentence(self) -> str:
        parts = [f"{_short(value)} ({_some(names)})" for value, names in list(self.values.items())[:3]]
        parts += [f"{len(self.values) - 3} more"] if len(self.values) > 3 else []
        return f"{self.words[:1].upper()}{self.words[1:]} differs: {listing(parts)}."


def disagreements(runs: Sequence[Run], facts: dict[str, str]) -> list[Disagreement]:
    """The facts on which runs differ; a run that does not record a fact does not disagree on it."""
    found = []
    for fact, words in facts.items():
        values: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            if (value := run.fact(fact)) is not None:
                values[str(value)].append(run.path.name)
        if len(values) > 1:
            found.append(Disagreement(fact, words, dict(values)))
    return found


def require_comparable(runs: Sequence[Run], *, force: bool = False) -> list[str]:
    """Warnings that a report of `runs` must carry. Raises ReportError when they are no fair comparison, unless `force`."""
    broken = disagreements(runs, IDENTITY)
    if broken and not force:
        raise ReportError(
            " ".join(d.sentence() for d in broken)
            + " Such losses are different quantities; compare runs that agree, or force the comparison"
            " (force=True, --force) to have it marked instead of refused."
        )
    return [f"{d.sentence()} These runs are compared by force; their losses are different quantities." for d in broken]


def circumstances(runs: Sequence[Run]) -> list[str]:
    """Remarks on what differs between the runs and may, but need not, matter."""
    return [d.sentence() for d in disagreements(runs, CIRCUMSTANCES)] + unpaired(runs)


def unpaired(runs: Sequence[Run]) -> list[str]:
    """Remarks on models of one's own that began from other weights than their like under the same seed.

    Runs of one seed are paired: a model that was trained on from run to run, or drawn anew, differs by more than the format.
    """
    begun: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for run in runs:
        model = run.fact("model")
        if isinstance(model, dict) and "weights" in model:
            kind = (str(run.fact("seed")), str(model.get("class")), str(model.get("parameters")))
            begun[kind].setdefault(str(model["weights"]), run.path.name)
    return [
        f"Of seed {seed}, {listing(list(names.values())[:4])} began from different weights of the same {kind}: what differs "
        "between them is not the format alone."
        for (seed, kind, _), names in begun.items()
        if len(names) > 1
    ]


def _short(value: str) -> str:
    """Long hashes by their first digits."""
    return f"{value[:10]}..." if len(value) >= 40 and " " not in value else value


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} runs, such as {names[0]}"
