"""The log of forks: what was asked is not asked twice, and what was not written as it should is asked again."""

import json

import pytest

from altgrad.autopsy.forks import Forks, read_log
from altgrad.autopsy.investigate import investigate
from tests.autopsy.planted import Planted, any_of, cell

HEAD = cell(6, "input_grad", "grad_output")


def test_an_interrupted_autopsy_goes_on_without_running_a_fork_twice(tmp_path):
    log = tmp_path / "forks.jsonl"
    first = investigate(Forks(Planted(any_of(HEAD)), budget=30, log=log))
    assert first.kind == "inconclusive"
    with log.open("a") as file:
        file.write('{"key": "torn')
    oracle = Planted(any_of(HEAD))
    verdict = investigate(Forks(oracle, budget=200, log=log))
    assert verdict.kind == "cause"
    lengths: dict[str, list[int]] = {}
    for line in log.read_text().splitlines():
        if line.endswith("}"):
            lengths.setdefault((record := json.loads(line))["key"], []).append(len(record["losses"]))
    assert all(lengths == sorted(set(lengths)) for lengths in lengths.values())  # again only where it had stopped early
    whole = investigate(Forks(Planted(any_of(HEAD)), budget=200))
    assert verdict.cells == whole.cells
    assert verdict.rescue == whole.rescue
    assert len(oracle.asked) == whole.forks - 30
    again = investigate(Forks(Planted(any_of(HEAD)), log=log))
    assert (again.sentence, again.seconds > 0) == (verdict.sentence, True)  # what it cost stays known


HOSTILE_LINES = (
    b"[" * 100_000, b'{"key": "x", "losses": [1e400]}', b'{"key": "x", "losses": 3}', b'{"key": [1], "losses": [1]}',
    b'{"losses": [1]}', b'{"key": "x", "losses": [1], "refused": 3}', b"\xff\xfe}", b"{}",
)  # fmt: skip


def test_answers_that_are_not_as_they_were_written_are_asked_for_again_and_counted(tmp_path):
    log = tmp_path / "forks.jsonl"
    first = investigate(Forks(Planted(any_of(HEAD)), budget=200, log=log))
    known = read_log(log)
    lines = log.read_bytes().splitlines()
    lines[3] = lines[3].replace(b'"losses": [', b'"losses": [9', 1)
    log.write_bytes(b"\n".join((*lines, *HOSTILE_LINES)) + b"\n")
    with pytest.warns(UserWarning, match="8 lines of .* could not be read; those forks are run again"):
        left = read_log(log)
    assert left.keys() < known.keys()
    assert all(left[key] == known[key] for key in left)
    with pytest.warns(UserWarning, match="could not be read"):
        again = investigate(Forks(Planted(any_of(HEAD)), log=log))
    assert again.sentence == first.sentence


def test_a_log_from_before_there_were_checksums_is_read(tmp_path):
    (tmp_path / "forks.jsonl").write_text(
        '{"key": "a", "losses": [1.5, null], "refused": null, "seconds": 0.1}\n{"key": "to'
    )
    assert [len(one.losses) for one in read_log(tmp_path / "forks.jsonl").values()] == [2]
