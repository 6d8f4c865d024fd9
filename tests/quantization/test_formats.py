"""Formats: every derived number against the definition, worked out from the codes in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

from altgrad.errors import FormatError
from altgrad.formats.describe import density_chart, equivalent_groups, facts, number
from altgrad.formats.scalar import format_from_spec
from altgrad.quantization import FORMAT_REGISTRY, FloatFormat, FP8Format, Specials, get_format
from altgrad.quantization.codec import value_table

CATALOG = list(FORMAT_REGISTRY.values())
LISTED = [fmt for fmt in CATALOG if fmt.magnitude_bits <= 16]
SMALL = [fmt for fmt in LISTED if fmt.bits <= 8]


@pytest.mark.parametrize(
    ("name", "bias", "largest", "step"),
    [
        ("E0M7", None, 127 / 128, 2**-7),
        ("E1M6", 0, 3.96875, 2**-5),
        ("E2M5", 1, 7.875, 2**-5),
        ("E3M4", 1, 124, 2**-4),
        ("E4M3", 7, 448, 2**-9),
        ("E5M2", 15, 57344, 2**-16),
        ("E6M1", 31, 1.5 * 2**32, 2**-31),
        ("E7M0", 63, 2**64, 2**-62),
        ("BF16", 127, (2 - 2**-7) * 2.0**127, 2.0**-133),
        ("FP16", 15, 65504, 2**-24),
        ("E3M2", 3, 28, 2**-4),
        ("E2M3", 1, 7.5, 2**-3),
        ("E2M1", 1, 6, 0.5),
        ("E4M3FNUZ", 8, 240, 2**-10),
        ("E5M2FNUZ", 16, 57344, 2**-17),
        ("E4M3B11FNUZ", 11, 30, 2**-13),
        ("E4M3_IEEE", 7, 240, 2**-9),
        ("E3M4_IEEE", 3, 15.5, 2**-6),
        ("INT8", 1, 127 / 64, 2**-6),
        ("binary8p3", 16, 49152, 2**-17),
        ("binary8p4", 8, 224, 2**-10),
    ],
)
def test_facts_of_the_standards(name, bias, largest, step):
    fmt = get_format(name)
    assert (fmt.bias, fmt.max, fmt.max_representable_value, fmt.min_subnormal) == (bias, largest, largest, step)


def exact_value(fmt: FloatFormat, code: int) -> Fraction | str:
    """The value of a non-negative code by the definition, in exact arithmetic."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    field, fraction = code >> m, code & (2**m - 1)
    top = 2 ** (e + m) - 1
    if fmt.specials is Specials.IEEE and field == 2**e - 1:
        return "nan" if fraction else "inf"
    if fmt.specials is Specials.NAN_ONLY and code == top:
        return "nan"
    if fmt.specials is Specials.P3109 and code == top:
        return "inf"
    if e == 0:
        return Fraction(code, 2**m)
    if field == 0 and fmt.has_zero:
        return Fraction(fraction, 2**m) * Fraction(2) ** (1 - fmt.bias)
    return (1 + Fraction(fraction, 2**m)) * Fraction(2) ** (field - fmt.bias)


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_every_code_of_the_8_bit_formats(fmt):
    table = value_table(fmt)
    assert len(table) == 2**fmt.bits
    for code in range(2**fmt.magnitude_bits):
        value = exact_value(fmt, code)
        if isinstance(value, str):
            assert str(table[code]) == value
        else:
            assert Fraction(float(table[code])) == value
        if fmt.signed and not fmt.twos_complement and code:
            assert str(table[code + 2**fmt.magnitude_bits]) == str(-table[code])
    if fmt.twos_complement:
        assert [Fraction(float(v)) for v in table] == [Fraction(c if c < 128 else c - 256, 64) for c in range(256)]


@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_values_are_sorted_and_their_extremes_are_the_derived_ones(fmt):
    values = fmt.values()
    assert np.all(np.diff(values) > 0)
    assert len(values) == fmt.number_of_values
    assert values[-1] == fmt.max
    assert values[values > 0][0] == fmt.min_subnormal
    assert fmt.min_normal in values
    assert 2.0**fmt.emax <= fmt.max < 2.0 ** (fmt.emax + 1)


@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_ulp_neighbours_and_index_agree_with_the_enumeration(fmt):
    values = fmt.values()
    picks = np.unique(
        np.concatenate([np.arange(min(300, len(values))), np.arange(0, len(values), 97), [len(values) - 1]])
    )
    zero = int(np.searchsorted(values, 0.0))
    for i in picks:
        value = float(values[i])
        up = float(values[i + 1]) if i + 1 < len(values) else math.inf
        down = float(values[i - 1]) if i else -math.inf
        if fmt.signed:
            assert fmt.neighbours(value) == (down, up)
            assert fmt.index_of(value) == i - zero
        else:
            assert fmt.index_of(value) == i
        if value > 0 and up < math.inf and fmt.has_zero:
            assert fmt.ulp(value) == up - value or fmt.mantissa_bits == 0
    if fmt.has_zero:
        middle = (values[1:] + values[:-1]) / 2
        for i in range(0, len(middle), max(1, len(middle) // 200)):
            assert fmt.neighbours(float(middle[i])) == (values[i], values[i + 1])
        assert fmt.next_up(fmt.max) == math.inf
        assert fmt.next_up(-math.inf) == -fmt.max
        assert fmt.next_down(math.inf) == fmt.max


def test_ulp_of_special_values_and_arrays():
    fmt = get_format("E4M3")
    assert fmt.ulp(0.0) == 2**-9
    assert math.isnan(fmt.ulp(math.inf))
    assert math.isnan(fmt.ulp(math.nan))
    below = math.nextafter(1.0, 0.0)
    assert fmt.ulp([1.0, below, -1.0, 448.0]).tolist() == [2**-3, 2**-4, 2**-3, 32]
    assert get_format("E0M7").ulp(0.9) == 1 / 128


@pytest.mark.parametrize("fmt", CATALOG, ids=str)
def test_names_aliases_and_specs_lead_back(fmt):
    assert get_format(fmt) is fmt
    for name in (fmt.name, fmt.name.lower(), fmt.name.upper(), *fmt.aliases):
        assert get_format(name) is fmt
    assert format_from_spec(fmt.spec) == fmt
    assert fmt.source
    assert str(fmt) == fmt.name


def test_any_split_parses_with_the_ieee_bias():
    fmt = get_format("e3m3")
    assert (fmt.name, fmt.bias, fmt.specials, fmt.max) == ("E3M3", 3, Specials.NONE, 30.0)
    assert get_format("E5M10") is get_format("FP16")
    assert get_format("E8M7") is get_format("BF16")
    assert get_format("E8M10") is get_format("TF32")
    assert FP8Format is FloatFormat


@pytest.mark.parametrize(
    ("wrong", "near"), [("E3M", "E3M4"), ("fp8e4m3", "E4M3"), ("bfloat", "BF16"), ("MXFP5", "MXFP")]
)
def test_unknown_names_are_refused_with_near_ones(wrong, near):
    with pytest.raises(FormatError, match=f"unknown format.*{near}"):
        get_format(wrong)


@pytest.mark.parametrize("name", ["E9M2", "E8M5", "E0M0", "E2M24", "E8M22"])
def test_formats_beyond_the_carrier_are_refused(name):
    with pytest.raises(FormatError):
        get_format(name)


def test_a_format_needs_a_bias_exactly_when_it_has_exponent_bits():
    with pytest.raises(FormatError, match="bias"):
        FloatFormat("X", 3, 4, None)
    with pytest.raises(FormatError, match="bias"):
        FloatFormat("X", 0, 7, 3)
    with pytest.raises(FormatError, match="smallest"):
        FloatFormat("X", 5, 2, 160)
    with pytest.raises(FormatError, match="largest"):
        FloatFormat("X", 5, 2, -110)
    with pytest.raises(FormatError, match="a name or a FloatFormat, not int"):
        get_format(8)


def test_switching_subnormals_off():
    fmt = get_format("E4M3").without_subnormals()
    assert fmt.min_subnormal == fmt.min_normal == 2**-6
    assert fmt.neighbours(0.0) == (-(2**-6), 2**-6)
    assert fmt.ulp(2**-8) == 2**-6
    assert get_format("E7M0").without_subnormals() is get_format("E7M0")
    with pytest.raises(FormatError, match="uniform"):
        get_format("E0M7").without_subnormals()


def test_index_of_refuses_values_off_the_grid():
    fmt = get_format("E4M3")
    for value in (0.3, 449.0, math.inf, math.nan, 480.0):
        with pytest.raises(FormatError, match="not a finite value"):
            fmt.index_of(value)
    with pytest.raises(FormatError, match="too many"):
        get_format("FP32").values()


@pytest.mark.parametrize("name", ["E3M5b1", "E3M5b3_ieee", "E4M4_fn", "E5M3_fnuz", "E2M4b-3"])
def test_generic_names_read_back_to_the_same_facts(name):
    fmt = get_format(name)
    expected = (name[:2] + name[2:4]).upper()
    assert fmt.name.upper().startswith(expected)
    assert get_format(fmt.name) == fmt
    assert get_format(name.upper()) == fmt


def test_a_generic_bias_moves_the_range_and_special_codes_end_it():
    assert get_format("E3M5b1").max == 4 * get_format("E3M5").max
    assert get_format("E4M3_ieee").max == 240  # the catalog's row of that name
    assert get_format("E3M5_ieee").has_inf
    assert not get_format("E3M5").has_nan


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
