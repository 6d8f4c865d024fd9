"""The list of claims, in the order of the rows that they come from; questions of our own last."""

from __future__ import annotations

import re
from difflib import get_close_matches

from altgrad.errors import OptionError
from altgrad.reproduce.claim import Claim
from altgrad.reproduce.own import OWN
from altgrad.reproduce.simulations import SIMULATIONS
from altgrad.reproduce.student_teacher import PROXY
from altgrad.reproduce.tensors import TENSORS
from altgrad.reproduce.training_rows import TRAINING


def _place(claim: Claim) -> tuple[int, str]:
    found = re.match(r"\d+", claim.number)
    return int(found.group()) if found else 1000, claim.number


CLAIMS: tuple[Claim, ...] = tuple(sorted((*TENSORS, *SIMULATIONS, *TRAINING, *PROXY, *OWN), key=_place))


def find_claim(name: str) -> Claim:
    """The claim of that name.

    Raises:
        OptionError: there is none, with the nearest names.
    """
    by_name = {claim.name: claim for claim in CLAIMS}
    if name in by_name:
        return by_name[name]
    near = get_close_matches(name, by_name, n=3, cutoff=0.4)
    then = f"did you mean {', '.join(near)}?" if near else "altgrad reproduce lists them"
    raise OptionError(f"no claim is called {name!r}; {then}")
