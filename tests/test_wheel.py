"""The wheel as a person has it: in an environment of its own, in an empty folder, without the repository (`make test-wheel`).

Every command that the README shows is run as written; settings that make it short are added at its end, and a run's folder
that the README invents is replaced by one that is there.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = [text for language, text in FENCED.findall((ROOT / "README.md").read_text()) if not language]
COMMANDS = [line for text in BLOCKS for line in text.splitlines() if line.startswith("altgrad ")]
ALONE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
SHORTER = {
    "run": "max_steps=6",
    "compare": "max_steps=6",
    "sweep": "max_steps=4 seeds=[42] fp8_format=[E3M4] weight_storage=[master]",
    "autopsy": "--dry-run",
    "advise": "--steps 6 --no-sensitivity",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `altgrad` of an environment into which only the wheel, and what it needs, was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("altgrad-*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    pip[0] = str(folder / "environment" / "bin" / "python")
    subprocess.run([*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", wheel], check=True)
    return folder / "environment" / "bin" / "altgrad"


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """Where the commands are run, one after another; each test may be the first."""
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def shown(installed, empty) -> str:
    """What a short demo printed, whose runs other commands look at."""
    return run(installed, empty, "demo", "--steps", "10", "--minutes", "0")


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """What the command printed; it ended well."""
    command = [str(installed), *arguments]
    done = subprocess.run(command, cwd=folder, env=ALONE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"altgrad {shlex.join(arguments)}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_readme_shows_its_commands():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"run", "compare", "sweep", "watch", "report", "advise"}


def test_the_wheel_holds_configs_matrices_templates_and_no_tests(installed, empty):
    code = "import altgrad, pathlib; print(*(p for p in pathlib.Path(altgrad.__file__).parent.rglob('*')), sep='\\n')"
    command = [str(installed.with_name("python")), "-c", code]
    found = subprocess.run(command, cwd=empty, env=ALONE, capture_output=True, text=True, check=True).stdout
    assert "site-packages/altgrad/__init__.py" in found
    for name in ("configs/e3m4_uniform.yaml", "matrix/formats.yaml", "comparison.html.j2", "report.css", "py.typed"):
        assert name in found
    assert "test_" not in found


def test_the_demo_the_formats_and_the_first_files(installed, empty, shown):
    assert "FP32" in shown
    assert "E3M4" in run(installed, empty, "formats")
    assert "E1M6" in run(installed, empty, "formats", "--equivalent")
    assert "nvfp4_te" in run(installed, empty, "recipes")
    run(installed, empty, "init")
    run(installed, empty, "init", "--matrix")
    run(installed, empty, "run", "experiment.yaml", "max_steps=3")
    assert "15 runs" in run(installed, empty, "sweep", "matrix.yaml", "--dry-run", "--no-estimate")


@pytest.mark.usefixtures("shown")
def test_every_command_of_the_readme(installed, empty):
    save = "import torch, safetensors.torch as s; s.save_file({'up.weight': torch.ones(8, 8)}, 'model.safetensors')"
    subprocess.run([installed.with_name("python"), "-c", save], cwd=empty, env=ALONE, check=True)
    for line in COMMANDS:
        _, verb, *arguments = shlex.split(line)
        if verb == "watch":
            _look_on(installed, empty, arguments)
            continue
        arguments = [_there(empty, argument) for argument in arguments]
        added = "" if arguments[-1:] == ["model.safetensors"] else SHORTER.get(verb, "")
        run(installed, empty, verb, *arguments, *shlex.split(added))


def _there(folder: Path, argument: str) -> str:
    """The demo's run of that format, where the README makes a run's name up."""
    invented = re.fullmatch(r"runs/(\w+)-s42-[0-9a-f]{8}", argument)
    return str(next((folder / "runs" / "demo").glob(f"{invented[1]}-*"))) if invented else argument


def _look_on(installed: Path, folder: Path, arguments: list[str]) -> None:
    """`altgrad watch` answers with its page until Ctrl-C."""
    watching = subprocess.Popen(
        [str(installed), "watch", *arguments], cwd=folder, env=ALONE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert watching.stdout is not None
        until = time.monotonic() + 60
        while (address := re.search(r"http://\S+", watching.stdout.readline())) is None:
            assert watching.poll() is None
            assert time.monotonic() < until
        with urllib.request.urlopen(address[0], timeout=60) as page:
            assert b"<html" in page.read()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=60) == 128 + signal.SIGINT
    finally:
        watching.kill()
