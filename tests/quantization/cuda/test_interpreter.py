"""The Triton kernels have the CPU's bits, run by Triton's interpreter on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def test_kernels_have_the_cpus_bits_in_the_interpreter():
    command = [sys.executable, "-m", "tests.quantization.cuda.interpreter_checks"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
