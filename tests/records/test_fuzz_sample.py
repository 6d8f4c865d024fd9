"""A sample of `python -m benchmarks.fuzz_records`: no traceback, no hang, no silent case."""

import random

from benchmarks.fuzz_records import judge, make_runs


def test_damaged_folders_are_reported_or_refused(tmp_path):
    make_runs(tmp_path / "base")
    told = [judge(tmp_path / "base", tmp_path, random.Random(f"0 {number}")) for number in range(15)]
    assert [case for case in told if case[0] not in ("reported", "refused")] == []
