"""What is printed to a terminal: sentences break between words and nowhere else, tables fit."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad.report.console import LOG_WIDTH, Terminal
from altgrad.report.text import wrapped

SENTENCE = "E5M2 ended behind (+0.034 to +0.098 nats), in 2 min 10 s; E7M0 froze at step 108 of 200 steps in runs/e7m0-s42-25e8bf54"


@pytest.mark.parametrize("width", range(36, 130, 3))
def test_no_figure_is_parted_from_its_unit_and_no_name_is_broken(width):
    lines = wrapped(SENTENCE, width, hang=2).split("\n")
    assert max(map(len, lines)) <= width
    assert " ".join(line.strip() for line in lines) == SENTENCE
    for whole in ("2 min 10 s", "step 108", "to +0.098 nats", "200 steps", "runs/e7m0-s42-25e8bf54"):
        assert any(whole in line for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])


@given(st.text("ab 1\n", max_size=80), st.integers(20, 60), st.integers(0, 8))
def test_nothing_is_lost_by_wrapping(text, width, hang):
    assert wrapped(text, width, hang).split() == text.split()


def test_a_log_has_whole_sentences_and_wide_tables(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    log = Terminal(file=io.StringIO())
    log.say(SENTENCE)
    assert log.file.getvalue() == SENTENCE + "\n"
    assert log.width == LOG_WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert Terminal(file=io.StringIO()).width == 72
    screen = Terminal(file=io.StringIO(), force_terminal=True, width=60, no_color=True)
    screen.say("[red] is no colour of " + SENTENCE, "bold")
    assert "[red] is no colour" in screen.file.getvalue()
    assert screen.file.getvalue().count("\n") == 3
