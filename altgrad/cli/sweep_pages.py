"""What `altgrad sweep` does: plan, show or run, sum up, and say by the exit code how it went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from altgrad.sweep import SweepOptions, SweepResult, describe_plan, describe_result, plan_sweep, run_sweep

STOPPED = 130  # as a shell says of a command that Ctrl-C ended


def sweep(
    matrix: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    jobs: int | None,
    dry_run: bool,
    executor: str,
    address: str | None,
    devices: str | None,
    fail_on_collapse: bool,
) -> int:
    """Exit code: 0 all runs are done, 1 some failed (or collapsed, on demand), 130 stopped before the end."""
    slots = None if devices is None else [name.strip() for name in devices.split(",") if name.strip()]
    options = SweepOptions(jobs=jobs, executor=executor, address=address, devices=slots)
    plan = plan_sweep(matrix, out, overrides)
    if dry_run:
        describe_plan(plan, options)
        return 0
    result = run_sweep(plan, options)
    describe_result(result)
    return _exit_code(result, fail_on_collapse)


def _exit_code(result: SweepResult, fail_on_collapse: bool) -> int:
    if result.count("stopped"):
        return STOPPED
    collapsed = any((outcome.result or {}).get("status") == "collapsed" for outcome in result.outcomes.values())
    return int(bool(result.count("failed")) or (fail_on_collapse and collapsed))
