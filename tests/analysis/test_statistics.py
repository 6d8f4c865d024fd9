"""Statistics against closed forms, scipy's own, published examples, and simulated studies; and ranks built on them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from altgrad.analysis.ranking import Contender, certainly_better, rank
from altgrad.analysis.statistics import (
    BOOTSTRAP_FROM,
    bootstrap_interval,
    estimate,
    hedges_g,
    holm,
    noise_floor,
    paired,
    paired_p,
)
from altgrad.errors import ReportError

FIVE = [2.01, 1.98, 2.05, 2.00, 1.97]


def test_few_seeds_get_students_interval():
    found = estimate(FIVE)
    low, high = stats.t.interval(0.95, 4, np.mean(FIVE), stats.sem(FIVE))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.n, found.method) == (pytest.approx(np.mean(FIVE)), 5, "Student's t")
    assert found.sd == pytest.approx(np.std(FIVE, ddof=1))
    assert found.bootstrap[1] - found.bootstrap[0] < high - low


def test_many_seeds_get_the_bootstrap():
    x = np.random.default_rng(0).normal(2, 0.1, BOOTSTRAP_FROM)
    found = estimate(x)
    judge = stats.bootstrap((x,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0))
    assert found.method == "BCa bootstrap"
    assert (found.low, found.high) == tuple(judge.confidence_interval)


def test_one_value_has_no_interval_and_overlaps_everything():
    one = estimate([2.0])
    assert (one.low, one.high, one.method) == (None, None, "one value")
    assert not one.excludes(0.0)
    assert one.overlaps(estimate(FIVE))


def test_equal_values_are_a_point():
    same = estimate([0.25, 0.25, 0.25])
    assert (same.low, same.high, same.method) == (0.25, 0.25, "constant")
    assert same.excludes(0.0)
    assert not estimate([0.0, 0.0]).excludes(0.0)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_what_cannot_be_averaged_is_refused(bad):
    with pytest.raises(ReportError):
        estimate(bad)


def test_two_values_fall_back_to_the_percentile_bootstrap_and_say_so():
    low, high, method = bootstrap_interval([1.0, 3.0])
    assert method == "percentile"
    assert (low, high) == (1.0, 3.0)


def test_reports_are_reproducible():
    assert estimate(FIVE, rng=3) == estimate(FIVE, rng=3)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_interval_of_few_seeds_covers_95_percent(n):
    rng = np.random.default_rng(n)
    studies = rng.normal(0.3, 0.05, (1500, n))
    half = stats.t.ppf(0.975, n - 1) * studies.std(axis=1, ddof=1) / math.sqrt(n)
    for row, h in zip(studies[:5], half, strict=False):  # the formula below is what estimate() gives
        found = estimate(row)
        assert (found.low, found.high) == pytest.approx((row.mean() - h, row.mean() + h))
    covered = np.mean(np.abs(studies.mean(axis=1) - 0.3) <= half)
    assert 0.935 <= covered <= 0.965


def test_why_the_bootstrap_does_not_decide_for_few_seeds():
    rng = np.random.default_rng(11)

    def coverage(n, studies):
        hits = 0
        for row in rng.normal(0.0, 1.0, (studies, n)):
            low, high, _ = bootstrap_interval(row, resamples=999)
            hits += low <= 0 <= high
        return hits / studies

    assert coverage(5, 200) < 0.90
    assert 0.89 <= coverage(BOOTSTRAP_FROM, 200) <= 0.99


def test_pairing_uses_the_common_seeds_and_removes_what_the_seed_does():
    rng = np.random.default_rng(2)
    seed_effect = dict(enumerate(rng.normal(0, 1.0, 6)))
    a = {seed: effect + 0.02 + 0.001 * rng.normal() for seed, effect in seed_effect.items()}
    b = {seed: effect for seed, effect in seed_effect.items() if seed != 3}
    found = paired(a, b)
    assert found.difference.n == 5
    assert found.difference.seeds == (0, 1, 2, 4, 5)
    assert found.difference.mean == pytest.approx(0.02, abs=0.002)
    assert found.difference.excludes(0.0)
    assert estimate(list(a.values())).overlaps(estimate(list(b.values())))  # unpaired, nothing could be said
    assert found.p == pytest.approx(stats.ttest_rel([a[s] for s in b], list(b.values())).pvalue)


def test_pairs_without_a_common_seed():
    assert paired({1: 2.0}, {2: 2.0}) is None
    assert paired({}, {}) is None


def test_bit_identical_runs_differ_by_exactly_nothing():
    same = paired({1: 2.0, 2: 2.1, 3: 2.2}, {1: 2.0, 2: 2.1, 3: 2.2})
    assert (same.difference.mean, same.difference.low, same.difference.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert same.effect is None


def test_hedges_g_is_unbiased_and_matches_the_tables():
    assert hedges_g([1.0, 2.0]) is None
    assert hedges_g([1.0] * 5) is None
    # J(4) = 0.7979, J(9) = 0.9139 (Hedges 1981, exact).
    for n, j in ((5, 0.7979), (10, 0.9139)):
        x = np.arange(n) + 1.0
        assert hedges_g(x) == pytest.approx(j * x.mean() / x.std(ddof=1), rel=1e-3)
    rng = np.random.default_rng(5)
    assert np.mean([hedges_g(rng.normal(0.8, 1, 6)) for _ in range(4000)]) == pytest.approx(0.8, abs=0.03)


def test_paired_p_of_no_spread():
    assert paired_p([0.0, 0.0]) == 1.0
    assert paired_p([0.1, 0.1]) == 0.0
    assert paired_p([0.1]) is None


def test_holm_against_a_worked_example_and_bounds():
    # Holm's procedure by hand: sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, made monotone.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.5, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_none_and_bonferroni_and_keeps_order(p):
    adjusted = holm(p)
    assert all(raw <= a <= min(1.0, raw * len(p)) + 1e-12 for raw, a in zip(p, adjusted, strict=True))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_holm_keeps_the_family_wise_error():
    rng = np.random.default_rng(8)
    false = [min(holm(rng.random(10))) < 0.05 for _ in range(3000)]
    assert np.mean(false) <= 0.06


def test_noise_floor():
    values = dict(enumerate([2.00, 2.02, 1.97, 2.01, 1.99]))
    floor = noise_floor(values)
    assert floor.sd == pytest.approx(np.std(list(values.values()), ddof=1))
    assert floor.low < floor.sd < floor.high
    # 95% interval of a standard deviation at n = 5: factors 0.599 and 2.874.
    assert (floor.low / floor.sd, floor.high / floor.sd) == pytest.approx((0.599, 2.874), abs=1e-3)
    assert floor.smallest_resolvable(5) == pytest.approx(stats.t.ppf(0.975, 8) * floor.sd * math.sqrt(2 / 5))
    assert noise_floor({1: 2.0}) is None
    assert noise_floor({1: 2.0, 2: math.nan}) is None


SEEDS = range(5)
EFFECT = dict(zip(SEEDS, np.random.default_rng(0).normal(0, 0.2, 5), strict=True))


def contender(name, mean, noise=0.002, seeds=SEEDS, collapsed=0):
    rng = np.random.default_rng(sum(map(ord, name)))
    losses = {s: mean + EFFECT.get(s, 0.0) + noise * rng.normal() for s in seeds}
    return Contender(name, losses, collapsed, len(losses) + collapsed)


def places(ranked):
    return {r.name: (r.best, r.worst) for r in ranked}


def test_what_is_far_apart_is_ranked():
    ranked = rank([contender("c", 2.3), contender("a", 2.0), contender("b", 2.1)], contender("FP32", 1.9))
    assert [r.name for r in ranked] == ["a", "b", "c"]
    assert places(ranked) == {"a": (1, 1), "b": (2, 2), "c": (3, 3)}
    assert all(r.resolved and r.p_adjusted < 0.01 for r in ranked)
    assert ranked[0].place == "1"


def test_what_is_close_together_is_unresolved_and_says_with_whom():
    ranked = rank([contender("a", 2.0, 0.05), contender("b", 2.001, 0.05), contender("c", 3.0)])
    by_name = {r.name: r for r in ranked}
    assert places(ranked)["c"] == (3, 3)
    assert places(ranked)["a"] == places(ranked)["b"] == (1, 2)
    assert by_name["a"].unresolved_with == ("b",)
    assert by_name["a"].place == "1 to 2, unresolved"


def test_bit_identical_settings_share_their_rank():
    twin = contender("a", 2.0)
    ranked = rank([twin, Contender("b", dict(twin.losses), 0, 5), contender("c", 3.0)])
    assert places(ranked) == {"a": (1, 2), "b": (1, 2), "c": (3, 3)}


def test_collapsed_settings_are_not_ranked_by_their_survivors():
    ranked = rank(
        [contender("a", 2.0), contender("lucky", 1.5, seeds=range(4), collapsed=1), Contender("dead", {}, 5, 5)]
    )
    assert [r.name for r in ranked] == ["a", "lucky", "dead"]
    assert [r.place for r in ranked] == ["1", "collapsed in 1 of 5", "collapsed in 5 of 5"]
    assert ranked[2].estimate is None


def test_one_seed_resolves_nothing():
    ranked = rank([contender("a", 1.0, seeds=[1]), contender("b", 9.0, seeds=[1])], contender("FP32", 0.5, seeds=[1]))
    assert places(ranked) == {"a": (1, 2), "b": (1, 2)}
    assert ranked[0].p_adjusted is None


def test_without_common_seeds_the_intervals_decide():
    far = [contender("a", 2.0, 0.01, range(10, 15)), contender("b", 2.5, 0.01, range(20, 25))]
    near = [contender("a", 2.0, 0.01, range(10, 15)), contender("b", 2.001, 0.01, range(20, 25))]
    for pair, resolved in ((far, True), (near, False)):
        estimates = {c.name: estimate(list(c.losses.values())) for c in pair}
        assert (certainly_better(pair, estimates) == {("a", "b")}) is resolved


def test_no_contenders():
    assert rank([]) == []


def test_false_resolutions_stay_rare_when_all_settings_are_equal():
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(400):
        same = [Contender(str(i), dict(enumerate(rng.normal(2, 0.05, 5))), 0, 5) for i in range(5)]
        wrong += bool(certainly_better(same, {}))
    assert wrong / 400 <= 0.07


def test_unresolved_words_stay_short():
    ranked = rank([Contender(str(i), {1: 2.0 + i, 2: 2.0 - i}, 0, 2) for i in range(7)])
    assert ranked[0].unresolved_words().endswith("and 2 more")


@pytest.mark.parametrize("n", [2, 3])
def test_few_seeds_need_large_differences(n):
    ranked = rank([contender("a", 2.0, 0.05, range(n)), contender("b", 2.05, 0.05, range(n))])
    assert not ranked[0].resolved
