"""The calibration draws the same cases from the same seed, breaks what it says from when it says, and counts as it says."""

import json
from pathlib import Path
from random import Random

import pytest

from altgrad.autopsy.confidence import CLASSES, confidence, fitted
from altgrad.autopsy.oracle import LoopOracle
from altgrad.autopsy.verdict import Verdict
from altgrad.errors import ConfigError
from benchmarks.autopsy_calibration import generate
from benchmarks.autopsy_calibration.__main__ import check_rules, names_of, pack, records_of, unpack
from benchmarks.autopsy_calibration.faults import KINDS, Case, Fault, draw_fault, width_of
from benchmarks.autopsy_calibration.generate import acceptable
from benchmarks.autopsy_calibration.loop import STEPS, build
from benchmarks.autopsy_calibration.one import RULES
from benchmarks.autopsy_calibration.score import (
    Rate,
    alarm,
    evidence,
    headline,
    is_null,
    misses,
    report,
    right,
    said,
)

DEAD_HEAD = Fault("IEEE overflow", 2, ("head.forward.input",), "single", 6)


@pytest.fixture
def broken():
    return build(Case("fault-000", 5, fault=DEAD_HEAD), DEAD_HEAD)


def test_the_run_is_healthy_until_its_fault_begins(broken):
    healthy = build(Case("fault-000", 5), None)
    losses = [[loop.advance() for _ in range(9)] for loop in (healthy, broken)]
    assert losses[0][:6] == losses[1][:6]
    assert all(x == x for x in losses[0])
    assert all(x != x for x in losses[1][6:])  # NaN from the first step with the fault


def test_forks_see_the_fault_from_its_step_and_only_where_its_cell_is_low(broken):
    oracle = LoopOracle(broken, 12, captures=12)
    head = next(cell for cell in oracle.cells if str(cell) == "head.forward.input")
    assert oracle.moved(4, frozenset([head])) < 1
    assert oracle.moved(6, frozenset([head])) != oracle.moved(6, frozenset([head]))  # NaN
    assert oracle.moved(6, frozenset()) == 0.0


@pytest.mark.parametrize("width", ["single", "tensor", "pair"])
def test_drawn_faults_have_their_width_and_repeat(width):
    for seed in range(40):
        fault = draw_fault(Random(seed), width)
        assert fault == draw_fault(Random(seed), width)
        assert len(fault.cells) == (1 if width == "single" else 2)
        assert fault.rung < len(KINDS[fault.kind].rungs)
        assert 0 <= fault.onset < STEPS * 3 / 4


def test_a_sixth_of_a_set_are_pairs_and_nulls_lie_among_faults():
    assert [width_of(n) for n in range(100)].count("pair") == 16
    names = names_of(100, 59)
    assert len(set(names)) == 159
    assert 18 <= sum(name.startswith("null") for name in names[:53]) <= 21


def test_of_a_tensor_the_use_that_does_the_damage_is_acceptable_too():
    cells = ("head.forward.weight", "head.input_grad.weight")
    fault = Fault("scale up", 3, cells, "tensor", 0)
    assert acceptable(fault, 1.0, {cells[0]: 0.9, cells[1]: 0.1}) == (cells, (cells[0],))
    assert acceptable(fault, 1.0, {cells[0]: 0.6, cells[1]: 0.7}) == (cells,)
    assert acceptable(Fault("scale up", 3, cells, "pair", 0), 1.0, {cells[0]: 0.9, cells[1]: 0.9}) == (cells,)


class Noisy:
    """Trainings that scatter too much in the first runs to show that a fault does nothing, and then show just that."""

    made = 0

    def __init__(self, case, draws=2):
        Noisy.made += 1
        self.base, self.scatter = [3.0], 1.0 if Noisy.made <= 3 else 0.0

    def damage(self, fault, cells=None, draws=2):
        return 0.0, 0.0


def test_every_draw_ends(monkeypatch):
    monkeypatch.setattr(generate, "Truth", Noisy)
    monkeypatch.setattr(generate, "draw_decoys", lambda random: ())
    case = generate.null_case(7, 1)
    assert (case.null, Noisy.made) == ("harmless cells", 4)
    with pytest.raises(ConfigError, match="fault-003: none of 40 faults in each of 20 runs fits"):
        generate.fault_case(7, 3)


def record(kind="cause", cells=("a.forward.input",), mechanism="scale", null=None, stated=0.9, **more):
    fault = Fault("scale up", 0, ("a.forward.input",), "single", 40)
    case = Case("x", 1, fault=fault, null=null, damage=0.5, acceptable=(fault.cells,), mechanisms=("range", "scale"))
    verdict = {
        "kind": kind,
        "cells": cells,
        "mechanism": mechanism,
        "acts_from": 41,
        "onset": 60,
        "confidence": stated,
        "sentence": "S.",
        "damage": 0.5,
        "noise": 0.01,
        "window": (40, 60),
        "rescue": None,
        "alone": None,
        "over_run": None,
        "groups": (),
        "members": (),
        "roles": (),
        "forks": 50,
        **more,
    }
    named = {"worst SQNR": "a.forward.input", "gradient norm (layer only)": "b"}
    facts = {"rules": "r", "commit": "c", "cpu_s": {"case": 1.0}, "baselines": named}
    return json.loads(json.dumps({"case": case.as_dict(), "verdict": verdict, **facts}))


def test_verdicts_are_counted_as_defined():
    good, part = record(), record(cells=("a.forward.input", "b.forward.input"))
    silent, wrong = record("inconclusive", ()), record("no damage in the window", ())
    assert [said(r) for r in (good, part, silent, wrong)] == [
        "right", "more", "inconclusive", "no damage in the window",
    ]  # fmt: skip
    table = {name: value for name, value, _ in headline([good, part, silent, wrong], [record(null="no fault")])}
    assert table["cells right, of those answered"].startswith("1/3 ")
    assert table["answered"].startswith("3/4 ")
    assert table["false alarms, of nulls"].startswith("1/1 ")
    assert table["Brier score of the stated confidence"] == "0.410"  # (0.1^2 + 0.9^2) / 2
    assert not right(record(mechanism="scale", cells=()))
    assert not alarm(silent)
    text = report([good, part, silent, wrong, record("no damage in the window", (), null="no fault")])
    assert "1/4" in text
    assert len([line for line in misses([good, part, wrong], []) if line.startswith("- ")]) == 2


def test_intervals_are_clopper_and_pearsons():
    assert Rate(99, 100).interval[0] == pytest.approx(0.9455, abs=1e-4)
    assert Rate(0, 59).interval[1] == pytest.approx(0.0606, abs=1e-4)
    assert str(Rate(0, 0)) == "-"


def test_a_set_follows_one_state_of_the_rules_and_goes_on_from_its_pack(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "fault-000.json").write_text(json.dumps({**record(), "rules": RULES}))
    (out / "fault-000.case.json").write_text("{}")
    check_rules(out, again=False)
    pack(out, tmp_path / "set.tar.xz")
    unpack(tmp_path / "set.tar.xz", tmp_path / "again")
    assert records_of(tmp_path / "again") == records_of(tmp_path / "set.tar.xz") == records_of(out)
    (out / "fault-001.json").write_text(json.dumps({**record(), "rules": "other"}))
    with pytest.raises(ConfigError, match="follows rules other"):
        check_rules(out, again=False)
    check_rules(out, again=True)
    assert not (out / "fault-001.json").exists()


def test_confidence_is_the_share_right_of_cases_alike():
    classes = fitted([(1.0, False), (2.0, True), (4.9, False), (5.0, True), (80.0, True)])
    assert [(one.damage, one.right, one.of) for one in classes] == [(2, 1, 2), (5, 2, 2)]

    def stated(damage, structure="single"):
        return confidence(Verdict("cause", "", structure=structure, damage=damage), 0.01, classes)

    assert stated(0.03) == pytest.approx(0.5)
    assert stated(0.9) == pytest.approx(2.5 / 3)
    assert stated(0.01) is None
    assert stated(0.9, "spread") is None


def test_the_classes_are_those_of_the_records_that_are_kept():
    kept = Path(__file__).parents[2] / "experiments/results"
    packs = [records_of(kept / f"autopsy-calibration-{name}.tar.xz") for name in ("develop", "sealed")]
    assert fitted(evidence([one for pack in packs for one in pack if not is_null(one)])) == CLASSES
