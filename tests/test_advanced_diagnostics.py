"""DIAG-01 stiffness, DIAG-02 grid alignment, DIAG-03 gradient-stiffness correlation, DIAG-04 ULP movement."""

import math

import numpy as np
import pytest
import torch

from altgrad.errors import DtypeError, FormatError, OptionError
from altgrad.quantization import (
    BF16,
    E0M7,
    E1M6,
    E3M4,
    E4M3,
    E5M2,
    E7M0,
    FORMAT_REGISTRY,
    compute_stiffness_field,
    compute_ulp_distance,
    gradient_stiffness_correlation,
    grid_alignment_error,
    grid_alignment_statistics,
    grid_index,
    grid_spacing,
    quantize,
    ulp_statistics,
)

ELEMENT_FORMATS = [fmt for fmt in FORMAT_REGISTRY.values() if fmt.has_zero]
SMALL_FORMATS = [fmt for fmt in ELEMENT_FORMATS if fmt.bits <= 8]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sample(n=4096, seed=0, spread=6.0, dtype=torch.float32):
    """Magnitudes over many binades, both signs, with zeros and exact powers of two among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g) * torch.exp2(spread * torch.randn(n, generator=g))
    x[::17] = 0.0
    x[5::31] = torch.exp2(torch.arange(len(x[5::31])) % 20 - 10.0)
    return x.to(dtype)


# -- DIAG-01: stiffness field ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mantissa_bits", [0, 1, 2, 4, 6, 10, 23])
def test_diag01_stiffness_is_two_to_the_floor_log2_minus_mantissa_bits(mantissa_bits):
    w = sample()
    expected = [math.ldexp(1.0, math.frexp(v)[1] - 1 - mantissa_bits) if v else math.nan for v in w.tolist()]
    torch.testing.assert_close(
        compute_stiffness_field(w, mantissa_bits), torch.tensor(expected), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("exponent", range(-126, 128))
def test_diag01_stiffness_is_exact_at_and_next_to_powers_of_two(exponent):
    power = torch.tensor(2.0**exponent)
    below = torch.nextafter(power, torch.tensor(0.0))
    above = torch.nextafter(power, torch.tensor(torch.inf))
    at_power = 2.0 ** (exponent - 2)
    field = compute_stiffness_field(torch.stack([below, power, above, -below]), 2)
    assert field.tolist() == [at_power / 2, at_power, at_power, at_power / 2]


def test_diag01_seven_mantissa_bits_as_a_number_mean_e0m7():
    w = torch.tensor([0.9, 1e-3, -0.5, 3.0, 0.0])
    field = compute_stiffness_field(w, 7)
    assert field[:4].tolist() == [1 / 128] * 4
    assert math.isnan(field[4])
    assert torch.equal(field[:4], compute_stiffness_field(w, E0M7)[:4])


def test_diag01_a_format_means_itself_so_bf16_is_not_e0m7():
    w = torch.tensor([1.0, 1e-3, 3.0])
    assert compute_stiffness_field(w, BF16).tolist() == [2.0**-7, 2.0**-17, 2.0**-6]
    assert compute_stiffness_field(w, "bfloat16").tolist() == compute_stiffness_field(w, BF16).tolist()


@pytest.mark.parametrize(("name", "step"), [("E0M3", 1 / 8), ("E0M7", 1 / 128), ("E0M15", 2.0**-15)])
def test_diag01_uniform_grids_have_one_stiffness(name, step):
    w = sample()
    field = compute_stiffness_field(w, name)
    assert set(field[w != 0].tolist()) == {step}


def test_diag01_zero_and_nonfinite_weights_have_no_stiffness():
    field = compute_stiffness_field(torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0]), 2)
    assert torch.isnan(field).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_diag01_dtype_shape_and_layout(dtype):
    w = sample(6 * 8, dtype=dtype).view(6, 8).t()
    field = compute_stiffness_field(w, E3M4)
    assert field.shape == w.shape
    assert field.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = compute_stiffness_field(w.double(), E3M4)
    torch.testing.assert_close(field.double(), wide, rtol=0, atol=0, equal_nan=True)
    assert compute_stiffness_field(w[:0], E3M4).shape == (0, 6)


def test_diag01_carrier_subnormals_are_exact_and_underflow_to_zero():
    w = torch.tensor([2.0**-149, 2.0**-140, 2.0**-126])
    assert compute_stiffness_field(w, 5).tolist() == [0.0, 2.0**-145, 2.0**-131]
    assert compute_stiffness_field(torch.tensor([2.0**-1070], dtype=torch.float64), 4).tolist() == [2.0**-1074]


@pytest.mark.parametrize("x", [torch.tensor([1, 2]), torch.tensor([1j]), torch.tensor([True]), [1.0]], ids=str)
def test_diag01_to_diag04_refuse_what_is_not_floating(x):
    for call in (
        lambda: compute_stiffness_field(x, 3),
        lambda: grid_spacing(x, "E4M3"),
        lambda: grid_alignment_error(x, "E4M3", 1.0),
        lambda: gradient_stiffness_correlation(x, x, 3),
        lambda: compute_ulp_distance(x, x),
    ):
        if isinstance(x, torch.Tensor):
            with pytest.raises(DtypeError, match="float32"):
                call()
    with pytest.raises(DtypeError, match="cast it first"):
        compute_stiffness_field(x, 3)


def test_diag01_negative_mantissa_bits_are_refused():
    with pytest.raises(OptionError, match="-1 mantissa bits"):
        compute_stiffness_field(torch.ones(2), -1)


@pytest.mark.parametrize("fmt", SMALL_FORMATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_diag01_exact_spacing_is_the_distance_to_the_next_code(fmt, scale):
    values = fmt.values()
    values = values[(values >= 0)]
    inner = torch.tensor(values[:-1] * scale)
    gaps = torch.tensor(np.diff(values) * scale)
    torch.testing.assert_close(grid_spacing(inner, fmt, scale), gaps, rtol=0, atol=0)
    torch.testing.assert_close(grid_spacing(-inner, fmt, scale), gaps, rtol=0, atol=0)


# -- DIAG-02: grid alignment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SMALL_FORMATS, ids=str)
def test_diag02_error_is_the_distance_to_the_nearest_grid_value(fmt):
    w = quantize(sample(512, spread=3.0), "E5M10")
    scale = 0.37
    values = torch.tensor(fmt.values(), dtype=torch.float32) * torch.tensor(scale)
    error = grid_alignment_error(w, fmt, scale, overflow="saturate")
    nearest = (w.double()[:, None] - values.double()).abs().amin(dim=1)
    torch.testing.assert_close(error.double(), nearest, rtol=1e-5, atol=1e-12)


def test_diag02_values_on_the_grid_have_no_error():
    for fmt in SMALL_FORMATS:
        values = torch.tensor(fmt.values(), dtype=torch.float32)
        stats = grid_alignment_statistics(values * 0.25, fmt, 0.25)
        assert stats["grid_error_max"] == 0
        assert stats["on_grid_frac"] == 1
        assert stats["grid_error_std"] == 0


def test_diag02_error_is_w_minus_quantize_of_w():
    w, scale = sample(), torch.tensor(0.7)
    for fmt in (E3M4, E5M2, E7M0):
        torch.testing.assert_close(
            grid_alignment_error(w, fmt, scale), (w - quantize(w, fmt, scale)).abs(), rtol=0, atol=0
        )


def test_diag02_statistics_match_numpy():
    w = sample()
    error = grid_alignment_error(w, E3M4, 0.5).double().numpy()
    stats = grid_alignment_statistics(w, E3M4, 0.5)
    assert float(stats["grid_error_mean"]) == pytest.approx(error.mean(), rel=1e-12)
    assert float(stats["grid_error_std"]) == pytest.approx(error.std(), rel=1e-12)
    assert float(stats["grid_error_max"]) == error.max()
    assert float(stats["on_grid_frac"]) == pytest.approx((error == 0).mean(), rel=1e-12)


def test_diag02_overflow_is_an_error_of_inf_only_where_the_format_has_inf():
    beyond = torch.tensor([1e6])
    assert grid_alignment_error(beyond, E5M2, 1.0).item() == math.inf
    assert grid_alignment_error(beyond, E5M2, 1.0, overflow="saturate").item() == 1e6 - 57344
    assert grid_alignment_error(beyond, E3M4, 1.0).item() == 1e6 - 124


def test_diag02_channel_scales_broadcast():
    w = sample(8 * 16).view(8, 16)
    scale = torch.rand(8, 1) + 0.1
    rows = torch.stack([grid_alignment_error(w[i], E4M3, scale[i]) for i in range(8)])
    assert torch.equal(grid_alignment_error(w, E4M3, scale), rows)


def test_diag02_empty_and_all_nan_weights_measure_nothing():
    for w in (torch.empty(0), torch.full((3,), math.nan)):
        assert all(math.isnan(v) for v in grid_alignment_statistics(w, E3M4, 1.0).values())


# -- DIAG-03: gradient-stiffness correlation ------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [E3M4, E5M2, E7M0, BF16], ids=str)
def test_diag03_matches_numpy_over_nonzero_weights(fmt):
    w, g = sample(spread=2.0), sample(seed=1, spread=2.0)
    stats = gradient_stiffness_correlation(w, g, fmt)
    keep = w != 0
    s = compute_stiffness_field(w, fmt)[keep].double().numpy()
    a = g[keep].abs().double().numpy()
    assert float(stats["grad_stiff_correlation"]) == pytest.approx(np.corrcoef(a, s)[0, 1], abs=1e-12)
    assert float(stats["grad_stiff_ratio_mean"]) == pytest.approx((a / s).mean(), rel=1e-12)
    assert float(stats["grad_below_stiffness_frac"]) == (a < s).mean()


def test_diag03_gradients_equal_to_the_stiffness_correlate_fully():
    w = sample()
    stiffness = torch.nan_to_num(compute_stiffness_field(w, 2))
    stats = gradient_stiffness_correlation(w, -stiffness, 2)
    assert float(stats["grad_stiff_correlation"]) == pytest.approx(1.0)
    assert stats["grad_stiff_ratio_mean"] == 1
    assert stats["grad_below_stiffness_frac"] == 0


def test_diag03_zero_weights_are_masked():
    w, g = torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0]), torch.tensor([1e9, 0.1, 0.2, 1e9, 0.4])
    stats = gradient_stiffness_correlation(w, g, 2)
    only = gradient_stiffness_correlation(w[w != 0], g[w != 0], 2)
    assert {k: float(v) for k, v in stats.items()} == pytest.approx({k: float(v) for k, v in only.items()}, rel=1e-12)
    assert float(stats["grad_stiff_correlation"]) == pytest.approx(1.0)


def test_diag03_nonfinite_pairs_are_left_out():
    w, g = torch.tensor([1.0, 2.0, 4.0, math.nan, 8.0]), torch.tensor([0.1, 0.2, 0.4, 0.5, math.inf])
    stats = gradient_stiffness_correlation(w, g, 2)
    only = gradient_stiffness_correlation(w[:3], g[:3], 2)
    assert {k: float(v) for k, v in stats.items()} == pytest.approx({k: float(v) for k, v in only.items()}, rel=1e-12)


@pytest.mark.parametrize(
    ("w", "g", "m"),
    [
        (torch.empty(0), torch.empty(0), 2),
        (torch.zeros(3), torch.ones(3), 2),
        (torch.tensor([1.0]), torch.tensor([1.0]), 2),
        (torch.tensor([1.0, 2.0, 4.0]), torch.full((3,), 0.1), 2),  # constant gradient
        (torch.tensor([0.1, 0.2, 0.4]), torch.tensor([1.0, 2.0, 3.0]), 7),  # constant stiffness
    ],
    ids=["empty", "all zero", "one", "constant gradient", "constant stiffness"],
)
def test_diag03_correlation_of_constant_or_empty_input_is_undefined(w, g, m):
    stats = gradient_stiffness_correlation(w, g, m)
    assert math.isnan(stats["grad_stiff_correlation"])
    measured = bool((w != 0).any())
    assert math.isnan(stats["grad_stiff_ratio_mean"]) != measured
    assert math.isnan(stats["grad_below_stiffness_frac"]) != measured


def test_diag03_shapes_must_agree():
    with pytest.raises(OptionError, match=r"\[3\].*\[4\]"):
        gradient_stiffness_correlation(torch.ones(3), torch.ones(4), 2)


# -- DIAG-04: ULP movement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_diag04_carrier_ulps_match_numpy_spacing(dtype):
    before, after = sample(dtype=dtype), sample(seed=1, dtype=dtype)
    distance = compute_ulp_distance(before, after)
    spacing = np.spacing(before.abs().numpy()).astype(np.float64)
    expected = np.abs(after.double().numpy() - before.double().numpy()) / spacing
    assert torch.equal(distance, torch.tensor(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_diag04_one_step_up_is_one_ulp_and_one_down_from_a_power_of_two_a_half(dtype):
    before = torch.tensor([1.0, 1.5, 3.0], dtype=dtype)
    up = torch.nextafter(before, torch.full_like(before, torch.inf))
    down = torch.nextafter(before, torch.zeros_like(before))
    assert compute_ulp_distance(before, up).tolist() == [1.0, 1.0, 1.0]
    assert compute_ulp_distance(before, down).tolist() == [0.5, 1.0, 1.0]


def test_diag04_carrier_ulps_at_the_ends_of_the_range():
    largest = torch.finfo(torch.float32).max
    before = torch.tensor([0.0, -0.0, largest, 2.0**-149])
    after = torch.tensor([2.0**-149, 0.0, torch.nextafter(torch.tensor(largest), torch.tensor(0.0)), -(2.0**-149)])
    assert compute_ulp_distance(before, after).tolist() == [1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("fmt", SMALL_FORMATS, ids=str)
def test_diag04_grid_distance_counts_codes_for_every_pair_of_values(fmt):
    values = torch.tensor(fmt.values(), dtype=torch.float32) * 0.5
    before, after = torch.meshgrid(values, values, indexing="ij")
    position = torch.arange(len(values))
    expected = (position[:, None] - position[None, :]).abs().double()
    assert torch.equal(compute_ulp_distance(before, after, fmt, 0.5), expected)


@pytest.mark.parametrize("fmt", ELEMENT_FORMATS, ids=str)
def test_diag04_plus_and_minus_zero_share_an_index(fmt):
    zeros, smallest = torch.tensor([0.0, -0.0]), torch.tensor([fmt.min_subnormal] * 2)
    assert compute_ulp_distance(zeros, -zeros, fmt).tolist() == [0.0, 0.0]
    assert compute_ulp_distance(-smallest, smallest, fmt).tolist() == [2.0, 2.0]
    assert grid_index(torch.tensor([fmt.max, -fmt.max]), fmt).tolist() == [
        fmt.index_of(fmt.max),
        -fmt.index_of(fmt.max),
    ]


def test_diag04_only_the_grid_distance_says_whether_a_weight_moved_on_its_grid():
    before = torch.tensor([1.0, 1.0])
    after = torch.tensor([1.01, 1.04])  # E3M4 has 1.0 and 1.0625
    assert (compute_ulp_distance(before, after) > 0).all()
    assert compute_ulp_distance(before, after, E3M4).tolist() == [0.0, 1.0]


def test_diag04_nonfinite_values_have_no_distance_and_overflow_saturates():
    before = torch.tensor([1.0, math.nan, math.inf, 100.0])
    after = torch.tensor([math.nan, 1.0, 1.0, 1e9])
    for fmt in (None, E3M4):
        assert torch.isnan(compute_ulp_distance(before, after, fmt)).tolist() == [True, True, True, False]
    assert compute_ulp_distance(before[3:], after[3:], E1M6).tolist() == [0.0]


@pytest.mark.parametrize(("fmt", "scale"), [(None, 1.0), (E3M4, 0.3), (E7M0, 1.0)], ids=["carrier", "E3M4", "E7M0"])
def test_diag04_statistics_match_numpy(fmt, scale):
    before = sample(1001)
    after = torch.where(torch.arange(1001) % 3 == 0, before, before * 1.3)
    distance = compute_ulp_distance(before, after, fmt, scale).numpy()
    stats = ulp_statistics(before, after, fmt, scale)
    assert float(stats["ulp_mean"]) == pytest.approx(distance.mean(), rel=1e-12)
    assert float(stats["ulp_median"]) == np.median(distance)
    assert float(stats["ulp_max"]) == distance.max()
    assert float(stats["ulp_zero_frac"]) == (distance == 0).mean()
    assert 0 < float(stats["ulp_zero_frac"]) < 1


def test_diag04_statistics_skip_nan_and_of_nothing_are_nan():
    before = torch.tensor([1.0, math.nan, 1.0])
    after = torch.tensor([1.0, 1.0, 1.0 + 2.0**-23])
    assert float(ulp_statistics(before, after)["ulp_zero_frac"]) == 0.5
    assert all(math.isnan(v) for v in ulp_statistics(torch.empty(0), torch.empty(0)).values())


def test_diag04_shapes_and_dtypes_must_agree():
    with pytest.raises(OptionError, match="same weights"):
        compute_ulp_distance(torch.ones(3), torch.ones(2))
    with pytest.raises(OptionError, match="same weights"):
        compute_ulp_distance(torch.ones(3), torch.ones(3).double())


# -- all of them ----------------------------------------------------------------------------------------------------


def test_diag01_diag02_scale_formats_have_no_grid():
    for call in (lambda: compute_stiffness_field(torch.ones(2), "E8M0"), lambda: grid_index(torch.ones(2), "E8M0")):
        with pytest.raises(FormatError, match="E8M0"):
            call()


def test_diag01_to_diag04_keep_inputs_and_autograd_untouched():
    w = torch.nn.Parameter(sample(64))
    g, kept = torch.ones(64), w.detach().clone()
    results = [
        compute_stiffness_field(w, 2),
        grid_alignment_error(w, E3M4, 1.0),
        compute_ulp_distance(w, w + g, E3M4),
        *gradient_stiffness_correlation(w, g, 2).values(),
        *ulp_statistics(w, w + g).values(),
    ]
    assert not any(r.requires_grad for r in results)
    assert torch.equal(w.detach(), kept)


@pytest.mark.parametrize("fmt", [E3M4, E7M0, BF16], ids=str)
def test_diag01_to_diag04_trace_on_fake_tensors_so_nothing_waits_for_the_device(fmt):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # reading a value here raises: a sync on a real device
        w, g = torch.empty(32), torch.empty(32)
        assert compute_stiffness_field(w, fmt).shape == (32,)
        assert all(v.shape == () for v in gradient_stiffness_correlation(w, g, fmt).values())
        assert all(v.shape == () for v in ulp_statistics(w, g).values())
