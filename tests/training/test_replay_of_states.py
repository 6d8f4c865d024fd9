"""Replay forks a captured state without a trace, repeats the run bit for bit, and changes what it is told to."""

import pytest
import torch

from altgrad.errors import ConfigError, OptionError
from altgrad.nn import uniform
from altgrad.training.step.replay import first_difference
from altgrad.training.step.ring import CaptureRing
from tests.training.tiny import differing, tiny_trainer, train

MODES = {
    "nearest": {"fp8_format": "E4M3"},
    "stochastic": {"fp8_format": "E4M3", "rounding": "stochastic"},
    "delayed": {"fp8_format": "E4M3", "scaling": "delayed"},
    "grid": {"fp8_format": "E3M4", "weight_storage": "grid"},
    "grid stochastic": {"fp8_format": "E3M4", "weight_storage": "grid", "storage_rounding": "stochastic"},
    "blocks": {"fp8_format": "MXFP8"},
    "monitored": {"fp8_format": "E4M3", "monitor": {"enabled": True, "interval": 2}},
    "clipped": {"fp8_format": "E5M2", "enable_partition_clipping": True},
    "float32": {},
}


def losses(records):
    return [record.loss for record in records]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_changed_repeats_the_run_and_leaves_no_trace(mode):
    trainer = tiny_trainer(**MODES[mode])
    train(trainer, 3)
    state = trainer.capture()
    own = train(trainer, 6)
    before = trainer.capture()
    replayed = trainer.replay(state, 6)
    assert losses(replayed) == losses(own)
    assert [r.grad_norm for r in replayed] == [r.grad_norm for r in own]
    assert differing(before, trainer.capture()) == []
    alone = tiny_trainer(**MODES[mode])
    train(alone, 9)
    assert losses(train(trainer, 2)) == losses(train(alone, 2))


def test_each_argument_changes_what_it_says():
    trainer = tiny_trainer(fp8_format="E4M3", rounding="stochastic")
    train(trainer, 3)
    state = trainer.capture()
    own = losses(trainer.replay(state, 4))
    assert losses(trainer.replay(state, 4, rounding_seed=99)) != own
    assert losses(trainer.replay(state, 4, data_seed=99)) != own
    assert losses(trainer.replay(state, 4, recipe=uniform("E5M2"))) != own
    slow = trainer.replay(state, 4, schedule=lambda step: 1e-5 * step)
    assert [r.lr for r in slow] == [1e-5 * step for step in (4, 5, 6, 7)]
    assert losses(trainer.replay(state, 4)) == own


def test_a_replay_goes_beyond_the_last_step():
    trainer = tiny_trainer(fp8_format="E4M3")
    records = trainer.replay(trainer.capture(), 35)
    assert [r.step for r in records] == list(range(1, 36))


def test_a_replay_of_no_steps_is_refused():
    trainer = tiny_trainer()
    with pytest.raises(ConfigError, match="at least 1"):
        trainer.replay(trainer.capture(), 0)


def test_the_first_difference_of_two_states_is_named():
    trainer = tiny_trainer(fp8_format="E4M3")
    train(trainer, 2)
    a, b = trainer.capture(), trainer.capture()
    assert first_difference(a, b) is None
    name = list(b["model"])[3]
    b["model"][name].flatten()[0] += 1
    assert first_difference(a, b) == f"model.{name}"
    assert first_difference({"x": [1, float("nan")]}, {"x": [1, float("nan")]}) is None
    assert first_difference({"x": 0.0, "y": 1}, {"x": 0.0}) == "y"


# -- the ring -----------------------------------------------------------------------------------------------------------


def state(megabytes=1):
    return {"w": torch.zeros(megabytes * 2**18)}


def test_the_ring_is_bounded_and_log_spaced():
    ring = CaptureRing(every=1, limit_bytes=12 * 2**20)
    for step in range(1001):
        ring.keep(step, state())
        assert ring.bytes <= 12 * 2**20
    steps = ring.steps
    assert steps[0] == 0
    assert steps[-1] == 1000
    ages = [1000 - s for s in steps]
    assert sum(age < 10 for age in ages) >= 3
    assert sum(10 <= age < 100 for age in ages) >= 3
    assert sum(age >= 100 for age in ages) >= 3
    assert ring.before(999) in steps
    assert ring.before(-1) is None


def test_going_back_drops_what_is_taken_anew():
    ring = CaptureRing(every=5)
    for step in (0, 5, 10, 15):
        ring.keep(step, state())
    ring.keep(5, state())
    assert ring.steps == [0, 5]


def test_one_state_is_kept_even_where_none_fits():
    ring = CaptureRing(limit_bytes=1)
    ring.keep(0, state())
    ring.keep(10, state())
    assert ring.steps == [10]
    with pytest.raises(OptionError, match="at least 1"):
        CaptureRing(every=0)
