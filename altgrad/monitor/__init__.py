"""What to measure and when: attaches to any model and optimizer; the formulas are `altgrad.quantization`'s."""

from altgrad.monitor.added import StepTensors, add_metric, remove_metric
from altgrad.monitor.monitor import Monitor
from altgrad.monitor.oscillation import Oscillation, quantizers_of
from altgrad.monitor.rank import RankLimits, effective_rank, singular_values, stable_rank
from altgrad.monitor.schedule import GROUPS, Schedule, When, make_schedule

__all__ = [
    "GROUPS",
    "Monitor",
    "Oscillation",
    "RankLimits",
    "Schedule",
    "StepTensors",
    "When",
    "add_metric",
    "effective_rank",
    "make_schedule",
    "quantizers_of",
    "remove_metric",
    "singular_values",
    "stable_rank",
]
