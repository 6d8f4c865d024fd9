"""Run folders: resumed, not repeated, consistent after a stop at any moment, and honest about collapse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from altgrad.analysis.comparability import unpaired
from altgrad.errors import ConfigError, DataError, RunBusyError
from altgrad.records import files
from altgrad.records.documents import read_json, write_environment
from altgrad.records.lock import RunLock
from altgrad.records.metrics_log import cut_back, record_of
from altgrad.records.run import read_run
from altgrad.training.config.loading import load_config
from altgrad.training.format_runner import (
    FormatExperimentRunner,
    RunListener,
    last_good_checkpoint,
    run_format_experiment,
)
from altgrad.training.model import GPT, GPTConfig
from altgrad.training.run import checkpoint as checkpoint_module
from altgrad.training.trainer import Trainer
from tests.training.tiny import TINY, losses, metrics, tiny_config, tiny_corpus

GRID = {"fp8_format": "E3M4", "weight_storage": "grid", "rounding": "stochastic"}


class Notes(RunListener):
    def __init__(self):
        self.lines, self.steps = [], []

    def said(self, line):
        self.lines.append(line)

    def stepped(self, record, tokens_per_s):
        self.steps.append(record.step)


class StopAt(Notes):
    """Sends this process the signal of Ctrl-C at a step."""

    def __init__(self, step, number=signal.SIGINT):
        super().__init__()
        self.step, self.number = step, number

    def stepped(self, record, tokens_per_s):
        super().stepped(record, tokens_per_s)
        if record.step == self.step:
            os.kill(os.getpid(), self.number)


def run(tmp_path, *overrides, listener=None, model_given=None, **top_level):
    config = tiny_config(*overrides, **{"runs_dir": str(tmp_path / "runs"), "max_steps": 14, **top_level})
    return FormatExperimentRunner(config, model_given, tiny_corpus(), listener=listener or Notes()).run()


def test_a_run_leaves_its_folder_and_a_finished_one_is_not_repeated(tmp_path):
    notes = Notes()
    result = run(tmp_path, listener=notes, **GRID)
    assert result.status == "completed"
    assert notes.steps == list(range(1, 15))
    assert result.run_dir.name == result.run_id == f"tiny-s7-{result.config_hash[:8]}"
    names = {p.name for p in result.run_dir.iterdir()}
    assert names >= {"config.yaml", "env.json", "metrics.jsonl", "result.json", "checkpoints"}
    assert [m["step"] for m in metrics(result.run_dir, "eval")] == [0, 10, 14]
    assert json.loads((result.run_dir / "result.json").read_text())["final_loss"] == losses(result.run_dir)[14]
    stall = [m["stall_rate"] for m in metrics(result.run_dir) if m["step"] > 2]
    assert result.stall_rate == pytest.approx(sum(stall) / len(stall))

    before = (result.run_dir / "metrics.jsonl").read_bytes()
    again_notes = Notes()
    again = run(tmp_path, listener=again_notes, **GRID)
    assert again.already_finished
    assert again.as_dict() == result.as_dict()
    assert again_notes.steps == []
    assert (result.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_changed_config_is_another_folder_and_paths_are_not(tmp_path):
    first = run(tmp_path)
    assert run(tmp_path, "optimizer.lr=0.02").run_dir != first.run_dir
    moved = run(tmp_path, runs_dir=str(tmp_path / "elsewhere"))
    assert moved.run_id == first.run_id
    assert losses(moved.run_dir) == losses(first.run_dir)


def test_the_environment_is_recorded(tmp_path):
    result = run(tmp_path, **GRID)
    env = json.loads((result.run_dir / "env.json").read_text())
    assert env["torch"] == version("torch")
    assert env["threads"] == 1
    assert env["data_fingerprint"] == tiny_corpus().fingerprint == result.data_fingerprint
    assert env["format"]["max"] == 124
    assert {"altgrad", "python", "numpy", "numba", "device", "commit"} <= set(env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_same_command_continues(tmp_path, number):
    whole = run(tmp_path / "whole", **GRID)
    handler = signal.getsignal(number)
    stopped = run(tmp_path, listener=StopAt(8, number), **GRID)
    assert signal.getsignal(number) is handler
    assert (stopped.status, stopped.steps, stopped.details["signal"]) == ("interrupted", 8, number)
    assert json.loads((stopped.run_dir / "result.json").read_text())["status"] == "interrupted"
    notes = Notes()
    finished = run(tmp_path, listener=notes, **GRID)
    assert notes.steps == list(range(9, 15))
    assert finished.status == "completed"
    assert losses(finished.run_dir) == losses(whole.run_dir)
    assert finished.details["resumed_after"] == [8]


def test_two_signals_at_once_are_the_request_and_the_end_without_a_traceback():
    """Both wait when Python looks: the one that comes second must still find a handler."""
    script = (
        "import os, signal\n"
        "from altgrad.training.run.stop import StopRequest\n"
        "both = (signal.SIGINT, signal.SIGTERM)\n"
        "with StopRequest():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
        "    for number in both: os.kill(os.getpid(), number)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)\n"
        "    while True: pass\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")


def test_threads_are_recorded_and_restored(tmp_path):
    stopped = run(tmp_path, "threads=2", listener=StopAt(4))
    seen = []
    notes = Notes()
    notes.stepped = lambda record, rate: seen.append(torch.get_num_threads())
    run(tmp_path, "threads=1", listener=notes)
    assert set(seen) == {2}
    assert "keeps them" in " ".join(notes.lines)
    assert torch.get_num_threads() == 1
    assert json.loads((stopped.run_dir / "env.json").read_text())["threads"] == 2


def test_a_resume_in_another_environment_is_announced(tmp_path):
    stopped = run(tmp_path, listener=StopAt(4))
    begun = read_json(stopped.run_dir / "env.json").content
    write_environment(stopped.run_dir, {**begun, "torch": "1.0"})
    notes = Notes()
    run(tmp_path, listener=notes)
    told = [line for line in notes.lines if "began with" in line]
    assert len(told) == 1
    assert f"torch 1.0 and goes on with {version('torch')}" in told[0]


class Killed(BaseException):
    """Stands in for SIGKILL at a file operation: nothing after it happens."""


@pytest.mark.parametrize("operation", ["replace", "rename", "fsync", "write"])
def test_killed_at_any_file_operation_the_losses_are_the_same(tmp_path, monkeypatch, operation):
    options = {**GRID, "max_steps": 6, "checkpoint_interval": 2, "evaluation": {"interval": 3, "batches": 1}}
    whole = losses(run(tmp_path / "whole", **options).run_dir)
    real, calls, killed_at = getattr(os, operation), [], None

    def counted(*arguments, **named):
        calls.append(operation)
        if len(calls) == killed_at:
            if operation == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])  # a torn line
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(files.shutil, "rmtree", lambda *a, **k: None if killed_at else shutil_rmtree(*a, **k))
    monkeypatch.setattr(os, operation, counted)
    run(tmp_path / "count", **options)
    total = len(calls)
    assert total >= 4
    for killed_at in range(1, total + 1, max(1, total // 4)):
        calls.clear()
        folder = tmp_path / f"killed{killed_at}"
        with pytest.raises(Killed):
            run(folder, **options)
        killed_at = None
        result = run(folder, **options)
        assert result.status == "completed"
        assert losses(result.run_dir) == whole


shutil_rmtree = shutil.rmtree


def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_used(tmp_path):
    whole = run(tmp_path / "whole", **GRID)
    stopped = run(tmp_path, listener=StopAt(12), **GRID)
    newest = checkpoint_module.checkpoints(stopped.run_dir / "checkpoints")[0]
    assert newest.name == "step-00000012"
    (newest / "state.json").write_text("{}")
    notes = Notes()
    finished = run(tmp_path, listener=notes, **GRID)
    assert notes.steps == list(range(11, 15))
    assert any("step-00000012" in line and "damaged" in line for line in notes.lines)
    assert losses(finished.run_dir) == losses(whole.run_dir)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": s}) for s in range(1, 8)]
    path.write_text("\n".join(lines) + '\n{"kind": "step", "st')
    assert not cut_back(path, 5)
    assert [record_of(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3, 4, 5]
    assert not cut_back(path, 5)
    assert not cut_back(tmp_path / "none.jsonl", 5)


def test_a_second_process_is_refused(tmp_path):
    result = run(tmp_path, listener=StopAt(3))
    with RunLock.acquire(result.run_dir), pytest.raises(RunBusyError):
        run(tmp_path)


def test_checkpoint_dir_is_used_as_given_and_never_shared(tmp_path):
    given = tmp_path / "checkpoints" / "mine"
    first = run(tmp_path, checkpoint_dir=str(given))
    assert (given / "step-00000014").is_dir()
    assert not (first.run_dir / "checkpoints").exists()
    notes = Notes()
    second = run(tmp_path, "seed=8", listener=notes, checkpoint_dir=str(given))
    other = tmp_path / "checkpoints" / f"mine-{second.config_hash[:8]}"
    assert (other / "step-00000014").is_dir()
    assert any(str(other) in line for line in notes.lines)
    assert second.details["checkpoint_dir"] == str(other)


def test_a_model_of_ones_own_is_part_of_the_runs_identity(tmp_path):
    config = tiny_config(runs_dir=str(tmp_path), max_steps=2)
    runs = [FormatExperimentRunner(config, GPT(GPTConfig(256, 1, 2, 32, 16), seed=s), tiny_corpus()) for s in (1, 1, 2)]
    assert runs[0].run_dir == runs[1].run_dir != runs[2].run_dir
    assert runs[0].run_dir != FormatExperimentRunner(config, data_dir=tiny_corpus()).run_dir
    assert runs[0].run().status == "completed"


def test_run_format_experiment_takes_a_file_and_overrides(tmp_path):
    (tmp_path / "text.txt").write_text("some text to train on. " * 100)
    (tmp_path / "e.yaml").write_text(
        "name: mine\nmax_steps: 2\nmodel: {n_layer: 1, n_embd: 16, n_head: 2, block_size: 8}\n"
    )
    overrides = [f"runs_dir={tmp_path}/runs", "data.source=text", f"data.path={tmp_path}/text.txt", "threads=1"]
    result = run_format_experiment(tmp_path / "e.yaml", "cpu", overrides=overrides)
    assert (result.name, result.steps, result.status) == ("mine", 2, "completed")
    with pytest.raises(DataError, match="does not exist"):
        run_format_experiment(tmp_path / "e.yaml", overrides=[*overrides, "data.path=/nowhere"])


FREEZE = {
    "fp8_format": "E7M0",
    "weight_storage": "grid",
    "max_steps": 60,
    "optimizer": {"lr": 1e-9, "warmup_steps": 1},
    "verdict": {"freeze_window": 10, "divergence_window": 10, "freeze_improvement": 1.0, "freeze_smoothing": 4},
}


def test_a_collapse_stops_the_run_with_its_evidence_and_both_states(tmp_path):
    result = run(tmp_path, **FREEZE)
    assert (result.status, result.steps) == ("collapsed", 21)
    assert result.verdict["kind"] == "freeze"
    assert (result.verdict["onset_step"], result.verdict["detected_step"]) == (2, 21)  # seen by evaluations 10 and 20
    events = [e for e in metrics(result.run_dir, "event") if e["event"] == "verdict"]
    assert [e["step"] for e in events] == [21]
    kept = result.run_dir / "checkpoints"
    assert (kept / "collapsed-00000021").is_dir()
    assert (kept / "last-good-00000000").is_dir()
    reports = list((kept / "failure_reports").iterdir())
    assert {p.suffix for p in reports} >= {".md", ".html"}
    assert os.path.exists(result.details["failure_report"])
    assert run(tmp_path, **FREEZE).already_finished


def test_a_collapse_can_be_trained_through(tmp_path):
    result = run(tmp_path, "verdict.stop=false", **{**FREEZE, "max_steps": 25})
    assert (result.status, result.steps) == ("collapsed", 25)
    assert result.verdict["detected_step"] == 21


def test_the_last_good_checkpoint_is_finite_and_before_the_onset(tmp_path):
    for step, value in ((0, 1.0), (5, 1.0), (10, float("nan")), (15, 1.0)):
        state = {"trainer": {"model": {"w": torch.full((3,), value)}}}
        checkpoint_module.save_checkpoint(tmp_path, step, state)
    assert last_good_checkpoint(tmp_path, 12).name == "step-00000005"
    assert last_good_checkpoint(tmp_path, 0) is None


def test_e0m7_and_e1m6_are_one_grid_under_amax_scaling(tmp_path):
    results = [run(tmp_path, fp8_format=f, weight_storage="grid", max_steps=25) for f in ("E0M7", "E1M6")]
    one, other = (losses(r.run_dir) for r in results)
    assert one == other
    assert results[0].final_val_loss == results[1].final_val_loss
    assert len(one) == 25


def test_the_monitors_records_go_into_the_metrics_and_change_no_loss(tmp_path):
    options = {"fp8_format": "E3M4", "weight_storage": "grid", "max_steps": 8, "checkpoint_interval": 4}
    plain = run(tmp_path / "plain", **options)
    watched = run(tmp_path, "monitor.enabled=true", "monitor.interval=2", **options)
    assert losses(watched.run_dir) == losses(plain.run_dir)
    records = metrics(watched.run_dir, "monitor")
    assert {"weight", "input", "grad_output"} <= {r["role"] for r in records}
    assert max(r["step"] for r in records) >= 7
    assert all(isinstance(r["layer"], str) for r in records)


def test_an_emergency_shift_is_recorded_and_survives_a_resume(tmp_path):
    options = {
        "fp8_format": "E7M0",
        "weight_storage": "grid",
        "enable_emergency_shift": True,
        "shift": {"stall_patience": 2, "stall_threshold": 0.3},
        "max_steps": 16,
    }
    whole = run(tmp_path / "whole", **options)
    shifts = [e for e in metrics(whole.run_dir, "event") if e["event"] == "shift"]
    assert [(e["step"], e["from_format"], e["to_format"]) for e in shifts] == [(4, "E7M0", "E5M2")]
    assert whole.interventions[0]["kind"] == "shift"
    run(tmp_path, listener=StopAt(9), **options)
    assert losses(run(tmp_path, **options).run_dir) == losses(whole.run_dir)


def test_a_shift_with_nowhere_to_go_is_said(tmp_path):
    without_link = {**GRID, "fp8_format": "E4M3"}
    notes = Notes()
    run(tmp_path / "a", listener=notes, enable_emergency_shift=True, **without_link)
    silent = Notes()
    run(tmp_path / "b", "shift.chain={E4M3: E3M4}", listener=silent, enable_emergency_shift=True, **without_link)
    assert any("E4M3 has no fallback" in line for line in notes.lines)
    assert not any("fallback" in line for line in silent.lines)


# -- a person's own model by name --------------------------------------------------------------------------------------

FACTORY = """
from torch import nn
from altgrad.training import GPT, GPTConfig

class Pair(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding, self.out = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, tokens):
        return self.out(self.embedding(tokens))

def make(vocab_size, width=16):
    return Pair(vocab_size, width)

def text(vocab_size):
    return "no module"


def drawn(vocab_size):
    import random

    import numpy

    model = make(vocab_size)
    nn.init.constant_(model.out.weight, float(numpy.random.rand()) + random.random())
    return model


def failing(vocab_size):
    return nn.Linear(-1, 2)
"""


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ALTGRAD_FACTORIES", "elsewhere, own_models")
    shared = {**TINY, "max_steps": 4, "runs_dir": str(tmp_path / "runs"), "fp8_format": "E4M3"}
    return {**shared, "model": {"block_size": 16, "factory": "own_models:make", "options": {"width": 24}}}


def test_a_config_names_the_function_that_makes_the_model(own_model):
    state = torch.get_rng_state()
    first = FormatExperimentRunner(own_model).run()
    assert torch.equal(torch.get_rng_state(), state)
    assert FormatExperimentRunner(own_model).run().already_finished
    assert read_run(first.run_dir).config["model"]["factory"] == "own_models:make"
    trainer = Trainer(load_config(own_model))
    assert trainer.model.out.in_features == 24
    assert "out" in trainer.formats.manifest.swapped
    wider = FormatExperimentRunner({**own_model, "model": {**own_model["model"], "options": {"width": 32}}})
    assert wider.run_dir != first.run_dir


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"factory": "os:system"}, "ALTGRAD_FACTORIES=os"),
        ({"factory": "own_models:nothing"}, "cannot be found"),
        ({"factory": "own_models:make", "options": {"depth": 3}}, "does not take vocab_size and model.options"),
        ({"factory": "own_models:text"}, "made a str"),
        ({"factory": "own_models:failing"}, "own_models:failing failed by RuntimeError"),
        ({"factory": "own_models"}, "model.factory = 'own_models'"),
        ({"factory": "../x:y"}, "model.factory"),
    ],
    ids=str,
)
def test_a_factory_that_cannot_be_used_is_refused(own_model, model, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        FormatExperimentRunner({**own_model, "model": {"block_size": 16, **model}})


def test_weights_that_numpy_and_python_draw_follow_the_seed_too(own_model):
    config = {**own_model, "model": {"block_size": 16, "factory": "own_models:drawn"}}
    assert FormatExperimentRunner(config).run_dir == FormatExperimentRunner(config).run_dir
    assert FormatExperimentRunner(config).plan.hash != FormatExperimentRunner({**config, "seed": 8}).plan.hash


class Gives(torch.nn.Module):
    """Gives what it is told, of the tokens and of right logits; takes no more than 16 tokens, 256 of them."""

    def __init__(self, made):
        super().__init__()
        self.embed, self.out, self.made = torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256), made

    def forward(self, tokens):
        if tokens.shape[1] > 16:
            raise ValueError("16 tokens at most")
        return self.made(self.out(self.embed(tokens)))


@pytest.mark.parametrize(
    "made", [lambda y: y, lambda y: (y, None), lambda y: {"logits": y}], ids=["alone", "tuple", "dict"]
)
def test_models_of_ones_own_give_logits_in_several_ways(tmp_path, made):
    assert run(tmp_path, model_given=Gives(made), max_steps=2).status == "completed"


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (Gives(lambda y: (y.sum(), y)), {}, r"Gives gives no loss by IndexError: .*it must take int64 tokens"),
        (Gives(lambda y: y[0]), {}, "gives no loss by ValueError"),
        (Gives(lambda y: y), {"model": {"block_size": 20}}, r"ValueError: 16 tokens at most; .*20 in a row"),
        (Gives(lambda y: y).requires_grad_(False), {}, "no parameter to train"),
    ],
    ids=["loss-first", "shape", "length", "frozen"],
)
def test_a_model_that_cannot_be_trained_is_refused_before_a_step(tmp_path, model, settings, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, model_given=model, **settings)


def test_a_model_that_another_run_has_trained_is_not_taken_for_a_fresh_one(tmp_path):
    model, runs = Gives(lambda y: y), []
    runs.append(run(tmp_path, model_given=model, max_steps=3, name="first").run_dir)
    with pytest.warns(UserWarning, match=r"was trained by the run first-s\d+-\w+: .*make a model for each run"):
        runs.append(run(tmp_path, model_given=model, max_steps=3, name="second").run_dir)
    (remark,) = unpaired([read_run(one) for one in runs])
    assert remark.startswith("Of seed")
    assert "began from different weights of the same Gives" in remark
    assert unpaired([read_run(runs[0])] * 2) == []
