"""The study's plan: every cell is a valid experiment, and finished runs find their cell again."""

import json

import pytest

from experiments import manifold
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
    entries = [manifold.entry(study, a, f, study["arms"][a]["lr"]) for a, f in cells]
    tuning = manifold.plan(study, entries, [42], tmp_path)
    assert len({run.name for run in tuning.runs}) == len(tuning.runs) == 4 * len(cells)


def test_best_rate_is_that_of_lowest_loss_and_the_table_pairs_seeds(study, tmp_path):
    cells = manifold.cells(study)
    entries = [manifold.entry(study, a, f, [study["arms"][a]["lr"][k] for k in (0, 1)]) for a, f in cells]
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
    assert rates["manifold_update", "E4M3"] == 0.1
    assert rates["eco", "E7M0"] == 1e-3
    chosen = {cell: [r for r in runs if r.config["optimizer"]["lr"] == rates[cell]] for cell, runs in found.items()}
    rows = {(row["arm"], row["format"]): row for row in manifold.table(study, rates, chosen)}
    row = rows["manifold_update", "E4M3"]
    assert row["seeds"] == 2
    assert row["difference"] == pytest.approx(-0.5 - 0.1 + 1e-3)
    assert row["low"] <= row["difference"] <= row["high"]
    assert rows["adamw_nearest", "E4M3"]["difference"] == 0.0
    assert "manifold_update" in manifold.describe(list(rows.values()))


def test_a_run_without_a_loss_is_worst(tmp_path):
    folder = make_run(tmp_path, "E4M3")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "final_val_loss": "nan"}))
    assert manifold.loss(manifold.read_run(folder)) == float("inf")
