"""The study's plan: every cell is a valid experiment, and finished runs find their cell again."""

import json

import pytest

from altgrad.records.documents import write_result
from altgrad.records.run import Run
from altgrad.training import run_format_experiment
from experiments import manifold
from experiments import manifold_results as results
from tests.run_folders import make_run


@pytest.fixture(scope="module")
def study():
    return manifold.read_study(manifold.MATRIX, ["max_steps=20", "formats=[E4M3,E7M0]", "seeds=[42,43]"])


def test_overrides_reach_base_and_study(study):
    assert study["base"]["max_steps"] == 20
    assert study["formats"] == ["E4M3", "E7M0"]


def test_plans_hold_every_cell_once(study, tmp_path):
    cells = manifold.cells(study)
    assert ("lns_madam", "E7M0") in cells
    assert ("lns_madam", "E4M3") not in cells
    entries = [manifold.entry(study, a, f, manifold.tried_rates(study, a, f)) for a, f in cells]
    tuning = manifold.plan(study, entries, [42], tmp_path)
    assert len({run.name for run in tuning.runs}) == len(tuning.runs) == 4 * len(cells)


def test_best_rate_is_that_of_lowest_loss_and_the_table_pairs_seeds(study, tmp_path):
    cells = manifold.cells(study)
    entries = [manifold.entry(study, a, f, [manifold.tried_rates(study, a, f)[k] for k in (0, 1)]) for a, f in cells]
    tuning = manifold.plan(study, entries, [42, 43], tmp_path)
    for planned in tuning.runs:
        folder = tmp_path / planned.name
        folder.mkdir()
        config = planned.config.model_dump(mode="json")
        rate = config["optimizer"]["lr"]
        better = 0.5 if config["optimizer"]["name"] == "manifold_adamw" else 0.0
        loss = 4.0 - rate - better + 0.1 * config["seed"]
        (folder / "config.yaml").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("")
        (folder / "result.json").write_text(
            json.dumps({"seed": config["seed"], "final_val_loss": loss, "stall_rate": 0.5})
        )
    found = manifold.by_cell(study, tmp_path, tuning)
    assert set(found) == set(cells)
    rates = manifold.best_rates(study, found)
    assert rates["manifold_update", "E4M3"] == 0.3
    assert rates["manifold_update", "E7M0"] == 0.03
    assert rates["eco", "E7M0"] == 3e-3
    chosen = {cell: [r for r in runs if r.config["optimizer"]["lr"] == rates[cell]] for cell, runs in found.items()}
    records = [results.run_record(run, arm, movement=False) for (arm, _), runs in chosen.items() for run in runs]
    tried = [results.run_record(run, arm, movement=False) for (arm, _), runs in found.items() for run in runs]
    outcome = results.Results({"study": study, "tuning": tried, "runs": records})
    assert difference(outcome, "manifold_update").n == 2
    assert difference(outcome, "manifold_update").mean == pytest.approx(-0.5 - 0.3 + 3e-3)
    assert difference(outcome, "adamw_nearest").mean == 0.0
    assert difference(outcome, "eco", without_tuning_seed=True).n == 1
    assert outcome.at_edge("manifold_update", "E4M3")
    table = results.main_table(outcome)
    assert len(table.splitlines()) == 2 + len(cells)
    assert "| E4M3 | manifold_update | 0.3 (edge) |" in table
    assert len(results.tuning_table(outcome).splitlines()) == 2 + len(cells)
    page = results.figure_page(outcome)
    assert page.count("<svg") >= 2
    assert "manifold_update" in page


def difference(outcome, arm, **options):
    """An arm minus the control on E4M3."""
    found = outcome.compare(arm, "adamw_nearest", "E4M3", **options)
    assert found is not None
    return found.difference


def tiny(tmp_path, study, arm, **changes):
    """A finished run of an arm: three steps of a one-layer model."""
    base = {**study["base"], "max_steps": 3, "runs_dir": str(tmp_path)}
    base["model"] = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16}
    base["optimizer"] = {**base["optimizer"], "warmup_steps": 0}
    small = {**study, "base": {**base, **changes}}
    (planned,) = manifold.plan(small, [manifold.entry(small, arm, "E4M3", [0.5])], [42], tmp_path).runs
    return Run(run_format_experiment(planned.config, "cpu").run_dir)


def test_movement_is_measured_in_grid_steps_of_the_weights_that_live_on_the_grid(study, tmp_path):
    run = tiny(tmp_path, study, "manifold_update")
    record = results.run_record(run, "manifold_update", movement=True)
    assert 0.1 < record["net"] <= record["path"] < 3  # at most half a grid step per step; rows of rare tokens stay
    assert record["state_bytes"] == pytest.approx(8, rel=0.01)  # two float32 moments
    assert record["stall_rate"] is not None


def test_master_weights_have_no_grid_to_move_on(study, tmp_path):
    record = results.run_record(tiny(tmp_path, study, "adamw_master"), "adamw_master", movement=True)
    assert record["path"] is None
    assert record["net"] is None


def test_records_survive_their_file(study, tmp_path):
    record = {"arm": "eco", "format": "E4M3", "seed": 42, "lr": 1.0, "val_loss": float("inf"), "stall_rate": None}
    path = tmp_path / "manifold.json"
    path.write_text(json.dumps({"study": study, "tuning": [], "runs": [record]}))
    found = results.Results.read(path)
    assert found.runs == [record]
    assert found.compare("eco", "eco", "E4M3") is None  # a diverged run has no difference
    assert "n=0, 1 diverged" in results.main_table(found)


def test_a_run_without_a_loss_is_worst(tmp_path):
    folder = make_run(tmp_path, "E4M3")
    assert results.final_loss(Run(folder)) < 10
    write_result(folder, {**Run(folder).result, "final_val_loss": "nan"})
    assert results.final_loss(Run(folder)) == float("inf")


def test_what_finer_rates_would_gain():
    assert results.left_to_gain([1.0, 0.0, 1.0, 2.0]) == 0  # the least is the vertex
    parabola = [(x - 0.25) ** 2 for x in (-1, 0, 1)]
    assert results.left_to_gain(parabola) == pytest.approx(0.25**2)
    assert results.left_to_gain([0.0, 1.0, 2.0]) is None
