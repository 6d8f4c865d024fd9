"""`altgrad formats` as a person runs it."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from altgrad.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["formats", *arguments])


def test_catalog_lists_every_format():
    from altgrad.quantization import FORMAT_REGISTRY

    output = run().output
    assert all(name in output for name in FORMAT_REGISTRY)


def test_one_format_and_the_groups():
    assert "57344" in run("fp8_e5m2").output
    groups = run("--equivalent").output
    assert any("E0M7" in line and "E1M6" in line for line in groups.splitlines())


def test_a_wrong_name_ends_in_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "altgrad", "formats", "E3M"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean E3M4" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["formats", "--help"]])
def test_help_does_not_import_torch(arguments):
    code = f"import sys; sys.argv = ['altgrad', *{arguments!r}]\nfrom altgrad.cli import main\ntry:\n main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
