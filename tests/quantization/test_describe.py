"""Facts, charts and groups of formats as people read them."""

import pytest

from altgrad.formats.describe import density_chart, equivalent_groups, facts, number
from altgrad.quantization import FORMAT_REGISTRY, get_format


def test_e0m7_and_e1m6_are_found_to_be_one_grid():
    groups = [{fmt.name for fmt in members} for members in equivalent_groups(FORMAT_REGISTRY.values())]
    assert {"E0M7", "E1M6", "INT8"} in groups
    assert not any("E2M5" in group for group in groups)


def test_a_format_defined_on_the_spot_joins_its_group():
    other = get_format("E1M6").__class__("wide", 1, 6, -5)
    groups = equivalent_groups([other, get_format("E0M7"), get_format("E3M4")])
    assert [[fmt.name for fmt in members] for members in groups] == [["wide", "E0M7"]]


@pytest.mark.parametrize("fmt", FORMAT_REGISTRY.values(), ids=str)
def test_facts_and_chart_of_every_format(fmt):
    rows = dict(facts(fmt))
    assert rows["source"] == fmt.source
    assert str(fmt.bits) in rows["bits"]
    if fmt.magnitude_bits <= 18:
        bars, axis, _ = density_chart(fmt, 64)
        assert 0 < len(bars) <= 64
        assert axis.startswith("2^")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (448.0, "448"),
        (2.0**-9, "2^-9"),
        (2.0**64, "2^64"),
        (0.9921875, "0.9921875"),
        (1.5 * 2**32, "1.5 x 2^32"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_read_well(value, text):
    assert number(value) == text
