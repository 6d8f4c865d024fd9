"""Charts show what they were given, in the theme's colours: positions, gaps, bands, ticks, and text that cannot break out."""

import re
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad.report.charts.axes import Axis, axis_over
from altgrad.report.charts.glyphs import bit_strip, rug, sparkline
from altgrad.report.charts.heat import Cell, Ramp, heat_strips, heat_table
from altgrad.report.charts.lines import Mark, Series, line_chart, spread_apart, thin
from altgrad.report.charts.rows import IntervalRow, interval_chart
from altgrad.report.charts.svg import band_data, breakable, dots_data, el, path_data, script_json
from altgrad.report.text import kept_apart, told_apart
from altgrad.report.theme import (
    BASELINE,
    DARK,
    DARK_HEAT,
    DARK_SERIES,
    LIGHT,
    LIGHT_HEAT,
    LIGHT_SERIES,
    Style,
    styles_for,
)

STEPS = np.arange(1.0, 11.0)
STYLE = Style(3)


def chart(*series: Series, **options) -> str:
    return str(line_chart(series, title="T", description="D", **options))


def test_path_positions_are_exact():
    assert path_data(np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 0.25])) == "M0 1000L500 0L1000 750"


def test_a_non_finite_value_is_a_gap_and_a_lone_point_a_dot():
    y = np.array([0.1, np.nan, 0.3, np.inf, 0.5, 0.6])
    x = np.linspace(0, 1, 6)
    assert path_data(x, y) == "M0 900h0M400 700h0M800 500L1000 400"
    assert path_data(x, np.full(6, np.nan)) == ""
    assert dots_data(x, y).count("h0") == 4


def test_bands_break_at_gaps():
    low, high = np.array([0.1, 0.1, np.nan, 0.2, 0.2]), np.array([0.3, 0.3, 0.3, 0.4, 0.4])
    assert band_data(np.linspace(0, 1, 5), low, high).count("Z") == 2


@pytest.mark.parametrize(
    ("lo", "hi", "log"), [(1, 500, False), (1.7, 5.9, True), (1e-6, 1e3, True), (-3, 2, False), (0.999, 1.001, False)]
)
def test_ticks_lie_on_the_axis_and_say_their_value(lo, hi, log):
    axis = Axis(lo, hi, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 14
    for position, label in ticks:
        assert 0 <= position <= 1
        assert float(axis.at(float(label.replace("−", "-")))) == pytest.approx(position, abs=2e-3)
    assert all(a < b for (a, _), (b, _) in pairwise(ticks))


def test_a_log_axis_cannot_show_zero_or_less():
    axis = axis_over([np.array([0.0, -1.0, 1.0, 100.0])], log=True)
    assert 0.5 < axis.lo < 1
    assert np.isnan(axis.at(np.array([0.0, -1.0, np.nan]))).all()


@pytest.mark.parametrize("values", [[], [np.nan], [3.0], [0.0], [-2.0, -2.0]])
@pytest.mark.parametrize("log", [False, True])
def test_degenerate_data_still_has_an_axis(values, log):
    axis = axis_over([np.array(values)], log=log)
    assert axis.lo < axis.hi
    assert np.isfinite([axis.lo, axis.hi]).all()
    assert axis.ticks()


@given(st.lists(st.floats(0, 300), max_size=15))
def test_labels_are_spread_apart_in_order_within_the_chart(wanted):
    wanted = sorted(wanted)
    placed = spread_apart(wanted, 15, 4, 296)
    assert len(placed) == len(wanted)
    assert all(b - a >= 15 - 1e-6 for a, b in pairwise(placed))
    assert all(4 - 1e-6 <= p <= 296 + 1e-6 for p in placed)


def test_labels_that_have_room_stay_where_they_are():
    assert spread_apart([20.0, 100.0, 200.0], 15, 4, 296) == [20.0, 100.0, 200.0]
    assert spread_apart([100.0, 100.0], 16, 4, 296) == [92.0, 108.0]


def test_the_baseline_is_ink_and_formats_are_coloured_and_dashed():
    markup = chart(Series("FP32", STEPS, STEPS, Style(BASELINE)), Series("E7M0", STEPS, STEPS + 1, Style(7, "9 3 2 3")))
    assert 'class="series s-base"' in markup
    assert 'class="series s7"' in markup
    assert 'stroke-dasharray="9 3 2 3"' in markup


def test_a_collapse_is_marked_at_its_step():
    markup = chart(Series("E7M0", STEPS, STEPS, STYLE), marks=[Mark(5.5, "E7M0 froze", 5.5, "E7M0")])
    assert 'class="mark"' in markup
    assert 'x1="50.000%"' in markup
    assert "M-5 -5L5 5M5 -5L-5 5" in markup


def test_labels_of_neighbouring_marks_do_not_share_a_line():
    markup = chart(Series("a", STEPS, STEPS, STYLE), marks=[Mark(5, "first mark"), Mark(5.1, "second mark")])
    heights = re.findall(r'<g class="mark">|y="(-\d+)"', markup)
    assert len({h for h in heights if h}) == 2


def test_values_above_the_top_are_pointed_at_with_their_size():
    grows = np.array([1.0, 2, 3, 4, 5, 1e2, 1e3, 1e4, 1e5, np.inf])
    markup = chart(Series("E5M2", STEPS, grows, STYLE), y_top=6.0)
    assert "E5M2 leaves the chart, up to 100000" in markup
    ticks = [float(t) for t in re.findall(r'class="tick" x="0"[^>]*>([\d.]+)<', markup)]
    assert max(ticks) <= 6
    outside = re.search(r'class="off-scale[^>]* y="(-?[\d.]+)"', markup)
    assert outside
    assert float(outside[1]) < 0  # above the plot, below no curve's label


def test_charts_below_one_another_share_their_steps_and_their_margin():
    own = chart(Series("a", STEPS, STEPS, STYLE))
    below = chart(Series("a", STEPS[3:5], STEPS[3:5], STYLE), x_span=(STEPS[0], STEPS[-1]), beside=["a longer name"])
    assert re.search(r'data-x="[^"]*"', own)[0] == re.search(r'data-x="[^"]*"', below)[0]
    assert own.split("--wide-right:")[1][:6] != below.split("--wide-right:")[1][:6]
    assert 'class="reference"' in chart(Series("a", STEPS, STEPS, STYLE), y_line=3.0)


def test_a_curve_that_ends_early_is_named_where_it_ends():
    early = Series("E7M0", STEPS[:4], STEPS[:4], STYLE)
    markup = chart(Series("FP32", STEPS, STEPS, Style(BASELINE)), early)
    label = re.search(r'class="end-label early s3"[^>]*><text x="([\d.]+)%"', markup)
    assert label
    assert float(label[1]) == pytest.approx(33.33)


def test_charts_have_names_for_screen_readers():
    markup = chart(Series("a", STEPS, STEPS, STYLE))
    assert "<title>T</title><desc>D</desc>" in markup
    assert 'role="img"' in markup


def test_an_empty_chart_is_still_a_chart():
    assert "<svg" in chart(Series("a", np.array([]), np.array([]), STYLE))
    assert "<svg" in chart()


def test_text_is_escaped_everywhere():
    evil = '"><script>alert(1)</script>'
    markup = chart(Series(evil, STEPS, STEPS, STYLE), marks=[Mark(3, evil)], y_label=evil)
    markup += str(interval_chart([IntervalRow(evil, 1, 0, 2, STYLE, evil)], title=evil, description=evil, x_label=evil))
    markup += str(heat_table([evil], [evil], [[Cell(1.0, evil, evil)]], caption=evil))
    markup += str(rug([(evil, STYLE, [1.0])])) + str(el("a", evil, href=evil)) + str(script_json({evil: evil}))
    assert "<script>" not in markup
    assert evil not in markup


def test_script_json_is_valid_without_nan_and_cannot_close_its_element():
    text = str(script_json({"y": np.array([1.0, np.nan, np.inf]), "n": np.int64(3), "t": "</script>"}))
    assert text == '{"y":[1.0,null,null],"n":3,"t":"\\u003c/script\\u003e"}'


def test_thinning_keeps_extremes_and_ends():
    y = np.sin(np.arange(1000) / 10)
    y[500] = 50.0
    y[700:720] = np.nan
    t = thin(np.arange(1000), y, 100)
    assert t.per_bucket == 10
    assert len(t.x) == 100
    assert np.nanmax(t.high) == 50.0
    assert (t.x[0], t.x[-1]) == (0, 999)
    assert t.mean[3] == pytest.approx(y[30:40].mean())
    assert np.isnan(t.mean[[70, 71]]).all()
    assert not np.isnan(np.delete(t.mean, [70, 71])).any()


def test_short_curves_are_not_thinned():
    t = thin(np.arange(5), np.array([1, 2, np.inf, 4, 5.0]), 100)
    assert t.per_bucket == 1
    assert list(t.x) == [0, 1, 2, 3, 4]
    assert np.isnan(t.mean[2])


def test_thinning_nothing():
    assert len(thin(np.array([]), np.array([]), 10).x) == 0


def test_ramp_levels():
    ramp = Ramp(0.0, 1.0)
    assert list(ramp.level(np.array([-1, 0, 0.05, 0.1, 0.95, 1.0, 9, np.nan]))) == [0, 0, 0, 1, 9, 9, 9, -1]


def test_heat_strips_draw_each_cell_once_and_leave_gaps():
    values = np.array([[0.0, 0.0, 1.0, np.nan], [1.0, 1.0, 1.0, 1.0]])
    markup = str(heat_strips(["a", "b"], values, ramp=Ramp(0, 1), title="T", description="D", x_ends=("1", "9")))
    assert 'class="h0" d="M0.0 0.0H500.0v500.00H0.0Z"><title>0 to 0.1<' in markup
    assert 'class="h9" d="M500.0 0.0H750.0v500.00H500.0ZM0.0 500.0H1000.0v500.00H0.0Z"><title>0.9 to 1<' in markup


def test_names_beside_a_chart_are_short_and_stay_apart():
    """Long ones were cut at the beginning, so that layers of two towers had one name."""
    parts = ("self_attn.q_proj", "mlp.up_proj")
    towers = [f"{t}_model.encoder.layers.{i}.{part}" for t in ("vision", "text") for i in (0, 1) for part in parts]
    names, start = told_apart(towers)
    assert len(set(names)) == len(towers)
    assert max(map(len, names)) < 32
    assert start == ""
    hugging_face = ["model.norm", "lm_head", *(f"model.layers.{i}.{part}" for i in (0, 1) for part in parts)]
    names, start = told_apart(hugging_face)
    assert names[:3] == ["model.norm", "lm_head", "…0.self_attn.q_proj"]
    assert [name.replace("…", start) for name in names] == hugging_face


@given(st.lists(st.text("ab.", max_size=40), unique=True), st.integers(0, 24))
def test_distinct_names_stay_distinct_beside_a_chart(names, longest):
    assert len(set(told_apart(names, longest)[0])) == len(names)


@given(st.lists(st.text("ab. ,", max_size=40), unique=True), st.integers(4, 24))
def test_distinct_labels_stay_distinct_beside_a_chart(names, longest):
    assert len(set(kept_apart(names, longest))) == len(names)


def test_rows_of_recipes_leave_room_for_their_chart():
    """Their whole texts took more than the page's width: nothing was drawn."""
    recipe = (
        "x:E4M3(amax(arithmetic='multiply')) w:E4M3(amax(arithmetic='multiply')) sum:accumulator(products=32,output={})"
    )
    rows = [IntervalRow(recipe.format(sums), 1.0, 0.5, 1.5, STYLE) for sums in ("TF32", "BF16")]
    markup = str(interval_chart(rows, title="T", description="D", x_label="x"))
    assert float(re.search(r"--wide-left:(\d+)px", markup)[1]) < 320
    shown = re.findall(r'class="row-name"[^>]*><title>(.*?)</title>(.*?)</text>', markup)
    assert "TF32" in shown[0][1]
    assert "BF16" in shown[1][1]
    assert shown[0][0].startswith("x:E4M3(amax(arithmetic=")


def test_heat_tables_of_one_study_share_their_shades():
    one = [[Cell(1.0, "a")]]
    shade = lambda **more: re.findall(r"cell (h\d)", str(heat_table(["r"], ["c"], one, caption="", **more)))  # noqa: E731
    assert shade() == ["h0"]
    assert shade(among=[0.0, 0.5, 1.0]) == ["h8"]


def test_a_long_name_may_be_broken_at_its_joints_alone():
    assert breakable("blocks.0.attention.qkv") == "blocks.<wbr>0.<wbr>attention.<wbr>qkv"
    assert breakable("of 0.123456789012345, <b> and model.norm") == "of 0.123456789012345, &lt;b&gt; and model.norm"


def test_heat_table_shows_failures_as_words():
    markup = str(
        heat_table(["E3M4"], ["adamw", "sgd"], [[Cell(0.1, "+0.1"), Cell(None, "froze", failed=True)]], caption="C")
    )
    assert 'class="cell failed"' in markup
    assert "froze" in markup


def test_intervals_without_an_interval_draw_the_dot_alone():
    known = str(interval_chart([IntervalRow("a", 1.0, 0.5, 1.5, STYLE)], title="T", description="D", x_label="x"))
    single = str(interval_chart([IntervalRow("a", 1.0, None, None, STYLE)], title="T", description="D", x_label="x"))
    assert known.count('class="interval') > single.count('class="interval')
    assert 'class="estimate"' in single


@pytest.mark.parametrize(("name", "filled"), [("E0M7", 0), ("E3M4", 3), ("E7M0", 7)])
def test_bit_strip(name, filled):
    markup = str(bit_strip(name))
    assert markup.count('class="bit exponent"') == filled
    assert markup.count('class="bit mantissa"') == 7 - filled


@pytest.mark.parametrize("name", ["FP32", "BF16", "E5M10", "MXFP4", ""])
def test_no_bit_strip_for_what_is_no_split_of_eight_bits(name):
    assert str(bit_strip(name)) == ""


def test_rug_draws_one_tick_per_positive_value():
    markup = str(rug([("E1M6", STYLE, [0.0, 0.5, 1.0, 2.0, float("nan")])]))
    assert markup.count("V850") == 3


def test_sparkline_of_nothing_is_nothing():
    assert str(sparkline(STEPS, np.full(10, np.nan))) == ""
    assert "NaN" not in str(sparkline(STEPS, np.where(STEPS > 5, np.nan, STEPS)))


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
SCHEMES = {"light": (LIGHT, LIGHT_SERIES), "dark": (DARK, DARK_SERIES)}
DEMO = (0, 1, 3, 5, 7)  # E0M7, E1M6, E3M4, E5M2, E7M0


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour))


def contrast(a: str, b: str) -> float:
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    m1 = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    m2 = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(m2) @ np.cbrt(np.array(m1) @ np.clip(rgb, 0, 1))


def distance(a: str, b: str, vision: str) -> float:
    matrix = np.array(VISION[vision])
    return float(np.linalg.norm(oklab(matrix @ linear(a)) - oklab(matrix @ linear(b))))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("vision", VISION)
def test_series_are_told_apart(scheme, vision):
    base, series = SCHEMES[scheme]
    colours = [*series, base["ink"]]
    assert min(distance(a, b, vision) for a, b in combinations(colours, 2)) > 0.07
    demo = [series[i] for i in DEMO] + [base["ink"]]
    assert min(distance(a, b, vision) for a, b in combinations(demo, 2)) > 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast_with_the_paper(scheme):
    base, series = SCHEMES[scheme]
    assert all(contrast(colour, base["paper"]) >= 2.95 for colour in series)
    assert contrast(base["ink"], base["paper"]) >= 12
    assert contrast(base["signal"], base["paper"]) >= 4.5


@pytest.mark.parametrize(("base", "heat", "turns"), [(LIGHT, LIGHT_HEAT, 6), (DARK, DARK_HEAT, 5)])
def test_heat_grows_away_from_the_paper_and_its_text_stays_readable(base, heat, turns):
    steps = [contrast(level, base["paper"]) for level in heat]
    assert steps == sorted(steps)
    for i, level in enumerate(heat):
        assert contrast(level, base["ink"] if i < turns else base["paper"]) >= 4.5


def test_a_format_keeps_its_colour_whatever_it_is_compared_with():
    for others in (["FP32", "E3M4"], ["E7M0", "E3M4", "E4M3"], ["MXFP8", "E3M4"]):
        assert styles_for(others)[others.index("E3M4")].slot == 3
    assert styles_for(["FP32"]) == [Style(BASELINE)]


def test_styles_are_distinct_for_the_whole_catalog():
    names = ["FP32", "E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"]
    assert len(set(styles_for(names))) == len(names)


def test_more_recipes_than_colours_are_told_apart_by_dashes():
    assert len(set(styles_for([f"recipe {i}" for i in range(20)]))) == 20
    assert len(set(styles_for(["FP32", *["E3M4"] * 12]))) == 13


def test_runs_of_one_format_are_told_apart_by_colour_and_of_several_by_dash():
    same = styles_for(["FP32", "E3M4", "E3M4", "E3M4"])
    assert len({s.slot for s in same}) == 4
    mixed = styles_for(["E3M4", "E3M4", "E5M2"])
    assert mixed[0].slot == mixed[1].slot
    assert mixed[0].dash != mixed[1].dash


def test_unknown_formats_take_free_colours():
    styles = styles_for(["E3M4", "MXFP8", "NVFP4", "E5M2"])
    assert len({s.slot for s in styles}) == 4


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.04])
@pytest.mark.parametrize(
    "values", [[3.0], [0.0], [], [1e308, -1e308], [5e-324, 1e308], [1.0, np.nextafter(1.0, 2.0)], [np.nan, 7]]
)
def test_an_axis_over_any_values_has_a_length_and_ticks(values, margin, log):
    axis = axis_over([np.array(values)], log=log, margin=margin)
    assert axis.lo < axis.hi
    assert all(0 <= position <= 1 and label for position, label in axis.ticks(8))
