"""Optimizers that other libraries wrapped: the monitor and the storage attach to the one inside."""

import pytest
import torch

from altgrad import nn as qnn
from altgrad.errors import OptionError
from altgrad.monitor import Monitor
from altgrad.nn.model.optimizer_hook import bare_optimizer
from tests.monitor.test_monitor import built, loss_of


class Accelerated(torch.optim.Optimizer):
    """As accelerate.optimizer.AcceleratedOptimizer: a subclass that never initialises its base and passes calls on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Passing:
    """As Lightning's: no optimizer itself, but has one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        return self.optimizer.step()


def trained(wrap):
    model = built()
    qnn.quantize_model(model, qnn.uniform("E3M4", storage="grid"))
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=3e-3))
    handle = qnn.attach_optimizer(model, optimizer)
    records = []
    monitor = Monitor(model, optimizer, handle=handle, schedule={"rank": 0}, sink=records.extend)
    for step in range(1, 4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    monitor.close()
    return model, handle.totals(), records


@pytest.mark.parametrize("wrap", [Accelerated, Passing, lambda o: Accelerated(Accelerated(o))])
def test_a_wrapped_optimizer_is_unwrapped(wrap):
    bare, counts, records = trained(lambda optimizer: optimizer)
    model, wrapped_counts, wrapped_records = trained(wrap)
    assert wrapped_records == records
    assert {r["step"] for r in records} == {1, 2, 3}
    assert wrapped_counts == counts
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))


def test_an_optimizer_with_hooks_of_its_own_stays_even_if_it_holds_another():
    class Lookahead(torch.optim.SGD):
        pass

    model = built()
    outer = Lookahead(model.parameters(), lr=0.1)
    outer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert bare_optimizer(outer) is outer


def test_what_is_no_optimizer_is_refused():
    model = built()
    for attach in (lambda o: qnn.attach_optimizer(model, o), lambda o: Monitor(model, o)):
        with pytest.raises(OptionError, match=r"list is no torch\.optim\.Optimizer"):
            attach([])
