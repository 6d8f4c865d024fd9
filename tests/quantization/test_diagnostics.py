"""The one-pass measurement: the fused kernel against the torch definition, and these against the public functions."""

import math

import pytest
import torch

from altgrad.diagnostics.fields import UPDATE_FIELDS, bin_edges, half_steps, predict_stall, stall_chances
from altgrad.diagnostics.kernels.cpu import supports
from altgrad.diagnostics.update import UpdateMeasurement, measure_update
from altgrad.errors import KernelError, OptionError
from altgrad.quantization import (
    FORMAT_REGISTRY,
    compute_stiffness_field,
    gradient_stiffness_correlation,
    grid_alignment_statistics,
    quantize,
    ulp_statistics,
)

CPU_FORMATS = [f for f in FORMAT_REGISTRY.values() if supports(f, 1.0, None, None, None, None)]


FLOAT32_SUMS = {name for name in UPDATE_FIELDS if "sum" in name} - {"steps_sum"}


def a_step(shape=(24, 100), fmt=None, scale=1.0, seed=0, spread=3.0):
    """before, gradient, attempted, after of a step with untouched, tiny and large updates, and dead units."""
    g = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=g) * torch.exp2(spread * torch.randn(shape, generator=g)) * 0.1
    gradient = torch.randn(shape, generator=g) * torch.exp2(5 * torch.randn(shape, generator=g)) * 1e-4
    update = gradient * 30 * (torch.rand(shape, generator=g) > 0.2)
    if len(shape) == 2:
        gradient[:, 5:6], gradient[3:4] = 0, 0
    before.view(-1)[::19] = 0
    if fmt is not None:
        before = quantize(before, fmt, scale, overflow="saturate")
    attempted = before + update
    after = attempted if fmt is None else quantize(attempted, fmt, scale, overflow="saturate")
    return before, gradient, attempted, after


def assert_same(a: UpdateMeasurement, b: UpdateMeasurement):
    for i, name in enumerate(UPDATE_FIELDS):
        x, y = float(a.vector[i]), float(b.vector[i])
        # Counts and extremes are exact; other sums, and the distances that ULPs are taken from, are float32's.
        tolerance = 4e-6 if name in FLOAT32_SUMS else 1e-7 if name == "ulp_max" else 0
        assert x == pytest.approx(y, rel=tolerance, abs=0, nan_ok=True), name
    assert torch.equal(a.weight_histogram, b.weight_histogram)
    assert torch.equal(a.update_histogram, b.update_histogram)


def both(before, gradient, attempted, after, **options):
    fast = measure_update(before, after, gradient=gradient, attempted=attempted, kernel="cpu", **options)
    slow = measure_update(before, after, gradient=gradient, attempted=attempted, kernel="eager", **options)
    return fast, slow


@pytest.mark.parametrize("fmt", CPU_FORMATS, ids=str)
def test_kernel_equals_definition_for_every_format(fmt):
    scale = 2.0**-4 if fmt.max < 2.0**20 else 1.0
    assert_same(*both(*a_step(fmt=fmt, scale=scale), format=fmt, scale=scale))
    assert_same(*both(*a_step(), format=fmt, scale=0.3))  # a master weight lies between the grid's values


def test_the_catalog_formats_that_people_train_in_are_in_the_kernel():
    assert {"E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "FP16", "FP32"} <= {
        f.name for f in CPU_FORMATS
    }


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (2048,), (5001,), (40000,), (1, 70000), (3, 4100), (300, 130), (4, 3, 5, 2)]
)
def test_kernel_equals_definition_for_every_shape(shape):
    assert_same(*both(*a_step(shape), format="E3M4", scale=2.0**-5))


@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["before", "gradient", "attempted", "after"])
def test_kernel_equals_definition_for_nonfinite_values(place):
    step = list(a_step())
    step[place] = step[place].clone()
    step[place].view(-1)[::7] = math.nan
    step[place].view(-1)[3::11] = math.inf
    step[place].view(-1)[4::11] = -math.inf
    assert_same(*both(*step, format="E3M4", scale=2.0**-5))
    step[place] = torch.full_like(step[place], math.nan)
    assert_same(*both(*step, format="E3M4", scale=2.0**-5))


def test_kernel_equals_definition_at_the_ends_of_float32():
    edge = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 2.0**-104, 1.0, -1.0, 2.0**100, -3e38, 3.4028235e38])
    before, after = (m.flatten().contiguous() for m in torch.meshgrid(edge, edge, indexing="ij"))
    for fmt in ("FP32", "E3M4", "E7M0", "E5M2", "E0M7"):
        assert_same(*both(before, after, after, after, format=fmt))


@pytest.mark.parametrize(
    ("place", "factor"),
    [(0, 1e-25), (0, 1e-15), (0, 1e15), (0, 1e25), (1, 0.0), (1, 1e-25), (1, 1e25), (2, 1e25), (3, 1e30)],
)
def test_kernel_equals_definition_where_float32_squares_do_not_do(place, factor):
    step = list(a_step((3, 700)))
    step[place] = step[place] * factor
    assert_same(*both(*step, format="E5M2", scale=2.0**-5))
    assert_same(*both(*step, format="FP32"))


def test_variances_survive_numbers_that_hardly_vary():
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    before = torch.where(noise > 2.9, 0.25, 0.75)  # stiffness differs in a few of them
    gradient = 1e-3 * (1 + 1e-4 * noise)
    for fmt in ("E3M4", "E7M0"):
        fast, slow = both(before, gradient, before + 1e-3, before, format=fmt, scale=0.3)
        assert_same(fast, slow)
        for sums in ("pair_g_sum", "pair_s_sum", "error_sum"):
            n, total, squares = (float(fast[name]) for name in ("count", sums, sums + "_sq"))
            expected = float(slow[sums + "_sq"] / n - (slow[sums] / n) ** 2)
            assert squares / n - (total / n) ** 2 == pytest.approx(expected, rel=2e-3, abs=1e-18), (fmt, sums)


@pytest.mark.parametrize("chance", [0.0, 0.01, 0.4, 0.6, 1.0])
def test_medians_wherever_few_or_most_move(chance):
    generator = torch.Generator().manual_seed(4)
    before = quantize(torch.randn(5001, generator=generator), "E3M4", 2.0**-5)
    moves = torch.rand(5001, generator=generator) < chance
    after = torch.where(moves, before + 0.125 + torch.rand(5001, generator=generator), before)
    for attempted in (after, after.clone()):
        for fmt in ("E3M4", "FP32"):
            assert_same(*both(before, None, attempted, after, format=fmt, scale=2.0**-5))


def test_histograms_are_counted_on_demand():
    before, gradient, attempted, after = a_step()
    options = {"gradient": gradient, "attempted": attempted, "format": "E3M4"}
    found, without = (
        measure_update(before, after, **options),
        measure_update(before, after, histograms=False, **options),
    )
    assert torch.equal(found.vector, without.vector)
    assert found.weight_histogram.sum() == 2400
    assert found.update_histogram.sum() == found["attempted"]
    assert without.histograms is None


def test_channel_and_element_scales():
    before, gradient, attempted, after = a_step()
    rows = torch.exp2(torch.arange(24.0) - 12)[:, None]
    assert_same(*both(before, gradient, attempted, after, format="E4M3", scale=rows))
    elements = torch.rand(24, 100) + 0.1
    assert_same(*both(before, gradient, attempted, after, format="E4M3", scale=elements))


def test_results_do_not_depend_on_the_number_of_threads():
    step = a_step((700, 300))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(
                measure_update(step[0], step[3], gradient=step[1], attempted=step[2], format="E3M4", kernel="cpu")
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].vector, results[1].vector)


def test_without_gradient_and_attempted():
    before, _, _, after = a_step()
    fast, slow = both(before, None, None, after, format="E3M4", scale=2.0**-5)
    assert_same(fast, slow)
    assert fast["g_count"] == 0
    assert math.isnan(fast["dead_rows"])
    assert fast["attempted"] == (before != after).sum()


@pytest.mark.parametrize("kernel", ["cpu", "eager"])
def test_sums_give_the_public_statistics(kernel):
    before, gradient, attempted, after = a_step(fmt="E3M4", scale=2.0**-5)
    m = measure_update(before, after, gradient=gradient, attempted=attempted, format="E5M2", scale=0.5, kernel=kernel)
    stiffness = compute_stiffness_field(before, "E5M2")
    assert float(m["s_sum"]) == pytest.approx(float(stiffness[before != 0].double().sum()), rel=1e-6)
    aligned = grid_alignment_statistics(before, "E5M2", 0.5)
    assert float(m["error_sum"] / m["count"]) == pytest.approx(float(aligned["grid_error_mean"]), rel=1e-6)
    assert float(m["on_grid"] / m["count"]) == float(aligned["on_grid_frac"])
    steps = ulp_statistics(before, after, "E5M2", 0.5)
    assert float(m["steps_sum"] / m["moves"]) == pytest.approx(float(steps["ulp_mean"]))
    assert float(m["steps_max"]) == float(steps["ulp_max"])
    assert 1 - float(m["flips"] / m["moves"]) == pytest.approx(float(steps["ulp_zero_frac"]))
    carrier = ulp_statistics(before, after)
    assert float(m["ulp_sum"] / m["moves"]) == pytest.approx(float(carrier["ulp_mean"]))
    assert float(m["ulp_median"]) <= float(carrier["ulp_median"]) < 1.3 * float(m["ulp_median"]) + 1e-30
    pairs = gradient_stiffness_correlation(before, gradient, "E5M2")
    n = m["pairs"]
    cov = m["pair_gs_sum"] / n - m["pair_g_sum"] / n * m["pair_s_sum"] / n
    var_g = m["pair_g_sum_sq"] / n - (m["pair_g_sum"] / n) ** 2
    var_s = m["pair_s_sum_sq"] / n - (m["pair_s_sum"] / n) ** 2
    assert float(cov / (var_g * var_s).sqrt()) == pytest.approx(float(pairs["grad_stiff_correlation"]), abs=1e-6)
    assert float(m["below"] / n) == float(pairs["grad_below_stiffness_frac"])
    assert (float(m["dead_rows"]), float(m["dead_columns"])) == (1, 1)


def test_stall_is_attempted_nonzero_without_a_new_code():
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    attempted = torch.tensor([1.0, 1.01, 1.05, 1.5, -1e-9])  # E3M4 has 1, 1.0625, ...
    after = quantize(attempted, "E3M4")
    m = measure_update(before, after, attempted=attempted, format="E3M4")
    assert [float(m[f]) for f in ("attempted", "stalled", "flips", "moves")] == [4, 2, 2, 5]


def test_the_kernel_refuses_what_it_does_not_take_and_none_falls_to_torch():
    before, _gradient, _attempted, after = (t.double() for t in a_step())
    with pytest.raises(KernelError, match="float64"):
        measure_update(before, after, format="E3M4", kernel="cpu")
    assert measure_update(before, after, format="E3M4")["count"] == 2400
    with pytest.raises(OptionError, match="shape"):
        measure_update(before, after[:3])
    strided = a_step()
    m = measure_update(strided[0].t(), strided[3].t(), format="E3M4")
    assert_same(m, measure_update(strided[0].t(), strided[3].t(), format="E3M4", kernel="eager"))


def test_empty_parameters_measure_nothing():
    m = measure_update(torch.empty(0), torch.empty(0), format="E3M4")
    assert m["count"] == 0
    assert math.isnan(m["ulp_median"])


# -- predicted stall --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["E0M7", "E3M4", "E5M2", "E4M3"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_predicted_stall_is_the_stall_that_independent_updates_meet(fmt, rounding):
    g = torch.Generator().manual_seed(3)
    scale = 2.0**-9 if fmt != "E0M7" else 2.0**-3
    before = quantize(0.02 * torch.randn(400, 250, generator=g), fmt, scale)
    before = before * (1 + 0)  # no weight on a power of two: there the spacing below is half
    attempted = before + 2e-4 * torch.randn(400, 250, generator=g)
    after = quantize(attempted, fmt, scale, rounding=rounding, key=(1, 2))
    m = measure_update(before, after, attempted=attempted, format=fmt, scale=scale)
    predicted = float(predict_stall(m.weight_histogram, m.update_histogram, fmt, rounding))
    measured = float(m["stalled"] / m["attempted"])
    assert 0.05 < measured < 0.999
    assert predicted == pytest.approx(measured, abs=0.04)


def test_stall_chances_by_hand():
    updates = torch.zeros(1024, dtype=torch.int64)
    edges = bin_edges()
    one = int((edges == 1.0).nonzero())
    updates[one] = 1  # an update of 1 .. 1.25
    t = {exponent: i for i, exponent in enumerate(range(-160, 129))}
    nearest, toward_zero = stall_chances(updates), stall_chances(updates, "toward_zero")
    assert [float(nearest[t[e]]) for e in (0, 1, 2)] == [0, 0, 1]  # half a spacing of 2 is 1: not below it
    assert [float(toward_zero[t[e]]) for e in (0, 1)] == [0, 1]
    chance = stall_chances(updates, "stochastic")
    assert [float(chance[t[e]]) for e in (0, 1, 2)] == pytest.approx([0, 1 - 1.125 / 2, 1 - 1.125 / 4])
    assert torch.isnan(stall_chances(torch.zeros(1024, dtype=torch.int64))).all()


@pytest.mark.parametrize(("fmt", "weight", "spacing"), [("E4M3", 1.0, 0.125), ("E7M0", 3.0, 2.0), ("E0M7", 0.9, 2**-7),
                                                        ("E1M6", 0.25, 2**-5), ("E4M3", 2.0**-8, 2.0**-9)])  # fmt: skip
def test_half_steps_are_updates_in_halves_of_the_spacing_at_the_weight(fmt, weight, spacing):
    scale, updates = 0.5, torch.full((999,), spacing / 4)
    m = measure_update(
        torch.full((999,), weight * scale), torch.full((999,), weight * scale), attempted=weight * scale + scale * updates,
        format=fmt, scale=scale,
    )  # fmt: skip
    found = float(half_steps(m.weight_histogram, m.update_histogram, fmt))
    assert 0.5 / 1.25 <= found <= 0.5  # a quarter of a spacing, as the lower edge of its bin
    empty = torch.zeros_like(m.update_histogram)
    assert math.isnan(float(half_steps(m.weight_histogram, empty, fmt)))


def test_predictions_batch():
    a, b = a_step(fmt="E3M4"), a_step(fmt="E3M4", seed=1)
    ms = [measure_update(s[0], s[3], attempted=s[2], format="E3M4") for s in (a, b)]
    weights, updates = (torch.stack(h) for h in zip(*[(m.weight_histogram, m.update_histogram) for m in ms]))
    together = predict_stall(weights, updates, "E3M4")
    assert together.tolist() == [float(predict_stall(m.weight_histogram, m.update_histogram, "E3M4")) for m in ms]
