"""The gates: names and paths, the document, text on its way out, errors of the operating system, locks."""

import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import altgrad as altgrad_package
from altgrad.analysis.study_report import csv_text
from altgrad.cli import format_pages
from altgrad.cli import main as command_line
from altgrad.errors import AltGradError, ConfigError, DataError, RunBusyError, SweepError
from altgrad.records.lock import RunLock, is_locked
from altgrad.records.untrusted import MOST_YAML_BYTES
from altgrad.report.console import Terminal
from altgrad.report.pages.page import render_markdown
from altgrad.report.tables import Column, Table, table_markdown
from altgrad.report.text import for_markdown, for_spreadsheet, for_terminal, shortened
from altgrad.sweep import matrix_from_mapping, read_matrix
from altgrad.training.config.document import read_document, write_document
from altgrad.training.config.loading import dump_config, load_config
from altgrad.training.data import load_corpus
from altgrad.training.format_runner import FormatExperimentRunner
from altgrad.training.run.checkpoint import lock_directory
from tests.training.tiny import TINY, tiny_config, tiny_corpus

BASE = {"name": "tiny", "seed": 1}


class TestNames:
    @pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "", ".hidden", "a\nb", "x" * 201, "=HYPERLINK(1)", "<b>", 3, None, ["a"]])  # fmt: skip
    def test_no_name_leaves_its_folder(self, name):
        with pytest.raises(ConfigError):
            load_config({"name": name})
        if name:  # without one, the base's name is taken
            with pytest.raises(ConfigError, match="is no name"):
                matrix_from_mapping({"base": BASE, "name": name, "matrix": {"seed": [1]}})
            with pytest.raises(AltGradError):
                matrix_from_mapping({"base": BASE, "matrix": {}, "include": [{"name": [[name]]}]}).expand()

    @pytest.mark.parametrize("key", ["runs_dir", "checkpoint_dir", "data.path", "data.name"])
    def test_no_path_holds_control_characters(self, key):
        for text in ("a\0b", "a\nb", "\x1b[31m"):
            with pytest.raises(ConfigError, match=key):
                load_config(None, [f"{key}={json.dumps(text)}"])


class TestReferences:
    OUTSIDE = ("${oc.env:HOME}", "${oc.env:HOME,x}", "a${oc.decode:x}", "${oc.create:{}}", "${${name}:HOME}", "${env:A}", "${", "${a b}", "${now:%Y}")  # fmt: skip

    @pytest.mark.parametrize("text", OUTSIDE)
    def test_nothing_reaches_outside_the_document(self, text, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", "SECRET")
        with pytest.raises(ConfigError, match="reaches outside the document"):
            load_config({"runs_dir": text})
        with pytest.raises(ConfigError, match="reaches outside the document"):
            load_config(None, [f"runs_dir={json.dumps(text)}"])
        for content in ({"base": BASE, "name": text}, {"base": {**BASE, "device": text}, "matrix": {"seed": [1]}}):
            (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
            with pytest.raises(AltGradError, match="reaches outside the document"):
                read_matrix(tmp_path / "m.yaml").expand()

    def test_references_inside_the_document_follow_overrides(self, tmp_path):
        (tmp_path / "c.yaml").write_text(
            "max_steps: 8\nevaluation: {interval: '${max_steps}'}\nruns_dir: 'r/${seed}x'\n"
        )
        config = load_config(tmp_path / "c.yaml", ["max_steps=9", "seed=3"])
        assert (config.evaluation.interval, config.runs_dir) == (9, "r/3x")
        for circle in (
            {"runs_dir": "${runs_dir}"},
            {"runs_dir": "${name}", "name": "${runs_dir}"},
            {"seed": "${nothing}"},
        ):
            with pytest.raises(ConfigError, match=r"refers to itself|names nothing"):
                load_config(circle)

    def test_dump_and_load_are_inverses_also_for_escapes(self, tmp_path):
        draw = random.Random(0)
        pieces = [
            "\\",
            "${",
            "}",
            "a",
            ":",
            "$",
            "{",
            " ",
            "'",
            '"',
            "oc.env:HOME",
            "1e3",
            "null",
            "~",
            "#",
            "é",
            "0x1",
            "-",
        ]
        for _ in range(400):
            text = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 8)))
            config = load_config({}).model_copy(update={"runs_dir": text})
            assert load_config(config) == config
            (tmp_path / "c.yaml").write_text(dump_config(config))
            assert load_config(tmp_path / "c.yaml") == config

    def test_plain_data_survives_the_document(self):
        data = {
            "a": [1, 2.5, -1e-30, 1e300, True, None, "1e3", "yes", "1_000", "2020-01-01", "0o7", "", " x", {"b": {}}],
            "c": [],
        }
        assert read_document(write_document(data)) == data


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "m0: &m0 {k: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}], k{i}: 1}}\n" for i in range(1, 12)
)
BAD_DOCUMENTS = {
    "bomb": BOMB, "merges": MERGES, "deep": "a: " + "[" * 300 + "]" * 300, "deep mappings": "{a: " * 300 + "1" + "}" * 300,
    "integer": "seed: " + "9" * 5000, "itself": "a: &a [*a]", "twice": "seed: 1\nseed: 2", "tag": "a: !!python/name:os.system",
    "set": "? a\n? b", "binary": "a: !!binary aGk=", "key": "1: 2", "null key": "~: 2", "list key": "? [1]\n: 2",
    "surrogate": 'name: "\\ud800"', "nul": "name: \0", "open": "max_steps: [1,2", "long": "#" * (MOST_YAML_BYTES + 1),
    "two documents": "a: 1\n---\nb: 2", "alias of nothing": "a: *b", "date": "max_steps: 2020-13-45",
}  # fmt: skip


class TestDocuments:
    @pytest.mark.parametrize("text", BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS.keys())
    @pytest.mark.timeout(20)
    def test_hostile_documents_are_refused(self, text, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError):
            load_config(path)
        with pytest.raises(AltGradError):
            read_matrix(path)

    @pytest.mark.timeout(20)
    def test_references_cannot_explode(self):
        bomb = {"x0": "x" * 1000, **{f"x{i}": f"${{x{i - 1}}}" * 10 for i in range(1, 12)}}
        with pytest.raises(ConfigError, match="write out more"):
            load_config(bomb)

    @pytest.mark.parametrize(
        "override",
        ["model=[1]", "optimizer=[null]", "max_steps=[1,2", "seed=" + "9" * 5000, "model.n_layer.x=1", "=1", "a..b=1", ".=1",
         "formats=" + "{a: " * 300, "name=" + "x" * 3000, "optimizer.lr=1e400", "seed=1e400", "model=null", "x" * 3000 + "=1"],
        ids=lambda text: text[:20],
    )  # fmt: skip
    def test_a_bad_setting_is_answered_with_its_key_and_not_echoed_whole(self, override):
        with pytest.raises(ConfigError) as error:
            load_config(None, [override])
        key = override.partition("=")[0][:20].partition(".")[0]
        assert key in str(error.value)
        assert len(str(error.value)) < 1500

    @pytest.mark.timeout(20)
    def test_absurd_sizes_are_refused_at_once(self):
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            with pytest.raises(ConfigError, match=f"model.{key}"):
                load_config({"model": {key: 10**30}})
        for key in ("data.batch_size", "evaluation.batches"):
            with pytest.raises(ConfigError, match=key):
                load_config(None, [f"{key}={2**63 - 1}"])
        with pytest.raises(ConfigError, match=r"model.n_layer.*4096"):
            load_config({"model": {"n_layer": 1 << 24}})

    @pytest.mark.timeout(20)
    def test_a_matrix_has_a_limit(self):
        with pytest.raises(SweepError, match="at most 20,000"):
            matrix_from_mapping({"base": BASE, "seeds": 10_000_000, "matrix": {"optimizer.lr": [1]}}).expand()
        axes = {f"optimizer.options.a{i}": list(range(10)) for i in range(12)}
        with pytest.raises(SweepError, match="at most 20,000"):
            matrix_from_mapping({"base": BASE, "matrix": axes}).expand()


class TestText:
    HOSTILE = (
        '=HYPERLINK("http://x")',
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "\x1b]0;title\x07",
        "a|b\nc",
        "[red]x[/nope]",
    )

    def test_the_terminal_gets_no_control_characters_and_no_markup(self, capsys):
        for text in (*self.HOSTILE, "\u202egnp.exe", "\x9b31m", "half \ud800"):
            Terminal(width=200).print(text, soft_wrap=True)
            shown = capsys.readouterr().out
            assert not any(ord(c) < 32 and c != "\n" for c in shown)
            assert "\u202e" not in shown
            if text == "[red]x[/nope]":
                assert text in shown
        assert for_terminal("tab\tline\n") == "tab\tline\n"

    def test_nothing_prints_to_a_terminal_but_through_the_gate(self):
        package = Path(altgrad_package.__file__).parent
        raw = [
            path.name
            for path in package.rglob("*.py")
            if path.name != "console.py"
            and re.search(r"\bConsole\(|TextColumn\((?!.*markup=False)(?!\"ETA\")", path.read_text())
        ]
        assert raw == []

    def test_a_warning_of_the_command_line_goes_through_the_gate(self, capsys, monkeypatch):
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setattr(sys, "argv", ["altgrad", "formats", "E4M3"])
        with pytest.raises(SystemExit):
            command_line()
        warnings.showwarning(UserWarning("a \x1b[31mname"), UserWarning, "file.py", 1)
        assert capsys.readouterr().err == "altgrad: warning: a \\x1b[31mname\n"

    def test_a_spreadsheet_gets_no_formula(self):
        for text in ("=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "=HYPERLINK(1)"):
            assert str(for_spreadsheet(text))[0] == "'" or for_terminal(text) != text
        for fine in (-1.5, 3, None, "-", "-1.5", "plain", "1e-3"):
            assert for_spreadsheet(fine) == fine
        table = csv_text([{"=name": "=1+1", "loss": -0.5}])
        assert table == "'=name,loss\n'=1+1,-0.5\n"

    def test_markdown_gets_no_html_link_or_code(self):
        for text in self.HOSTILE:
            line = for_markdown(text)
            assert "<img" not in line
            assert "[x](" not in line.replace("\\[x\\](", "")
            assert "\n" not in line
        table = table_markdown(Table((Column("a|b"),), [["<b>x|y</b>"]]))
        assert table.splitlines()[-1] == "| &lt;b>x\\|y&lt;/b> |"
        assert for_markdown("|g| < 1e-8, x_y * 3") == "|g| < 1e-8, x_y * 3"

    def test_every_template_goes_through_the_gate(self):
        empty = dict.fromkeys(("results", "shared", "environment"), Table((Column("a"),), []))
        page = render_markdown(
            "comparison.md.j2", headline="<img src=x>", result_notes=[], verdicts=[], differences=None, shared_summary="s",
            facts=["<script>"], **empty,
        )  # fmt: skip
        assert "<img" not in page
        assert "<script" not in page
        assert "<details>" in page

    def test_long_texts_are_shortened(self):
        assert len(shortened("x" * 10_000)) <= 120
        assert shortened("short") == "short"


def altgrad(*arguments, stdout=subprocess.PIPE, **options):
    command = [sys.executable, "-m", "altgrad", *map(str, arguments)]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=240, check=False, **options
    )


class TestSystemErrors:
    def config(self, folder: Path, **extra) -> Path:
        path = folder / "tiny.yaml"
        text = folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
        path.write_text(
            json.dumps({**TINY, "max_steps": 4, "data": {**TINY["data"], "source": "text", "path": str(text)}, **extra})
        )
        return path

    def check(self, done, said):
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("altgrad: ")
        assert said in done.stderr

    def test_a_runs_dir_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        self.check(
            altgrad("run", self.config(tmp_path), f"runs_dir={tmp_path}/file"), "a file stands where a folder is needed"
        )

    @pytest.mark.parametrize(
        "ask", [lambda: torch.empty(1 << 46), lambda: torch.empty(1 << 62, 1 << 62), lambda: bytes(1 << 62)]
    )
    def test_too_little_memory_is_said(self, ask, monkeypatch, capsys):
        monkeypatch.setattr(format_pages, "print_catalog", ask)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setattr(sys, "argv", ["altgrad", "formats"])
        with pytest.raises(SystemExit) as ended:
            command_line()
        assert ended.value.code == 2
        assert "not enough memory" in capsys.readouterr().err
        monkeypatch.setattr(format_pages, "print_catalog", lambda: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError):  # our own mistakes are not hidden
            command_line()

    def test_a_name_that_is_too_long_for_the_system(self, tmp_path):
        self.check(altgrad("run", self.config(tmp_path), f"runs_dir={tmp_path}/{'x' * 300}"), "choose a shorter name")

    def test_a_file_size_limit_leaves_what_was_written_whole_and_the_run_goes_on(self, tmp_path):
        import resource

        config = self.config(tmp_path, runs_dir=str(tmp_path / "runs"))
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
        self.check(altgrad("run", config, preexec_fn=limit, env=environment), "raise the limit of file sizes")
        (folder,) = (tmp_path / "runs").iterdir()
        assert not list(folder.rglob(".aside-*"))
        assert altgrad("run", config).returncode == 0

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
    def test_a_full_output(self):
        with open("/dev/full", "w") as full:
            self.check(altgrad("formats", stdout=full), "free some space")

    def test_a_reader_that_goes_away(self):
        process = subprocess.Popen(
            [sys.executable, "-m", "altgrad", "formats"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        process.wait()

    def test_a_finished_run_is_looked_up_where_nothing_can_be_written(self, tmp_path, monkeypatch, capsys):
        from altgrad.cli import run_pages

        config = self.config(tmp_path, runs_dir=str(tmp_path / "runs"))
        run_pages.train(config, [], None, dry_run=False, print_config=False)

        def refuse(*_):
            raise OSError(30, "Read-only file system", "report.html")

        monkeypatch.setattr(run_pages, "write_report", refuse)
        result = run_pages.train(config, [], None, dry_run=False, print_config=False)
        assert result is not None
        assert result.already_finished
        assert "no report was written: report.html: Read-only file system" in " ".join(capsys.readouterr().out.split())


class TestLocks:
    def test_one_run_in_two_folders_with_one_checkpoint_directory(self, tmp_path):
        shared = tmp_path / "shared"
        runs = [tiny_config(f"runs_dir={tmp_path}/{i}", f"checkpoint_dir={shared}", "max_steps=3") for i in (1, 2)]
        first, second = (FormatExperimentRunner(config, data_dir=tiny_corpus()) for config in runs)
        _, _, lock = lock_directory(shared, first.plan.hash, first.run_dir)
        assert lock is not None
        with lock, pytest.raises(RunBusyError, match="shared"):
            second.run()
        assert second.run().status == "completed"
        assert first.run().status == "completed"

    def test_a_lock_can_be_looked_at_where_nothing_can_be_written(self, tmp_path, monkeypatch):
        really = os.open

        def read_only(path, flags, *mode):
            if flags & os.O_RDWR:
                raise OSError(30, "Read-only file system", str(path))
            return really(path, flags, *mode)

        with RunLock.acquire(tmp_path):
            monkeypatch.setattr(os, "open", read_only)
            assert is_locked(tmp_path)
        assert not is_locked(tmp_path)

    def test_the_runs_own_folder_is_not_locked_twice(self, tmp_path):
        config = tiny_config(f"runs_dir={tmp_path}", "max_steps=2")
        own = FormatExperimentRunner(config, data_dir=tiny_corpus())
        with RunLock.acquire(own.run_dir):
            assert lock_directory(own.run_dir / "checkpoints", own.plan.hash, own.run_dir)[2] is None


class TestData:
    def corpus(self, folder, **data):
        config = load_config({"data": {"source": "tokens", "path": str(folder), **data}})
        return load_corpus(config.data, None)

    def write(self, folder, dtype):
        tokens = np.random.default_rng(0).integers(0, 5000, 4000)
        for name in ("train.bin", "val.bin"):
            tokens.astype(dtype).tofile(folder / name)
        return tokens

    @pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
    def test_tokens_are_read_as_declared(self, tmp_path, dtype):
        tokens = self.write(tmp_path, dtype)
        found = self.corpus(tmp_path, token_dtype=dtype)
        assert np.array_equal(found.train, tokens)
        x, _ = found.batch(1, 1, 2, 8)
        assert int(x.max()) < 5000

    @pytest.mark.parametrize(("dtype", "said"), [("int64", "token_dtype=int64"), ("int32", "token_dtype=int32"), ("float32", "float32 numbers")])  # fmt: skip
    def test_tokens_of_another_dtype_are_refused(self, tmp_path, dtype, said):
        self.write(tmp_path, dtype)
        with pytest.raises(DataError, match=said):
            self.corpus(tmp_path)

    def test_fractions_written_as_float32_are_no_tokens(self, tmp_path):
        for name in ("train.bin", "val.bin"):
            np.random.default_rng(0).random(5000, np.float32).tofile(tmp_path / name)
        with pytest.raises(DataError, match="float32 numbers"):
            self.corpus(tmp_path)

    def test_an_absurd_size_cap_and_a_folder_named_as_a_text(self, tmp_path):
        (tmp_path / "a.txt").mkdir()
        (tmp_path / "b.txt").write_text("some text " * 100)
        config = load_config({"data": {"source": "text", "path": str(tmp_path), "max_bytes": 10**30}})
        assert load_corpus(config.data, None).train.size > 0
