"""What to measure and when: attaches to any model and optimizer; the formulas are `altgrad.quantization`'s."""

from altgrad.monitor.monitor import Monitor
from altgrad.monitor.rank import RankLimits, effective_rank, singular_values, stable_rank
from altgrad.monitor.schedule import GROUPS, Schedule, When, make_schedule

__all__ = [
    "GROUPS",
    "Monitor",
    "RankLimits",
    "Schedule",
    "When",
    "effective_rank",
    "make_schedule",
    "singular_values",
    "stable_rank",
]
