"""From a damaged run to the cells that caused it, as a pure function of an oracle.

`investigate` goes through the stages in order: gates, null band, onset and point of no return, role screen, layer split,
confirmation, mechanism, decision. A stage that cannot be decided ends the autopsy with what is known so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from altgrad.analysis.statistics import holm
from altgrad.autopsy import mechanism
from altgrad.autopsy.confidence import confidence
from altgrad.autopsy.damage import Yardstick, floor_of
from altgrad.autopsy.fork import LOW, TWIN
from altgrad.autopsy.forks import BudgetSpent, Forks
from altgrad.autopsy.gates import first_loss_ceiling, not_precision, own_damage, too_fast, unwell
from altgrad.autopsy.objections import alone_over_run, too_weak
from altgrad.autopsy.search import Found, Prior, Search, Settings, expected_forks, names
from altgrad.autopsy.verdict import (
    CAUSE,
    INCONCLUSIVE,
    NO_DAMAGE,
    NOT_PRECISION,
    REFUSED,
    Effect,
    Verdict,
    joined,
    whole_roles,
)
from altgrad.autopsy.window import (
    CLEARLY,
    SHORTEST,
    Window,
    acts_from,
    change_point,
    choose,
    first_damaged,
    no_return,
    onset_of,
    over_the_run,
    recovery,
    to_the_end,
)
from altgrad.report.verdicts import CAUSED


def investigate(
    forks: Forks,
    *,
    symptom: int | None = None,
    prior: Prior | None = None,
    ceiling: float | None = None,
    settings: Settings | None = None,
) -> Verdict:
    """Why the oracle's run was damaged.

    Args:
        forks: the oracle, with its cache, log and budget.
        symptom: the step at which the run's own verdict found it.
        prior: (step of the captured state, cells) to the suspicion of each, larger is more; it is asked about the cells
            of the roles that matter, orders the search, and decides nothing.
        ceiling: largest loss that counts; None: the larger of the two trajectories' first losses.
        settings: how hard to look.

    Returns:
        The verdict; its `level` says how far the search came. A spent budget gives "inconclusive".
    """
    settings = settings or Settings()
    low, twin = (list(forks.oracle.history(path)) for path in (LOW, TWIN))
    top = ceiling if ceiling is not None else first_loss_ceiling(low, twin)
    so_far = Verdict(INCONCLUSIVE, "", symptom=symptom)
    search = Search(forks, settings, prior or (lambda start, cells: {}), top, so_far)
    try:
        verdict = _stages(search, so_far, low, twin)
    except BudgetSpent:
        verdict = replace(
            search.so_far,
            kind=INCONCLUSIVE,
            sentence=f"Inconclusive: the budget of {forks.budget} forks is spent; give --budget {2 * forks.budget}.",
        )
    return replace(verdict, forks=forks.run + forks.found, seconds=forks.seconds)


def _stages(search: Search, so_far: Verdict, low: list[float], twin: list[float]) -> Verdict:
    forks, settings, top = search.forks, search.settings, search.ceiling
    forks.expected = expected_forks(search.cells, len(forks.oracle.captures(LOW)), settings)
    length = min(len(low), len(twin))
    if length < 10:
        return replace(so_far, kind=REFUSED, sentence=f"The run has {length} steps; an autopsy needs at least 10.")
    yardstick = Yardstick(tuple(twin[:length]), top)
    gap = yardstick.curve(low[:length])
    floor = floor_of(top)
    rise = max(floor, 0.1 * float(np.mean(gap[-max(5, length // 10) :])))

    # gates
    forks.stage = "gates"
    gates: list[str] = []
    wrong = unwell(twin, top)
    if wrong and float(np.mean(gap[length // 2 :])) < max(0.5 * own_damage(twin, top), floor):
        return replace(so_far, kind=NOT_PRECISION, **not_precision(forks, wrong, top, settings.longest))
    quiet = rise <= floor and float(np.mean(gap[-max(5, length // 10) :])) < floor
    ends = _end_gap(forks, top)
    if (quiet or change_point(gap, rise) is None) and ends <= CLEARLY * floor:
        if (wrong := too_fast(forks, top, settings.longest)) is not None:
            return replace(so_far, kind=NOT_PRECISION, **wrong)
        return _undamaged(replace(so_far, damage=ends), ends, floor, "")
    onset = onset_of(gap, rise)
    gates.append(f"float32 twin survives (loss {twin[-1]:.3f} at step {len(twin)})")

    least = SHORTEST
    while True:
        so_far, found = _look(search, so_far, onset, least, gates, onset)
        if found is None:
            return so_far
        window = search.window
        forks.stage = "proof"
        over_run = over_the_run(forks, window, found.cells, top, settings.longest)
        so_far = search.so_far = replace(so_far, over_run=over_run)
        if over_run is None or over_run.value >= CAUSED or found.spread:
            break
        least = len(low)  # these cells did damage first, and others in the end: look again over all that the proof saw
        so_far = replace(so_far, first=so_far.first or names(found.cells))
    if (more := search.behind(found)) != found:
        found, over_run = more, over_the_run(forks, window, more.cells, top, settings.longest)
    whole, parts, members, placebos = search.confirm(found)
    assert whole.rescue is not None
    assert whole.alone is not None
    so_far = replace(
        so_far,
        cells=names(found.cells),
        over_run=over_run,
        rescue=whole.rescue,
        alone=whole.alone,
        groups=tuple(parts),
        members=_corrected(members),
        placebos=tuple(placebos),
        structure=_structure(found, parts),
    )
    search.so_far = so_far
    if found.spread or whole.rescue.value < CAUSED:
        sentence = (
            f"Inconclusive: {joined(so_far.cells)} close {whole.rescue} of the gap, and the other cells still do damage; "
            f"the damage is spread over more than {len(found.sets)} sets of cells."
        )
        return replace(so_far, sentence=sentence)
    if whole.alone.value < CAUSED:
        so_far = search.so_far = replace(so_far, alone_over_run=alone_over_run(search, found.cells))
    if max(share.value for share in (whole.alone, so_far.alone_over_run) if share) < CAUSED:
        sentence = (
            f"Inconclusive: rescuing {joined(so_far.cells)} closes {whole.rescue} of the gap, but low alone they do only "
            f"{whole.alone} of the damage: others have a part in it."
        )
        return replace(so_far, sentence=sentence)
    if (weak := too_weak(search, so_far, floor)) is not None:
        return replace(so_far, sentence=f"Inconclusive: {weak}; {joined(so_far.cells)} are the first to suspect.")
    interventions = search.mechanisms(found.cells)
    shares = {i.name: i.closed.value for i in interventions if i.closed is not None}
    stored = all(getattr(cell, "role", "") == "storage" for cell in found.cells)
    what = mechanism.read(shares, stored=stored)
    saved = any(value >= mechanism.SAVES for value in shares.values())
    moved = getattr(forks.oracle, "moved", None)
    begun = None
    if moved is not None and so_far.onset is not None:
        begun = acts_from(lambda step: moved(step, found.cells), forks.oracle.captures(LOW), so_far.onset)
    verdict = replace(
        so_far,
        kind=CAUSE,
        mechanism=what,
        acts_from=begun,
        interventions=tuple(interventions),
        level="repair" if saved else "cause",
    )
    verdict = replace(verdict, confidence=confidence(verdict, floor))
    return replace(verdict, sentence=_sentence(verdict))


def _undamaged(so_far: Verdict, ends: float, floor: float, seen: str) -> Verdict:
    """No damage, where the run ends within the floor of its twin; unresolved between that and what counts as damage clearly."""
    if ends <= floor:
        sentence = f"No damage in the window: {seen}the run ends {ends:+.3g} nats from its float32 twin."
        return replace(so_far, kind=NO_DAMAGE, level="phenomenon", sentence=sentence)
    sentence = (
        f"Inconclusive: {seen}the run ends {ends:.3g} nats above its float32 twin, more than chance alone is trusted to do "
        f"({floor:.2g}) and too little to look for a cause ({CLEARLY * floor:.2g})."
    )
    return replace(so_far, level="phenomenon", sentence=sentence)


def _look(
    search: Search, so_far: Verdict, onset: int, least: int, gates: list[str], begin: int
) -> tuple[Verdict, Found | None]:
    """Null band, bounds, roles and layers in a window of at least `least` steps; without cells where it shows no damage.

    The window begins at the last state before `begin`, or before the state carries damage.
    """
    forks, settings, top = search.forks, search.settings, search.ceiling
    forks.stage = "null band"
    window = search.window = choose(forks, begin, top, settings.draws, settings.longest, least)
    ends = _end_gap(forks, top)
    if not _shows(window) and ends > CLEARLY * floor_of(top):
        window = search.window = _before_it_shows(search, window, begin, least)
    null = window.null
    so_far = search.so_far = replace(
        so_far,
        damage=null.damage,
        noise=null.noise,
        onset=onset + 1 if so_far.onset is None else so_far.onset,
        window=(window.start, window.start + window.horizon),
        gates=tuple(gates),
    )
    if not null.damaged and ends > CLEARLY * floor_of(top):
        sentence = (
            f"Inconclusive: the run ends {ends:.3g} nats above its float32 twin, and no window shows where that comes from: "
            f"{null.damage:+.3g} nats over steps {window.start + 1} to {window.start + window.horizon}."
        )
        return replace(so_far, level="phenomenon", sentence=sentence), None
    if not null.damaged:
        seen = (
            f"{null.damage:+.3g} nats over steps {window.start + 1} to {window.start + window.horizon}, where single draws "
            f"scatter by {null.noise:.2g}; "
        )
        return _undamaged(so_far, ends, floor_of(top), seen), None
    again = f"low precision fails again: {null.damage:.3g} nats, {null.z:.0f} standard errors, {settings.draws} draws"
    forks.stage = "bounds"
    if so_far.level is None:
        given = recovery(len(forks.oracle.history(LOW)), window, settings.longest)
        back = no_return(forks, top, window, given)
        captured = [c for c in forks.oracle.captures(TWIN) if c <= onset + window.horizon]
        first = first_damaged(forks, top, window, captured)
        if first is not None and first > window.start and onset + 1 < first:
            so_far = replace(so_far, onset=first)
        so_far = replace(so_far, no_return=back, recovery=given, level="bound")
    so_far = search.so_far = replace(so_far, gates=(*gates, again))
    roles = search.screen()
    so_far = search.so_far = replace(so_far, roles=_corrected(roles), level="boundary")
    if (found := search.split(roles)) is None:
        earlier = max(0, onset - max(2 * (onset - begin), window.horizon))
        if earlier < begin and onset - earlier <= settings.longest // 2:
            return _look(search, so_far, onset, max(least, onset - earlier + SHORTEST), gates, earlier)
        sentence = (
            f"Inconclusive: the state after step {window.start} carries damage already, so that rescues from there cannot tell "
            "cells apart, and no earlier one is in reach."
        )
        return replace(so_far, sentence=sentence), None
    return replace(so_far, prior={str(cell): value for cell, value in search.suspicion.items()}), found


def _end_gap(forks: Forks, top: float) -> float:
    """How far the last quarter of the run lies above that of its twin."""
    low, twin = (list(forks.oracle.history(path)) for path in (LOW, TWIN))
    length = min(len(low), len(twin))
    yardstick = Yardstick(tuple(twin[:length]), top, late=True)
    return yardstick.over(low[:length], yardstick.first)


def _before_it_shows(search: Search, window: Window, onset: int, least: int) -> Window:
    """A window from an earlier state, where that at the onset hardly shows damage though the run ends damaged; else that one.

    A model that has adapted to its fault gets worse when the fault is lifted, which hides the damage: so the window has to
    begin before the model has adapted, which may be long before the loss shows anything. Damage that grows slowly shows
    at the run's end only.
    """
    forks, settings, top = search.forks, search.settings, search.ceiling
    for earlier in dict.fromkeys((onset // 2, 0)):
        tried = choose(forks, earlier, top, settings.draws, settings.longest, max(least, onset - earlier))
        if _shows(tried):
            return tried
    for earlier in dict.fromkeys((onset // 2, 0)):
        tried = to_the_end(forks, earlier, top, settings.draws, settings.longest)
        if _shows(tried):
            return tried
    return window


def _shows(window: Window) -> bool:
    """Whether a window shows damage of which a cause may be named."""
    return window.null.damaged and window.null.damage > CLEARLY * window.null.low.floor


def _sentence(v: Verdict) -> str:
    verb = "together caused" if v.structure in ("interacting", "spread") else "caused"
    who = whole_roles(v.cells) if v.structure == "spread" else joined(v.cells)
    return (
        f"{who} {verb} the damage of {v.damage:.3g} nats from step {v.onset} on ({v.mechanism}): "
        f"rescue closes {v.rescue} of the gap, low alone does {v.alone} of the damage."
        + (
            " Each set does more than half of it alone, so that no single rescue helps."
            if v.structure == "redundant"
            else ""
        )
        + (f" At work since step {v.acts_from}." if _earlier(v) else "")
        + (f" It began with {joined(v.first)}." if v.first and v.first != v.cells else "")
        + (f" Over the whole run the rescue closes {v.over_run.value:.0%}" if v.over_run else "")
        + (f", and low alone they do {v.alone_over_run.value:.0%}" if v.over_run and v.alone_over_run else "")
        + ("." if v.over_run else "")
    )


def _earlier(v: Verdict) -> bool:
    """Whether the cells were at work well before their damage."""
    return v.acts_from is not None and v.onset is not None and v.acts_from + 5 < v.onset


REDUNDANT = 0.5
"""Share that each of redundant sets does alone, and below which the rescue of any one of them stays."""


def _structure(found: Found, parts: Sequence[Effect]) -> str:
    if found.spread or found.whole_roles:
        return "spread"
    if len(found.sets) == 1:
        return "single" if len(found.cells) == 1 else "interacting"
    alone = [p.alone.value for p in parts if p.alone]
    rescue = [p.rescue.value for p in parts if p.rescue]
    return "redundant" if max(rescue) < REDUNDANT < min(alone) else "cumulative"


def _corrected(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    if not effects:
        return ()
    ps = holm([1.0 if e.p is None else e.p for e in effects])
    return tuple(replace(e, p=p) for e, p in zip(effects, ps, strict=True))
