"""Sweeps: a matrix of experiments, planned, estimated, made in parallel processes or on a Ray cluster, and resumed.

    plan = plan_sweep("experiments/matrix/formats.yaml")
    result = run_sweep(plan, SweepOptions(jobs=2))

Runs that are done are left alone; runs that were interrupted go on. Results are read by `altgrad.analysis`.
"""

from altgrad.sweep.job import Job, Outcome, State
from altgrad.sweep.local import LocalExecutor
from altgrad.sweep.matrix import Matrix, Variant, matrix_from_mapping, read_matrix
from altgrad.sweep.plan import Plan, PlannedRun, make_plan
from altgrad.sweep.study import SweepOptions, SweepResult, describe_plan, describe_result, plan_sweep, run_sweep

__all__ = [
    "Job",
    "LocalExecutor",
    "Matrix",
    "Outcome",
    "Plan",
    "PlannedRun",
    "State",
    "SweepOptions",
    "SweepResult",
    "Variant",
    "describe_plan",
    "describe_result",
    "make_plan",
    "matrix_from_mapping",
    "plan_sweep",
    "read_matrix",
    "run_sweep",
]
