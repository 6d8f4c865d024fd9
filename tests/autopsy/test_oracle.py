"""Forks of a real trainer: bit-identical where nothing is changed, and an injected fault is found."""

import json
import math
import shutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from altgrad.autopsy import Recorder, autopsy, run, workers
from altgrad.autopsy.folder import check_versions, rebuild
from altgrad.autopsy.fork import LOW, TWIN, Fork
from altgrad.autopsy.forks import Forks, Told
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.loop import RunLoop, jittered
from altgrad.autopsy.oracle import LoopOracle
from altgrad.autopsy.plan import Pace
from altgrad.autopsy.search import Settings
from altgrad.autopsy.verdict import Verdict
from altgrad.errors import ConfigError, OptionError, ReportError, RunBusyError
from altgrad.nn import attach_optimizer, quantize_model, uniform
from altgrad.nn.recipe.cells import Cell
from altgrad.nn.recipe.spec import OperandSpec
from altgrad.records.lock import RunLock
from altgrad.records.metrics_log import cut_back
from altgrad.training.format_runner import FormatExperimentRunner
from altgrad.training.trainer import Trainer
from tests.training.tiny import corpus_overrides, tiny_config, tiny_trainer, train

QUICK = Settings(draws=3, most_draws=2, placebos=1, longest=40)
BROKEN = OperandSpec("E4M3", scaling={"policy": "static", "scale": 2.0**9})  # nearly all of the gradient underflows


def broken_recipe():
    return uniform("E4M3").with_cell("head", "input_grad", "grad_output", BROKEN).to_dict()


def oracle_of(steps=40, **config):
    config = config or {"formats": broken_recipe()}
    return LoopOracle(RunLoop(tiny_trainer(**config)), steps, captures=8)


@pytest.fixture(scope="module")
def oracle():
    return oracle_of()


def test_the_low_trajectory_is_the_run_and_the_twin_is_the_float32_run(oracle):
    own = [r.loss for r in train(tiny_trainer(formats=broken_recipe()), 40)]
    assert oracle.history(LOW) == own
    assert oracle.history(TWIN) == [r.loss for r in train(tiny_trainer(), 40)]


def test_an_unchanged_fork_repeats_the_run_to_the_bit(oracle):
    start = oracle.captures(LOW)[3]
    outcome = oracle.run(Fork(frozenset(oracle.cells), start, LOW, 10))
    assert list(outcome.losses) == oracle.history(LOW)[start : start + 10]
    twin = oracle.run(Fork(frozenset(), start, TWIN, 10))
    assert list(twin.losses) == oracle.history(TWIN)[start : start + 10]


def test_draws_differ_and_repeat(oracle):
    forks = [Fork(frozenset(oracle.cells), 5, LOW, 6, draw=k) for k in (0, 1, 2, 1)]
    losses = [oracle.run(fork).losses for fork in forks]
    assert losses[1] == losses[3]
    assert len({losses[0], losses[1], losses[2]}) == 3


def test_a_draw_moves_weights_by_no_more_than_one_unit_in_the_last_place():
    state = {"model": {"w": torch.randn(1000)}, "step": 3}
    moved = jittered(state, 1)
    changed = moved["model"]["w"] != state["model"]["w"]
    assert 50 < int(changed.sum()) < 250
    assert torch.equal(
        torch.nextafter(state["model"]["w"], torch.full((1000,), math.inf))[changed], moved["model"]["w"][changed]
    )
    assert moved["step"] == 3


def test_an_injected_underflow_is_found(oracle):
    verdict = investigate(Forks(oracle, budget=300), prior=oracle.prior, settings=QUICK)
    assert verdict.kind == "cause"
    assert verdict.cells == ("head.input_grad.grad_output",)
    assert verdict.mechanism in ("scale", "range")
    assert {i.name: i.refused for i in verdict.interventions}["nearest"] == "it rounds to nearest even"


def test_moments_are_cells_and_go_to_float32_and_back():
    options = {"name": "sr_adamw", "options": {"moment_format": ["BF16", "E4M3"]}, "lr": 1e-2, "warmup_steps": 2}
    oracle = oracle_of(20, formats="E4M3", optimizer=options)
    first, second = [cell for cell in oracle.cells if cell.gemm == "moments"]
    assert (str(first), str(second)) == ("optimizer.moments.exp_avg", "optimizer.moments.exp_avg_sq")
    same = oracle.run(Fork(frozenset(oracle.cells), 10, LOW, 5))
    assert list(same.losses) == oracle.history(LOW)[10:15]
    rescued = oracle.run(Fork(frozenset(oracle.cells) - {second}, 10, LOW, 5))
    assert rescued.losses[0] == same.losses[0]  # the moment is read after the first loss
    assert rescued.losses[1:] != same.losses[1:]
    assert oracle.loop.optimizer.param_groups[0]["moment_format"] == ["BF16", "E4M3"]
    finer = Fork(frozenset(oracle.cells), 10, LOW, 5, change="mantissa", changed=frozenset([second]))
    assert oracle.run(finer).losses[1:] != same.losses[1:]
    assert "no such choice" in oracle.run(Fork(finer.low, 10, change="saturate", changed=finer.changed)).refused


def test_a_float32_run_has_no_cells():
    with pytest.raises(ConfigError, match="float32"):
        RunLoop(tiny_trainer())


# -- a run folder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(*corpus_overrides(folder), f"runs_dir={folder}", formats=broken_recipe(), max_steps=40)
    return FormatExperimentRunner(config).run().run_dir


class Whole(NamedTuple):
    """An autopsy by one process: its verdict, the folder that it wrote, and how far it said it was."""

    verdict: Verdict
    folder: Path
    told: list[Told]


@pytest.fixture(scope="module")
def whole(run_folder, tmp_path_factory):
    """The autopsy of the run, whose own folder is left without it."""
    told: list[Told] = []
    verdict = autopsy(run_folder, budget=300, settings=QUICK, told=told.append)
    folder = shutil.move(run_folder / "autopsy", tmp_path_factory.mktemp("whole"))
    return Whole(verdict, Path(folder), told)


def test_the_autopsy_of_a_run_folder_leaves_its_page_and_verdict(run_folder, whole):
    assert whole.verdict.cells == ("head.input_grad.grad_output",)
    written = json.loads((whole.folder / "verdict.json").read_text())
    assert written["cells"] == ["head.input_grad.grad_output"]
    assert written["places"]["head.input_grad.grad_output"] == ["head", "input_grad", "grad_output"]
    assert "head" in written["saving"]
    assert "head.input_grad.grad_output" in (whole.folder / "autopsy.md").read_text()
    assert whole.told[0].left > whole.told[-1].left
    shutil.copytree(whole.folder, run_folder / "autopsy")
    again = autopsy(run_folder, budget=1, settings=QUICK)  # every fork is in the log
    assert again.cells == whole.verdict.cells
    shutil.rmtree(run_folder / "autopsy")


def test_a_run_that_does_not_repeat_is_refused_with_the_step(run_folder, monkeypatch):
    trainer, losses, result = rebuild(run_folder)
    losses[6] += 1e-6
    monkeypatch.setattr(run, "rebuild", lambda folder: (trainer, losses, result))
    with pytest.raises(ConfigError, match=r"at step 7 .*it ran on another machine"):
        autopsy(run_folder)


def test_a_run_whose_loop_draws_at_will_is_refused_by_the_first_tensor(run_folder, monkeypatch):
    batch = Trainer.batch
    monkeypatch.setattr(Trainer, "batch", lambda self, step, seed=None: batch(self, step, next(drawn)))
    drawn = iter(range(10**6))
    with pytest.raises(ConfigError, match=r"at step 1 .*the run does not repeat itself: model\.\S+ differs"):
        autopsy(run_folder)


@pytest.mark.parametrize(
    ("environment", "result", "says"),
    [
        ({"processes": 2}, {}, "2 ranks"),
        ({"torch": "1.0"}, {}, "torch 1.0"),
        ({}, {"numerics_version": "0"}, "numerics"),
    ],
)
def test_runs_whose_bits_cannot_be_had_again_are_refused(tmp_path, environment, result, says):
    check_versions(tmp_path, {}, {})
    with pytest.raises(ConfigError, match=says):
        check_versions(tmp_path, environment, result)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ReportError, match=r"config\.yaml"):
        autopsy(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_run_and_what_is_no_twin_are_refused_before_anything_is_trained(run_folder, tmp_path, monkeypatch):
    broken = tmp_path / run_folder.name
    shutil.copytree(run_folder, broken)
    (broken / "config.yaml").write_text("")  # which means the defaults, of another run
    for look in (autopsy, run.plan):
        with pytest.raises(ReportError, match=r"is damaged \(config.yaml"):
            look(broken)
    monkeypatch.setattr("altgrad.autopsy.run.LoopOracle", None)
    with pytest.raises(ReportError, match="is not a folder"):
        autopsy(run_folder, twin=tmp_path / "nothing")
    with pytest.raises(ReportError, match=r"the twin .* is damaged"):
        autopsy(run_folder, twin=broken)
    shutil.copytree(run_folder, tmp_path / "short")
    (tmp_path / "short" / "result.json").unlink()
    cut_back(tmp_path / "short" / "metrics.jsonl", 12)
    with pytest.raises(ConfigError, match="records 12 steps"):
        autopsy(run_folder, twin=tmp_path / "short")


def test_one_autopsy_at_a_time_works_in_a_folder(run_folder):
    with RunLock.acquire(run_folder / "autopsy"), pytest.raises(RunBusyError, match="autopsy; wait until it ends"):
        autopsy(run_folder, settings=QUICK)
    shutil.rmtree(run_folder / "autopsy")


# -- side by side ---------------------------------------------------------------------------------------------------------


def answers(folder):
    records = map(json.loads, (folder / "forks.jsonl").read_text().splitlines())
    return {record["key"]: record["losses"] for record in records}


def test_two_processes_give_the_answers_of_one_and_leave_no_states(run_folder, whole):
    autopsy(run_folder, budget=14, settings=QUICK, jobs=2)  # as far as the roles
    alone, together = answers(whole.folder), answers(run_folder / "autopsy")
    assert not (run_folder / "autopsy" / "states").exists()
    shutil.rmtree(run_folder / "autopsy")
    common = alone.keys() & together.keys()
    assert len(common) >= 12
    assert all(alone[key] == together[key] for key in common)


class Dying:
    """An executor whose workers die after some calls, or that is interrupted there."""

    def __init__(self, calls, error):
        self.calls, self.error = calls, error

    def submit(self, function, /, *arguments):
        future = Future()
        self.calls -= 1
        if self.calls < 0:
            future.set_exception(self.error)
        else:
            future.set_result(function(*arguments))
        return future


def test_an_autopsy_interrupted_among_its_workers_goes_on(run_folder, whole):
    log = run_folder / "autopsy" / "forks.jsonl"
    with pytest.raises(KeyboardInterrupt):
        autopsy(run_folder, settings=QUICK, jobs=2, executor=Dying(5, KeyboardInterrupt()))
    known = len(log.read_text().splitlines())
    assert known >= 4
    with pytest.warns(UserWarning, match="a worker died"):
        verdict = autopsy(run_folder, budget=300, settings=QUICK, jobs=2, executor=Dying(3, BrokenProcessPool()))
    assert (verdict.cells, verdict.rescue) == (whole.verdict.cells, whole.verdict.rescue)
    assert verdict.forks >= whole.verdict.forks
    shutil.rmtree(run_folder / "autopsy")


def test_a_worker_that_does_not_have_the_runs_bits_is_refused(run_folder, whole, monkeypatch):
    monkeypatch.setattr(workers, "first_other", lambda recorded, own: 0)
    workers._MADE.clear()
    with pytest.raises(ConfigError, match="this worker does not repeat the run"):
        autopsy(run_folder, settings=QUICK, jobs=2, executor=Dying(9, None))
    workers._MADE.clear()
    shutil.rmtree(run_folder / "autopsy")


def test_the_plan_is_measured_and_needs_no_fork(run_folder, whole):
    planned = run.plan(run_folder, 120)
    assert (planned.steps, planned.budget) == (40, 120)
    assert min(planned.pace.low, planned.pace.twin, planned.pace.turn) > 0
    planned = replace(planned, pace=Pace(0.003, 0.002, 0.01))  # a busy machine's own is no measure
    assert planned.seconds < planned.most_seconds < 60
    assert replace(planned, known=20).seconds < planned.seconds
    assert replace(planned, jobs=2).seconds < planned.seconds
    assert "typically" in str(planned)
    with pytest.raises(OptionError, match="0 forks at a time"):
        autopsy(run_folder, jobs=0)


# -- a person's own loop ------------------------------------------------------------------------------------------------


DEAD = OperandSpec("E4M3", scaling={"policy": "static", "scale": 4096.0})  # every activation underflows


def dead_loop():
    """A recorder at its first step, as a worker makes it afresh."""
    return own_loop(uniform("E4M3").with_cell("2", "forward", "input", DEAD))


def other_loop():
    return own_loop(uniform("E4M3"))


def own_loop(recipe, also=(), noise=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    quantize_model(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach_optimizer(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(16, 4, generator=generator)

    def step_fn(step):
        drawn = torch.Generator().manual_seed(step if not noise else int(torch.seed() % 1000))
        x = torch.randn(64, 16, generator=drawn)
        loss = (model(x) - (x @ teacher).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Recorder(model, optimizer, step_fn, also=also, every=5)


def test_the_recorder_finds_a_fault_in_a_loop_of_ones_own():
    recorder = dead_loop()
    losses = [recorder.step() for _ in range(60)]
    verdict = recorder.autopsy(budget=300, settings=QUICK)
    assert verdict.kind == "cause"
    assert verdict.cells == (str(Cell("2", "forward", "input")),)
    assert recorder.taken == 60
    assert losses[-1] == recorder.losses[60]


class Here:
    """An executor that answers in this process, through the states on disk."""

    asked = 0

    def submit(self, function, /, *arguments):
        self.asked += 1
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_the_forks_of_ones_own_loop_run_side_by_side_where_a_function_builds_it(tmp_path):
    recorder = dead_loop()
    for _ in range(40):
        recorder.step()
    alone = recorder.autopsy(budget=300, settings=QUICK)
    hands = Here()
    together = recorder.autopsy(budget=300, settings=QUICK, out=tmp_path, jobs=2, build=dead_loop, executor=hands)
    assert hands.asked > 10
    assert (together.cells, together.rescue, together.roles) == (alone.cells, alone.rescue, alone.roles)
    assert not (tmp_path / "states").exists()
    with pytest.raises(ConfigError, match="does not repeat the run"):
        recorder.autopsy(settings=QUICK, jobs=2, build=other_loop, executor=hands)
    with pytest.raises(OptionError, match="give build="):
        recorder.autopsy(jobs=2)
    with pytest.raises(OptionError, match="at the top of a module"):
        recorder.autopsy(jobs=2, build=lambda: recorder)


def test_states_that_a_killed_autopsy_left_are_not_taken_for_this_ones(oracle, tmp_path):
    left = tmp_path / "states" / "low-00000000"
    left.mkdir(parents=True)
    hands = workers.Workers(oracle, dead_loop, Here(), 2, tmp_path)
    assert not left.exists()
    hands.close()


def test_a_pool_that_broke_is_done_without(oracle, tmp_path):
    class Broken:
        def submit(self, function, /, *arguments):
            raise BrokenProcessPool("a process was killed")

    forks = [Fork(frozenset(oracle.cells), 5, LOW, 4, draw=k) for k in (1, 2)]
    with pytest.warns(UserWarning, match="a process was killed"):
        answers = dict(workers.Workers(oracle, dead_loop, Broken(), 2, tmp_path).side_by_side(forks, None))
    assert {fork: outcome.losses for fork, outcome in answers.items()} == {f: oracle.run(f).losses for f in forks}


def test_a_loop_that_does_not_repeat_itself_is_refused_by_name():
    recorder = own_loop(uniform("E4M3"), noise=True)
    for _ in range(12):
        recorder.step()
    with pytest.raises(ConfigError, match=r"does not repeat itself: model\.0\.weight differs .* twice from step 0"):
        recorder.autopsy()


def test_a_loop_of_several_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match=r"this loop runs on 4 ranks.*in one process"):
        own_loop(uniform("E4M3"))


def test_too_short_a_loop_is_refused():
    recorder = own_loop(uniform("E4M3"))
    recorder.step()
    with pytest.raises(ConfigError, match="at least 10"):
        recorder.autopsy()


def test_a_loop_whose_captures_begin_after_the_damage_is_refused():
    recorder = own_loop(uniform("E4M3"))
    recorder.ring.limit_bytes = 1  # room for the newest state alone
    for _ in range(20):
        recorder.step()
    with pytest.raises(ConfigError, match=r"first state kept is that after step 20 of 20.*raise limit_bytes"):
        recorder.autopsy()


def test_the_guides_hugging_face_loop_runs(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "autopsy.md").read_text(encoding="utf-8")
    script = next(block for block in guide.split("```python\n")[1:] if "transformers" in block).split("```")[0]
    whole = Recorder.autopsy
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Recorder, "autopsy", lambda self, **given: whole(self, settings=QUICK, **given))
    found: dict = {}
    exec(script, found)
    assert found["verdict"].cells == ("lm_head.input_grad.grad_output",)
    assert (tmp_path / "autopsy" / "autopsy.html").is_file()
