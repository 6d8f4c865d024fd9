"""The search finds planted causes of every structure, and says so when there is none."""

import json
import math
import random

import pytest

from altgrad.autopsy.damage import Band, Null, Share, Yardstick, wobble
from altgrad.autopsy.fork import Fork, Outcome
from altgrad.autopsy.forks import Forks
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.mechanism import read
from altgrad.autopsy.search import Search, Settings
from altgrad.autopsy.split import groups, minimal
from altgrad.autopsy.verdict import Verdict
from altgrad.autopsy.window import Window, acts_from
from tests.autopsy.planted import CELLS, Planted, all_of, any_of, cell, cured_by, sum_of

HEAD = cell(6, "input_grad", "grad_output")
MIDDLE = cell(3, "forward", "input")
FIRST = cell(0, "weight_grad", "input")


def autopsy(oracle, budget=200, **more):
    return investigate(Forks(oracle, budget=budget), **more)


@pytest.mark.parametrize("cause", [HEAD, MIDDLE, FIRST], ids=str)
@pytest.mark.parametrize("onset", [0, 60, 140])
def test_a_single_cause_is_found_with_its_onset(cause, onset):
    oracle = Planted(any_of(cause), onset=onset)
    verdict = autopsy(oracle)
    assert verdict.kind == "cause"
    assert verdict.cells == (str(cause),)
    assert verdict.structure == "single"
    assert verdict.onset is not None
    assert abs(verdict.onset - onset) <= 5
    assert verdict.rescue.value > 0.9
    assert verdict.alone.value > 0.9
    assert all(p.rescue.value < 0.2 for p in verdict.placebos)
    assert verdict.no_return is None  # float32 saves it from every state


def test_small_damage_counts_where_draws_hardly_scatter():
    """Draws that live show their own noise, however little it is; only dead ones, all at the ceiling, need an assumed one."""
    verdict = autopsy(Planted(any_of(MIDDLE, size=0.03), noise=1e-6))
    assert verdict.kind == "cause"
    assert verdict.cells == (str(MIDDLE),)


def test_a_model_that_has_adapted_to_its_fault_is_forked_from_before_it_has():
    """Lifting the fault from an adapted state hurts for a while, which hides damage that the run's end shows."""

    class Adapted(Planted):
        def _losses(self, fork, start, horizon):
            losses = super()._losses(fork, start, horizon)
            withdrawal = 0.5 if fork.path == "low" and start > 30 and MIDDLE not in fork.low else 0.0
            return tuple(loss + withdrawal for loss in losses)

    verdict = autopsy(Adapted(any_of(MIDDLE, size=0.3), onset=60, noise=0.001))
    assert verdict.kind == "cause"
    assert verdict.cells == (str(MIDDLE),)
    assert verdict.window[0] <= 30


def test_damage_that_grows_slowly_shows_at_the_end_of_the_run():
    """Half a window's mean is below what counts, its last quarter is above; and the model has adapted to its fault."""

    class Slow(Planted):
        def _losses(self, fork, start, horizon):
            withdrawal = 0.5 if fork.path == "low" and start > 0 and MIDDLE not in fork.low else 0.0
            return tuple(loss + withdrawal for loss in super()._losses(fork, start, horizon))

    verdict = autopsy(Slow(any_of(), later=lambda low: 0.025 * (MIDDLE in low), noise=1e-5))
    assert verdict.kind == "cause"
    assert verdict.cells == (str(MIDDLE),)
    assert verdict.window == (0, 200)
    assert 0.02 < verdict.damage < 0.023


def test_a_few_good_steps_at_the_end_do_not_hide_a_damaged_run():
    class Recovers(Planted):
        def _losses(self, fork, start, horizon):
            healthy = super()._losses(Fork(frozenset(), start, fork.path, horizon), start, horizon)
            last = max(0, self.steps - 6 - start)
            return (*super()._losses(fork, start, horizon)[:last], *healthy[last:])

    verdict = autopsy(Recovers(any_of(MIDDLE, size=0.05), onset=60, noise=1e-5))
    assert verdict.kind == "cause"
    assert verdict.cells == (str(MIDDLE),)


def test_a_run_that_ends_damaged_is_not_called_undamaged():
    class Never(Planted):
        def run(self, fork, stop=None):  # no fork shows what the run's own history does
            return super().run(Fork(frozenset(), fork.start, fork.path, fork.horizon, fork.draw), stop)

    verdict = autopsy(Never(any_of(MIDDLE, size=0.3), onset=60))
    assert verdict.kind == "inconclusive"
    assert "ends 0.3" in verdict.sentence


def test_damage_that_comes_and_goes_from_step_to_step_names_no_cause():
    """Two trajectories that have parted differ by chance at every step, which draws that hardly scatter do not show."""

    class Parted(Planted):
        def _losses(self, fork, start, horizon):
            losses = super()._losses(fork, start, horizon)
            parted = (random.Random(f"{start + i}").gauss(0.02, 0.15) if fork.low else 0.0 for i in range(len(losses)))
            return tuple(loss + by for loss, by in zip(losses, parted, strict=True))

    for steps in (96, 120, 150):
        assert autopsy(Parted(any_of(), steps=steps, noise=1e-5)).kind != "cause"


def test_redundant_causes_that_no_single_rescue_shows():
    verdict = autopsy(Planted(any_of(HEAD, FIRST)))
    assert set(verdict.cells) == {str(HEAD), str(FIRST)}
    assert verdict.structure == "redundant"
    assert all(g.rescue.value < 0.2 < 0.8 < g.alone.value for g in verdict.groups)


def test_interacting_causes():
    verdict = autopsy(Planted(all_of(HEAD, MIDDLE)))
    assert set(verdict.cells) == {str(HEAD), str(MIDDLE)}
    assert verdict.structure == "interacting"


def test_cumulative_causes():
    verdict = autopsy(Planted(sum_of({HEAD: 0.6, FIRST: 0.5})))
    assert set(verdict.cells) == {str(HEAD), str(FIRST)}
    assert verdict.structure == "cumulative"


def test_what_is_left_behind_a_rescue_has_its_cause_too():
    verdict = autopsy(Planted(sum_of({HEAD: 0.8, FIRST: 0.15})))
    assert set(verdict.cells) == {str(HEAD), str(FIRST)}
    assert verdict.structure == "cumulative"
    assert verdict.rescue.value > 0.9
    many = autopsy(Planted(sum_of({**dict.fromkeys(CELLS, 0.005), HEAD: 0.8})))
    assert many.cells == (str(HEAD),)  # the rest is of all cells, and of none


def test_weak_damage_that_cells_do_only_together_names_none():
    """Of a few hundredths that the whole forward shares, some set does the most: chance says which."""
    weak = autopsy(Planted(all_of(HEAD, MIDDLE, size=0.03), noise=1e-6))
    assert weak.kind == "inconclusive"
    assert "do damage together" in weak.sentence
    assert autopsy(Planted(all_of(HEAD, MIDDLE, size=0.06), noise=1e-6)).structure == "interacting"
    besides = autopsy(Planted(lambda low, *rest: 0.03 * (HEAD in low) + 0.014 * ({FIRST, MIDDLE} <= low), noise=1e-6))
    assert besides.kind == "inconclusive"
    assert "do damage together" in besides.sentence


@pytest.mark.parametrize("alone", [0.3, 0.47])
def test_cells_that_do_less_than_two_thirds_alone_are_no_cause(alone):
    both = sum_of({HEAD: alone})
    oracle = Planted(lambda low, *rest: both(low, *rest) + (0.8 - alone if HEAD in low and len(low) > 1 else 0.0))
    verdict = autopsy(oracle)
    assert verdict.kind == "inconclusive"
    assert "low alone they do only" in verdict.sentence


@pytest.mark.parametrize("over", [0.2, 0.5, None])
def test_doing_it_alone_over_the_whole_run_is_enough_and_told(monkeypatch, over):
    """What is left when only the others are rescued, over the run: cells that delay a divergence do less in a short window."""
    share = None if over is None else Share(over, over - 0.01, over + 0.01, 1)
    monkeypatch.setattr("altgrad.autopsy.objections.over_the_run", lambda *rest: share)
    both = sum_of({HEAD: 0.47})
    verdict = autopsy(Planted(lambda low, *rest: both(low, *rest) + (0.33 if HEAD in low and len(low) > 1 else 0.0)))
    assert verdict.kind == ("cause" if over == 0.2 else "inconclusive")
    assert verdict.alone_over_run == (None if over is None else Share(1 - over, 1 - over - 0.01, 1 - over + 0.01, 1))
    assert verdict.confidence is None  # no calibrated case was alike


def test_a_cell_that_others_need_and_whose_rescue_adds_nothing_to_theirs_is_no_cause():
    def helped(low, *rest):  # at fault is MIDDLE, which others make worse by their rounding, HEAD the most
        return (0.12 + 0.33 * len(low) / len(CELLS) + 0.55 * (HEAD in low)) * (MIDDLE in low)

    suspects = {MIDDLE: 2.0, HEAD: 1.0}
    verdict = autopsy(Planted(helped, noise=1e-4), prior=lambda start, cells: suspects)
    assert verdict.kind == "inconclusive"
    assert f"the rescue of {HEAD} adds nothing" in verdict.sentence


def test_what_is_left_is_not_pinned_on_cells_that_do_weak_damage_only_together():
    def planted(low, *rest):
        return 0.065 * (HEAD in low) + 0.015 * ({FIRST, MIDDLE} <= low)

    verdict = autopsy(Planted(planted, noise=1e-5))
    assert verdict.cells == (str(HEAD),)
    single = autopsy(Planted(lambda low, *rest: 0.03 * (HEAD in low) + 0.008 * (FIRST in low), noise=1e-5))
    assert single.cells == (str(HEAD),)  # below the floor nothing is called damage


def test_a_state_that_carries_the_damage_is_not_taken_for_damage_of_the_other_cells():
    """From a state that one cell has damaged any others diverge when it is rescued; from the twin's state they do not."""

    class Carries(Planted):
        def _losses(self, fork, start, horizon):
            losses = super()._losses(fork, start, horizon)
            carried = fork.path == "low" and start > 10 and HEAD not in fork.low and len(fork.low) > 9
            return tuple(loss + 0.8 for loss in losses) if carried else losses

    verdict = autopsy(Carries(any_of(HEAD), onset=60, noise=1e-4), budget=300)
    assert verdict.kind == "cause"
    assert verdict.cells == (str(HEAD),)
    assert verdict.window[0] <= 10
    pair = autopsy(Carries(any_of(HEAD, FIRST), onset=60, noise=1e-4), budget=300)
    assert set(pair.cells) == {str(HEAD), str(FIRST)}

    class Ring(Carries):
        def captures(self, path):
            return [step for step in super().captures(path) if step > 20]  # no state from before it carries the damage

    assert autopsy(Ring(any_of(HEAD), onset=60, noise=1e-4), budget=300).kind == "inconclusive"


def test_innocent_cells_that_only_delay_a_divergence_are_no_objection():
    """Any change delays it, and seems to close a part of the gap in a window that ends soon after."""
    role = frozenset(one for one in CELLS if one.role == "weight")

    class Diverges(Planted):
        def _losses(self, fork, start, horizon):
            delayed = not role & fork.low and fork.low != {HEAD}
            dies = self.onset + (24 if delayed else 4) if HEAD in fork.low else math.inf
            losses = super()._losses(fork, start, horizon)
            return tuple(math.nan if start + i > dies else loss for i, loss in enumerate(losses))

    verdict = autopsy(Diverges(any_of(), onset=60))
    assert verdict.kind == "cause"
    assert verdict.cells == (str(HEAD),)
    delaying = next(one for one in verdict.roles if set(one.cells) == set(map(str, role)))
    assert delaying.rescue.value > 0.5


@pytest.mark.parametrize("noise", [0.003, 0.03, 0.08])
def test_noise_costs_forks_not_truth(noise):
    verdict = autopsy(Planted(any_of(MIDDLE, size=0.8), noise=noise), budget=300)
    assert verdict.kind == "cause"
    assert verdict.cells == (str(MIDDLE),)


def test_no_damage():
    verdict = autopsy(Planted(lambda *_: 0.0))
    assert verdict.kind == "no damage in the window"
    assert verdict.cells == ()


@pytest.mark.parametrize("noise", [1e-5, 1e-2])
def test_between_the_floor_and_what_is_clearly_damage_nothing_is_decided(noise):
    verdict = autopsy(Planted(any_of(HEAD, size=0.015 if noise < 1e-3 else 0.012), noise=noise))
    assert verdict.kind == "inconclusive"
    assert "too little" in verdict.sentence or "too few" in verdict.sentence


def test_too_high_a_learning_rate_is_not_precision():
    verdict = autopsy(Planted(lambda *_: 0.0, lr_kills=True))
    assert verdict.kind == "not precision"
    assert verdict.mechanism == "learning rate"
    assert "0.5 times the learning rate" in verdict.sentence


def test_a_dead_run():
    verdict = autopsy(Planted(any_of(HEAD, size=9.0), onset=60, dead=5.0))
    assert verdict.kind == "cause"
    assert verdict.cells == (str(HEAD),)


def test_diffuse_damage_is_not_pinned_on_anybody():
    verdict = autopsy(Planted(sum_of(dict.fromkeys(CELLS, 0.05))), settings=Settings(most_groups=2), budget=400)
    assert verdict.kind == "inconclusive"
    assert "spread" in verdict.sentence


def test_damage_that_all_layers_of_a_role_share_is_the_roles():
    guilty = [one for one in CELLS if one.role == "weight"]
    verdict = autopsy(Planted(sum_of(dict.fromkeys(guilty, 0.2))), settings=Settings(most_groups=2))
    assert verdict.kind == "cause"
    assert verdict.structure == "spread"
    assert set(verdict.cells) == set(map(str, guilty))
    assert "forward.weight in 7 layers" in verdict.sentence


def test_what_does_damage_first_is_not_taken_for_what_does_it_in_the_end():
    slow = Planted(any_of(HEAD, size=0.4), later=lambda low: 1.2 * (FIRST in low))
    verdict = autopsy(slow, budget=300)
    assert str(FIRST) in verdict.cells
    assert verdict.window[1] - verdict.window[0] > 16
    assert verdict.first == (str(HEAD),)
    assert f"It began with {HEAD}." in verdict.sentence
    quick = autopsy(Planted(any_of(HEAD, size=0.4)))
    assert quick.over_run.value > 0.9
    assert "Over the whole run" in quick.sentence


def test_a_run_that_ends_weakly_damaged_has_its_proof_over_the_run_too():
    """What did the damage in a short window has faded by the end, where another cell does less of it, and still damage."""

    class Fades(Planted):
        def _losses(self, fork, start, horizon):
            after = [max(0, step - 60) for step in range(start, start + horizon)]
            fading = [(n > 0) * (HEAD in fork.low) * max(0.011, 0.09 * (1 - n / 91)) for n in after]
            growing = [0.045 * (FIRST in fork.low) * max(0, n - 40) / 100 for n in after]
            return tuple(map(sum, zip(super()._losses(fork, start, horizon), fading, growing, strict=True)))

    verdict = autopsy(Fades(any_of(), noise=1e-6))
    assert str(FIRST) in verdict.cells
    assert verdict.first == (str(HEAD),)


def test_float32_that_learns_more_at_a_slower_rate_is_not_precision():
    verdict = autopsy(Planted(lambda *_: 0.0, slower_learns=0.6))
    assert (verdict.kind, verdict.mechanism) == ("not precision", "learning rate")
    assert verdict.forks <= 3


def test_forks_stop_early_and_say_the_same():
    early, late = Planted(any_of(HEAD), onset=60), Planted(any_of(HEAD), onset=60, ignores_stop=True)
    one, other = autopsy(early), autopsy(late)
    assert (one.cells, one.kind, one.rescue) == (other.cells, other.kind, other.rescue)
    assert early.steps_taken < late.steps_taken
    assert one.forks <= 60


def test_a_fork_is_not_stopped_before_damage_that_comes_late_and_from_step_to_step():
    """A single high step of the run's own is no sign that the damage has begun, nor one low mean that it will not."""
    high = [3 + 0.3 * (-1) ** i for i in range(20)]
    twin = Yardstick((3.0,) * 40, 9.0)
    own = [*(3.0,) * 20, 3.3, *(3.0,) * 9, *(3.5,) * 10]
    search = Search(Forks(Planted(any_of(HEAD))), Settings(), lambda start, cells: {}, 9.0, Verdict("", ""))
    band = Band((0.14, 0.14), 0.01), Band((0.0, 0.0), 0.01)
    search.window = Window(0, 40, twin, Null(*band, wobble(twin.curve(own)[20:])))
    search.forks.known[search.window.fork(search.everything).key] = Outcome(tuple(own))
    rule = search._rule_at(0.05)
    late = [*(3.0,) * 20, *(high[i] - 0.05 for i in range(10)), *(3.8,) * 10]
    assert not any(rule(late[:n]) and twin.over(late[:n], 20) < 0.05 for n in range(24, 38))
    assert search._shown(0.05) == 32  # where it stays above; the first time that it is above is step 21
    assert rule.noise == search.window.null.step_noise > search.window.null.noise


def test_the_budget_ends_as_inconclusive_with_what_is_known():
    verdict = autopsy(Planted(any_of(HEAD)), budget=25)
    assert verdict.kind == "inconclusive"
    assert "50" in verdict.sentence
    assert verdict.damage is not None


def test_the_mechanism_follows_the_interventions():
    for names, expected in [
        (("exponent",), "range"),
        (("mantissa",), "resolution"),
        (("saturate",), "overflow"),
        (("fresh_scale", "exponent"), "scale"),
        (("stochastic", "nearest"), "bias of the rounding"),
    ]:
        assert autopsy(Planted(cured_by(any_of(HEAD), *names))).mechanism == expected


def test_rounding_in_one_direction_is_told_from_coarse_rounding():
    up = {"mantissa": 0.64, "nearest": 0.99, "stochastic": 0.98}  # a bit more halves the bias as well
    assert read(up, stored=False) == "bias of the rounding"
    half = {"mantissa": 0.55, "nearest": 0.42, "stochastic": 0.38, "fine_blocks": 0.61}
    assert read(half, stored=False) == "bias of the rounding"
    noisy = {"mantissa": 0.9, "nearest": 0.9}  # it rounds stochastically already: its noise is that of its grid
    assert read(noisy, stored=False) == "resolution"


def test_the_point_of_no_return_lies_before_the_end():
    verdict = autopsy(Planted(any_of(HEAD), onset=60, no_return=85))
    assert verdict.no_return == 85


def test_a_verdict_is_plain_data():
    verdict = autopsy(Planted(any_of(HEAD)))
    assert json.loads(json.dumps(verdict.as_dict()))["cells"] == [str(HEAD)]


# -- the split by itself ------------------------------------------------------------------------------------------------


def test_a_right_prior_costs_few_questions():
    asked = []

    def damaged(low):
        asked.append(low)
        return 17 in low

    assert minimal([17, *range(17), *range(18, 64)], damaged) == {17}
    assert len(asked) <= 3
    asked.clear()
    assert minimal(range(64), damaged) == {17}
    assert len(asked) <= 14


@pytest.mark.parametrize("causes", [{3}, {3, 40}, {0, 31, 63}])
def test_minimal_sets_of_monotone_damage(causes):
    assert minimal(range(64), lambda low: causes <= low) == causes


def test_a_minimal_set_of_more_members_than_are_wanted_is_given_up_before_they_are_all_found():
    asked = []

    def damaged(low):
        asked.append(low)
        return causes <= low

    causes = frozenset(range(3, 64, 4))
    assert minimal(range(64), damaged, most=2) is None
    assert len(asked) < 30
    assert minimal(range(64), damaged, most=16) == causes


def test_groups_are_disjoint_and_complete():
    found = groups(range(32), lambda low: 4 in low or {9, 20} <= low)
    assert set(found.sets) == {frozenset({4}), frozenset({9, 20})}
    assert found.complete


def test_the_key_of_a_question_depends_on_every_field():
    forks = [
        Fork(frozenset([HEAD])),
        Fork(frozenset([HEAD]), start=1),
        Fork(frozenset([HEAD]), path="twin"),
        Fork(frozenset([HEAD]), horizon=3),
        Fork(frozenset([HEAD]), draw=1),
        Fork(frozenset([HEAD]), data=1),
        Fork(frozenset([HEAD]), change="mantissa"),
        Fork(frozenset([HEAD]), changed=frozenset([HEAD])),
        Fork(frozenset([HEAD]), lr_factor=0.5),
        Fork(frozenset()),
    ]
    assert len({f.key for f in forks}) == len(forks)


@pytest.mark.parametrize(
    ("effect", "begun"),
    [
        (lambda step: 0.03 if step < 60 else 0.5, 61),  # captured every 10: somewhere in 51..60, told by the next state
        (lambda step: 0.5, 1),
        (lambda step: 0.02 * 1.3 ** (step / 10), 1),  # it grows, and was there from the first step on
        (lambda step: 0.03 if step < 60 else math.nan, 61),
        (lambda step: 0.0, 1),
        (
            lambda step: 0.2 if not step else 0.01 if step < 60 else 0.04,
            1,
        ),  # it drifts, and was larger at the first step
        (lambda step: 0.2 if not step else 0.01 if step < 60 else 0.1, 61),
    ],
    ids=["jumps", "constant", "grows", "dies", "blind", "drifts", "jumps far"],
)
def test_cells_are_at_work_from_where_their_effect_on_one_step_jumps(effect, begun):
    found = acts_from(effect, range(0, 200, 10), onset=95)
    assert begun - 10 <= found <= begun


def test_the_verdict_tells_when_its_cells_began_apart_from_when_the_loss_shows_it():
    oracle = Planted(any_of(MIDDLE), onset=120)
    oracle.moved = lambda step, cells: 0.5 if step >= 60 and MIDDLE in cells else 0.02
    verdict = autopsy(oracle)
    assert verdict.onset is not None
    assert verdict.acts_from is not None
    assert verdict.onset > 110
    assert 50 <= verdict.acts_from <= 60
    assert "At work since step" in verdict.sentence
