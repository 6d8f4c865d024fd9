"""Sweeps from the matrix file to finished runs: what is planned, estimated, shown, made and left alone."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from altgrad.errors import AltGradError, SweepError
from altgrad.records.lock import RunLock
from altgrad.sweep import SweepOptions, describe_plan, describe_result, estimate, plan_sweep, run_sweep
from altgrad.sweep.estimate import Estimate, calibrate, estimate_run, measure_finished, schedule
from altgrad.sweep.job import State, position
from altgrad.sweep.plan import PlannedRun
from altgrad.sweep.progress import SweepProgress, duration
from altgrad.training.config.loading import dump_config, load_config
from altgrad.training.run.folder import plan_run
from tests.sweep.fakes import FAKE_RUN, wait_until

ROOT = Path(__file__).parents[2]
TINY = {
    "name": "tiny", "max_steps": 30, "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8},
    "data": {"batch_size": 4, "max_bytes": 50_000}, "evaluation": {"interval": 10, "batches": 1},
    "checkpoint_interval": 5, "optimizer": {"warmup_steps": 2},
}  # fmt: skip


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """A file with two formats and two seeds of a tiny model."""
    file = tmp_path / "formats.yaml"
    content = {"base": TINY, "seeds": [1, 2], "matrix": {"fp8_format": ["E3M4", "E5M2"]}}
    file.write_text(yaml.safe_dump(content))
    return file


def faked(run: PlannedRun, threads: int):
    return replace(run.job(threads), command=(sys.executable, str(FAKE_RUN), "{config}"))


def said(function, *arguments) -> str:
    stream = io.StringIO()
    function(*arguments, console=Console(file=stream, width=300))
    return stream.getvalue()


def test_runs_are_named_by_their_content_as_the_run_command_names_them(matrix: Path, tmp_path: Path) -> None:
    plan = plan_sweep(matrix, tmp_path / "runs")
    assert [run.config.name for run in plan.runs] == ["tiny-e3m4", "tiny-e5m2"] * 2
    for run in plan.runs:
        assert run.folder == plan_run(load_config(yaml.safe_load(run.job().config))).path
    assert len({run.name for run in plan.runs}) == 4
    assert plan_sweep(matrix).runs[0].folder.parent == Path("runs/formats")
    assert plan.count() == {State.MISSING: 4}
    assert not (tmp_path / "runs").exists(), "planning writes nothing"


def test_only_what_is_missing_is_run_and_more_seeds_extend(matrix: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    first = run_sweep(plan_sweep(matrix, out, ["max_steps=3"]), SweepOptions(jobs=2), make_job=faked)
    assert first.count("done") == 4
    text = said(describe_result, first)
    assert "4 runs: 4 completed" in text
    assert f"altgrad report {out}" in text.replace("\n", "")
    extended = plan_sweep(matrix, out, ["max_steps=3", "seeds=[1,2,3]"])
    assert extended.count() == {State.DONE: 4, State.MISSING: 2}
    second = run_sweep(extended, SweepOptions(jobs=2), make_job=faked)
    assert set(second.outcomes) == {run.name for run in extended.runs if run.config.seed == 3}
    assert "6 runs: 4 done before, 2 completed" in said(describe_result, second)
    assert run_sweep(plan_sweep(matrix, out, ["max_steps=3"]), make_job=faked).outcomes == {}
    assert {path.read_text() for path in out.glob("*/attempts")} == {"x"}


def test_states_are_told_apart(matrix: Path, tmp_path: Path) -> None:
    plan = plan_sweep(matrix, tmp_path / "runs")
    done, partial, failed, busy = (run.folder for run in plan.runs)
    for folder in (done, partial, failed, busy):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 3, "loss": 5.0}\n')
    (done / "result.json").write_text('{"status": "collapsed"}')
    (partial / "result.json").write_text('{"status": "interrupted"}')
    (failed / "crashes.json").write_text('{"state": "failed", "crashes": []}')
    with RunLock.acquire(busy):
        plan = plan_sweep(matrix, tmp_path / "runs")
    assert [run.state for run in plan.runs] == [State.DONE, State.PARTIAL, State.FAILED, State.BUSY]
    text = said(describe_plan, plan, SweepOptions(jobs=2), lambda config: Estimate(60.0, "a guess"))
    assert "4 runs" in text
    assert "1 done, 1 to resume, 1 failed before, 1 running in another process" in text
    assert "about 2 min with 2 runs at a time" in text
    assert "by a guess" in text


WRONG = {
    "layer": ({"exclude": [["haed"]]}, "exclude pattern 'haed' matches no module; closest names: head"),
    "override": (
        {"formats": "x:E4M3 w:E4M3 dy:E4M3; name='blocks.3.mlp.up': FP32"},
        "'blocks.3.mlp.up' matches no module",
    ),
    "blocks": ({"formats": {"uniform": "MXFP8", "whole_blocks": True}}, "is not a multiple of MXFP8's block 32"),
    "option": ({"optimizer.options": {"nu": 1}}, "adamw does not take nu"),
    "optimizer": ({"optimizer": {"name": "adamv"}}, "did you mean madam, adamw"),
    "context": ({"model.block_size": 100_000}, "use more text, a smaller model.block_size"),
    "fallback": ({"enable_emergency_shift": True, "shift.chain": {"E3M4": "FP32"}}, "end it with null"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_run_could_do_is_refused_before_any_starts(name: str, tmp_path: Path) -> None:
    wrong, says = WRONG[name]
    file = tmp_path / "m.yaml"
    second = {"max_steps": 5, **({} if "formats" in wrong else {"fp8_format": "E3M4"}), **wrong}
    file.write_text(yaml.safe_dump({"base": TINY, "include": [{"fp8_format": "E5M2"}, second]}))
    with pytest.raises(AltGradError, match=f"m.yaml: .*{says}"):
        plan_sweep(file, tmp_path / "runs")


def test_runs_that_differ_by_what_an_optimizer_may_refuse_are_each_set_up(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    base = {**TINY, "optimizer": {"reset_every": 2}}
    file.write_text(yaml.safe_dump({"base": base, "matrix": {"optimizer.reset_moments": ["both", "second"]}}))
    with pytest.raises(AltGradError, match="take sr_adamw"):
        plan_sweep(file, tmp_path / "runs")
    file.write_text(yaml.safe_dump({"base": base, "include": [{"optimizer.name": "sgd", "optimizer.momentum": 0.0}]}))
    with pytest.raises(AltGradError, match="sgd with momentum 0 keeps no moment"):
        plan_sweep(file, tmp_path / "runs")


def test_failures_are_listed_and_the_others_are_done(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    pair = [{"name": "a-ok", "fp8_format": "E3M4"}, {"name": "a-segfault", "fp8_format": "E5M2"}]
    file.write_text(yaml.safe_dump({"base": TINY, "include": pair, "overrides": {"max_steps": 3}}))
    result = run_sweep(plan_sweep(file, tmp_path / "runs"), SweepOptions(jobs=2), make_job=faked)
    text = said(describe_result, result)
    assert (result.count("done"), result.count("failed")) == (1, 1)
    assert "1 completed, 1 failed" in text
    assert "ended by SIGSEGV" in text
    assert "the same command tries the failed runs again" in text


def measured(tmp_path: Path, name: str, seconds: float, **changes) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config({**TINY, **changes})))
    (folder / "result.json").write_text(json.dumps({"status": "completed", "steps": 30, "wall_s": seconds}))
    return folder


def test_estimates_rest_on_the_runs_that_are_most_alike(tmp_path: Path) -> None:
    folders = [
        measured(tmp_path, "a", 30.0),
        measured(tmp_path, "b", 60.0, fp8_format="E3M4"),
        measured(tmp_path, "c", 66.0, fp8_format="E5M2"),
        measured(tmp_path, "d", 90.0, fp8_format="E3M4", weight_storage="grid"),
        measured(tmp_path, "large", 9000.0, model={"n_layer": 9}),
    ]
    (tmp_path / "empty").mkdir()
    (folders[1] / "sweep.json").write_text('{"seconds": 64.0}')
    found = measure_finished([*folders, tmp_path / "empty"])
    assert len(found) == 5

    def estimate(**changes) -> Estimate | None:
        return estimate_run(load_config({**TINY, "max_steps": 60, **changes}), found)

    assert estimate() == Estimate(60.0, "1 finished run like it")
    assert estimate(fp8_format="E2M5") == Estimate(126.0 + 2.0, "2 finished runs like it")
    assert estimate(optimizer={"name": "sgd"}) == Estimate(2.1 * 60, "4 finished runs of its model size")
    assert estimate(model={"n_layer": 3}) is None
    assert estimate(data={**TINY["data"], "batch_size": 8}) is None


def test_a_calibration_times_the_steps_and_counts_evaluations(tmp_path: Path) -> None:
    config = load_config({**TINY, "max_steps": 1000, "evaluation": {"interval": 100, "batches": 3}})

    def job(short, scratch: Path):
        assert short.max_steps == 16
        run = PlannedRun(short, {}, scratch / "calibration", State.MISSING)
        return replace(faked(run, 1), environment={"FAKE_STEP_S": "0.02"})

    found = calibrate(config, job)
    steps_worth = 1000 + 12 * 3 / 3
    assert 0.02 * steps_worth < found.seconds < 0.02 * steps_worth + 20  # and a process that starts on a busy machine
    assert found.source == "a calibration of 16 steps"
    with pytest.raises(SweepError, match=r"calibration of tiny failed: .*does not divide"):
        calibrate(config, lambda short, scratch: job(short.model_copy(update={"name": "x-usage"}), scratch))


def test_a_calibration_that_takes_too_long_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "CALIBRATION_LIMIT_S", 0.05)

    def job(short, scratch: Path):
        run = PlannedRun(short, {}, scratch / "calibration", State.MISSING)
        return replace(faked(run, 1), environment={"FAKE_STEP_S": "3"})

    with pytest.raises(SweepError, match=r"took no 6 steps in 0.05 s; .*--no-estimate"):
        calibrate(load_config(TINY), job)


def test_schedules_fill_the_slots_in_order() -> None:
    assert schedule([], 3) == 0
    assert schedule([1, 2, 3], 1) == 6
    assert schedule([4, 1, 1, 1], 2) == 4
    assert schedule([1, 1, 4], 2) == 5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (130, "2 min"), (5940, "99 min"), (12_060, "3 h 21 min"), (190_000, "2 d 5 h")]
)  # fmt: skip
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_live_table_shows_runs_and_what_is_left(matrix: Path, tmp_path: Path) -> None:
    plan = plan_sweep(matrix, tmp_path / "runs", ["max_steps=3"])
    jobs = [faked(run, 1) for run in plan.runs]
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, force_interactive=True, width=120, color_system=None)
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "metrics.jsonl").write_text('{"kind": "step", "step": 2, "loss": 4.5, "elapsed_s": 20.0}\n')
    from altgrad.sweep.local import Event

    with SweepProgress(
        jobs, already_done=5, slots=2, estimates=dict.fromkeys((j.name for j in jobs), 30.0), console=terminal
    ) as p:
        assert p.eta_s() == 60
        p(Event("started", jobs[0]))
        assert p.eta_s() == 60  # 10 s of the running one, then 30 after it and 60 on the other slot
        p(Event("crashed", jobs[0], crash={"reason": "ended by SIGKILL", "step": 2}))
        p(None)
    shown = stream.getvalue()
    for part in (
        "5 of 9 done",
        "1 crash",
        "60 s left",
        "tiny: 5 of 9 done",  # what all names begin with is said once
        jobs[0].name.removeprefix("tiny-"),
        "2/3",
        "4.500",
        "10 s",
        "crashed at step 2: ended by SIGKILL",
    ):
        assert part in shown


def test_a_terminal_that_cannot_redraw_gets_lines_as_a_log_does(matrix: Path, tmp_path: Path) -> None:
    """Nothing was shown under TERM=dumb until the end."""
    from altgrad.sweep.local import Event

    (job, *_) = (faked(run, 1) for run in plan_sweep(matrix, tmp_path / "runs", ["max_steps=3"]).runs)
    stream = io.StringIO()
    with SweepProgress([job], console=Console(file=stream, force_terminal=True, _environ={"TERM": "dumb"})) as progress:
        progress(Event("started", job))
        assert f"{job.name} starts" in stream.getvalue()


def test_the_live_table_fits_its_terminal_and_goes_when_all_is_done(matrix: Path, tmp_path: Path) -> None:
    from altgrad.sweep.local import Event

    jobs = [replace(faked(run, 1), name="x" * 60 + run.name) for run in plan_sweep(matrix, tmp_path / "runs").runs]
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, force_interactive=True, width=80, color_system=None)
    with SweepProgress(jobs, console=terminal) as progress:
        progress(Event("started", jobs[0]))
        progress(None)
        assert "tokens/s" in stream.getvalue()
        drawn = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", stream.getvalue())]
        assert max(map(len, drawn)) <= 80
        assert any(jobs[0].name[-12:] in line for line in drawn)
        at = stream.tell()
        progress(Event("stopped", jobs[0]))
    assert "tokens/s" not in stream.getvalue()[at:]


def test_unusable_options_are_refused(matrix: Path, tmp_path: Path) -> None:
    plan = plan_sweep(matrix, tmp_path / "runs")
    with pytest.raises(SweepError, match="executor 'slurm' is unknown; use one of local, ray"):
        run_sweep(plan, SweepOptions(executor="slurm"))
    with pytest.raises(SweepError, match="--jobs 9999999; use 1 to 1024"):
        describe_plan(plan, SweepOptions(jobs=9999999))
    with pytest.raises(SweepError, match="--jobs 0; use 1 to 1024"):
        run_sweep(plan, SweepOptions(jobs=0))
    with pytest.raises(SweepError, match="is a file; choose a folder"):
        plan_sweep(matrix, matrix)
    on_gpu = plan_sweep(matrix, tmp_path / "runs", ["device=cuda"])
    assert {run.job().gpus for run in on_gpu.runs} == {1}
    with pytest.raises(SweepError, match=r"needs 1 GPU\(s\) and there are 0 device slots"):
        run_sweep(on_gpu, SweepOptions(devices=[]))


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the run's process in /proc")
def test_a_real_sweep_survives_kill_9_of_its_run_and_ctrl_c_and_goes_on(tmp_path: Path) -> None:
    """The real command with real training: the run is killed, resumes, is interrupted, and is finished by a repeat."""
    file, out = tmp_path / "m.yaml", tmp_path / "runs"
    long = {**TINY, "max_steps": 400, "checkpoint_interval": 50, "evaluation": {"interval": 200, "batches": 1}}
    file.write_text(yaml.safe_dump({"base": long, "matrix": {"fp8_format": ["E3M4"]}}))
    command = [sys.executable, "-m", "altgrad", "sweep", str(file), "--out", str(out), "--jobs", str(os.cpu_count())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = plan_sweep(file, out).runs[0]
    sweep = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: position(run.folder).step >= 10, 120)
    os.kill(children(sweep.pid)[0], signal.SIGKILL)
    wait_until(lambda: (run.folder / "crashes.json").exists(), 60)
    killed_at = json.loads((run.folder / "crashes.json").read_text())["crashes"][0]["step"]
    wait_until(lambda: position(run.folder).step >= killed_at + 10, 120)
    sweep.send_signal(signal.SIGINT)
    shown, log = sweep.communicate(timeout=200)
    assert sweep.returncode == 130, log
    assert "1 stopped" in shown
    assert "the same command goes on" in shown
    assert plan_sweep(file, out).runs[0].state is State.PARTIAL

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "1 completed" in again.stdout
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 401))
    assert json.loads((run.folder / "crashes.json").read_text())["crashes"][0]["exit_code"] == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [run.name]
