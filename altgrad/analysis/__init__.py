"""Run folders in; tables, statistics and reports out. Imports neither torch nor anything that trains."""

from altgrad.analysis.comparison import comparison_table
from altgrad.analysis.comparison_report import write_report
from altgrad.analysis.study import is_study
from altgrad.analysis.study_report import write_study
from altgrad.records.run import Curve, Metrics, Run, find_runs, read_run

__all__ = [
    "Curve",
    "Metrics",
    "Run",
    "comparison_table",
    "find_runs",
    "is_study",
    "read_run",
    "write_report",
    "write_study",
]
