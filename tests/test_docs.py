"""The documentation holds: Python blocks and tutorials run as written, no link is dead, and the site can be built."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from altgrad.monitor import remove_metric
from altgrad.nn.layer import registry
from altgrad.quantization import implied_scale
from altgrad.records.metrics import metrics

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
LONG = ("docs/guides/autopsy.md", "docs/guides/sweeps.md")
"""Their blocks take minutes."""


def blocks(page: str) -> list[tuple[int, str]]:
    """(line, code) of each Python block."""
    text = (ROOT / page).read_text()
    return [(text[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"```python\n(.*?)```", text, re.S)]


WITH_CODE = [pytest.param(p, marks=pytest.mark.slow) if p in LONG else p for p in PAGES if blocks(p)]


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_python_block_of_a_page_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(implied_scale, "_looks_left", implied_scale.LOOKS)  # no example underflows in silence
    known = {row.name for row in metrics()}
    monkeypatch.setattr(registry, "_BY_CLASS", dict(registry._BY_CLASS))
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "docs"}
    try:
        for line, code in blocks(page):
            exec(compile("\n" * line + code, page, "exec"), names)
    finally:
        for added in {row.name for row in metrics()} - known:
            remove_metric(added)


@pytest.mark.parametrize("page", PAGES)
def test_no_link_into_the_repository_is_dead(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        found = (ROOT / page).parent / path if path else ROOT / page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            dead.append(target)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """What headings are linked by (small letters, words joined by dashes, other marks dropped), and anchors of a page's own."""
    text = page.read_text()
    heads = re.findall(r"^#+ +(.+)$", text, re.M)
    own = re.findall(r'<a id="([^"]+)">', text)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads} | set(own)


def test_make_bench_runs_what_the_page_of_benchmarks_names():
    made = re.search(r"^bench:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"`python -m (benchmarks\.\w+)", (ROOT / "docs/benchmarks.md").read_text())
    assert made is not None
    assert not set(named) - set(re.findall(r"-m (benchmarks\.\w+)", made[1]))


def test_the_tests_that_pages_name_exist():
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    named = {(page, name) for page in PAGES for name in re.findall(r"`(test_\w+)`", (ROOT / page).read_text())}
    assert len(named) > 20
    assert not sorted((page, name) for page, name in named if f"def {name}(" not in tests)


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_tutorial_prints_what_it_shows(path, tmp_path):
    """Word by word; numbers within a tenth, or two of their last digits: processors add up in different orders.

    What was trained on the source of Python's own library has these numbers under that Python only.
    """
    ran = tmp_path / path.name
    shutil.copy(path, ran)
    execute = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", "--timeout=250", str(ran)]
    done = subprocess.run(
        execute, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cells = [nbformat.read(one, as_version=4).cells for one in (path, ran)]
    told = json.loads(path.read_text())
    of_python = "Python's own library" in path.read_text()
    same_text = not of_python or told["metadata"]["language_info"]["version"].split(".")[:2] == [
        *map(str, sys.version_info[:2])
    ]
    for number, (cell, again) in enumerate(zip(*cells, strict=True)):
        if cell.cell_type == "code":
            expected, found = (
                "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in one.outputs)
                for one in (cell, again)
            )
            assert NUMBER.sub("#", found).split() == NUMBER.sub("#", expected).split(), f"cell {number}"
            for mine, theirs in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True) if same_text else ():
                digits = len(theirs.partition("e")[0].partition(".")[2])
                last = 0.0 if "e" in theirs else 10.0**-digits
                assert abs(float(mine) - float(theirs)) <= 0.1 * abs(float(theirs)) + 2 * last, (
                    f"cell {number}: {found}"
                )


def test_every_page_has_a_place_in_the_site():
    """`make docs` refuses a page without one; this says so sooner."""
    places = (ROOT / "mkdocs.yml").read_text()
    pages = [str(p.relative_to(ROOT / "docs")) for kind in ("md", "ipynb") for p in ROOT.glob(f"docs/**/*.{kind}")]
    assert [page for page in pages if page.replace(".ipynb", ".md") not in places] == []


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for page, said in (
        ("index", "wind tunnel"),
        ("reference/altgrad.nn", "quantize_model"),
        ("changelog", "Unreleased"),
    ):
        assert said in (tmp_path / "site" / f"{page}.html").read_text()


def test_speeds_beside_others_are_those_of_the_record():
    record = json.loads((ROOT / "benchmarks" / "results" / "cpu-avx512-bf16.json").read_text())["beside"]
    ratios = [{row["library"]: f"{row['time_ratio']:.2f}" for row in model["rows"]} for model in record]
    lines = [f"| {name} | {' | '.join(model[name] for model in ratios)} |" for name in ratios[0] if name != "FP32"]
    page = (ROOT / "docs" / "beside.md").read_text()
    assert [line for line in lines if line not in page] == []
