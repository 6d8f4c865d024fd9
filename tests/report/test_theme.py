"""Colours hold apart under every kind of colour vision and stand out from both papers; formats keep their colours."""

from itertools import combinations

import numpy as np
import pytest

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


@pytest.mark.parametrize(("base", "heat"), [(LIGHT, LIGHT_HEAT), (DARK, DARK_HEAT)])
def test_heat_grows_away_from_the_paper_and_its_text_stays_readable(base, heat):
    steps = [contrast(level, base["paper"]) for level in heat]
    assert steps == sorted(steps)
    for i, level in enumerate(heat):
        assert contrast(level, base["ink"] if i < 5 else base["paper"]) >= 3.4


def test_a_format_keeps_its_colour_whatever_it_is_compared_with():
    for others in (["FP32", "E3M4"], ["E7M0", "E3M4", "E4M3"], ["MXFP8", "E3M4"]):
        assert styles_for(others)[others.index("E3M4")].slot == 3
    assert styles_for(["FP32"]) == [Style(BASELINE)]


def test_styles_are_distinct_for_the_whole_catalog():
    names = ["FP32", "E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"]
    assert len(set(styles_for(names))) == len(names)


def test_runs_of_one_format_are_told_apart_by_colour_and_of_several_by_dash():
    same = styles_for(["FP32", "E3M4", "E3M4", "E3M4"])
    assert len({s.slot for s in same}) == 4
    mixed = styles_for(["E3M4", "E3M4", "E5M2"])
    assert mixed[0].slot == mixed[1].slot
    assert mixed[0].dash != mixed[1].dash


def test_unknown_formats_take_free_colours():
    styles = styles_for(["E3M4", "MXFP8", "NVFP4", "E5M2"])
    assert len({s.slot for s in styles}) == 4
