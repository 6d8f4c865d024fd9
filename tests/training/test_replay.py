"""State is complete: capture, go on, restore, go on again, and every bit is the same, whatever the formats."""

import pytest
import torch

from altgrad.optim import OPTIMIZERS
from altgrad.quantization import Rounding
from altgrad.training.run.checkpoint import load_checkpoint, save_checkpoint
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
    "clipping": ["fp8_format=E5M2", "scaling=none", "enable_partition_clipping=true", "clipping.overflow_threshold=0"],
    "shift": ["fp8_format=E7M0", "weight_storage=grid", "enable_emergency_shift=true", "shift.stall_patience=2"],
    "gpt2": [*GRID, "model.style=gpt2"],
    "block-format": ["fp8_format=MXFP8"],
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
