"""Block formats as facts: names, grammar, derived numbers, errors, and what `altgrad formats` prints."""

import pytest
from typer.testing import CliRunner

from altgrad.cli import app
from altgrad.errors import FormatError
from altgrad.formats.block import block_format_from_spec
from altgrad.quantization import BLOCK_FORMATS, BlockFormat, block_format, get_format
from tests.quantization.blocks.oracle import power_of_two_exponent

RULES = ("floor", "ceil", "nearest", "even")
TURNS = (0, 64, 96, 112, 120, 124, 126, 127, 128, 160, 192, 224, 240, 248, 252, 254, 255)  # of 256
ELEMENTS = ("E4M3", "E5M2", "E2M3", "E3M2", "E2M1", "INT8", "E3M4", "E0M7", "E7M0", "binary8p3")


@pytest.mark.parametrize(
    ("name", "element", "block", "scale", "bits"),
    [
        ("MXFP8", "E4M3", 32, "E8M0", 8.25),
        ("MXFP8_E5M2", "E5M2", 32, "E8M0", 8.25),
        ("MXFP6", "E2M3", 32, "E8M0", 6.25),
        ("MXFP6_E3M2", "E3M2", 32, "E8M0", 6.25),
        ("MXFP4", "E2M1", 32, "E8M0", 4.25),
        ("MXINT8", "INT8", 32, "E8M0", 8.25),
        ("NVFP4", "E2M1", 16, "E4M3", 4.5),
    ],
)
def test_catalog_follows_its_standards(name, element, block, scale, bits):
    fmt = get_format(name)
    assert (fmt.element.name, fmt.block, fmt.scale_format.name, fmt.bits_per_value) == (element, block, scale, bits)
    assert str(fmt) == name
    assert fmt.source
    assert fmt.tensor_scale == (name == "NVFP4")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mxfp8_e4m3", "MXFP8"),
        ("MXFP6_E2M3", "MXFP6"),
        ("mxfp4:ceil", "MXFP4:ceil"),
        ("MXFP4:floor", "MXFP4"),
        ("E2M1/32", "MXFP4"),
        ("e2m1/32:e8m0:even", "MXFP4:even"),
        ("E2M1/16:E4M3:tensor", "NVFP4"),
        ("E2M1/16:E4M3", "E2M1/16:E4M3"),
        ("E3M4/64:ceil", "E3M4/64:E8M0:ceil"),
        ("float8_e4m3fn/128x128:float32", "E4M3/128x128:FP32"),
    ],
)
def test_names_parse_to_one_canonical_form_and_back(text, name):
    fmt = get_format(text)
    assert fmt.name == name
    assert get_format(name) == fmt
    assert get_format(fmt) is fmt


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "E3M4/64:E8M0:ceil", "E4M3/128x128:FP32", "E2M1/16:E5M2:tensor"])
def test_spec_reads_back(name):
    fmt = get_format(name)
    assert block_format_from_spec(fmt.spec) == fmt


def test_constructor_finds_the_catalog_row():
    assert block_format("E2M1") is BLOCK_FORMATS["MXFP4"]
    assert block_format("E4M3", (128, 128), "FP32").tile == (128, 128)
    assert isinstance(block_format("E3M4", 20), BlockFormat)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_rule_as_one_comparison_equals_its_definition(element, rule):
    """`round_up_from` against exact fractions, at every significand where a rule could turn, with its neighbours."""
    fmt = block_format(element, 32, "E8M0", rule)
    for bits in (23, 52):
        for eighth in TURNS:
            for nudge in (-1, 0, 1):
                fraction = (eighth << (bits - 8)) + nudge
                if 0 <= fraction < 2**bits:
                    up = fraction >= fmt.round_up_from(bits)
                    amax = 1 + fraction / 2**bits
                    assert power_of_two_exponent(amax, fmt) == up - fmt.element_emax, (amax, bits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MXFP5", "did you mean MXFP"),
        ("E3M4/64:E8M0:up", "is not a rule"),
        ("E4M3/32:FP32:ceil", "needs an E8M0 scale"),
        ("E4M3/0", "outside 1"),
        ("E8M0/32", "scale format"),
        ("E4M3/32:FP32:tensor", "no use"),
        ("FP32/32", "at most 16"),
    ],
)
def test_wrong_names_say_what_is_wrong(name, message):
    with pytest.raises(FormatError, match=message):
        get_format(name)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "MXFP4:ceil", "E4M3/128x128:FP32"])
def test_cli_prints_the_facts(name):
    result = CliRunner().invoke(app, ["formats", name])
    assert result.exit_code == 0, result.output
    fmt = get_format(name)
    for word in (fmt.element.name, fmt.scale_format.name, fmt.rule.value, "saturates"):
        assert word in result.output
