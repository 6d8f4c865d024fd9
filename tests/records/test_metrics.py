"""The rows of metrics: what refers to them agrees with them, and a bad row is refused."""

from pathlib import Path

import pytest

from altgrad.errors import OptionError
from altgrad.records.metrics import (
    OPERANDS,
    PARAMETERS,
    RECORD_KEYS,
    RUN,
    Metric,
    find_metric,
    groups,
    markdown_table,
    mean,
    metrics,
    register,
    unregister,
)

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "diagnostics.md"


def test_the_guide_has_the_table_of_the_rows():
    assert markdown_table() in GUIDE.read_text(), f"put this into {GUIDE.name}:\n{markdown_table()}"


@pytest.mark.parametrize("row", metrics(), ids=lambda row: f"{row.group}-{row.name}")
def test_every_row_says_what_it_is_and_can_be_shown(row):
    assert row.says
    assert row.name not in RECORD_KEYS
    assert any(set(row.roles) <= set(kind) for kind in (OPERANDS, PARAMETERS, RUN))
    assert set(row.heads) <= set(row.roles)


def test_rows_of_one_name_agree_and_no_group_has_a_name_twice():
    for row in metrics():
        first = find_metric(row.name, "run" if row.roles == RUN else None)
        assert (row.unit, row.heading, row.over_layers) == (first.unit, first.heading, first.over_layers)
    keys = [(row.group, row.name) for row in metrics()]
    assert len(keys) == len(set(keys))


def test_a_row_is_found_by_name_and_role():
    assert find_metric("nonfinite_frac", "grad_output").group == "operands"
    assert find_metric("nonfinite_frac", "gradient").group == "sparsity"
    assert find_metric("flip_rate").group == "stall"
    assert find_metric("flip_rate", "run").group == "step"
    assert find_metric("loss") is None
    assert find_metric("l2", "input") is None
    assert find_metric("no_such") is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": "step"}, "'step'"),
        ({"name": "Kurtosis of w"}, "plain name"),
        ({"name": "stall"}, "already"),
        ({"roles": ("weight", "grad_output", "update")}, "not some of"),
        ({"roles": ()}, "not some of"),
        ({"heads": {"input": "k"}}, "'input'"),
        ({"roles": ("weight", "update"), "tabled": True}, "one role"),
    ],
)
def test_a_bad_row_is_refused(facts, message):
    before = metrics()
    with pytest.raises(OptionError, match=message):
        register(Metric(**{"name": "kurtosis", "group": "shape", "roles": ("weight",), **facts}))
    assert metrics() == before


def test_a_row_can_be_added_and_taken_out_but_none_of_altgrads_own():
    before = metrics()
    register(Metric("kurtosis", "shape", ("weight",)))
    try:
        assert groups()[-1] == "shape"
        assert find_metric("kurtosis") is not None
    finally:
        unregister("kurtosis")
    unregister("stall")
    assert metrics() == before


def test_the_mean_of_layers_keeps_what_is_not_finite():
    assert mean([1.0, 2.0]) == 1.5
    assert mean([1.0, float("inf")]) == float("inf")
