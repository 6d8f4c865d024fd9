"""`altgrad verify` and reports on damaged folders: each damage is named, the rest is reported, nothing ends in a traceback."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from altgrad.analysis import write_report, write_study
from altgrad.cli import app, main
from altgrad.records.documents import CONFIG, ENVIRONMENT, RESULT, write_environment, write_result
from altgrad.records.files import file_sha256
from altgrad.records.metrics_log import METRICS, line_of, read_rows
from altgrad.records.run import Run
from altgrad.records.verify import CHECKSUMS
from tests.run_folders import make_run


def sealed_run(root, fmt="E3M4", **options):
    """A synthetic run with the checksums that a run writes, and a checkpoint."""
    folder = make_run(root, fmt, steps=40, **options)
    rows, _ = read_rows((folder / METRICS).read_bytes())
    (folder / METRICS).write_bytes(b"".join(map(line_of, rows)))
    write_environment(folder, json.loads((folder / ENVIRONMENT).read_text()))
    if (folder / RESULT).exists():
        write_result(folder, json.loads((folder / RESULT).read_text()))
    checkpoint = folder / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 40,\n"state": {}}')
    (checkpoint / CHECKSUMS).write_text(json.dumps({"state.json": file_sha256(checkpoint / "state.json")}))
    return folder


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_whole_runs_exit_with_0(tmp_path):
    sealed_run(tmp_path / "runs")
    sealed_run(tmp_path / "runs", "FP32", finished=False)
    make_run(tmp_path / "runs", "E5M2", steps=20)
    told = verify(tmp_path / "runs")
    assert told.exit_code == 0, told.output
    assert told.output.count("whole  ") == 3
    assert told.output.count("an older record without checksums") == 1
    assert "unfinished" in told.output


def test_a_kills_torn_line_is_no_damage_of_an_unfinished_run_and_is_of_a_finished_one(tmp_path):
    for finished, code in ((False, 0), (True, 1)):
        folder = sealed_run(tmp_path / str(finished), finished=finished)
        with (folder / METRICS).open("ab") as file:
            file.write(b'{"kind": "step", "st')
        assert verify(folder).exit_code == code


def first_line_gone(path):
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def deleted(path):
    path.unlink()


FILES = (METRICS, RESULT, ENVIRONMENT, CONFIG, "checkpoints/step-00000040/state.json")
KINDS = (flipped, cut, emptied, deleted, first_line_gone)
# Without a result a run is an unfinished one.
DAMAGES = [(name, kind) for name in FILES for kind in KINDS if (name, kind) != (RESULT, deleted)]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_every_damage_to_every_file_of_a_finished_run_is_found(tmp_path, name, damage):
    folder = sealed_run(tmp_path / "runs")
    damage(folder / name)
    told = verify(tmp_path / "runs")
    assert told.exit_code == 1
    assert name.rpartition("/")[2] in told.output
    assert "DAMAGED" in told.output


def test_no_runs_is_a_mistake_of_the_caller(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        monkeypatch.setattr("sys.argv", ["altgrad", "verify", str(missing)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert str(missing) in capsys.readouterr().err


HOSTILE = {
    "huge": "9" * 400,
    "1e400": "1e400",
    "NaN": "NaN",
    "list": "[1, [2]]",
    "mapping": '{"a": {"b": 1}}',
    "surrogate": '"\\ud800"',
    "deep": "[" * 100_000,
    "truth": "true",
    "text": '"x"',
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_one_bad_folder_is_named_and_the_others_are_reported(tmp_path, value):
    runs = [make_run(tmp_path / "runs", fmt, steps=30, seed=s) for fmt in ("FP32", "E3M4") for s in (1, 2)]
    bad = runs[-1]
    for name in (RESULT, ENVIRONMENT, CONFIG):
        facts = Run(bad).config if name == CONFIG else json.loads((bad / name).read_text())
        for key in ("steps", "verdict", "interventions", "seed", "format", "name", "max_steps", "optimizer", "threads"):
            if key not in facts:
                continue
            shutil.copy(bad / name, tmp_path / "kept")
            (bad / name).write_text(json.dumps({**facts, key: "@"}).replace('"@"', value))
            page = write_report(runs, tmp_path / "report.html").read_text()
            study = write_study(tmp_path / "runs", tmp_path / "study.html").read_text()
            assert runs[0].name in study
            assert "E3M4" in page
            if Run(bad).status == "damaged":
                assert "result.json" in page
                assert "1 run is damaged and left out of the statistics" in study
                assert f"{bad.name}: result.json" in study
            shutil.copy(tmp_path / "kept", bad / name)


def test_yaml_aliases_by_the_billion_do_not_stop_a_report(tmp_path):
    run = make_run(tmp_path, steps=20)
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (run / CONFIG).write_text("\n".join(rows))
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "config.yaml is unreadable: aliases unfold to more than" in page
