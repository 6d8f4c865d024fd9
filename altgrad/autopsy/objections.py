"""What speaks against naming a cause: too little damage, cells that matter only together, others that have a part in it."""

from __future__ import annotations

from altgrad.autopsy.damage import Share
from altgrad.autopsy.search import Search
from altgrad.autopsy.verdict import Effect, Verdict, joined
from altgrad.autopsy.window import CLEAR, CLEARLY, over_the_run
from altgrad.report.verdicts import CAUSED

INNOCENT = 0.5
"""Share of the gap that innocent cells may seem to close (or to widen) before nothing can be told by such shares."""
ALL = 0.9
"""Share that the cells found close over the whole run, beside which innocent cells that merely delay the damage are no
objection."""


def too_weak(search: Search, v: Verdict, floor: float) -> str | None:
    """Why the evidence names no cause: too little damage, or innocent cells that matter as much; None where it does.

    Where a run diverges any change delays it, and seems to close a part of the gap within the window: so innocent cells are
    asked again over the whole run, to whose end a delay does nothing.
    """
    if v.damage is not None and v.damage < CLEARLY * floor:
        return (
            f"{v.damage:.3g} nats are too few to tell cells apart, whose rounding alone moves the loss by half as much"
        )
    together = [v.damage] if v.damage is not None and v.structure in ("interacting", "spread") else []
    together += [e.alone.value * v.damage for e in v.groups if len(e.cells) > 1 and e.alone and v.damage is not None]
    if together and min(together) < CLEAR * floor:
        nats = min(together)
        return f"{nats:.3g} nats are too few to tell which cells do damage together, and none of them does it alone"
    if (helper := _mere_helper(v, floor)) is not None:
        return f"the rescue of {helper} adds nothing to the other's, which does damage only together with it"
    named = set(v.cells)
    innocent = [e for e in (*v.placebos, *v.roles) if e.rescue is not None and not named & set(e.cells)]
    innocent.sort(key=lambda e: -abs(e.rescue.value) if e.rescue else 0.0)
    for one in innocent:
        if one.rescue is not None and abs(one.rescue.value) >= INNOCENT and not _delays(search, v, one):
            return f"{joined(one.cells, 2)}, which are none of the cells found, seem to close {one.rescue} of the gap"
    return None


def _mere_helper(v: Verdict, floor: float) -> str | None:
    """One of two cells that do damage only together, without which the rescue closes as much, and whose own closes less
    than `CAUSED`.

    The other needs it, and is cured without it: whether it is a cause or only what any cell does there, shares do not tell.
    """
    if v.structure != "interacting" or v.rescue is None or v.damage is None or len(v.members) != 2:
        return None
    a, b = sorted(v.members, key=lambda e: e.rescue.value if e.rescue else 0.0)
    if a.rescue is None or b.rescue is None or a.rescue.value >= CAUSED:
        return None
    adds = (v.rescue.value - b.rescue.value) * v.damage
    return joined(a.cells) if adds < floor else None


def alone_over_run(search: Search, cells: frozenset) -> Share | None:
    """The share of the damage that the cells do alone over the whole run, to whose end a delay does nothing."""
    others = over_the_run(
        search.forks, search.window, search.everything - cells, search.ceiling, search.settings.longest
    )
    return None if others is None else Share(1 - others.value, 1 - others.high, 1 - others.low, others.draws)


def _delays(search: Search, v: Verdict, innocent: Effect) -> bool:
    """Whether innocent cells close less than half of the gap over the whole run, and the cells found nearly all of it."""
    if v.over_run is None or v.over_run.value < ALL:
        return False
    cells = frozenset(cell for cell in search.cells if str(cell) in innocent.cells)
    over = over_the_run(search.forks, search.window, cells, search.ceiling, search.settings.longest)
    return over is not None and abs(over.value) < INNOCENT
