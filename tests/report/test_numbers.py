"""Numbers as text: exact for the edges that mislead readers."""

import math

import pytest

from altgrad.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (0.985, "0.985"),
        (1234.5678, "1235"),
        (100.0, "100"),
        (-2.5, "−2.5"),
        (1e-9, "1e-9"),
        (2.34567e8, "2.35e8"),
    ],
)
def test_number(value, text):
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0%"),
        (1e-9, "<0.01%"),
        (0.00123, "0.12%"),
        (0.5, "50.0%"),
        (0.9999, ">99.9%"),
        (1.0, "100%"),
        (math.nan, "NaN"),
    ],
)
def test_percent_never_rounds_to_none_or_all(value, text):
    assert numbers.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "same"), (0.0216, "+0.022"), (-0.5, "−0.500"), (1e-5, "+1e-5"), (None, "–"), (math.nan, "NaN")],
)
def test_difference_is_signed_and_tells_tiny_from_same(value, text):
    assert numbers.difference(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (None, "–"), (math.nan, "–")],
)
def test_duration(seconds, text):
    assert numbers.duration(seconds) == text


def test_listing_and_plural():
    assert numbers.listing([]) == ""
    assert numbers.listing(["a"]) == "a"
    assert numbers.listing(["a", "b", "c"]) == "a, b and c"
    assert numbers.plural(1, "run") == "1 run"
    assert numbers.plural(2000, "run") == "2\u202f000 runs"
