"""A real process, killed by SIGKILL at random instants and started again, trains to bit-identical losses."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.training.tiny import losses

SCRIPT = """
import sys, torch
from altgrad.training.format_runner import FormatExperimentRunner
from tests.training.tiny import tiny_config, tiny_corpus
torch.set_num_threads(1)
overrides = ["fp8_format=E3M4", "weight_storage=grid", "rounding=stochastic", "checkpoint_interval=3", "max_steps=120"]
FormatExperimentRunner(tiny_config(*overrides, runs_dir=sys.argv[1]), data_dir=tiny_corpus()).run()
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stderr=subprocess.PIPE, env={**os.environ})


def lines(folder) -> int:
    found = list(folder.glob("*/metrics.jsonl"))
    return found[0].read_bytes().count(b"\n") if found else 0


@pytest.mark.timeout(240)
def test_killed_at_random_instants_the_losses_are_bit_identical(tmp_path):
    whole = start(tmp_path / "whole")
    generator = random.Random(os.environ.get("ALTGRAD_KILL_SEED", "11"))
    kills = 0
    for _ in range(3):
        process = start(tmp_path / "killed")
        wanted = lines(tmp_path / "killed") + generator.randint(2, 25)
        while process.poll() is None and lines(tmp_path / "killed") < wanted:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors.decode()
        kills += process.returncode != 0
    assert kills >= 2
    process = start(tmp_path / "killed")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors.decode()
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert one.name == other.name
    assert losses(other) == losses(one)
    assert sorted(losses(one)) == list(range(1, 121))
