"""Stable and effective rank, and when their fall is a collapse."""

import math

import pytest
import torch

from altgrad.monitor import RankLimits, effective_rank, singular_values, stable_rank


def of_rank(r, n=24):
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g))
    p, _ = torch.linalg.qr(torch.randn(n, n, generator=g))
    return q[:, :r] @ p[:r]


@pytest.mark.parametrize("r", [1, 3, 24])
def test_equal_singular_values_have_their_number_as_rank(r):
    values = singular_values(of_rank(r))
    assert float(stable_rank(values)) == pytest.approx(r, rel=1e-4)
    assert float(effective_rank(values)) == pytest.approx(r, rel=1e-3)


def test_ranks_by_hand():
    values = torch.tensor([2.0, 1.0, 1.0])
    assert float(stable_rank(values)) == 1.5
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert float(effective_rank(values)) == pytest.approx(math.exp(entropy))


def test_convolutions_are_matrices_of_out_by_the_rest():
    assert singular_values(torch.randn(4, 3, 2, 2)).shape == (4,)


def test_a_weight_that_is_not_finite_has_no_rank():
    weight = torch.ones(3, 3)
    weight[1, 1] = math.nan
    assert torch.isnan(singular_values(weight)).all()
    assert math.isnan(stable_rank(singular_values(torch.zeros(2, 2))))


@pytest.mark.parametrize(
    ("layer", "strict"),
    [
        ("head", True),
        ("lm_head", True),
        ("blocks.3.attention.out", True),
        ("h.0.mlp.c_proj", True),
        ("blocks.0.mlp.up", False),
    ],
)
def test_heads_and_output_projections_are_held_to_more(layer, strict):
    limits = RankLimits()
    assert limits.collapsed(layer, 100.0, 60.0) is strict
    assert limits.collapsed(layer, 100.0, 49.0)
    assert not limits.collapsed(layer, 100.0, 71.0)
