"""Optimizer state comes back in its own dtypes, as copies, also from optimizers that rely on torch's casting loader."""

import torch

from altgrad.training.step.state_tree import load_optimizer_state, optimizer_state
from tests.training.tiny import differing


class Keeper(torch.optim.Optimizer):
    """Keeps codes, a float64 sum and a number for each parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("codes", torch.zeros(parameter.shape, dtype=torch.uint8)).add_(3)
            state.setdefault("sum", torch.zeros(parameter.shape, dtype=torch.float64)).add_(1e-12)
            state.setdefault("step", torch.zeros(())).add_(1)
            state["count"] = state.get("count", 0) + 1


def test_state_is_restored_bit_for_bit_and_shares_nothing():
    optimizer = Keeper([torch.nn.Parameter(torch.ones(2, 3))])
    optimizer.step()
    saved = optimizer_state(optimizer)
    kept = optimizer_state(optimizer)
    for _ in range(2):
        optimizer.step()
        load_optimizer_state(optimizer, saved)
        assert not differing(optimizer_state(optimizer), kept)
    optimizer.step()
    assert not differing(saved, kept)
    state = optimizer_state(optimizer)["state"][0]
    assert (state["codes"].dtype, state["sum"].dtype) == (torch.uint8, torch.float64)
