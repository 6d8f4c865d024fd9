"""Loops are compiled once, kept under a stamp of all their sources, and work where nothing can be kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import altgrad
from altgrad.jit import template
from altgrad.jit.threads import run_range

LOOPS = [
    "altgrad.quantization.kernels.cpu.loops",
    "altgrad.quantization.kernels.cpu.block_loops",
    "altgrad.quantization.kernels.cpu.block_decode",
    "altgrad.diagnostics.kernels.cpu",
    "altgrad.optim.kernels.steps",
]


@pytest.fixture(autouse=True)
def _loaded():
    for name in LOOPS:
        __import__(name)


@pytest.mark.parametrize("module", LOOPS)
def test_a_stamp_covers_what_a_loop_is_made_of(module):
    sources = template._sources(module)
    assert {module, "altgrad.jit.machine", "altgrad.jit.memory", "altgrad.jit.storage", "altgrad.jit.template"} <= set(
        sources
    )
    grids = {"altgrad.jit.grid_rounding", "altgrad.jit.grid_table", "altgrad.randomness.counter"}
    assert "diagnostics" in module or "decode" in module or grids <= set(sources)
    assert all(source for source in sources.values())


def test_a_stamp_covers_the_parts_of_a_loop():
    assert {"altgrad.optim.kernels.rules", "altgrad.optim.kernels.self_rounding", "altgrad.jit.element"} <= set(
        template._sources("altgrad.optim.kernels.steps")
    )
    assert {"altgrad.diagnostics.fields", "altgrad.diagnostics.kernels.tiles"} <= set(
        template._sources("altgrad.diagnostics.kernels.cpu")
    )


@pytest.mark.parametrize("module", LOOPS)
def test_any_changed_source_gives_another_stamp(module, monkeypatch):
    stamp = template.stamp.__wrapped__
    found, read = stamp(module), template._read
    for changed in template._sources(module):

        def changed_read(name, changed=changed):
            source, imported = read(name)
            return source + "# changed" * (name == changed), imported

        monkeypatch.setattr(template, "_read", changed_read)
        assert stamp(module) != found, changed
        monkeypatch.setattr(template, "_read", read)
    assert stamp(module) == found


def test_variants_of_a_template_have_names_of_their_own():
    from altgrad.quantization.kernels.cpu.loops import DecodeVariant, _decode

    names = {template.bind(_decode, DecodeVariant(kind, width)).__qualname__ for kind in (0, 1) for width in (1, 4)}
    assert len(names) == 4
    assert all(template.stamp(_decode.__module__) in name for name in names)


def test_an_error_of_the_compiler_is_no_matter_of_the_cache(monkeypatch):
    monkeypatch.setattr(template, "_cache_refused", False)

    def broken(keep):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        template._kept_on_disk(broken)
    assert not template._cache_refused


def test_a_full_disk_is_said_once_and_costs_no_result(monkeypatch, caplog):
    monkeypatch.setattr(template, "_cache_refused", False)
    asked = []

    def compile_(keep):
        asked.append(keep)
        if keep:
            raise OSError(28, "No space left on device")
        return "compiled"

    assert [template._kept_on_disk(compile_) for _ in range(3)] == ["compiled"] * 3
    assert asked == [True, False, False, False]
    assert [r.message.count("NUMBA_CACHE_DIR") for r in caplog.records] == [1]


def test_without_a_folder_to_write_loops_still_run_and_one_line_says_so(tmp_path):
    """An installed package that cannot be written, and no home: today's root may write anywhere, so files block."""
    package = tmp_path / "altgrad"
    shutil.copytree(Path(altgrad.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        (folder / "__pycache__").touch()
    blocked = tmp_path / "home"
    blocked.touch()
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "PYTHONPATH")},
        "HOME": str(blocked),
        "XDG_CACHE_HOME": str(blocked),
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    code = (
        "import torch, altgrad\n"
        "from altgrad.quantization import amax, quantize\n"
        "x = torch.tensor([0.3, 465.0])\n"
        "print(altgrad.__file__, quantize(x, 'E4M3').tolist(), float(amax(x)))\n"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split(maxsplit=1) == [str(package / "__init__.py"), "[0.3125, 448.0] 465.0\n"]
    assert len(found.stderr.splitlines()) == 1
    assert "NUMBA_CACHE_DIR" in found.stderr


def test_the_drivers_are_compiled_once():
    assert run_range() is run_range()
