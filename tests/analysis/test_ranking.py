"""The ranking says what the seeds can tell apart, and "unresolved" where they cannot."""

import numpy as np
import pytest

from altgrad.analysis.ranking import Contender, certainly_better, rank
from altgrad.analysis.statistics import estimate

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
