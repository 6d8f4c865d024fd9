"""The failure report says what was measured, and says so where nothing was."""

import re

import numpy as np
import pytest

from altgrad.report.pages.failure import (
    FailureData,
    Intervention,
    RunFacts,
    VerdictFacts,
    bars,
    headline,
    render_failure,
)
from tests.report.failure_samples import all_nan_run, frozen_run, nothing_measured


def text_of(html: str) -> str:
    body = re.sub(r"(?s)<(style|script|title|desc)\b.*?</\1>", " ", html[html.index("<body>") :])
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_everything_issue_asks_for_is_in_both_forms():
    html, markdown = render_failure(frozen_run())
    for document in (text_of(html), markdown):
        for said in (
            "E7M0 froze at step 410 of 500.",
            "Weights stopped moving",
            "stall rate = 0.985, threshold 0.95",
            "step 460",
            "3.210 (step 400)",
            "1.2%",
            "|g| &lt; 1e-8" if document is not markdown else "|g| < 1e-8",
            "blocks.0.mlp.down",
            "98.0%",
            "flip_rate",
            "gradient norm 2.1 to 0.5",
            "checkpoints/step000400",
            "altgrad run experiments/configs/e7m0_uniform.yaml seed=42",
            "2.13.0",
        ):
            assert said in document, said
    assert html.count('class="spark') == 4
    assert "▁" in markdown
    assert "█" in markdown


def test_all_nan_gradients_are_called_that_and_no_sparsity_is_printed():
    html, markdown = render_failure(all_nan_run())
    for document in (text_of(html), markdown):
        assert "every element is NaN or infinite; sparsity is undefined" in document
        assert "Exact zeros" not in document
        assert "NaN (step 37)" in document
        assert "None fired." in document


def test_what_was_not_measured_is_said_and_gets_no_number():
    html, markdown = render_failure(nothing_measured())
    for document in (text_of(html), markdown):
        assert document.count("not measured") >= 8
        assert "0%" not in document
        assert "none was kept" in document
    assert "None" not in markdown
    assert "nan" not in markdown.lower().replace("nan or", "")


def test_an_unmeasured_rate_is_a_dash_not_zero():
    _, markdown = render_failure(frozen_run())
    row = next(line for line in markdown.splitlines() if line.startswith("| blocks.0.attn.qkv | input"))
    assert row.split("|")[5].strip() == "–"
    assert row.split("|")[3].strip() == "0%"


def test_markup_in_names_is_escaped():
    data = FailureData(
        RunFacts("<script>alert(1)</script>", "<b>id</b>"), VerdictFacts("freeze", 3, 4, reason="a < b & c")
    )
    html, _ = render_failure(data)
    assert "<script>alert" not in html
    assert "<b>id" not in html
    assert "A &lt; b &amp; c." in html


@pytest.mark.parametrize(
    ("kind", "words"),
    [("freeze", "froze"), ("divergence", "diverged"), ("nonfinite", "went non-finite"), ("odd", "collapsed")],
)
def test_headline(kind, words):
    data = FailureData(RunFacts("n", "n-s1-x", format="E5M2", max_steps=1000), VerdictFacts(kind, 1000, 1000))
    assert headline(data) == f"E5M2 {words} at step 1\u202f000 of 1\u202f000."


def test_the_headline_says_the_format_in_force_at_the_onset():
    shift = [Intervention(30, "shift", to_format="E5M2"), Intervention(900, "shift", to_format="FP32")]
    data = FailureData(RunFacts("n", "n-s1-x", format="E7M0"), VerdictFacts("freeze", 324, 373), interventions=shift)
    assert headline(data) == "E7M0, shifted to E5M2 at step 30, froze at step 324."


def test_bars():
    assert bars(np.array([0.0, 0.5, 1.0])) == "▁▄█"
    assert bars(np.array([np.nan, 1.0])) == "·▁"
    assert bars(np.array([np.nan])) == "·"
    assert len(bars(np.arange(100.0))) <= 16
