"""JSON, YAML and whole run folders that anybody may have written: refused with a reason, in bounded time."""

import json
import math
import random
import time

import pytest

from altgrad.records.documents import read_result
from altgrad.records.untrusted import MOST_DEPTH, Malformed, parse_json, parse_line, parse_yaml
from benchmarks import fuzz_configs
from benchmarks.fuzz_records import judge, make_runs

REFUSED_JSON = {
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "an integer beyond 64 bits": b'{"a": 99999999999999999999}',
    "1e400": b'{"a": 1e400}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "half of a surrogate pair": b'{"a": "\\ud800"}',
    "half of a surrogate pair as a name": b'{"\\udc00": 1}',
    "deep": b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    "as deep as the stack": b"[" * 200_000,
    "not UTF-8": b'{"a": "\xff"}',
    "cut off": b'{"a": 1',
    "empty": b"",
}


@pytest.mark.parametrize("text", REFUSED_JSON.values(), ids=REFUSED_JSON)
@pytest.mark.parametrize("parse", [parse_json, parse_line])
def test_json_that_no_run_writes_is_refused(parse, text):
    with pytest.raises(Malformed) as told:
        parse(text)
    assert 0 < len(str(told.value)) < 300


def test_json_that_runs_write_is_read():
    text = b'{"a": [1, -2.5e-310, null, true, "nan", "\\u00e9\\ud83d\\ude00"], "b": {}}'
    assert parse_json(text) == parse_line(text) == json.loads(text)
    assert parse_json(b"9223372036854775807") == 2**63 - 1
    assert parse_line(b'{"a": 0.00012345678901234567}') == {"a": 0.00012345678901234567}


def bomb(levels=9, width=9):
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(rows).encode()


def merge_bomb(levels=9, width=9):
    rows = ["a0: &a0 {x: 1}"]
    rows += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}]}}" for i in range(1, levels)]
    return "\n".join(rows).encode()


REFUSED_YAML = {
    "aliases by the billion": bomb(),
    "merges by the billion": merge_bomb(),
    "an alias inside of itself": b"a: &a [*a]",
    "deep brackets": b"[" * 300_000,
    "deep dashes": b"- " * 300_000,
    "deep braces": b"{a: " * 200_000,
    "an integer of 5,000 digits": b"a: " + b"9" * 5000,
    "an integer beyond 64 bits": b"a: 99999999999999999999",
    "a Python object": b"a: !!python/object/apply:os.system [ls]",
    "bytes": b"a: !!binary aGk=",
    "a set": b"a: !!set {x, y}",
    "a list as a key": b"? [a]\n: 1",
    "a number as a key": b"1: true",
    "a key given twice": b"a: 1\na: 2",
    "not UTF-8": b"a: \xff",
    "half written": b"a: [1, 2\n b: }",
    "two documents": b"a: 1\n---\nb: 2",
    "too long": b"#" * (1 << 21),
}


@pytest.mark.parametrize("text", REFUSED_YAML.values(), ids=REFUSED_YAML)
def test_yaml_that_no_run_writes_is_refused_at_once(text):
    begun = time.process_time()
    with pytest.raises(Malformed):
        parse_yaml(text)
    assert time.process_time() - begun < 5


def test_yaml_that_runs_write_is_read():
    date = {"d": "2024-01-05"}
    text = b"a: 1\nb: [x, 1e-3, .inf, null]\nc: &c {d: 2024-01-05}\ne: *c\nf: 2024-13-45"
    assert parse_yaml(text) == {"a": 1, "b": ["x", 0.001, math.inf, None], "c": date, "e": date, "f": "2024-13-45"}
    assert parse_yaml(b"") is None
    assert parse_yaml(b"x: " + b"[" * (MOST_DEPTH - 2) + b"]" * (MOST_DEPTH - 2))
    with pytest.raises(Malformed, match="deeper"):
        parse_yaml(b"x: " + b"[" * MOST_DEPTH + b"]" * MOST_DEPTH)


def test_the_former_name_of_a_results_details_is_read(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"name": "old", "figures": {"skipped_steps": 2}}))
    content = read_result(tmp_path / "result.json").content
    assert content["details"] == {"skipped_steps": 2}
    assert "figures" not in content


def test_damaged_folders_are_reported_or_refused(tmp_path):
    make_runs(tmp_path / "base")
    told = [judge(tmp_path / "base", tmp_path, random.Random(f"0 {number}")) for number in range(15)]
    assert [case for case in told if case[0] not in ("reported", "refused")] == []


@pytest.mark.parametrize("kind", fuzz_configs.KINDS)
def test_hostile_configs_overrides_and_matrices_are_taken_or_refused(kind):
    verdicts = fuzz_configs.run(kind, 40, seed=2)
    assert set(verdicts) <= {"taken", "refused"}
    assert verdicts["refused"] > 10
