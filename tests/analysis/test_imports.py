"""Reports can be written where torch is not installed: importing and using them loads neither torch nor the upper layers."""

import subprocess
import sys

from tests.run_folders import make_run

PROGRAM = """
import sys
from altgrad.analysis import write_report
import altgrad.report.pages.failure
write_report([sys.argv[1]], sys.argv[2])
bad = ("torch", "numba", "scipy", "pandas", "pyarrow", "altgrad.cli", "altgrad.sweep", "altgrad.training", "altgrad.monitor", "altgrad.nn",
       "altgrad.optim", "altgrad.quantization")
loaded = sorted(name for name in sys.modules if name in bad)
assert not loaded, loaded
"""


def test_a_report_is_written_without_torch(tmp_path):
    run = make_run(tmp_path, "E3M4", steps=20)
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), str(tmp_path / "r.html")], capture_output=True, text=True, timeout=60
    )
    assert program.returncode == 0, program.stderr
