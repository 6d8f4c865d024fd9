"""State is complete: capture, go on, restore or fork, go on again, and every bit is the same, whatever the formats."""

import pytest
import torch

from altgrad.errors import ConfigError, OptionError
from altgrad.loop.states import CaptureRing
from altgrad.nn import recipe, uniform
from altgrad.optim import OPTIMIZERS
from altgrad.quantization import Rounding
from altgrad.training.run.checkpoint import load_checkpoint, save_checkpoint
from altgrad.training.step.replay import first_difference
from tests.training.tiny import differing, tiny_trainer, train

GRID = ["fp8_format=E3M4", "weight_storage=grid"]
POWERS = ["fp8_format=E7M0", "weight_storage=grid"]  # the one grid that lns_madam steps along
MASTER = ["fp8_format=E3M4", "weight_storage=master"]
CASES = {
    "fp32": ["fp8_format=FP32"],
    **{
        f"{s}-{r.value}": [*o, f"rounding={r.value}"] for s, o in (("grid", GRID), ("master", MASTER)) for r in Rounding
    },
    **{f"fp32-{name}": [f"optimizer.name={name}"] for name in OPTIMIZERS},
    **{f"grid-stochastic-{name}": [*GRID, "rounding=stochastic", f"optimizer.name={name}"] for name in OPTIMIZERS},
    "grid-stochastic-lns_madam": [*POWERS, "rounding=stochastic", "optimizer.name=lns_madam"],
    "delayed": [*MASTER, "scaling=delayed"],
    "delayed-grid": [*GRID, "scaling=delayed"],
    "unscaled-grid": ["fp8_format=E5M2", "weight_storage=grid", "scaling=none"],
    "accumulation": [*MASTER, "rounding=stochastic", "data.grad_accumulation=2"],
    "clipping": ["fp8_format=E0M7", "scaling=none", "enable_partition_clipping=true"],
    "shift": ["fp8_format=E7M0", "weight_storage=grid", "enable_emergency_shift=true", "shift.stall_patience=2"],
    "resets": ["optimizer.reset_every=3"],
    "reset of second moments": [
        *["optimizer.name=sr_adamw", "optimizer.reset_every=3", "optimizer.reset_moments=second"],
        "optimizer.options={moment_format: BF16, moment_rounding: stochastic}",
    ],
    "noisy lmd": ["optimizer.name=lmd", "optimizer.options={noise: 0.1}"],
    "gpt2": [*GRID, "model.style=gpt2"],
    "block-format": ["fp8_format=MXFP8"],
    **{
        name: [f"formats={name}", "data.grad_accumulation=2"]
        for name in ("te_delayed", "msamp_o2", "tetrajet_v2", "quartet")
    },
    "tetrajet_q_ema": [
        "formats='" + recipe("tetrajet_q_ema").text.replace("start=10", "start=3").replace("'", "''") + "'"
    ],
}


def options(case: str) -> list[str]:
    small_steps = [] if "-" not in case else ["optimizer.lr=0.003"]
    return ["model.n_embd=32", *small_steps, *CASES[case]]


@pytest.mark.parametrize("case", CASES)
def test_a_captured_state_replays_bit_for_bit(case, tmp_path):
    trainer = tiny_trainer(*options(case))
    train(trainer, 4)
    state = trainer.capture()
    first = train(trainer, 4)
    end = trainer.capture()
    assert differing(state["model"], end["model"]), "nothing was trained"

    trainer.restore(state)  # the same trainer, in memory
    assert not differing(trainer.capture(), state)
    assert train(trainer, 4) == first
    assert not differing(trainer.capture(), end)

    other = tiny_trainer(*options(case))  # another trainer, through a file, with other steps behind it
    train(other, 1)
    other.restore(load_checkpoint(save_checkpoint(tmp_path, 4, state)).state)
    assert train(other, 4) == first
    assert not differing(other.capture(), end)


def test_what_is_captured_shares_nothing_with_the_trainer():
    trainer = tiny_trainer(*GRID, "rounding=stochastic")
    train(trainer, 2)
    state = trainer.capture()
    again = trainer.capture()
    train(trainer, 2)
    trainer.restore(state)
    train(trainer, 2)
    assert not differing(state, again)


def test_evaluation_consumes_nothing_of_trainings_randomness():
    options = [*GRID, "rounding=stochastic", "scaling=delayed"]
    plain, watched = tiny_trainer(*options), tiny_trainer(*options)
    first = train(plain, 6)
    second = []
    for _ in range(6):
        before = watched.capture()
        assert watched.evaluate() == watched.evaluate()
        assert not differing(before, watched.capture())
        second += train(watched, 1)
    assert first == second


def test_a_step_leaves_torchs_generators_alone():
    trainer = tiny_trainer(*GRID, "rounding=stochastic")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(trainer, 2)
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_different_seeds_differ():
    assert train(tiny_trainer(seed=1), 2) != train(tiny_trainer(seed=2), 2)


def test_a_restored_run_rewinds_to_the_state_that_the_unbroken_one_did():
    options = [*CASES["shift"], "shift.stall_threshold=1.0", "shift.snapshot_interval=4"]
    unbroken, other = tiny_trainer(*options), tiny_trainer(*options)
    train(unbroken, 6)
    other.restore(unbroken.capture())
    outcomes = []
    for trainer in (unbroken, other):
        trainer.model.head.weight.data[0, 0] = torch.nan
        records = train(trainer, 6)
        assert [e["rewound_to"] for r in records for e in r.events if e["event"] == "shift"] == [4]
        outcomes.append(repr(records))  # NaN losses are equal as text
    assert outcomes[0] == outcomes[1]
    assert not differing(unbroken.capture(), other.capture())


CLIPPED = {"fp8_format": "E0M7", "scaling": "none", "enable_partition_clipping": True}
MODES = {
    "nearest": {"fp8_format": "E4M3"},
    "stochastic": {"fp8_format": "E4M3", "rounding": "stochastic"},
    "delayed": {"fp8_format": "E4M3", "scaling": "delayed"},
    "grid": {"fp8_format": "E3M4", "weight_storage": "grid"},
    "grid stochastic": {"fp8_format": "E3M4", "weight_storage": "grid", "storage_rounding": "stochastic"},
    "blocks": {"fp8_format": "MXFP8"},
    "monitored": {"fp8_format": "E4M3", "monitor": {"enabled": True, "interval": 2}},
    "clipped": CLIPPED,
    "clipped, monitored": {**CLIPPED, "monitor": {"enabled": True, "interval": 2}},
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
    assert [r.events for r in replayed] == [r.events for r in own]
    assert any(e["event"] == "clip" for r in own for e in r.events) == ("clipped" in mode)
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
