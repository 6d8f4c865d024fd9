"""Geometry: spacing, code positions and values, judged by the format's own scalar facts."""

import numpy as np
import pytest
import torch

from altgrad.errors import FormatError
from altgrad.optim import position, spacing, value_at
from altgrad.optim.grid import scalar_format, scale_as_rows
from altgrad.quantization import FORMAT_REGISTRY, get_format
from altgrad.quantization.parameter_grid import ParameterGrid, declare_grid, declared_grid
from altgrad.randomness.streams import PURPOSES, step_key

SMALL = [f for f in FORMAT_REGISTRY.values() if f.bits <= 8 and f.signed and f.has_zero]
SMALL += [get_format("E4M3").without_subnormals(), get_format("E2M1").without_subnormals()]
small = pytest.mark.parametrize("fmt", SMALL, ids=str)


def between(fmt):
    """Every value of the format, and the points a third of the way up to the next one."""
    values = fmt.values()
    return np.concatenate([values, values[:-1] + np.diff(values) / 3])


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_spacing_is_the_formats_ulp(fmt, dtype, scale):
    x = between(fmt)
    s = spacing(torch.tensor(x * scale, dtype=dtype), ParameterGrid(fmt, scale))
    assert s.dtype == dtype
    expected = np.where(x == 0, fmt.next_up(0.0), fmt.ulp(x))
    np.testing.assert_array_equal(s.double().numpy(), expected * scale)


def test_spacing_below_float32s_normal_numbers():
    fmt = get_format("BF16")
    x = torch.tensor([0.0, 2.0**-149, 2.0**-130, 2.0**-126, 2.0**-125])
    assert spacing(x, ParameterGrid(fmt)).tolist() == [2.0**-133, 2.0**-133, 2.0**-133, 2.0**-133, 2.0**-132]


@small
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_positions_and_values_are_inverse(fmt, scale):
    values = fmt.values()
    index = torch.tensor([fmt.index_of(v) for v in values])
    grid = ParameterGrid(fmt, scale)
    assert torch.equal(value_at(index, grid), torch.tensor(values * scale))
    torch.testing.assert_close(position(torch.tensor(values * scale), grid), index.double(), rtol=1e-12, atol=0)


@small
def test_positions_are_linear_between_neighbours(fmt):
    values = fmt.values()
    index = np.array([fmt.index_of(v) for v in values], dtype=float)
    third = torch.tensor(values[:-1] + np.diff(values) / 3)
    expected = index[:-1] + np.diff(index) / 3
    torch.testing.assert_close(position(third, ParameterGrid(fmt)), torch.tensor(expected), rtol=1e-9, atol=1e-12)


def test_values_clamp_to_the_finite_range():
    grid = ParameterGrid(get_format("E4M3"), 2.0)
    assert value_at(torch.tensor([-1000, 126, 127]), grid).tolist() == [-896.0, 896.0, 896.0]


def test_scale_per_channel():
    scale = torch.tensor([[1.0], [4.0]])
    w = torch.tensor([[1.0, 1.5], [4.0, 3.0]])
    s = spacing(w, ParameterGrid(get_format("E4M3"), scale))
    assert s.tolist() == [[0.125, 0.125], [0.5, 0.25]]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1, 24)), ((1,), (1, 24)), ((4, 1), (4, 6)), ((4, 6), (24, 1)), ((6,), None), ((1, 6), None)],
)
def test_scales_that_cover_contiguous_runs(shape, expected):
    rows = scale_as_rows(torch.ones(shape), torch.zeros(4, 6))
    assert (rows is None) == (expected is None)
    if rows is not None:
        assert (rows[0].numel(), rows[1]) == expected


@pytest.mark.parametrize("name", ["MXFP8", "E8M0"])
def test_formats_without_a_signed_scalar_grid_are_refused(name):
    with pytest.raises(FormatError, match="signed scalar"):
        scalar_format(name)


def test_grids_are_declared_on_parameters_and_taken_back():
    p = torch.nn.Parameter(torch.zeros(3))
    assert declared_grid(p) is None
    declare_grid(p, ParameterGrid(get_format("E4M3")))
    assert declared_grid(p).format.name == "E4M3"
    declare_grid(p, None)
    assert declared_grid(p) is None


def test_streams_differ_by_parameter_step_and_purpose():
    keys = {step_key(0, p, t, purpose) for p in range(40) for t in range(40) for purpose in PURPOSES}
    assert len(keys) == 40 * 40 * len(PURPOSES)
    assert step_key(5, 1, 2, "weight")[1] == step_key(6, 1, 2, "weight")[1]
    assert step_key(5, 1, 2, "weight")[0] == 5
