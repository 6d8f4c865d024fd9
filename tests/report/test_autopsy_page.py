"""The page of an autopsy says the verdict, both directions, the interventions and the controls, and nothing unmeasured."""

import pytest

from altgrad.autopsy.forks import Forks
from altgrad.autopsy.investigate import investigate
from altgrad.report.pages.autopsy import render_autopsy, word_for
from tests.autopsy.planted import CELLS, Planted, any_of, cell, cured_by

HEAD = cell(6, "input_grad", "grad_output")


def page_data(oracle, **more):
    verdict = investigate(Forks(oracle, budget=300), symptom=120)
    places = {str(c): [c.layer, c.gemm, c.role] for c in CELLS}
    losses = {path: oracle.history(name) for path, name in (("run", "low"), ("twin", "twin"))}
    return {**verdict.as_dict(), "places": places, "losses": losses, **more}


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
        assert "not calibrated" in text
        assert "likely" not in text
    assert html.count("exonerated") >= len(CELLS) - 1
    assert "https://" not in html.replace("https://www.w3.org", "")


def test_a_run_without_a_cause_has_a_page_without_one():
    html, markdown = render_autopsy(page_data(Planted(lambda *_: 0.0)))
    assert "No damage in the window" in html
    assert "caused" not in markdown


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
