"""Schedules: what people write, and which steps and layers it means."""

import pytest

from altgrad.errors import ConfigError
from altgrad.monitor import GROUPS, Schedule, When, make_schedule


def test_default_measures_everything_but_the_costly_groups():
    schedule = make_schedule()
    assert schedule.due(1) == set(GROUPS) - {"reference"}
    assert schedule.due(2) == set(GROUPS) - {"reference", "rank"}


def test_a_number_spaces_all_groups():
    schedule = make_schedule(10)
    assert [step for step in range(1, 40) if "stall" in schedule.due(step)] == [1, 11, 21, 31]


def test_groups_follow_default_unless_named():
    schedule = make_schedule({"default": 0, "stall": 1, "rank": {"every": 5, "window": [10, 30], "layers": "head"}})
    assert schedule.due(3) == {"stall"}
    assert [step for step in range(1, 60) if "rank" in schedule.due(step)] == [11, 16, 21, 26]
    assert schedule.groups["rank"].covers("lm_head")
    assert not schedule.groups["rank"].covers("blocks.0.mlp")
    assert schedule.groups["norms"] == When(every=0)


def test_an_open_window():
    assert [s for s in range(1, 9) if When(every=2, window=(4, None)).due(s)] == [5, 7]


def test_a_schedule_is_taken_as_it_is():
    schedule = Schedule({"stall": When()})
    assert make_schedule(schedule) is schedule


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"stal": 1}, "unknown group 'stal'"),
        ({"stall": "often"}, "'often' is not a number of steps"),
        ({"stall": {"evry": 1}}, "evry"),
        ({"stall": {"window": [5, 2]}}, r"\[5, 2\] is empty"),
        ({"stall": {"window": 5}}, "window 5"),
        ({"stall": {"layers": "("}}, "not a regular expression"),
        ({"stall": -1}, "-1 is not a number of steps"),
    ],
)
def test_wrong_schedules_are_refused(plan, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(plan)
