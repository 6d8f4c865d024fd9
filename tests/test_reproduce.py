"""Published claims: verdicts follow from values, trials go on where they stopped, every row is whole, and cheap ones run."""

import json
import math

import pytest
from typer.testing import CliRunner

from altgrad.cli import app
from altgrad.errors import OptionError, ReportError, RunBusyError
from altgrad.records.folders import write_archive
from altgrad.records.lock import RunLock
from altgrad.report.pages.claim import headline, render_claim, sentence
from altgrad.reproduce import CLAIMS, Claim, Criterion, Protocol, find_claim, judge, reproduce
from altgrad.reproduce.data import data_of
from altgrad.reproduce.run import RECORD, committed_records, document_bytes, last_record, read_record
from altgrad.reproduce.verdict import NOT_REPRODUCED, NOT_RUN, QUICK, REPRODUCED, UNRESOLVED


def claim_of(*criteria: Criterion, protocol: Protocol | None = None) -> Claim:
    return Claim("a_claim", "1", "2601.00001", "It holds.", criteria, 1, protocol)


def seeds_of(*values: float) -> dict[int, dict[str, float]]:
    return dict(enumerate({"x": value} for value in values))


@pytest.mark.parametrize(
    ("values", "low", "high", "kind"),
    [
        ((1.0, 1.1, 0.9, 1.0), 0.5, 1.5, REPRODUCED),
        ((1.0, 1.1, 0.9, 1.0), 1.5, math.inf, NOT_REPRODUCED),
        ((1.0, 1.1, 0.9, 1.0), 1.05, math.inf, UNRESOLVED),
        ((1.0,), 0.5, 1.5, UNRESOLVED),  # one seed has no interval
        ((1.0, math.nan, 1.0), 0.5, 1.5, UNRESOLVED),
        ((0.0, 0.0, 0.0), 0.0, 0.0, REPRODUCED),  # exact quantities
        ((0.0, 0.0, 1e-9), 0.0, 0.0, UNRESOLVED),
        ((), 0.0, 1.0, NOT_RUN),
    ],
)
def test_a_verdict_follows_from_intervals_and_bounds(values, low, high, kind):
    protocol = Protocol("says", counted([]))
    assert judge(claim_of(Criterion("x", "x", low, high), protocol=protocol), seeds_of(*values)).kind == kind


def test_what_cannot_be_tried_at_this_size_is_unresolved_and_says_what_it_takes():
    claim = find_claim("mxfp4_needs_more_tokens")
    record = last_record(claim, "nowhere")
    assert record.verdict.kind == UNRESOLVED
    assert sentence(data_of(record)).startswith("Two runs of 8B parameters")


def test_all_criteria_must_hold_and_told_ones_decide_nothing():
    values = {seed: {"x": 1 + 0.01 * seed, "y": 5 + 0.01 * seed, "z": 0.0} for seed in range(4)}
    holds, told = Criterion("x", "x", 0.5, 1.5), Criterion("z", "z")
    assert judge(claim_of(holds, told), values).kind == REPRODUCED
    verdict = judge(claim_of(holds, Criterion("y", "y", high=3.0), told), values)
    assert (verdict.kind, [f.outcome for f in verdict.findings]) == (NOT_REPRODUCED, ["holds", "fails", "told"])
    assert judge(claim_of(holds), values, quick=True).kind == QUICK


def test_the_power_analysis_names_the_seeds_that_settle_it():
    values = [1.0, 1.4, 0.6, 1.2, 0.8]
    criterion = Criterion("x", "x", low=0.9)
    (finding,) = judge(claim_of(criterion), seeds_of(*values)).findings
    assert finding.outcome == "open"
    assert finding.needed is not None
    scaled = [1.0 + spread for _ in range(finding.needed // 2 + 1) for spread in (-0.2987, 0.2987)]  # the same sd
    assert judge(claim_of(criterion), seeds_of(*scaled)).kind == REPRODUCED
    on_the_bound = judge(claim_of(Criterion("x", "x", low=1.0)), seeds_of(*values))
    assert on_the_bound.findings[0].needed is None
    assert "more than 1\u202f000 seeds" in sentence(data_of_values(on_the_bound))


def data_of_values(verdict) -> dict:
    record = last_record(claim_of(Criterion("x", "x", low=1.0)), "nowhere")
    record.__dict__["verdict"] = verdict
    record.__dict__["by_seed"] = seeds_of(1.0, 1.4)
    return data_of(record)


def counted(calls: list):
    def measure(facts, seed, quick):
        calls.append((facts.get("lr"), seed, quick))
        return {"loss": abs(facts.get("lr", 1.0) - 0.3) + 0.001 * seed + facts.get("add", 0.0)}

    return measure


def test_trials_go_on_where_they_stopped_and_rates_are_tuned_on_other_seeds(tmp_path):
    calls: list = []
    arms = {"tuned": {"rates": [0.1, 0.3, 1.0]}, "plain": {"add": 0.5}}
    protocol = Protocol(
        "says", counted(calls), arms, lambda a: {"x": a["plain"]["loss"] - a["tuned"]["loss"]}, 3, tuned_by="loss"
    )
    claim = claim_of(Criterion("x", "x", low=0.0), protocol=protocol)
    first = reproduce(claim, tmp_path, seeds=1)
    assert [rate for rate, seed, _ in calls if seed == 1001] == [0.1, 0.3, 1.0]
    assert first.rates == {"tuned": 0.3}
    assert list(first.by_seed) == [0]
    assert headline(data_of(first)) == "Unresolved (1 of 3 seeds)."
    assert (first.measured, first.minutes) == (False, claim.minutes)
    before = len(calls)
    whole = reproduce(claim, tmp_path)
    assert [seed for _, seed, _ in calls[before:]] == [1, 1, 2, 2]  # nothing twice, no tuning again
    assert whole.verdict.kind == REPRODUCED
    assert (whole.measured, whole.minutes) == (True, whole.seconds / 120)
    again = reproduce(claim, tmp_path)
    assert len(calls) == before + 4
    assert again.by_seed == whole.by_seed
    assert "tuned: 0.3" in render_claim(data_of(again, "altgrad reproduce a_claim"))
    reproduce(claim, tmp_path, quick=True)
    assert [quick for _, _, quick in calls[before + 4 :]] == [True] * 7  # beside it, with two seeds
    assert reproduce(claim, tmp_path).verdict.kind == REPRODUCED


def test_criteria_that_move_after_the_run_are_said_and_another_protocol_starts_anew(tmp_path):
    protocol = Protocol("says", counted([]), quantities=lambda a: {"x": a["all"]["loss"]})
    made = reproduce(claim_of(Criterion("x", "x", low=2.0), protocol=protocol), tmp_path)
    assert (made.verdict.kind, made.moved) == (NOT_REPRODUCED, False)
    moved = reproduce(claim_of(Criterion("x", "x", low=0.0), protocol=protocol), tmp_path)
    assert moved.moved
    assert "not those that stood when" in sentence(data_of(moved))
    other = Protocol("says", counted([]), {"all": {"add": 1.0}}, protocol.quantities)
    assert not read_record(claim_of(Criterion("x", "x"), protocol=other), tmp_path / "a_claim").trials


def test_an_arm_gets_another_name_and_its_records_stay(tmp_path):
    measure, sums = counted([]), lambda arms: {"x": sum(values["loss"] for values in arms.values())}
    old = Protocol("says", measure, {"1 bits": {}, "2 bits": {"add": 1.0}}, sums)
    new = Protocol("says", measure, {"1 bit": {}, "2 bits": {"add": 1.0}}, sums, before={"1 bit": "1 bits"})
    was, now = (claim_of(Criterion("x", "x", low=0.0), protocol=protocol) for protocol in (old, new))
    made = reproduce(was, tmp_path)
    read = read_record(now, tmp_path / now.name)
    assert read.by_seed == made.by_seed
    assert {trial.arm for trial in read.trials} == set(new.arms)
    assert document_bytes(reproduce(now, tmp_path / "anew")).count(b'"1 bit"') == new.seeds
    one = next(arm for arm, facts in find_claim("few_random_bits").protocol.arms.items() if facts["bits"] == 1)
    assert one == "1 bit"
    assert last_record(find_claim("few_random_bits"), tmp_path).measured


def test_records_are_read_from_packs_and_damage_is_said(tmp_path):
    protocol = Protocol("says", counted([]), quantities=lambda a: {"x": a["all"]["loss"]})
    claim = claim_of(Criterion("x", "x", low=0.0), protocol=protocol)
    made = reproduce(claim, tmp_path)
    file = tmp_path / claim.name / RECORD
    write_archive(tmp_path / "claims.tar.xz", {f"{claim.name}/{RECORD}": file.read_bytes()})
    assert read_record(claim, tmp_path / "claims.tar.xz" / claim.name).by_seed == made.by_seed
    content = json.loads(file.read_text())
    content["trials"][0]["values"]["loss"] = 0.1
    file.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="does not match its checksum"):
        reproduce(claim, tmp_path)
    file.write_text("{}")
    with RunLock.acquire(tmp_path / claim.name), pytest.raises(RunBusyError, match="another folder with --out"):
        reproduce(claim, tmp_path)


@pytest.mark.parametrize(("options", "words"), [({"seeds": 0}, "0 seeds"), ({"jobs": 0}, "0 trials at a time")])
def test_what_cannot_be_tried_is_refused(tmp_path, options, words):
    protocol = Protocol("says", counted([]))
    with pytest.raises(OptionError, match=words):
        reproduce(claim_of(protocol=protocol), tmp_path, **options)
    with pytest.raises(OptionError, match="cannot be tried here"):
        reproduce(claim_of(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is a file"):
        reproduce(claim_of(protocol=protocol), tmp_path / "file")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_row_is_whole(claim):
    assert claim.minutes <= 30
    assert claim.protocol or claim.needs
    names = [criterion.quantity for criterion in claim.criteria]
    assert len(set(names)) == len(names)
    assert any(criterion.decides for criterion in claim.criteria)
    assert all(criterion.low <= criterion.high for criterion in claim.criteria)
    assert (
        sum(other.name == claim.name for other in CLAIMS) == sum(other.number == claim.number for other in CLAIMS) == 1
    )
    assert find_claim(claim.name) is claim


CHEAP = ["mx_norm_clamp", "few_random_bits", "attention_ties", "noise_knee"]


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_claims_give_what_their_criteria_ask_for(name, tmp_path):
    record = reproduce(find_claim(name), tmp_path, quick=True)
    assert record.verdict.kind == QUICK
    asked = {criterion.quantity for criterion in record.claim.criteria}
    assert all(asked <= values.keys() for values in record.by_seed.values())
    assert record.by_seed == reproduce(find_claim(name), tmp_path / "other", quick=True).by_seed


def test_the_command_lists_tries_and_writes_a_page(tmp_path):
    run = CliRunner()
    for width in (80, 120):
        listed = run.invoke(app, ["reproduce", "--out", str(tmp_path)], env={"COLUMNS": str(width)})
        assert listed.exit_code == 0
        lines = listed.output.splitlines()
        assert max(map(len, lines)) <= width
        assert {claim.number for claim in CLAIMS} <= {line.split("  ")[0] for line in lines}
        words = " ".join(listed.output.split())
        assert all(claim.name in words and claim.statement in words for claim in CLAIMS)
    tried = run.invoke(app, ["reproduce", "noise_knee", "--quick", "--out", str(tmp_path)])
    assert tried.exit_code == 0
    assert "proves nothing" in tried.output
    page = (tmp_path / "noise_knee-quick" / "report.html").read_text()
    assert "leave out --quick for a verdict" in page
    wrong = run.invoke(app, ["reproduce", "noise_nee"])
    assert isinstance(wrong.exception, OptionError)
    assert "noise_knee" in str(wrong.exception)


def test_committed_records_are_whole_and_were_judged_by_the_criteria_of_before():
    pack = committed_records()
    assert pack is not None
    tried = [record for claim in CLAIMS if (record := read_record(claim, pack / claim.name)).trials]
    assert tried
    assert [record.claim.name for record in tried if record.moved] == []
