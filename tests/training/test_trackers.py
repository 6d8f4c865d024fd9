"""Trackers get what metrics.jsonl gets, in W&B's and TensorBoard's own formats, and never fail a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from altgrad.training.config.experiment import ExperimentConfig, TrackersSection
from altgrad.training.run.trackers import TRACKERS, make_trackers, scalars

RECORDS = [
    {"kind": "step", "step": 1, "loss": 5.5, "lr": 1e-3, "finite": True, "stall_rate": None},
    {"kind": "step", "step": 2, "loss": "nan", "lr": 1e-3, "finite": False},
    {"kind": "eval", "step": 2, "val_loss": 5.25, "perplexity": 190.5},
    {"kind": "monitor", "step": 2, "layer": "blocks.0.mlp.up", "role": "weight", "stall": 0.5},
    {"kind": "event", "step": 2, "event": "clip", "overflow_rate": 0.02},
]
RESULT = {"status": "completed", "final_loss": 5.5, "steps": 2, "verdict": None}


def config(**on: bool) -> ExperimentConfig:
    return ExperimentConfig(name="tracked", trackers=TrackersSection(**on))


def test_every_tracker_of_the_config_has_a_row() -> None:
    assert set(TRACKERS) == set(TrackersSection.model_fields)


def test_records_become_named_numbers() -> None:
    named = [scalars(record) for record in RECORDS]
    assert named[0] == {"train/loss": 5.5, "train/lr": 1e-3}
    assert named[1]["train/loss"] != named[1]["train/loss"]
    assert named[2] == {"eval/val_loss": 5.25, "eval/perplexity": 190.5}
    assert named[3] == {"monitor/blocks.0.mlp.up/weight/stall": 0.5}
    assert named[4] == {}


def test_nothing_is_opened_that_was_not_asked_for(tmp_path: Path) -> None:
    trackers = make_trackers(config(), tmp_path, "run")
    trackers.log(RECORDS[0])
    trackers.finish(RESULT)
    assert not list(tmp_path.iterdir())
    assert trackers.names == []


@pytest.mark.filterwarnings("ignore")  # of the tracker's own packages
def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    trackers = make_trackers(config(tensorboard=True), tmp_path, "tracked-s42-00000000")
    assert trackers.names == ["tensorboard"]
    for record in RECORDS:
        trackers.log(record)
    trackers.finish(RESULT)
    assert trackers.problems == []
    written = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [(e.step, e.value) for e in written.Scalars("eval/val_loss")] == [(2, 5.25)]
    assert [e.step for e in written.Scalars("train/loss")] == [1, 2]
    assert written.Scalars("monitor/blocks.0.mlp.up/weight/stall")[0].value == 0.5


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_an_offline_run_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__DISABLE_STATS": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    trackers = make_trackers(config(wandb=True), tmp_path, "tracked-s42-00000000")
    assert trackers.problems == []
    for record in RECORDS:
        trackers.log(record)
    trackers.finish(RESULT)
    assert trackers.problems == []
    stored = list(tmp_path.rglob("run-*.wandb"))
    assert len(stored) == 1
    expected = {b"train/loss", b"eval/val_loss", b"event/clip", b"tracked-s42-00000000"}
    deadline = time.monotonic() + 60
    missing = expected
    while missing and time.monotonic() < deadline:  # W&B's service writes on after finish(), record by record
        time.sleep(0.05)
        missing = {text for text in expected if text not in stored[0].read_bytes()}
    assert not missing


class Failing:
    name = "tensorboard"

    def __init__(self, at: str) -> None:
        self.at, self.logged = at, 0

    def log(self, record) -> None:
        self.logged += 1
        if self.at == "log":
            raise ConnectionError("no route")

    def finish(self, result) -> None:
        if self.at == "finish":
            raise SystemExit(3)


@pytest.mark.parametrize("at", ["open", "log", "finish"])
def test_a_failing_tracker_is_announced_once_and_left_out(at: str, tmp_path: Path, monkeypatch) -> None:
    failing, working, said = Failing(at), Failing("never"), []

    def make(*_):
        if at == "open":
            raise OSError("disk is full")
        return failing

    monkeypatch.setitem(TRACKERS, "tensorboard", make)
    monkeypatch.setitem(TRACKERS, "wandb", lambda *_: working)
    trackers = make_trackers(config(tensorboard=True, wandb=True), tmp_path, "run", said.append)
    for record in RECORDS:
        trackers.log(record)
    trackers.finish(RESULT)
    trackers.finish(RESULT)
    assert len(said) == 1
    assert said == trackers.problems
    assert "goes on without it" in said[0]
    assert failing.logged == {"open": 0, "log": 1, "finish": len(RECORDS)}[at]
    assert working.logged == len(RECORDS)


def test_a_tracker_that_is_not_installed_says_how_to_install_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    assert make_trackers(config(wandb=True), tmp_path, "run", said.append).names == []
    assert "pip install 'altgrad[wandb]'" in said[0]
