"""The documentation holds: every Python block runs as written, page by page, and no link inside the repository is dead."""

import re
from pathlib import Path

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
    """What headings are linked by: small letters, words joined by dashes, other marks dropped."""
    heads = re.findall(r"^#+ +(.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


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
