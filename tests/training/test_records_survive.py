"""Records and losses survive kills, stops and damage: those of an unbroken run, or what is lost is counted."""

import json
import os
import signal
import subprocess
import sys

import pytest

from altgrad.records.documents import read_json, read_result
from altgrad.records.metrics_log import record_of
from altgrad.records.run import Run
from altgrad.records.verify import verify_run
from altgrad.training.format_runner import FormatExperimentRunner, RunListener
from tests.training.tiny import tiny_config, tiny_corpus

OPTIONS = {
    "fp8_format": "E3M4",
    "weight_storage": "grid",
    "max_steps": 12,
    "checkpoint_interval": 4,
    "evaluation": {"interval": 6, "batches": 1},
    "monitor": {"enabled": True, "interval": 1, "schedule": {"rank": 5}},
    "keep_checkpoints": 5,
}
TIMES = ("tokens_per_s", "elapsed_s", "rank_seconds", "reference_seconds")


class Notes(RunListener):
    """Sends this process a signal, or dies, at a step."""

    def __init__(self, stop_at=None, die_at=None):
        self.lines, self.stop_at, self.die_at = [], stop_at, die_at

    def said(self, line):
        self.lines.append(line)

    def stepped(self, record, tokens_per_s):
        if record.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        if record.step == self.die_at:
            raise Killed


class Killed(BaseException):
    """Stands in for SIGKILL: nothing after it is written."""


def run(folder, notes=None, **changes):
    base = {k: v for k, v in OPTIONS.items() if "formats" not in changes or k not in ("fp8_format", "weight_storage")}
    config = tiny_config(**{"runs_dir": str(folder), **base, **changes})
    return FormatExperimentRunner(config, data_dir=tiny_corpus(), listener=notes or Notes()).run()


def killed(folder, step):
    with pytest.raises(Killed):
        run(folder, Notes(die_at=step))


def records(folder):
    """Every line as it is, times aside."""
    lines = next(folder.glob("*/metrics.jsonl")).read_bytes().splitlines()
    return [{k: v for k, v in record_of(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


def only(folder):
    return next(folder.iterdir())


@pytest.mark.parametrize("steps", [(3,), (6, 7, 11)])
def test_records_of_a_run_that_was_killed_and_resumed_equal_an_unbroken_runs(unbroken, tmp_path, steps):
    for step in steps:
        killed(tmp_path, step)
    run(tmp_path)
    assert records(tmp_path) == records(unbroken)


def test_a_stop_between_checkpoints_changes_neither_records_nor_their_order(unbroken, tmp_path):
    for step in (3, 6, 9):
        assert run(tmp_path, Notes(stop_at=step)).status == "interrupted"
        assert verify_run(only(tmp_path)).whole
    result = run(tmp_path)
    assert result.details["resumed_after"] == [3, 6, 9]
    assert records(tmp_path) == records(unbroken)


def test_ways_of_weights_noise_and_resets_go_on_over_a_stop(tmp_path):
    """With an average of the weights deciding how they are rounded, and records whose window the stop falls into."""
    changes = {
        "formats": "tetrajet_q_ema",
        "data": {"batch_size": 4, "grad_accumulation": 2},
        "optimizer": {"name": "sr_adamw", "reset_every": 4, "reset_moments": "second", "lr": 0.01},
        "monitor": {"enabled": True, "interval": 4, "schedule": {"oscillation": 3, "reference": 5}},
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, **changes)
    for step in (5, 9):
        assert run(stopped, Notes(stop_at=step), **changes).status == "interrupted"
    run(stopped, **changes)
    assert records(stopped) == records(whole)
    found = [r for r in records(whole) if r["kind"] == "monitor"]
    assert {r["step"] for r in found if "oscillation" in r} == {1, 4, 7, 10}
    assert (
        {r["step"] for r in found if "noise_ratio" in r}
        == {r["step"] for r in found if "batch_noise_scale" in r}
        == {1, 6, 11}
    )


def test_what_the_monitor_held_back_at_a_kill_is_only_from_after_the_checkpoint(unbroken, tmp_path):
    killed(tmp_path, 6)
    steps = {r["step"] for r in records(tmp_path) if r["kind"] == "monitor"}
    assert steps >= {1, 2, 3, 4}


def test_damaged_records_are_made_again_from_a_checkpoint_before_them(unbroken, tmp_path):
    run(tmp_path, Notes(stop_at=10))
    path = only(tmp_path) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    at = next(i for i, line in enumerate(lines) if b'"step": 6,' in line)
    lines[at] = lines[at].replace(b'"step": 6,', b'"step": 7,')
    path.write_bytes(b"\n".join(lines))
    assert not verify_run(only(tmp_path)).whole
    notes = Notes()
    run(tmp_path, notes)
    assert any("damaged before step 10" in line and "after 4 are taken again" in line for line in notes.lines)
    assert records(tmp_path) == records(unbroken)
    assert verify_run(only(tmp_path)).whole


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_lost_metrics_are_made_again_from_the_start_or_counted(unbroken, tmp_path, damage):
    run(tmp_path, Notes(stop_at=10), keep_checkpoints=2)
    kept = sorted(p.name for p in (only(tmp_path) / "checkpoints").glob("step-*"))
    damage(only(tmp_path) / "metrics.jsonl")
    notes = Notes()
    run(tmp_path, notes, keep_checkpoints=2)
    if "step-00000000" not in kept:
        assert any("lost" in line for line in notes.lines)
    assert any("metrics.jsonl" in line for line in notes.lines)


def test_a_truncated_environment_is_said_and_made_again(tmp_path):
    run(tmp_path, Notes(stop_at=5))
    path = only(tmp_path) / "env.json"
    path.write_bytes(path.read_bytes()[:100])
    notes = Notes()
    assert run(tmp_path, notes).status == "completed"
    assert any("env.json is unreadable" in line and "made again" in line for line in notes.lines)
    assert read_json(path).content["threads"] == 1


def test_an_altered_result_is_not_believed_but_made_again(unbroken, tmp_path):
    before = run(tmp_path)
    path = only(tmp_path) / "result.json"
    path.write_text(path.read_text().replace('"status": "completed"', '"status": "collapsed"'))
    assert read_result(path).problem == "result.json does not match its checksum"
    assert Run(only(tmp_path)).status == "damaged"
    notes = Notes()
    again = run(tmp_path, notes)
    assert any("result.json" in line and "made again" in line for line in notes.lines)
    assert again.status == "completed"
    assert again.final_loss == before.final_loss


def test_damage_to_a_finished_runs_records_is_said_when_it_is_looked_up(tmp_path):
    run(tmp_path)
    path = only(tmp_path) / "metrics.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[3:]))
    notes = Notes()
    assert run(tmp_path, notes).already_finished
    assert any("3 lines of metrics.jsonl are lost" in line for line in notes.lines)


def test_a_run_that_began_before_there_were_checksums_goes_on(unbroken, tmp_path):
    killed(tmp_path, 6)
    folder = only(tmp_path)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record_of(line)) + "\n" for line in lines))
    run(tmp_path)
    assert records(tmp_path) == records(unbroken)
    assert verify_run(folder).whole


STORM = """
import sys
from benchmarks.storm import run_storm
for kind in ("kills", "damage", "signals", "disk"):
    for case in run_storm(kind, int(sys.argv[1]), seed=5):
        print("fault:", kind, case.case, case.what, case.faults) if case.faults else print("well:", kind, case.hits)
"""


@pytest.mark.timeout(280)
def test_a_sample_of_every_storm_passes_without_a_trace(tmp_path):
    """In a process of its own, which forks: none of pytest's threads may be there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-c", STORM, os.environ.get("ALTGRAD_STORM_COUNT", "3")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fault:" not in done.stdout
    assert done.stdout.count("well:") >= 6
