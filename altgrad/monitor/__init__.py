"""What to measure and when: attaches to any model and optimizer; the formulas are `altgrad.quantization`'s."""

from altgrad.monitor.added import StepTensors, add_metric, remove_metric
from altgrad.monitor.monitor import Monitor
from altgrad.monitor.rank import RankLimits, effective_rank, singular_values, stable_rank
from altgrad.monitor.schedule import GROUPS, Schedule, When, make_schedule

__all__ = [
    "GROUPS",
    "Monitor",
    "RankLimits",
    "Schedule",
    "StepTensors",
    "When",
    "add_metric",
    "effective_rank",
    "make_schedule",
    "remove_metric",
    "singular_values",
    "stable_rank",
]
