"""Which format for which tensor: predictions from one short float32 trace or from weights alone, and a recipe."""

from altgrad.advise.advice import Advice, advise_trace
from altgrad.advise.checkpoint import advise_weights
from altgrad.advise.choose import HARDWARE, Budget
from altgrad.advise.loop import PlainLoop
from altgrad.advise.run import advise, advise_loop
from altgrad.advise.trace import Trace, take_trace
from altgrad.advise.verify import verify

__all__ = [
    "HARDWARE",
    "Advice",
    "Budget",
    "PlainLoop",
    "Trace",
    "advise",
    "advise_loop",
    "advise_trace",
    "advise_weights",
    "take_trace",
    "verify",
]
