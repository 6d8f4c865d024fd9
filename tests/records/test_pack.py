"""Packs and `altgrad verify`: read like folders of runs, whole or said not to be, and never trusted."""

import io
import json
import lzma
import shutil
import tarfile

import pytest
from typer.testing import CliRunner

from altgrad.analysis import write_report, write_study
from altgrad.cli import app, main
from altgrad.errors import ReportError
from altgrad.records import folders
from altgrad.records.documents import CONFIG, ENVIRONMENT, RESULT, write_environment, write_result
from altgrad.records.files import file_sha256
from altgrad.records.folders import open_archive, read_bytes, write_archive
from altgrad.records.metrics_log import METRICS, line_of, read_rows
from altgrad.records.pack import pack_runs, unpack
from altgrad.records.run import Run, find_runs, read_run
from altgrad.records.verify import CHECKSUMS
from tests.run_folders import make_run


@pytest.fixture
def study(tmp_path):
    root = tmp_path / "study"
    for fmt in ("FP32", "E3M4"):
        for seed in (1, 2):
            make_run(root / "part", fmt, seed=seed, steps=60, monitor_interval=20)
    make_run(root, "E7M0", seed=1, steps=60, collapse="freeze", onset=20)
    (root / "facts.json").write_text('{"rate": 1}')
    return root


def test_a_pack_reads_like_the_folder_it_was_made_of(study, tmp_path):
    pack = tmp_path / "study.tar.xz"
    names = pack_runs([study], pack)
    on_disk = find_runs(study)
    packed = find_runs(pack)
    assert [p.relative_to(pack) for p in packed] == [p.relative_to(study) for p in on_disk]
    assert sorted(names) == [p.relative_to(study).as_posix() for p in on_disk]
    for one, other in zip(map(read_run, on_disk), map(read_run, packed), strict=True):
        assert (one.result, one.config, one.environment) == (other.result, other.config, other.environment)
        assert one.records() == other.records()
        assert one.problems == other.problems
        assert one.status == other.status
    assert read_bytes(pack / "facts.json") == b'{"rate": 1}'
    assert find_runs(pack / "part") == packed[-4:] or len(find_runs(pack / "part")) == 4


def test_reports_are_written_from_packs(study, tmp_path):
    pack = tmp_path / "study.tar.xz"
    pack_runs([study], pack)
    page = write_study(pack)
    assert page == tmp_path / "study.html"
    assert "E3M4" in page.read_text()
    assert 'href="study.tar.xz"' in page.read_text()
    single = write_report([find_runs(pack / "part")[0]], tmp_path / "one.html")
    assert "60 steps" in single.read_text()


def test_the_same_records_make_the_same_bytes_wherever_they_lie(study, tmp_path):
    first, second, third = (tmp_path / f"{i}.tar.xz" for i in "abc")
    pack_runs([study], first)
    unpack(first, tmp_path / "again")
    pack_runs([tmp_path / "again"], second)
    pack_runs([second], third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_the_commands_pack_report_and_unpack(study, tmp_path):
    pack = tmp_path / "out" / "study.tar.xz"
    told = CliRunner().invoke(app, ["pack", str(study), "--out", str(pack)])
    assert told.exit_code == 0
    assert "5 runs" in told.output
    table = (tmp_path / "out" / "study.md").read_text()
    assert table.count("\n| part/") == 4
    assert "froze, step 20" in table
    assert CliRunner().invoke(app, ["report", str(pack)]).exit_code == 0
    assert (tmp_path / "out" / "study.html").exists()
    assert CliRunner().invoke(app, ["unpack", str(pack), "--out", str(tmp_path / "back")]).exit_code == 0
    assert len(find_runs(tmp_path / "back")) == 5


def test_what_cannot_be_packed_is_refused_with_the_remedy(study, tmp_path):
    with pytest.raises(ReportError, match=r"\.tar\.xz"):
        pack_runs([study], tmp_path / "study.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="no run folders"):
        pack_runs([tmp_path / "empty"], tmp_path / "x.tar.xz")
    run = find_runs(study)[0]
    with pytest.raises(ReportError, match="two runs"):
        pack_runs([run, run], tmp_path / "x.tar.xz")
    pack_runs([study], tmp_path / "study.tar.xz")
    with pytest.raises(ReportError, match="new folder"):
        unpack(tmp_path / "study.tar.xz", study)


def tar_of(*members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=options.get("format", tarfile.USTAR_FORMAT)) as tar:
        for name, content, changes in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in changes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


HOSTILE = {
    "out of the folder": tar_of(("../../etc/x", b"1", {})),
    "absolute": tar_of(("/etc/x", b"1", {})),
    "backslash": tar_of(("..\\x", b"1", {})),
    "drive": tar_of(("C:x", b"1", {})),
    "control letters": tar_of(("a\x1b[2Jb", b"1", {})),
    "symbolic link": tar_of(("x", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})),
    "hard link": tar_of(("x", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})),
    "device": tar_of(("x", b"", {"type": tarfile.CHRTYPE})),
    "twice": tar_of(("x", b"1", {}), ("x", b"2", {})),
    "file and folder": tar_of(("x", b"1", {}), ("x/y", b"2", {})),
    "long names in extended headers": tar_of(("x" * 200, b"1", {}), format=tarfile.PAX_FORMAT),
    "size beyond the end": tar_of(("x", b"1", {}))[:512],
    "no archive": b"hello" * 400,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_nothing_is_written(name, tmp_path):
    pack = tmp_path / "evil.tar.xz"
    pack.write_bytes(lzma.compress(HOSTILE[name]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ReportError, match=r"evil\.tar\.xz"):
        unpack(pack, tmp_path / "out")
    with pytest.raises(ReportError):
        find_runs(pack)
    assert sorted(tmp_path.iterdir()) == before


def test_a_bomb_is_refused_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MOST_BYTES", 1 << 20)
    pack = tmp_path / "bomb.tar.xz"
    pack.write_bytes(lzma.compress(bytes(1 << 24)))
    with pytest.raises(ReportError, match="more than 1,048,576 bytes"):
        open_archive(pack)


def test_a_damaged_pack_is_said_to_be(tmp_path, study):
    pack = tmp_path / "study.tar.xz"
    pack_runs([study], pack)
    whole = pack.read_bytes()
    for damaged in (whole[:-40], whole[: len(whole) // 2], b"", whole[:900] + b"\0" + whole[901:], whole + b"more"):
        pack.write_bytes(damaged)
        with pytest.raises(ReportError, match=r"study\.tar\.xz is damaged"):
            find_runs(pack)


def test_names_that_no_pack_can_hold_are_refused(tmp_path):
    for name in ("../x", "/x", "a//b", "x\\y", "n" * 300):
        with pytest.raises(ReportError, match="cannot go into a pack"):
            write_archive(tmp_path / "x.tar.xz", {name: b""})


def test_a_run_in_a_pack_links_to_no_page_outside(study, tmp_path):
    pack_runs([study], tmp_path / "s.tar.xz")
    assert all(Run(path).failure_reports == [] for path in find_runs(tmp_path / "s.tar.xz"))


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


HOSTILE_VALUES = {
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


@pytest.mark.parametrize("value", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
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
            study = write_study(tmp_path / "runs", tmp_path / "study.html").read_text().replace("<wbr>", "")
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
