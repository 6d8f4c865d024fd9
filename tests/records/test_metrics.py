"""The rows of metrics and the log that holds them: references agree, bad rows are refused, torn lines are counted."""

import json
import random
from pathlib import Path

import pytest

from altgrad.errors import OptionError
from altgrad.records.metrics import (
    OPERANDS,
    PARAMETERS,
    RECORD_KEYS,
    RUN,
    Metric,
    find_metric,
    groups,
    markdown_table,
    mean,
    metrics,
    register,
    unregister,
)
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

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "diagnostics.md"


def test_the_guide_has_the_table_of_the_rows():
    assert markdown_table() in GUIDE.read_text(), f"put this into {GUIDE.name}:\n{markdown_table()}"


@pytest.mark.parametrize("row", metrics(), ids=lambda row: f"{row.group}-{row.name}")
def test_every_row_says_what_it_is_and_can_be_shown(row):
    assert row.says
    assert row.name not in RECORD_KEYS
    assert any(set(row.roles) <= set(kind) for kind in (OPERANDS, PARAMETERS, RUN))
    assert set(row.heads) <= set(row.roles)


def test_rows_of_one_name_agree_and_no_group_has_a_name_twice():
    for row in metrics():
        first = find_metric(row.name, "run" if row.roles == RUN else None)
        assert (row.unit, row.heading, row.over_layers) == (first.unit, first.heading, first.over_layers)
    keys = [(row.group, row.name) for row in metrics()]
    assert len(keys) == len(set(keys))


def test_a_row_is_found_by_name_and_role():
    assert find_metric("nonfinite_frac", "grad_output").group == "operands"
    assert find_metric("nonfinite_frac", "gradient").group == "sparsity"
    assert find_metric("flip_rate").group == "stall"
    assert find_metric("flip_rate", "run").group == "step"
    assert find_metric("loss") is None
    assert find_metric("l2", "input") is None
    assert find_metric("no_such") is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": "step"}, "'step'"),
        ({"name": "Kurtosis of w"}, "plain name"),
        ({"name": "stall"}, "already"),
        ({"roles": ("weight", "grad_output", "update")}, "not some of"),
        ({"roles": ()}, "not some of"),
        ({"heads": {"input": "k"}}, "'input'"),
        ({"roles": ("weight", "update"), "tabled": True}, "one role"),
    ],
)
def test_a_bad_row_is_refused(facts, message):
    before = metrics()
    with pytest.raises(OptionError, match=message):
        register(Metric(**{"name": "kurtosis", "group": "shape", "roles": ("weight",), **facts}))
    assert metrics() == before


def test_a_row_can_be_added_and_taken_out_but_none_of_altgrads_own():
    before = metrics()
    register(Metric("kurtosis", "shape", ("weight",)))
    try:
        assert groups()[-1] == "shape"
        assert find_metric("kurtosis") is not None
    finally:
        unregister("kurtosis")
    unregister("stall")
    assert metrics() == before


def test_the_mean_of_layers_keeps_what_is_not_finite():
    assert mean([1.0, 2.0]) == 1.5
    assert mean([1.0, float("inf")]) == float("inf")


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
