"""metrics.jsonl: checksummed lines, and every kind of damage counted by the one reader."""

import json
import random

import pytest

from altgrad.records.metrics_log import (
    Mark,
    MetricsLog,
    cut_back,
    is_sealed,
    last_step,
    line_of,
    mark_of,
    read_metrics,
    read_rows,
    record_of,
    seal_holds,
)

ROWS = [
    *({"kind": "step", "step": s, "loss": 1 / s, "finite": True} for s in range(1, 9)),
    {"kind": "eval", "step": 8, "val_loss": float("inf"), "perplexity": float("nan")},
    {"kind": "event", "step": 8, "event": "verdict", "verdict": {"kind": "freeze"}},
    {"kind": "monitor", "step": 8, "layer": "a\N{LATIN SMALL LETTER E WITH ACUTE}", "role": "weight", "overflow": 0.5},
]


def whole():
    return b"".join(map(line_of, ROWS))


def test_lines_are_json_and_come_back_without_their_checksum():
    rows, damage = read_rows(whole())
    assert rows == [{**r, **({"val_loss": "inf", "perplexity": "nan"} if r["kind"] == "eval" else {})} for r in ROWS]
    assert not damage
    assert damage.sealed
    for line in whole().splitlines():
        assert json.loads(line)["crc"]
        assert is_sealed(line)
        assert seal_holds(line)


def test_every_flipped_bit_is_noticed_and_costs_one_line():
    data = whole()
    places = range(len(data)) if len(data) < 500 else random.Random(1).sample(range(len(data)), 500)
    for at in places:
        for bit in (0, 3, 7):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            rows, damage = read_rows(bytes(changed))
            assert 1 <= damage.count <= 2  # a flip at a line break joins or parts lines
            assert all(row in read_rows(data)[0] for row in rows)


def test_a_line_without_a_checksum_among_lines_that_have_one_is_damage():
    lines = whole().splitlines(keepends=True)
    lines[3] = json.dumps(ROWS[3]).encode() + b"\n"
    rows, damage = read_rows(b"".join(lines))
    assert damage.altered == [4]
    assert len(rows) == len(ROWS) - 1
    assert damage.said() == "1 line of metrics.jsonl did not match the checksum and was skipped (line 4)"


def test_files_of_before_there_were_checksums_are_read_and_said_to_be_such():
    data = "".join(json.dumps(r) + "\n" for r in ROWS[:8]).encode()
    rows, damage = read_rows(data + b'{"kind": "st')
    assert len(rows) == 8
    assert damage.sealed is False
    assert damage.torn == [9]


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "step"}',
        b'{"kind": "step", "step": -1}',
        b'{"kind": "step", "step": 1.5}',
        b'{"kind": "step", "step": true}',
        b'{"kind": "step", "step": 99999999999999999}',
        b'{"kind": ["step"], "step": 1}',
        b'{"kind": "other", "step": 1}',
        b'{"kind": "step", "step": 1, "loss": 1e999}',
        b'["step", 1]',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_is_no_record_is_counted_and_not_believed(line):
    metrics = read_metrics(line + b"\n" + json.dumps(ROWS[0]).encode())
    assert metrics.torn == [1]
    assert list(metrics.train.steps) == [1]


def test_the_log_knows_its_mark_and_a_file_goes_back_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for row in ROWS[:5]:
        log.write(row)
    mark = log.mark
    assert mark == mark_of(path.read_bytes())
    for row in ROWS[5:]:
        log.write(row)
    log.close()
    assert MetricsLog(path).mark.lines == len(ROWS)
    assert not cut_back(path, 5, mark)
    assert [record_of(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3, 4, 5]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[2:]))
    damage = cut_back(path, 5, mark)
    assert damage.missing == 2
    assert damage.said() == "2 lines of metrics.jsonl are lost"


def test_without_a_mark_sound_records_until_the_step_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole() + b'{"kind": "step", "st')
    assert not cut_back(path, 4)
    assert [r["step"] for r in read_rows(path.read_bytes())[0]] == [1, 2, 3, 4]
    assert not cut_back(tmp_path / "none", 4, Mark(0, 0))


def test_the_last_step_is_found_from_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole() + line_of(ROWS[0])[:30])
    assert last_step(path)["step"] == 8
    assert last_step(tmp_path / "none") is None
