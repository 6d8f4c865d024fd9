"""Why one run went wrong: counterfactual forks of a replayed run, from its symptom to the cells that caused it."""

from altgrad.autopsy.fork import Fork, Oracle, Outcome
from altgrad.autopsy.forks import Forks, Told
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.recorder import Recorder
from altgrad.autopsy.run import autopsy
from altgrad.autopsy.search import Settings
from altgrad.autopsy.verdict import Effect, Intervention, Verdict

__all__ = [
    "Effect",
    "Fork",
    "Forks",
    "Intervention",
    "Oracle",
    "Outcome",
    "Recorder",
    "Settings",
    "Told",
    "Verdict",
    "autopsy",
    "investigate",
]
