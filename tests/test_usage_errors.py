"""What the command line's parser cannot take, and what would be found out late or never, is refused in one line with value, limit
and remedy."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.cli import main
from altgrad.errors import ReportError
from altgrad.nn import uniform
from tests.run_folders import make_run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--devic", "cpu"], "run has no option --devic; did you mean --device?"),
        (["run", "x", "--lr", "3e-4"], "run has no option --lr; a setting is written optimizer.lr=VALUE"),
        (["sweep", "x", "--seed=7"], "sweep has no option --seed; a setting is written seed=VALUE"),
        (["formats", "--all"], "formats has no option --all; options are --equivalent, --help"),
        (["run", "x", "--zzz"], "and settings such as seed=7"),
        (["--formats"], "there is no option --formats; did you mean altgrad formats?"),
        (["runn"], "there is no command runn; did you mean run?"),
        (["train", "x"], "there is no command train; commands are demo, init, run,"),
        (["run"], "run needs CONFIG: an experiment's YAML file, or a shipped one's name: e3m4_uniform"),
        (["unpack"], "unpack needs PACK: a pack, such as study.tar.xz"),
        (["pack", "runs"], "pack needs --out: the pack to write, such as study.tar.xz"),
        (["advise", "x", "--steps", "many"], "--steps many is no whole number: steps of the float32 trace"),
        (["advise", "x", "--bits", "8bit"], "--bits 8bit is no number: average bits a value"),
        (["advise", "x", "--bits"], "--bits needs a value: average bits a value"),
        (["advise", "fp32_baseline", "--bits", "nan"], "NaN bits on average are fewer than the 8"),
        (["autopsy", "x", "-j"], "-j needs a value: forks at a time"),
        (["formats", "--equivalent=yes"], "--equivalent is a switch and takes no value"),
        (["formats", "E4M3", "E5M2"], "formats takes NAME and no more; leave out E5M2"),
        (["demo", "here"], "demo takes options alone; leave out here"),
        (["demo", "--minutes", "nan"], "--minutes nan; use at least 0"),
        (["autopsy", "x", "--budget", "0"], "--budget 0; use at least 1"),
        (["replay", "x", "--steps", "0"], "--steps 0; use at least 1"),
    ],
    ids=str,
)
def test_a_usage_error_is_one_line_with_its_remedy(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["altgrad", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "compiling loops" not in line]
    assert line.startswith("altgrad: ")
    assert said in line
    assert shown.out == ""


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_terminal_is_shown_no_box_of_a_usage_error(kind):
    screen, end = pty.openpty()
    command = [sys.executable, "-m", "altgrad", "run", "--devic"]
    environment = {**os.environ, "TERM": kind, "COLUMNS": "60"}
    done = subprocess.run(command, stdin=end, stdout=end, stderr=end, env=environment, check=False)
    os.close(end)
    assert done.returncode == 2
    assert os.read(screen, 4096) == b"altgrad: run has no option --devic; did you mean --device?\r\n"
    os.close(screen)


def test_nothing_at_all_is_answered_with_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["altgrad"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "autopsy" in capsys.readouterr().err


MATRIX = "base: fp32_baseline\nmatrix: {formats: [E4M3, E5M2]}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", "fp32_baseline", "formats="],
            "override 'formats=' has no value; write formats=null where none is meant",
        ),
        (["run", "fp32_baseline", "name=../up"], "write letters, digits, _, . and -"),
        (["run", "recipe.yaml"], "recipe.yaml is a recipe and no config"),
        (["advise", "fp32_baseline", "-o", "matrix.yaml"], "matrix.yaml is a file; choose a folder for the advice"),
        (["advise", "run"], "run is a run's folder; give its config: run/config.yaml"),
        (["sweep", "matrix.yaml", "-o", "run"], "run is the folder of one run; choose a folder for the runs"),
        (["sweep", "matrix.yaml", "--devices", "0", "--dry-run"], "--devices 0 are GPUs, and no run has device=cuda"),
        (["sweep", "matrix.yaml", "-o", "/proc/no"], "no folder /proc/no can be made for the runs"),
        (["report", "run", "-o", "/proc/page.html"], "/proc/page.md: No such file or directory"),
        (["unpack", "nowhere", "-o", "out"], "nowhere cannot be read: No such file or directory; name a pack"),
    ],
    ids=str,
)
def test_what_would_be_found_out_late_is_refused_at_once(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "E4M3", steps=5).rename("run")
    Path("matrix.yaml").write_text(MATRIX)
    Path("recipe.yaml").write_text(uniform("E4M3").to_yaml())
    monkeypatch.setattr(sys, "argv", ["altgrad", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_twin_that_is_none_is_refused_before_an_autopsy_is_planned(tmp_path, monkeypatch):
    from altgrad.autopsy import run

    monkeypatch.setattr(run, "rebuild", lambda folder: (None, [1.0], None))
    with pytest.raises(ReportError, match="is not a run folder"):
        run.plan(tmp_path, twin=tmp_path)


def test_ctrl_c_in_a_callback_of_the_interpreter_is_not_lost():
    """It was dropped there with a traceback, and the command went on."""
    code = """if True:
        import signal, sys, time, typer
        from altgrad.cli.process import carried_out
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        class Falls:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)
        app = typer.Typer()
        @app.command()
        def go():
            Falls()
            time.sleep(300)
        sys.argv = ["altgrad"]
        carried_out(app)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (130, "altgrad: stopped\n")
