"""The study of advice: its record can be cut off anywhere, and its tables tell a prediction that holds from one that does not."""

from __future__ import annotations

import json

import pytest

from experiments.advice import DECAYS, DY, FORMATS, HELD_OUT, SEEDS, STORAGES, W, X, jobs, main, read_record
from experiments.advice_scores import (
    freeze_table,
    gap_table,
    rank_table,
    ratchet_table,
    regret_table,
    stall_table,
    tell,
)

ALL = (*FORMATS, *HELD_OUT)


def planted(*, right: bool) -> dict:
    """A record in which the worst format loses most, as the advice says, or says the other way round."""
    record: dict = {}
    order = {fmt: i if right else len(ALL) - i for i, fmt in enumerate(ALL)}
    for decay in DECAYS:
        where = f"gpt-S|0|{decay}"
        stalls = {f"{s}|{f}": [0.1 * order[f], 50 if order[f] > 4 else None] for s in STORAGES for f in ALL}
        record[f"{where}|advice"] = {
            "stall": stalls,
            "damage": {f: 1e-3 * (1 + order[f]) for f in ALL},
            "sqnr": dict.fromkeys(ALL, 30.0),
            "sqnr_error": dict.fromkeys(ALL, 0.2),
            "seconds": 1.0,
        }
        record[f"{where}|FP32|FP32"] = {"loss": 2.0}
        for storage in STORAGES:
            for i, fmt in enumerate(ALL):
                run = {"loss": 2 + 0.1 * i, "loss20": 3.0 - 0.01 * i, "stall": 0.1 * i, "freeze": 48 if i > 4 else None}
                record[f"{where}|{storage}|{fmt}"] = run
    best = {"input": "E2M3", "weight": "E1M4", "grad_output": "E3M2"}
    damage = {
        role: {f: 1.0 + (f != best[role] if right else f == best[role]) for f in offered}
        for role, offered in zip(best, (X, W, DY), strict=True)
    }
    record["choice|gpt-S|0"] = {"damage": damage, "sqnr": damage, "hawq": damage["weight"]}
    for x in X:
        for w in W:
            for dy in DY:
                far = sum(a != b for a, b in zip((x, w, dy), best.values(), strict=True))
                record[f"recipe|gpt-S|0|{x},{w},{dy}"] = {"loss": 2 + 0.1 * far, "loss20": 3.0 + 0.01 * (x == "E1M4")}
    series = [1.0, 1.1, 1.3, 1.5]
    record["moments|gpt-S|0"] = {"measured": {"E5M2": series}, "predicted": {"E5M2": series if right else [1.0] * 4}}
    return record


@pytest.mark.parametrize("table", [stall_table, rank_table, regret_table, freeze_table, ratchet_table])
def test_a_table_tells_a_prediction_that_holds_from_one_that_does_not(table):
    assert all(str(row[-1]).startswith("met") or row[-1] == "" for row in table(planted(right=True)).rows)
    assert any(str(row[-1]).startswith("missed") for row in table(planted(right=False)).rows)


def test_the_table_of_gaps_has_each_seeds_mean_of_both_schedules_and_the_error_over_seeds():
    one = planted(right=True)
    shifted = {
        k.replace("|0", "|1"): v | ({"loss": v["loss"] + 0.2} if "|FP32|" not in k and "loss" in v else {})
        for k, v in one.items()
    }
    rows = gap_table({**one, **shifted}).rows
    assert [row[:3] for row in rows] == [[storage, "gpt-S", "2"] for storage in STORAGES]
    assert rows[0][3:5] == ["+0.100 (0.100)", "+0.200 (0.100)"]
    assert gap_table(one).rows == []  # one seed has no error


def test_what_is_not_there_is_said_and_a_record_that_was_cut_off_goes_on(tmp_path, capsys):
    path = tmp_path / "advice.jsonl"
    record = planted(right=True)
    path.write_text("".join(json.dumps({"key": k, **v}) + "\n" for k, v in record.items()) + '{"key": "gpt-S|1|co')
    assert read_record(path) == record
    total = len(list(jobs()))
    assert total == len(dict(jobs()))
    assert total > 900
    assert main(["--record", str(path), "--list"]) == 0
    assert f"{total - len(record)} to make" in capsys.readouterr().out
    assert f"{len(record)} of {total} entries are there" in tell(record)
    assert len(SEEDS) == 5
