"""JSON, YAML and whole run folders that anybody may have written: refused with a reason, in bounded time."""

import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import yaml

from altgrad.analysis import write_report
from altgrad.errors import ConfigError, RecipeError, ReportError
from altgrad.monitor import make_schedule
from altgrad.nn import Recipe, uniform
from altgrad.records.documents import load_result, read_result, write_result
from altgrad.records.files import open_regular, read_file
from altgrad.records.machine import threads_in
from altgrad.records.pack import pack_runs, unpack
from altgrad.records.untrusted import MOST_DEPTH, Malformed, parse_json, parse_line, parse_pattern, parse_yaml
from altgrad.records.verify import verify_run
from altgrad.training.config.document import read_document
from altgrad.training.config.loading import load_config
from benchmarks import fuzz_configs, reliability
from benchmarks.fuzz_records import judge, make_runs
from benchmarks.reliability import count_cases

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


# -- files that are none, or that somebody wrote on purpose ---------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Finished runs with checksums, which no test changes."""
    base = tmp_path_factory.mktemp("finished")
    make_runs(base)
    return base


@pytest.fixture
def runs(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs")
    return sorted((tmp_path / "runs").iterdir())


def forged_result(folder, **changes):
    content = {**json.loads((folder / "result.json").read_text()), **changes}
    write_result(folder, content)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["config.yaml", "env.json", "result.json", "metrics.jsonl"])
@pytest.mark.parametrize("made", [os.mkfifo, lambda path: path.symlink_to("/dev/tty"), lambda path: path.mkdir()])
def test_a_pipe_a_device_or_a_folder_in_a_files_place_is_damage_and_never_waited_for(runs, name, made):
    (runs[0] / name).unlink()
    made(runs[0] / name)
    assert not verify_run(runs[0]).whole
    assert write_report(runs, runs[0].parent / "page.html", force=True).exists()
    assert len(pack_runs([runs[0].parent], runs[0].parent / "pack.tar.xz")) == len(runs)


@pytest.mark.timeout(30)
def test_a_file_without_end_is_refused(tmp_path):
    with (tmp_path / "metrics.jsonl").open("wb") as stream:
        stream.truncate(1 << 42)
    with pytest.raises(OSError, match="longer than"):
        read_file(tmp_path / "metrics.jsonl")
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(OSError, match="no regular file"):
            open_regular(Path(device))
    os.mkfifo(tmp_path / "study.tar.xz")
    with pytest.raises(ReportError, match="no regular file"):
        unpack(tmp_path / "study.tar.xz", tmp_path / "out")
    with pytest.raises(ConfigError, match="no regular file"):
        read_document(tmp_path / "study.tar.xz")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": {}}, "verdict has no kind"),
        ({"verdict": {"kind": "freeze"}}, "verdict has no reason"),
        ({"verdict": {"kind": "freeze", "reason": "x", "onset_step": "y"}}, "onset_step"),
        ({"remarks": [3]}, "remarks.0 is 3"),
        ({"remarks": [{"kind": "stalled"}]}, "remarks.0 has no reason"),
    ],
)
def test_a_verdict_that_no_run_writes_is_damage_also_under_a_sound_checksum(runs, changes, said):
    forged_result(runs[0], **changes)
    assert said in str(read_result(runs[0] / "result.json").problem)
    with pytest.raises(ReportError, match="is damaged"):
        load_result(runs[0])


@pytest.mark.parametrize("folder", ["x" * 300, "a\0b", "/"])
def test_a_config_that_names_no_possible_folder_does_not_end_the_report(runs, folder):
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    (runs[0] / "config.yaml").write_text(json.dumps({**config, "checkpoint_dir": folder}))
    assert write_report(runs, runs[0].parent / "page.html", force=True).exists()
    assert pack_runs([runs[0].parent], runs[0].parent / "pack.tar.xz")


@pytest.mark.parametrize("threads", [True, 0, -1, 10**9, 2**40, "4", 1.5, None])
def test_threads_that_no_machine_has_are_none(threads):
    assert threads_in({"threads": threads}) is None
    assert threads_in({"threads": 8}) == 8


@pytest.mark.timeout(20)
def test_a_recipes_yaml_is_read_within_the_limits():
    for text in (bomb(), b"a: " + b"[" * 5000, b"formats: !!python/name:os.system", b"a: 1\na: 2"):
        with pytest.raises(RecipeError, match="is no YAML"):
            Recipe.from_yaml(text.decode() + "\n")
    assert Recipe.from_yaml(uniform("E4M3").to_yaml()) == uniform("E4M3")


YEARS = (
    "(.+)+!",
    "(.*)*(.*)*!",
    "(a|.)*(b|.)*x{1,9}.*.*!",
    "(?:(?:.{1,20}){1,20}){1,20}!",
    ".*.*.*.*.*!",
    "(.*.*)?(.*.*.*)?!",
    "x" * 5000,
    "(",
    "(?=(.+)+!)",
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", YEARS, ids=range(len(YEARS)))
def test_a_pattern_that_may_take_years_is_refused_wherever_one_is_taken(text):
    with pytest.raises(Malformed):
        parse_pattern(text)
    with pytest.raises(RecipeError, match="name pattern"):
        Recipe.from_dict({"default": "E4M3", "overrides": [{"name": f"re:{text}", "recipe": None}]})
    with pytest.raises(ConfigError):
        load_config({"formats": {"default": "E4M3", "overrides": [{"name": f"re:{text}", "recipe": None}]}})
    with pytest.raises(ConfigError, match="not a regular expression"):
        make_schedule({"rank": {"every": 1, "layers": text}})


@pytest.mark.timeout(20)
def test_patterns_that_people_write_are_taken_and_are_fast():
    name = "transformer.layers.117.attention.self_attn.q_proj.base_layer"
    for text in (
        r"(?:.*\.)?(?:\w*emb\w*|wte|wpe)",
        r".*blocks\.\d+\.(attn|mlp)\..*",
        r"(?:.*\.)?lora_\w+(?:\..*)?",
        "",
        "head$",
        r".*.*.*.*!",
    ):
        begun = time.process_time()
        parse_pattern(text).fullmatch(name)
        parse_pattern(text).search(name)
        assert time.process_time() - begun < 5


def test_counts_go_on_where_they_were_stopped_and_start_anew_for_another_seed(tmp_path):
    record, asked = tmp_path / "record.json", []

    def judged(number):
        asked.append(number)
        return "refused" if number % 2 else "taken"

    count_cases(record, "fuzz x", 1, 4, judged, every=2)
    assert count_cases(record, "fuzz x", 1, 6, judged, every=2) == {"taken": 3, "refused": 3}
    assert asked == [0, 1, 2, 3, 4, 5]
    assert count_cases(record, "fuzz x", 2, 1, judged) == {"taken": 1}
    assert json.loads(record.read_text())["fuzz x"]["cases"] == 1


def test_the_page_has_the_tables_of_the_record():
    assert reliability.with_tables(reliability.PAGE.read_text(), reliability.tables(json.loads(reliability.RECORD.read_text()))) == reliability.PAGE.read_text()  # fmt: skip
