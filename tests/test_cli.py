"""The command line as a person runs it: what it prints, its exit codes, and no traceback for a mistake."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import altgrad as altgrad_package
from altgrad.analysis import find_runs, read_run
from altgrad.cli import app, demo_pages
from altgrad.cli.run_pages import exit_code
from altgrad.errors import ConfigError, RecipeError
from altgrad.records.schema import ExperimentResult
from altgrad.sweep import read_matrix, run_sweep
from altgrad.training.config.loading import key_paths, load_config
from tests.training.tiny import TINY, losses

E3M4 = Path(__file__).parents[1] / "experiments" / "configs" / "e3m4_uniform.yaml"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps({**TINY, "max_steps": 4, "runs_dir": str(tmp_path / "runs")}))  # JSON is YAML
    return path


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def altgrad(*arguments, **options):
    command = [sys.executable, "-m", "altgrad", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_run_prints_its_result_and_is_not_repeated(config, tmp_path):
    first = invoke("run", config, "fp8_format=E3M4", "weight_storage=grid")
    assert first.exit_code == 0
    assert "E3M4" in first.output
    assert "completed" in first.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"report: {folder}/report.html" in first.output
    assert "<html" in (folder / "report.html").read_text()
    again = invoke("run", config, "fp8_format=E3M4", "weight_storage=grid")
    assert "finished before" in again.output
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_dry_run_and_print_config_write_nothing(config, tmp_path):
    plan = invoke("run", config, "fp8_format=E3M4", "--dry-run")
    assert plan.exit_code == 0
    assert "blocks.0.mlp.up" in plan.output
    assert "parameters" in plan.output
    shown = invoke("run", config, "seed=9", "--print-config", "--device", "cpu")
    assert "seed: 9" in shown.output
    assert "divergence_window: 50" in shown.output
    assert not (tmp_path / "runs").exists()


def test_compare_runs_all_and_reports_once(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace('"tiny"', '"other", "fp8_format": "E5M2"'))
    result = invoke("compare", config, other, "seed=5")
    assert result.exit_code == 0
    assert "FP32" in result.output
    assert "E5M2" in result.output
    text = (tmp_path / "runs" / "comparison.html").read_text()
    assert "other" in text
    assert all("-s5-" in p.name for p in (tmp_path / "runs").iterdir() if p.is_dir())
    rewritten = invoke("report", tmp_path / "runs", "-o", tmp_path / "again.html")
    assert rewritten.exit_code == 0
    assert (tmp_path / "again.html").exists()


def test_a_plan_is_shown_without_times_where_none_are_wanted(config, tmp_path):
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(f"base: {config}\nmatrix: {{fp8_format: [E3M4, E5M2]}}\n")
    shown = invoke("sweep", matrix, "--out", tmp_path / "out", "--dry-run", "--no-estimate")
    assert "2 runs" in shown.output
    assert "no estimate" in shown.output


def test_nothing_is_run_of_a_comparison_that_cannot_be_whole(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({**json.loads(config.read_text()), "fp8_format": "E3M4", "exclude": ["nohead"]}))
    with pytest.raises(
        RecipeError, match=r"other\.yaml: exclude pattern 'nohead' matches no module; closest names: head"
    ):
        invoke("compare", config, other)
    assert not (tmp_path / "runs").exists()


def test_formats_of_one_config_are_compared_over_seeds_in_one_report(config, tmp_path):
    given = ["compare", config, "weight_storage=grid", "--formats", "E3M4, te_current without promotion"]
    planned = invoke(*given, "--seeds", "2", "--dry-run")
    assert "4 runs" in planned.output
    assert not (tmp_path / "runs").exists()
    result = invoke(*given, "--seeds", "2", "--jobs", "1")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "tiny-formats"
    assert f"report: {folder / 'report.html'}" in result.output
    storages = {(read_run(run).config["weight_storage"]) for run in find_runs(folder)}
    assert storages == {"grid", "master"}  # a named recipe says itself how weights are stored
    assert "4 done before" in invoke(*given, "--seeds", "2").output


def test_advice_takes_a_shipped_config_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["model.n_layer=1", "model.n_embd=16", "data.max_bytes=20000", "max_steps=5"]
    assert "5 float32 steps" in invoke("advise", "fp32_baseline", *small, "--dry-run").output


def test_first_files_say_every_key_and_run_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "altgrad run experiment.yaml" in invoke("init").output
    text = Path("experiment.yaml").read_text()
    assert load_config("experiment.yaml") == load_config({"formats": "E4M3"})
    assert [key for key in key_paths() if not re.search(rf"^ *(# )?{key.rpartition('.')[2]}:", text, re.M)] == []
    assert invoke("init", "--matrix").exit_code == 0
    assert len(read_matrix("matrix.yaml").expand()) == 15
    with pytest.raises(ConfigError, match="exists and stays as it is"):
        invoke("init")


def test_shipped_configs_and_matrices_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("e3m4_uniform") == load_config(E3M4)
    assert read_matrix("formats").name == "formats"
    assert "seed: 42" in invoke("run", "e3m4_uniform", "--print-config").output


def test_the_version_is_said():
    assert invoke("--version").output == f"altgrad {altgrad_package.__version__}\n"


def test_the_demo_trains_six_formats_saves_the_worst_and_says_why(tmp_path, monkeypatch):
    from altgrad.training.run import demo

    monkeypatch.setitem(demo.DEMO_SIZE, "model", {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16})
    monkeypatch.setitem(demo.DEMO_SIZE, "data", {"batch_size": 2, "max_bytes": 20_000})
    monkeypatch.setitem(demo.DEMO_SIZE, "optimizer", {"lr": 5e-3, "warmup_steps": 2})
    given = ["demo", "--runs-dir", tmp_path / "demo", "--steps", "30", "--minutes", "0"]
    result = invoke(*given)
    assert result.exit_code == 0
    for fmt in demo.DEMO_FORMATS:
        assert fmt in result.output
    assert len([p for p in (tmp_path / "demo").iterdir() if p.is_dir()]) == 7
    assert "E7M0 barely learned" in " ".join(result.output.split())
    assert "E7M0 stochastic storage" in " ".join(result.output.split())
    saved = re.search(
        r"saved .* nats: (altgrad run .*/e7m0-s42-\w+/config.yaml storage_rounding=stochastic)", result.output
    )
    assert saved, result.output
    again = invoke(*saved[1].split()[1:])  # the command is the arm's: it is looked up
    assert "finished before" in again.output
    assert f"altgrad autopsy {tmp_path / 'demo'}" in result.output
    page = (tmp_path / "demo" / "report.html").read_text()
    for words in ("Update over half a grid step", "Learning rate", "Where numbers were lost first", "What saves it."):
        assert words in page


def test_the_demo_trains_formats_side_by_side_and_holds_each_against_the_float32_run(tmp_path, monkeypatch):
    from altgrad.training.run import demo

    monkeypatch.setitem(demo.DEMO_SIZE, "model", {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 8})
    monkeypatch.setitem(demo.DEMO_SIZE, "data", {"batch_size": 2, "max_bytes": 20_000})
    monkeypatch.setattr(demo, "DEMO_FORMATS", ("FP32", "E3M4", "E7M0"))
    monkeypatch.setattr(demo_pages, "available_cores", lambda: 2)
    monkeypatch.setattr(demo_pages, "LONG", 0.0)
    asked = {}
    monkeypatch.setattr(
        demo_pages,
        "run_sweep",
        lambda plan, options, make_job: (
            asked.update({run.config.name: make_job(run, 1) for run in plan.runs})
            or run_sweep(plan, options, make_job=make_job)
        ),
    )
    result = invoke("demo", "--runs-dir", tmp_path, "--steps", "12", "--minutes", "0")
    assert result.exit_code == 0
    twin = next(tmp_path.glob("fp32-*"))
    assert {name: job.arguments(Path("c.yaml"))[-2:] for name, job in asked.items()} == {
        key: ["--twin", str(twin)] for key in ("e3m4", "e7m0")
    }
    assert all((next(tmp_path.glob(f"{name}-*")) / "log.txt").read_text() for name in asked)
    assert (tmp_path / "report.html").exists()
    with pytest.raises(ConfigError, match=r"is not .* in FP32"):
        invoke("run", E3M4, "--twin", twin)


def test_two_rows_of_one_experiment_are_refused(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace('"tiny"', '"other"'))
    with pytest.raises(ConfigError, match="are the same experiment"):
        invoke("compare", config, other)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.yaml"], "does not exist"),
        (["run", E3M4, "sed=7"], "did you mean 'seed'"),
        (["run", E3M4, "max_steps=-1"], "greater than 0"),
        (["run", E3M4, "--device", "tpu"], "cpu, cuda"),
        (["run", E3M4, "data.source=text", "data.path=/nowhere"], "does not exist"),
        (["run", E3M4, "optimizer.name=adamv", "--dry-run"], "adamw"),
        (["run", E3M4, "include=[nothing]", "--dry-run"], "nothing"),
        (["compare", E3M4], "at least two"),
        (["report", "/nowhere"], "/nowhere"),
        (["run", "e3m4_unifrom"], "did you mean e3m4_uniform?"),
        (["sweep", "nowhere"], "give a file, or one of"),
        (["run", E3M4.parent], "is a folder; give a config file, such as"),
        (["run", E3M4, "exclude=head"], "exclude = 'head': must be a list; write [head]"),
        (["formats", "E4M3", "--equivalent"], "leave out E4M3"),
        (["run", E3M4, "learning_rate=3e-4"], "did you mean 'optimizer.lr'"),
        (["run", E3M4, "data.bs=3"], "did you mean 'data.batch_size'"),
        (["compare", E3M4, "--formats", "E4M3"], "give two or more"),
        (["compare", E3M4, "--formats", "E4M3,fp8_e4m3"], "the same run twice"),
        (["compare", E3M4, "--formats", "E4M3,E4M"], "did you mean E4M3"),
        (["compare", E3M4, E3M4, "--formats", "E4M3,E3M4"], "of one config, 2 given"),
        (["compare", E3M4, E3M4, "--seeds", "2"], "--seeds goes with --formats"),
        (["compare", E3M4, E3M4, "--dry-run"], "--dry-run goes with --formats"),
        (["run", E3M4, "data.path=mine.txt"], "is not read by source 'stdlib'; set data.source=text"),
        (["run", E3M4, "formats=te_mxfp9"], "recipes of a like name: te_mxfp8"),
        (["sweep", "formats", "fp8_format=[]"], "axis 'fp8_format' has no values"),
        (["sweep", "formats", "rounding=[up,down]"], "to try several, write rounding with its values under matrix:"),
        (["sweep", "format"], "did you mean formats?"),
        (["sweep", "e3m4_uniform"], "altgrad run e3m4_uniform"),
        (["advise", E3M4, "--steps", "-1"], "--steps -1; use at least 1"),
        (["advise", E3M4, "--verify", "-1", "--dry-run"], "--verify -1; use at least 0"),
    ],
    ids=str,
)
def test_a_persons_mistake_is_one_line_and_exit_code_2(arguments, said, capsys, monkeypatch):
    from altgrad.cli import main

    monkeypatch.setattr(sys, "argv", ["altgrad", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert len([line for line in shown.err.splitlines() if "compiling loops" not in line]) == 1
    assert "Traceback" not in shown.err + shown.out


def test_exit_codes():
    def result(status, **details):
        missing = dict.fromkeys(("name", "run_id", "seed", "format", "storage", "rounding", "verdict", "steps"))
        numbers = dict.fromkeys(
            ("max_steps", "final_loss", "best_loss", "best_step", "final_val_loss", "best_val_loss")
        )
        rest = dict.fromkeys(("stall_rate", "wall_s", "tokens_per_s", "interventions", "config_hash"))
        ends = dict.fromkeys(("data_fingerprint", "numerics_version"))
        return ExperimentResult(**missing, **numbers, **rest, **ends, status=status, details=details)

    collapsed = [result("completed"), result("collapsed")]
    assert exit_code(collapsed, fail_on_collapse=False) == 0
    assert exit_code(collapsed, fail_on_collapse=True) == 1
    assert exit_code([result("completed"), None], fail_on_collapse=True) == 0
    assert exit_code([result("interrupted", signal=2)], fail_on_collapse=True) == 130
    assert exit_code([result("interrupted", signal=15)], fail_on_collapse=False) == 143


def test_a_collapse_fails_the_command_only_when_asked(config):
    freeze = ["fp8_format=E7M0", "weight_storage=grid", "optimizer.lr=1e-9", "max_steps=30", "verdict.freeze_window=4"]
    arguments = [
        "run",
        config,
        *freeze,
        "verdict.freeze_improvement=1.0",
        "verdict.freeze_smoothing=2",
        "optimizer.warmup_steps=1",
    ]
    assert invoke(*arguments).exit_code == 0
    failed = invoke(*arguments, "--fail-on-collapse")
    assert failed.exit_code == 1
    assert "froze, step 2" in failed.output
    assert "failure report: " in failed.output


def test_ctrl_c_stops_a_real_process_cleanly_and_it_continues(config, tmp_path):
    arguments = [sys.executable, "-m", "altgrad", "run", str(config), "max_steps=3000", "evaluation.interval=3000"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    while process.poll() is None and not any((tmp_path / "runs").glob("*/checkpoints/step-00000010")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "the same command continues" in out
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert sorted(losses(folder)) == list(range(1, result["steps"] + 1))


def test_help_is_fast_and_free_of_torch():
    shown = altgrad("--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout
    assert "│" not in shown.stdout  # boxes are for terminals
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "altgrad", "--help"], capture_output=True, text=True, check=True
    ).stderr
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in loaded.splitlines()}
    assert not packages & {"torch", "numba", "pydantic", "omegaconf", "scipy", "numpy"}
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        altgrad("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5  # processor time: the clock would measure what else the machine does


def run(*arguments):
    return CliRunner().invoke(app, ["formats", *arguments])


def test_catalog_lists_every_format():
    from altgrad.quantization import FORMAT_REGISTRY

    output = run().output
    assert all(name in output for name in FORMAT_REGISTRY)


def test_one_format_and_the_groups():
    assert "57344" in run("fp8_e5m2").output
    groups = run("--equivalent").output
    assert any("E0M7" in line and "E1M6" in line for line in groups.splitlines())


def test_a_wrong_name_ends_in_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "altgrad", "formats", "E3M"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean E3M4" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["formats", "--help"]])
def test_help_does_not_import_torch(arguments):
    code = f"import sys; sys.argv = ['altgrad', *{arguments!r}]\nfrom altgrad.cli import main\ntry:\n main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", [("formats", "E3M4"), ("reproduce",), ("formats", "--equivalent"), ("recipes",)])
def test_a_terminal_of_ascii_alone_is_enough(command):
    narrow = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = altgrad(*command, env=narrow)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "?" not in done.stdout  # every character that commands print has a plain one


def test_closed_streams_drop_what_they_are_told(config, tmp_path):
    for closed in (">&-", ">&- 2>&-", "<&- >&- 2>&-"):
        command = f"{sys.executable} -m altgrad run {config} seed={len(closed)} {closed}"
        assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
        assert len(list((tmp_path / "runs").glob(f"*-s{len(closed)}-*/result.json"))) == 1
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m altgrad formats >&-"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
