"""Interventions alter what they say and nothing else."""

import pytest

from altgrad.autopsy.changes import CHANGES, NotApplicable, widened
from altgrad.autopsy.mechanism import CHANGES as ROWS
from altgrad.formats.catalog import get_format
from altgrad.nn.recipe.spec import OperandSpec, StorageSpec

EIGHT_BITS = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1")


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_one_more_exponent_bit_extends_the_range_at_both_ends_and_keeps_the_step_within(name):
    fmt = get_format(name)
    wider = widened(fmt, exponent=1)
    assert wider.mantissa_bits == fmt.mantissa_bits - (fmt.exponent_bits == 0)  # E0M7 is the grid of E1M6
    assert wider.max > 1.9 * fmt.max
    assert wider.min_subnormal <= fmt.min_subnormal / 2
    assert wider.specials is fmt.specials
    assert get_format(wider.name) == wider


@pytest.mark.parametrize("name", [*EIGHT_BITS, "E7M0", "E3M4_IEEE"])
def test_one_more_mantissa_bit_keeps_the_exponents(name):
    fmt = get_format(name)
    finer = widened(fmt, mantissa=1)
    assert (finer.exponent_bits, finer.bias, finer.specials) == (fmt.exponent_bits, fmt.bias, fmt.specials)
    assert finer.ulp(1.0) == fmt.ulp(1.0) / 2
    assert get_format(finer.name) == finer


def test_each_change_alters_a_plain_operand_or_says_why_not():
    spec = OperandSpec("E4M3", scaling={"policy": "static", "scale": 0.5}, overflow="native")
    altered, refused = {}, {}
    for name, change in CHANGES.items():
        try:
            altered[name] = change(spec)
        except NotApplicable as why:
            refused[name] = str(why)
    assert set(refused) == {"nearest", "saturate"}
    assert len({*altered.values(), spec}) == len(altered) + 1


def test_block_elements_are_widened_inside_their_blocks():
    wider = CHANGES["mantissa"](OperandSpec("MXFP4"))
    assert get_format(wider.format).element.mantissa_bits == 2
    assert get_format(wider.format).block == 32


def test_overflow_to_inf_is_cured_by_saturation():
    assert CHANGES["saturate"](OperandSpec("E5M2", overflow="native")).overflow.value == "saturate"


def test_a_grid_is_altered_as_a_grid():
    grid = StorageSpec("E3M4")
    assert CHANGES["stochastic"](grid).rounding.value == "stochastic"
    assert get_format(CHANGES["mantissa"](grid).format).mantissa_bits == 5
    assert CHANGES["fine_blocks"](grid).per_channel
    with pytest.raises(NotApplicable):
        CHANGES["fresh_scale"](grid)


def test_a_format_that_float32_cannot_carry_is_no_intervention():
    with pytest.raises(NotApplicable, match="E8M0: its largest value"):
        CHANGES["exponent"](StorageSpec("E7M0"))


def test_every_row_of_the_mechanisms_is_made_by_somebody():
    assert {row.name for row in ROWS} == {*CHANGES, "master", "half_lr"}
