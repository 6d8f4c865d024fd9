"""The pages of a failure and of an autopsy: in order, complete, and honest where nothing was measured."""

import re
from itertools import pairwise

import numpy as np
import pytest

from altgrad.report.pages.autopsy import render_autopsy, word_for
from altgrad.report.pages.failure import (
    FailureData,
    Intervention,
    RunFacts,
    VerdictFacts,
    bars,
    headline,
    render_failure,
)
from altgrad.report.pages.products import render_products
from tests.autopsy.planted import CELLS, Planted, any_of, cell, cured_by, page_data
from tests.run_folders import all_nan_run, frozen_run, nothing_measured


def text_of(html: str) -> str:
    body = re.sub(r"(?s)<(style|script|title|desc)\b.*?</\1>", " ", html[html.index("<body>") :].replace("<wbr>", ""))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_everything_issue_asks_for_is_in_both_forms():
    html, markdown = render_failure(frozen_run())
    for document in (text_of(html), markdown):
        for said in (
            "E7M0 froze at step 410 of 500.",
            "Weights stopped moving",
            "stall rate 98.5%, threshold 95.0%",
            "step 460",
            "3.210 (step 400)",
            "1.2%",
            "|g| &lt; 1e-8" if document is not markdown else "|g| < 1e-8",
            "blocks.0.mlp.down",
            "98.0%",
            "Flip rate",
            "gradient norm 2.1 to 0.5",
            "checkpoints/step000400",
            "altgrad run experiments/configs/e7m0_uniform.yaml seed=42",
            "2.13.0",
        ):
            assert said in document, said
    assert html.count('class="spark') == 3  # of four trends one stood still
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
    assert [cell.strip() for cell in row.split("|")[1:6]] == ["blocks.0.attn.qkv", "input x", "–", "0%", "11"]


def test_what_lost_most_stands_first_and_a_column_of_one_value_is_a_sentence():
    html, markdown = render_failure(frozen_run())
    assert "| Layer | Role | Stall | Underflow | SQNR, dB |" in markdown
    for document in (text_of(html), markdown):
        assert "The same wherever it was measured: Overflow 0%." in document


def test_markup_in_names_is_escaped():
    data = FailureData(
        RunFacts("<script>alert(1)</script>", "<b>id</b>"), VerdictFacts("freeze", 3, 4, reason="a < b & c")
    )
    html, _ = render_failure(data)
    assert "<script>alert" not in html
    assert "<b>id" not in html
    assert "A &lt; b &amp; c." in html


def test_trends_carry_their_range_and_those_of_one_value_are_summed_up():
    html, markdown = render_failure(frozen_run())
    assert "60.0% to 98.5%" in markdown
    assert "Of one value in all these steps: underflow of gradient dy 10.0%." in html
    rows = html.partition("The last steps")[2].partition("</table>")[0]
    assert "Stall rate" in rows
    assert "10 dB to 10 dB" in rows
    assert "nderflow" not in rows


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


HEAD = cell(6, "input_grad", "grad_output")


@pytest.fixture(scope="module")
def found():
    return page_data(
        Planted(cured_by(any_of(HEAD), "exponent", "fresh_scale"), onset=60),
        run={"run_id": "e4m3-s1-abc", "formats": "E4M3", "seed": 1},
        command="altgrad autopsy runs/e4m3-s1-abc",
        saving="x:E4M3 w:E4M3 dy:E5M3",
    )


def test_the_page_tells_cause_control_and_remedy(found):
    html, markdown = render_autopsy(found)
    for text in (html, markdown):
        assert str(HEAD) in text
        assert "placebo" in text
        assert "one more exponent bit" in text
        assert "altgrad autopsy runs/e4m3-s1-abc" in text
        assert "x:E4M3 w:E4M3 dy:E5M3" in text
        assert "by calibrated cases of like damage and structure" in text
        assert "likely" not in text
    assert html.count("exonerated") >= len(CELLS) - 1
    assert "https://" not in html.replace("https://www.w3.org", "")


def test_a_screen_reader_finds_headings_in_order_and_every_table_and_chart_by_name(found):
    html, _ = render_autopsy(found)
    levels = [int(level) for level in re.findall(r"<h([1-6])", html)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    names = re.findall(r'class="table-scroll"[^>]*aria-label="([^"]*)"', html)
    assert len(names) == len(set(names)) == 3
    assert "table" not in names
    assert all(re.search(r'aria-label="[^"]{20,}"', svg) for svg in re.findall(r'<svg[^>]*role="img"[^>]*>', html))


def test_a_long_set_is_named_by_its_layer_and_interventions_come_best_first(found):
    share = {"value": 0.0, "low": -0.1, "high": 0.1, "draws": 1}
    both = ["layer0.forward.input", "layer0.weight_grad.input"]
    more = {"members": [{"cells": both, "rescue": share, "alone": share, "p": 1.0}]}
    html, markdown = render_autopsy(
        {**found, **more, "cells": [*both, *(f"layer{i}.forward.input" for i in range(1, 6))]}
    )
    assert "layer: 2 cells of layer0" in html
    assert "The input of 6 layers caused it" in html
    table = markdown[markdown.index("On the cells found") :]
    assert table.index("one more exponent bit") < table.index("one more mantissa bit")


def test_a_run_without_a_cause_has_a_page_without_one():
    html, markdown = render_autopsy(page_data(Planted(lambda *_: 0.0)))
    assert "No damage in the window" in html
    assert "caused" not in markdown
    assert '<button type="button" aria-label="layer' not in html  # no map where nothing was asked of any cell


@pytest.mark.parametrize(
    ("rescue", "alone", "word"),
    [
        ((0.9, 0.8, 1.0), (0.9, 0.8, 1.0), "caused"),
        ((0.4, 0.3, 0.5), (0.1, 0.0, 0.2), "contributed"),
        ((0.0, -0.1, 0.1), (0.0, -0.1, 0.1), "exonerated"),
        ((0.2, -0.1, 0.5), (0.0, -0.1, 0.1), "inconclusive"),
    ],
)
def test_words_follow_the_intervals(rescue, alone, word):
    shares = [dict(zip(("value", "low", "high"), one, strict=True)) for one in (rescue, alone)]
    assert word_for(*shares) == word


def test_text_from_a_run_is_escaped(found):
    html, _ = render_autopsy({**found, "run": {"run_id": "<script>alert(1)</script>"}})
    assert "<script>alert(1)" not in html


def test_a_curve_that_would_cover_the_recipes_is_left_out_and_the_headline_names_the_recipe():
    errors = {"mine": (0.03784, 0.02, 0.01), "without a": (0.03784, 0.02, 0.01), "without b": (0.05, 0.02, 0.01)}
    by_length = {"mine": (0.03, 0.04), "without a": (0.03, 0.0401), "without b": (0.03, 0.05)}
    html = render_products("mine", "x:MXFP8", "64 tokens", errors, (64, 256), by_length, "altgrad recipes mine --error")
    assert "<h1>mine: errors of y 3.8%, dx 2.0%, dw 1.0%</h1>" in html
    assert ">3.784%<" in html
    chart = html.split('id="length"')[1].split("</section>")[0]
    assert "without b" in chart
    assert "without a" not in chart
