"""Pages as a reader sees them, in a headless Chromium.

Without Chromium the tests that need it are skipped with the reason, but only on a developer's machine: where CI is set
they fail, so that a check cannot pass by not looking.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad.advise.checkpoint import advise_weights
from altgrad.analysis import write_report, write_study
from altgrad.analysis.live import LivePage
from altgrad.report.pages.advice import render_advice
from altgrad.report.pages.autopsy import render_autopsy
from altgrad.report.pages.claim import render_claim
from altgrad.report.pages.failure import render_failure
from altgrad.report.pages.products import render_products
from altgrad.reproduce import find_claim
from altgrad.reproduce.data import data_of
from altgrad.reproduce.run import last_record
from tests.autopsy.planted import Planted, any_of, cell, cured_by, page_data
from tests.run_folders import demo_runs, frozen_run, make_run

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
INSTALL = "install it (Debian: apt-get install chromium chromium-driver)"


class Page:
    """One browser tab: loads pages, sizes itself, reports what went wrong."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def click(self, selector: str, *, shift: bool = False) -> None:
        element = self.one(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        if shift:
            self.run("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true, shiftKey: true}))", element)
        else:
            element.click()

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def point_at(self, selector: str, across: float, down: float = 0.5) -> None:
        """Move the mouse to a fraction of the element's box, by real input events."""
        box = self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]",
            selector,
        )
        at = {"x": box[0] + across * box[2], "y": box[1] + down * box[3]}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **at})

    def complaints(self) -> list[str]:
        """Console messages since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened, the page itself included, data: addresses left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextmanager
def browser() -> Iterator[Page]:
    """A fresh browser with a profile of its own. Skips (or under CI fails) when there is none."""
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver_path is None:
        if os.environ.get("CI"):
            pytest.fail(f"no chromium and chromedriver on this machine, and CI is set: {INSTALL}")
        pytest.skip(f"no chromium and chromedriver on this machine: {INSTALL}")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(driver_path))
        try:
            yield Page(driver)
        finally:
            driver.quit()


pytestmark = pytest.mark.browser

TEXT_OFF_THE_PAGE = """const w = document.documentElement.clientWidth;
    return [...document.querySelectorAll('svg.chart text')].map((t) => [t.textContent, t.getBoundingClientRect()])
        .filter(([, r]) => r.width && (r.left < -1 || r.right > w + 1)).map(([text, r]) => [text, r.left, r.right])"""
BROKEN_NAMES = """const broken = [], range = document.createRange();
    const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode());) {
        if (node.parentElement.closest('svg, script, pre')) continue;
        for (const word of node.data.matchAll(/[\\w.]+/g)) {
            range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
            const lines = new Set([...range.getClientRects()].filter((r) => r.width).map((r) => Math.round(r.top)));
            if (lines.size > 1) broken.push(word[0]);
        }
    }
    return broken"""
"""Names that a line's end breaks elsewhere than at a joint."""
PALE_TEXT = """const channels = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
    const light = (colour) => channels(colour).slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (e) => { for (; e; e = e.parentElement) {
        const c = getComputedStyle(e).backgroundColor; if ((channels(c)[3] ?? 1) > 0.99) return c; } return 'rgb(255, 255, 255)'; };
    return [...document.querySelectorAll('body *')].filter((e) => !e.closest('svg, [hidden], script, details:not([open])')
        && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getBoundingClientRect().width)
        .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((p, q) => q - p);
            return [e.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]; }).filter(([, ratio]) => ratio < 4.5)"""
"""Text whose contrast with what lies behind it is below 4.5 (WCAG 2.2, AA)."""
LABELS = ["FP32", "E5M2", "E3M4", "E1M6", "E0M7", "E7M0"]


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return write_report(demo_runs(root), root / "report.html")


def visible_curves(page):
    """(group, role) of the curves that the first figure shows."""
    script = """return [...document.querySelector('.line-figure').querySelectorAll('.scale:not([hidden]) .series')]
        .filter((g) => getComputedStyle(g).display !== 'none').map((g) => [g.dataset.group, g.dataset.role])"""
    return [tuple(pair) for pair in page.run(script)]


def long_named(data):
    """The verdict with layers of such names as models have."""
    return json.loads(re.sub(r"layer(\d)", r"blocks.\1.self_attention.q_projection", json.dumps(data)))


@pytest.fixture(scope="module")
def pages(report, study, tmp_path_factory):
    """Every kind of page."""
    root = tmp_path_factory.mktemp("pages")
    model = torch.nn.ModuleDict({f"{part}_projection_of_a_layer": torch.nn.Linear(32, 32) for part in "qkv"})
    products = {"te_mxfp8": (0.01, 0.02, 0.03), "without accumulator": (0.01, 0.01, 0.02)}
    found = page_data(
        Planted(cured_by(any_of(cell(6, "input_grad", "grad_output")), "exponent"), onset=60), command="altgrad"
    )
    made = {
        "failure": render_failure(frozen_run())[0],
        "autopsy": render_autopsy(long_named(found))[0],
        "claim": render_claim(data_of(last_record(find_claim("few_random_bits"), root), "altgrad reproduce")),
        "advice": render_advice(advise_weights(torch.nn.ModuleDict({"blocks": model})).as_dict()),
        "products": render_products(
            "te_mxfp8", "x:MXFP8", "8", products, (64, 256), {"te_mxfp8": (0.01, 0.02)}, "altgrad"
        ),
        "watch": LivePage([report.parent]).html(),
        "waiting": LivePage([root]).html(),
    }
    for name, html in made.items():
        (root / f"{name}.html").write_text(html, "utf-8")
    return {"comparison": report, "study": study, **{name: root / f"{name}.html" for name in made}}


KINDS = ("comparison", "study", "failure", "autopsy", "claim", "advice", "products", "watch", "waiting")


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (360, "dark"), (768, "light"), (1280, "light"), (1280, "dark")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_page_fits_is_readable_and_quiet_and_asks_the_network_for_nothing(page, pages, kind, width, scheme):
    page.open(pages[kind], width=width, scheme=scheme)
    assert page.overflow() <= 0
    assert page.complaints() == []
    assert page.requests() == [pages[kind].resolve().as_uri()]
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(17, 23, 29)")
    assert page.run(TEXT_OFF_THE_PAGE) == []
    assert page.run(BROKEN_NAMES) == []
    assert page.run(PALE_TEXT) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_prints_on_white_without_controls_and_within_the_paper(page, pages, kind):
    page.open(pages[kind], width=718, scheme="dark")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        shown = [control for control in page.all(".switches, .table-tools, nav.contents") if control.is_displayed()]
        assert shown == []
        assert page.overflow() <= 0
        assert page.run(PALE_TEXT) == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_on_a_phone_verdict_distance_and_stall_stand_first(page, report):
    page.open(report, width=360)
    tops = page.run(
        "return ['#results', '.line-figure'].map((s) => document.querySelector(s).getBoundingClientRect().top)"
    )
    assert tops[0] < tops[1]
    right = page.run("return document.querySelectorAll('#results thead th')[3].getBoundingClientRect().right")
    assert [head.text.split()[0] for head in page.all("#results thead th")[:4]] == ["Run", "Verdict", "vs", "Stall"]
    assert right <= 360


def test_the_outcome_stands_first_and_large(page, report):
    page.open(report)
    headline = page.one("h1")
    assert "ended on par with FP32" in headline.text
    assert "E7M0 froze at step 150" in headline.text
    assert float(headline.value_of_css_property("font-size")[:-2]) >= 30


def test_legend_hides_shows_and_isolates(page, report):
    page.open(report)
    assert {group for group, _ in visible_curves(page)} == set(LABELS)
    page.click('.line-figure .legend-item[data-group="E5M2"]')
    assert "E5M2" not in {group for group, _ in visible_curves(page)}
    assert page.one('.line-figure .legend-item[data-group="E5M2"]').get_attribute("aria-pressed") == "false"
    assert not page.one('.line-figure .end-label[data-group="E5M2"]').is_displayed()
    page.click('.line-figure .legend-item[data-group="E5M2"]')
    assert "E5M2" in {group for group, _ in visible_curves(page)}
    page.click('.line-figure .legend-item[data-group="E7M0"]', shift=True)
    assert {group for group, _ in visible_curves(page)} == {"E7M0"}
    page.click('.line-figure .legend-item[data-group="E7M0"]', shift=True)
    assert {group for group, _ in visible_curves(page)} == set(LABELS)


def test_switches_choose_the_role_and_the_axis(page, report):
    page.open(report)
    page.click('.line-figure [data-switch="role"][data-value="validation"]')
    assert {role for _, role in visible_curves(page)} == {"validation"}
    page.click('.line-figure [data-switch="role"][data-value="train"]')
    assert {role for _, role in visible_curves(page)} == {"train"}
    before = page.run("return document.querySelector('.line-figure .scale:not([hidden])').dataset.scale")
    page.click('.line-figure [data-switch="scale"][data-value="log"]')
    after = page.run("return document.querySelector('.line-figure .scale:not([hidden])').dataset.scale")
    assert (before, after) == ("linear", "log")
    assert {role for _, role in visible_curves(page)} == {"train"}


def test_hover_reads_the_values_that_were_recorded(page, report):
    page.open(report)
    page.point_at(".line-figure .hit", 0.999)
    readout = page.one(".line-figure .readout")
    assert readout.is_displayed()
    lines = readout.text.splitlines()
    assert lines[0] == "step 500"
    cells = [
        [cell.text for cell in row.find_elements("css selector", "th, td")] for row in page.all("#results tbody tr")
    ]
    results = {row[0]: row[4].split()[0] for row in cells}
    for line in lines[2:]:
        name, validation, *_ = line.split()
        if name == "E7M0":
            assert validation == "ended"
        else:
            assert float(validation) == pytest.approx(float(results[name]), abs=0.0011)
    page.point_at(".line-figure h3", 0.5)
    assert not readout.is_displayed()


def test_hover_reads_by_keyboard_too(page, report):
    page.open(report)
    page.run("document.querySelector('.line-figure .stage').focus()")
    page.one(".line-figure .stage").send_keys("\ue014")  # arrow right
    first = page.one(".line-figure .readout b").text
    page.one(".line-figure .stage").send_keys("\ue014")
    second = page.one(".line-figure .readout b").text
    assert first != second
    assert int(second.split()[1]) > int(first.split()[1])


def test_columns_sort_by_value_both_ways_missing_last(page, report):
    page.open(report)

    def column(i):
        return [row.find_elements("css selector", "th, td")[i].text.split()[0] for row in page.all("#results tbody tr")]

    page.click("#results thead th:nth-child(5) button")
    values = [float(v) for v in column(4)]
    assert values == sorted(values)
    page.click("#results thead th:nth-child(5) button")
    values = [float(v) for v in column(4)]
    assert values == sorted(values, reverse=True)
    page.click("#results thead th:nth-child(4) button")
    assert column(0)[-1] == "FP32"  # has no stall rate
    page.click("#results thead th:nth-child(1) button")
    assert column(0) == sorted(LABELS)
    assert page.one("#results thead th:nth-child(1)").get_attribute("aria-sort") == "ascending"


def test_the_collapse_is_marked_where_it_began(page, report):
    page.open(report)
    line, hit = page.run("""const f = document.querySelector('.line-figure .scale:not([hidden])');
        const l = f.querySelector('.mark-line').getBoundingClientRect(), h = f.querySelector('.hit').getBoundingClientRect();
        return [l.x, [h.x, h.width]]""")
    first, last = (float(v) for v in page.one(".line-figure .plot").get_attribute("data-x").split(",")[:2])
    assert (line - hit[0]) / hit[1] == pytest.approx((150 - first) / (last - first), abs=0.003)
    assert page.one(".mark text").text == "E7M0 froze, step 150"


def test_the_failure_report_is_linked_and_opens(page, report):
    page.open(report)
    link = page.one(".verdict.collapsed a")
    target = link.get_attribute("href")
    assert target.startswith(report.parent.resolve().as_uri())
    page.run("arguments[0].scrollIntoView()", link)
    link.click()
    assert page.driver.title == "failure"


def test_without_scripts_the_page_still_shows_its_curves(page, report):
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.open(report)
        assert len(page.all(".line-figure .scale:not([hidden]) .series path.line")) >= 12
    finally:
        page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_markup_in_a_run_name_stays_text(page, tmp_path):
    evil = "<img src=x onerror=document.title='owned'>"
    runs = [make_run(tmp_path, "E3M4", steps=60, name="a", config={"name": evil, "data": {"source": evil}})]
    page.open(write_report(runs, tmp_path / "r.html"))
    assert page.driver.title != "owned"
    assert page.all("img") == []
    assert page.complaints() == []


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for optimizer in ("adamw", "manifold_adamw"):
        for fmt in ("FP32", "E3M4", "E7M0"):
            for seed in range(3):
                frozen = fmt == "E7M0" and optimizer == "adamw"
                make_run(
                    root,
                    fmt,
                    seed=seed,
                    steps=100,
                    optimizer=optimizer,
                    monitor_interval=20,
                    collapse="freeze" if frozen else None,
                    onset=30,
                )
    return write_study(root)


def test_the_study_filters_its_runs(page, study):
    page.open(study)
    box = page.one("#runs .filter")
    box.send_keys("e7m0 adamw froze")
    assert page.one("#runs .filter-count").text == "3 of 18 rows"
    shown = [row for row in page.all("#runs tbody tr") if row.is_displayed()]
    assert len(shown) == 3
    assert all("froze, step 30" in row.text for row in shown)
    box.clear()
    box.send_keys("x")
    box.send_keys("\ue003")  # backspace
    assert page.one("#runs .filter-count").text == "18 rows"


def test_the_study_reads_bands(page, study):
    page.open(study)
    page.point_at("#curves .hit", 0.999)
    text = page.one("#curves .readout").text
    assert "step 100" in text
    assert "[" in text.split("E3M4")[1]
