"""GridOptim and the steps of a grid under it: rounding without bias to actual neighbours, clipping, masters, reports."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import FormatError, OptionError
from altgrad.optim import GridOptim, LNSMadam, position, spacing, value_at
from altgrad.optim.grid import scalar_format, scale_as_rows
from altgrad.quantization import FORMAT_REGISTRY, get_format, quantize
from altgrad.quantization.parameter_grid import ParameterGrid, declare_grid, declared_grid
from altgrad.randomness import PURPOSES, random_bits, step_key

FORMATS = ["E4M3", "E5M2", "E3M4", "E0M7", "E6M1", "E7M0"]


def one_step(w, grid_steps, fmt, n, **options):
    """n copies of weight w asked to move by `grid_steps`; the weights after the step."""
    p = Parameter(torch.full((n,), w))
    p.grad = torch.full((n,), -grid_steps)
    GridOptim([p], fmt, lr=1.0, momentum=0.0, **options).step()
    return p.detach()


@pytest.mark.parametrize("name", FORMATS)
def test_expectation_over_all_bits_is_exact(name, monkeypatch):
    """With 8 random bits every draw can be enumerated: the mean over the 256 draws is w + d to the last bit.

    Steps are multiples of 1/128 of a grid step on and beside powers of two, where the gap below is half the gap above.
    """
    monkeypatch.setattr(GridOptim, "random_bits", 8)
    fmt, n = get_format(name), 8192
    key = torch.tensor(step_key(0, 0, 1, "weight"), dtype=torch.uint64).view(torch.int64)
    draws = random_bits(key, n, 8).numpy()
    assert len(np.unique(draws)) == 256
    first = np.array([np.flatnonzero(draws == r)[0] for r in range(256)])
    edge = 0.5 if fmt.bias is None else 2.0 ** max(fmt.emin + 2, -2)
    for w in (edge, fmt.next_up(edge), fmt.next_down(edge), -edge, 0.0):
        for grid_steps in (0.5, -0.5, 1 / 128, -1 / 128, -0.25, 0.75, -1.0, 1.0):
            after = one_step(w, grid_steps, name, n).double().numpy()
            assert np.mean(after[first]) == w + grid_steps * fmt.ulp(w), (w, grid_steps)


@pytest.mark.parametrize("name", ["E4M3", "E7M0"])
def test_targets_land_on_actual_neighbours(name):
    fmt = get_format(name)
    after = one_step(1.0, -0.3, name, 4000)
    assert set(after.tolist()) == {fmt.next_down(1.0), 1.0}


def test_full_resolution_expectation():
    """With 32 bits a step of 1e-4 grid steps is not lost; the mean over many weights agrees within four sigma."""
    n, grid_steps = 400_000, -1e-3
    after = one_step(1.0, grid_steps, "E4M3", n).double()
    chance = 1e-3 * 0.125 / 0.0625  # down from 1.0 the gap is half the spacing
    moved = float((after != 1.0).double().mean())
    assert abs(moved - chance) < 4 * (chance / n) ** 0.5


def test_code_unbiased_variant():
    """E[code'] = code + r; in value it moves half as far down from a power of two."""
    n = 200_000
    grid = ParameterGrid(get_format("E4M3"))
    for grid_steps in (-0.3, 0.3, -1.6):
        after = one_step(1.0, grid_steps, "E4M3", n, unbiased="code")
        codes = position(after, grid) - position(torch.ones(1), grid)
        assert abs(float(codes.mean()) - grid_steps) < 4 * (0.25 / n) ** 0.5
        assert float(codes.max() - codes.min()) == 1.0
    value = one_step(1.0, -0.3, "E4M3", n, unbiased="value").mean()
    assert float(value) == pytest.approx(1 - 0.3 / 8, abs=4 * 0.0625 / n**0.5)


def test_code_unbiased_nearest_and_saturation():
    assert one_step(1.0, 1.4, "E4M3", 1, unbiased="code", rounding="nearest_even").item() == 1.125
    assert one_step(448.0, 5.0, "E4M3", 1, unbiased="code").item() == 448.0
    assert one_step(0.0, -2.0, "E4M3", 1, unbiased="code").item() == -(2.0**-8)


def test_step_clipping_is_counted():
    p = Parameter(torch.ones(4))
    p.grad = torch.tensor([0.5, -3.0, 8.0, 1.0])
    optimizer = GridOptim([p], "E4M3", lr=1.0, momentum=0.0, step_clip=2.0, rounding="nearest_even")
    optimizer.step()
    assert p.tolist() == [1.0 - 0.0625, 1.25, 0.75, 0.875]
    assert optimizer.grid_step_counts(p).tolist() == [4, 4, 0, 0, 2, 0]


def test_a_master_keeps_what_nearest_rounding_swallows():
    p, q = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    a = GridOptim([p], "E4M3", lr=0.2, momentum=0.0, master=True, rounding="nearest_even")
    b = GridOptim([q], "E4M3", lr=0.2, momentum=0.0, rounding="nearest_even")
    for _ in range(4):
        p.grad, q.grad = -torch.ones(1), -torch.ones(1)
        a.step()
        b.step()
    assert p.item() == 1.125
    assert q.item() == 1.0
    assert a.state[p]["master"].item() == pytest.approx(1.1)
    assert b.last_step_stats()["stall_rate"] == 1.0


@pytest.mark.parametrize(("name", "crosses"), [("E0M7", True), ("E7M0", False)])
def test_steps_below_one_grid_step_cannot_cross_zero_on_e7m0(name, crosses):
    """One grid step of E7M0 is the weight itself: a smaller step halves the weight at most. Uniform grids walk through zero."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(quantize(torch.randn(2000, generator=generator) * 0.02, name))
    optimizer = GridOptim([p], name, lr=0.7, momentum=0.0, step_clip=0.9)
    start = p.detach().clone()
    for _ in range(30):
        p.grad = torch.randn(2000, generator=generator)
        optimizer.step()
    changed = int((start * p.detach() < 0).sum())
    assert (changed > 100) if crosses else (changed == 0)


def test_sign_flips_are_reported():
    generator = torch.Generator().manual_seed(0)
    p = Parameter(quantize(torch.randn(2000, generator=generator), "E7M0"))
    optimizer = GridOptim([p], "E7M0", lr=2.0, momentum=0.0)
    before = p.detach().clone()
    p.grad = torch.randn(2000, generator=generator)
    optimizer.step()
    assert optimizer.last_step_stats()["sign_flips"] == int((before * p.detach() < 0).sum()) > 300


def test_saturation_is_counted():
    p = Parameter(torch.tensor([448.0, 1.0]))
    p.grad = torch.tensor([-3.0, 0.0])
    optimizer = GridOptim([p], "E4M3", lr=1.0)
    optimizer.step()
    assert p.tolist() == [448.0, 1.0]
    assert optimizer.last_step_stats()["saturated"] == 1


def test_normalised_steps_do_not_depend_on_the_gradients_size():
    results = []
    for size in (1e-6, 1e3):
        p = Parameter(torch.ones(1000))
        generator = torch.Generator().manual_seed(0)
        optimizer = GridOptim([p], "E4M3", lr=0.5, normalize="rms")
        for _ in range(3):
            p.grad = torch.randn(1000, generator=generator) * size
            optimizer.step()
        results.append(p.detach().clone())
    assert (results[0] != results[1]).double().mean() < 1e-2


def test_nan_stays_nan():
    for unbiased in ("value", "code"):
        assert one_step(float("nan"), 1.0, "E4M3", 1, unbiased=unbiased).isnan().all()
        assert one_step(1.0, float("nan"), "E4M3", 1, unbiased=unbiased).isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.0},
        {"step_clip": 0.0},
        {"normalize": "max"},
        {"unbiased": "both"},
        {"unbiased": "code", "master": True},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError):
        GridOptim([Parameter(torch.ones(1))], **options)


def test_lns_madam_is_unbiased_in_the_exponent_and_keeps_signs():
    n = 100_000
    w = Parameter(torch.where(torch.arange(n) % 2 == 0, 1.0, -0.25))
    before = w.detach().clone()
    optimizer = LNSMadam([w], lr=0.3, p_scale=100.0)
    w.grad = torch.ones(n)
    optimizer.step()
    moved = torch.log2(w.detach().abs()) - torch.log2(before.abs())
    assert float(moved[0::2].mean()) == pytest.approx(-0.3, abs=0.01)
    assert float(moved[1::2].mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(torch.sign(w.detach()), torch.sign(before))
    assert set(moved.tolist()) == {-1.0, 0.0, 1.0}


def test_lns_madam_needs_powers_of_two():
    w = Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(FormatError, match="E7M0"):
        LNSMadam([w], "E4M3").step()


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
