"""The monitor on what other people bring: wrapped and compiled models, foreign layers, sparse gradients, closures, order."""

import copy
import gc
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from altgrad import nn as qnn
from altgrad.errors import FormatError, OptionError
from altgrad.monitor import Monitor
from altgrad.nn.model.optimizer_hook import bare_optimizer
from altgrad.quantization import amax_scale, get_format, quantize_with_stats
from tests.monitor.test_monitor import built, loss_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(torch.relu(self.up(x)))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, steps=3, x=X):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def watched(model, steps=3, x=X, parameters=None, **options):
    optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=1e-2)
    records = []
    monitor = Monitor(model, optimizer, sink=records.extend, **options)
    train(model, optimizer, steps, x)
    monitor.close()
    return records


def of(records, layer, role, statistic):
    """The values over the steps of one statistic."""
    return [r[statistic] for r in records if (r["layer"], r["role"]) == (layer, role) and statistic in r]


@pytest.fixture
def one_rank():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")  # dynamo's
@pytest.mark.parametrize(
    ("wrap", "storage"),
    [
        (DistributedDataParallel, None),
        (DistributedDataParallel, "master"),
        (DistributedDataParallel, "grid"),
        (lambda model: torch.compile(model, backend="eager"), "grid"),
    ],
    ids=["ddp", "ddp-master", "ddp-grid", "compile-grid"],
)
def test_a_wrapped_model_is_recorded_as_the_bare_one(wrap, storage, one_rank):
    def made():
        model = Net()
        if storage is not None:
            qnn.quantize_model(model, qnn.uniform("E4M3", storage=storage))
        return model

    options = {"format": "E4M3"} if storage is None else {}
    bare, wrapped = watched(made(), **options), watched(wrap(made()), **options)
    strip = [{k: v for k, v in r.items() if k != "rank_seconds"} for r in bare]
    assert {r["layer"] for r in wrapped} == {"up", "up.bias", "head", "head.bias"}
    assert sorted(map(repr, strip)) == sorted(
        repr({k: v for k, v in r.items() if k != "rank_seconds"}) for r in wrapped
    )


@pytest.mark.parametrize("attach", ["before", "after", "by itself"])
def test_grid_storage_may_be_attached_before_or_after_or_by_itself(attach):
    """An update counts to its own step, as stall, whoever hooked the optimizer first."""
    model = Net()
    qnn.quantize_model(model, qnn.uniform("E4M3", storage="grid"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    records, stalled = [], []
    if attach == "before":
        qnn.attach_optimizer(model, optimizer)
    monitor = Monitor(model, optimizer, sink=records.extend)
    if attach == "after":
        qnn.attach_optimizer(model, optimizer)
    codes = model.up.weight.detach().clone()
    for _ in range(3):
        train(model, optimizer, 1)
        stalled.append(int((model.up.weight.detach() == codes).sum()))
        codes = model.up.weight.detach().clone()
    monitor.close()
    assert of(records, "up", "update", "stall") == pytest.approx([n / 128 for n in stalled], abs=0.05)
    assert of(records, "up", "update", "flips") == [128 - n for n in stalled]
    assert not of(records, "up", "update", "code_unchanged")


def test_shadow_weights_are_measured_as_operands():
    model = Net()
    weight = model.up.weight.detach().clone()
    records = watched(model, 1, format="E3M4")
    fmt = get_format("E3M4")
    stats = quantize_with_stats(weight, fmt, amax_scale(weight, fmt), clamp=True)[1]
    assert of(records, "up", "weight", "sqnr_db") == pytest.approx([float(stats.sqnr_db)])
    assert of(records, "up", "weight", "underflow") == [float(stats.underflow_rate)]


def test_layers_of_hugging_face_and_subclasses_are_seen():
    from transformers.pytorch_utils import Conv1D as conv1d

    class Scaled(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    records = watched(nn.Sequential(conv1d(16, 8), Scaled(16, 4)), 1, format="E4M3")
    for layer in ("0", "1"):
        assert of(records, layer, "input", "sqnr_db")
        assert of(records, layer, "grad_output", "sqnr_db")


def test_a_single_layer_is_called_model():
    records = watched(nn.Linear(8, 4), 1, format="E4M3")
    assert {r["layer"] for r in records} == {"model", "bias"}


def test_a_weight_shared_with_an_unquantized_layer_is_measured_on_its_grid():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    model = Tied()
    qnn.quantize_model(model, qnn.uniform("E4M3"), include=["head"])
    records = watched(model, 1, x=torch.tensor([1, 2, 3]))
    assert of(records, "embedding", "update", "code_unchanged")


def test_sparse_gradients_are_measured_as_dense_ones():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 4))
        optimizer, records = torch.optim.SGD(model.parameters(), lr=0.1), []
        monitor = Monitor(model, optimizer, sink=records.extend, schedule={"default": 1, "rank": 0})
        train(model, optimizer, 1, torch.tensor([1, 1, 7]))
        monitor.close()
        found.append(records)
    assert found[0] == found[1]
    assert of(found[1], "0", "gradient", "zero_frac") == [0.8]


def test_empty_layers_and_layers_without_gradients():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 4), nn.Linear(3, 3)
            self.empty = nn.Parameter(torch.zeros(0, 3))

        def forward(self, x):
            return self.used(x) + self.empty.sum()

    records = watched(Odd(), 1, format="E4M3")
    assert of(records, "used", "update", "attempted") == [32]
    assert not of(records, "unused", "update", "attempted")
    assert not of(records, "unused", "gradient", "zero_frac")


def test_a_closure_computes_its_gradients_within_the_step():
    model = Net()
    optimizer, records = torch.optim.LBFGS(model.parameters(), max_iter=2), []
    monitor = Monitor(model, optimizer, sink=records.extend)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    before = model.up.weight.detach().clone()
    optimizer.step(closure)
    monitor.close()
    moved = (model.up.weight.detach() - before).norm()
    assert of(records, "up", "update", "l2") == pytest.approx([float(moved)], rel=1e-6)


@pytest.mark.parametrize("name", ["MXFP8", "E8M0"])
def test_formats_without_a_grid_are_refused_where_there_is_none(name):
    with pytest.raises(FormatError, match="element format"):
        Monitor(Net(), format=name)


def test_layers_in_a_block_format_are_measured_in_it():
    model = nn.Sequential(nn.Linear(32, 64))
    qnn.quantize_model(model, qnn.uniform("MXFP8"))
    records = watched(model, 1, torch.ones(32, 32), format="MXFP8")
    assert {r["format"] for r in records if r["role"] in ("input", "grad_output")} == {"MXFP8"}


def test_a_monitor_that_nobody_kept_leaves_no_hooks_behind():
    model = nn.Sequential(nn.LayerNorm(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    gc.collect()
    count = len(hooks)
    Monitor(model, optimizer)
    gc.collect()
    assert len(hooks) == count
    train(model, optimizer, 1)


def test_a_second_monitor_gives_the_layers_back():
    model = Net()
    qnn.quantize_model(model, qnn.uniform("E4M3"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = [], []
    outer = Monitor(model, optimizer, sink=first.extend)
    inner = Monitor(model, optimizer, sink=second.extend)
    train(model, optimizer, 1)
    inner.close()
    train(model, optimizer, 1)
    outer.close()
    assert of(second, "up", "input", "amax")
    assert len(of(first, "up", "input", "amax")) == 1


def test_copies_of_a_watched_model_can_be_made():
    model = Net()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), format="E4M3")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    monitor.close()


def test_without_a_format_no_quantization_is_reported():
    model = Net()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(X).sum().backward()
    assert monitor.overflow_rate() is None
    monitor.close()
    (record,) = [r for r in watched(model, 1) if (r["layer"], r["role"]) == ("up", "input")]
    assert record["amax"] == float(X.abs().max())
    assert record["nonfinite_frac"] == 0.0
    assert not {"overflow", "underflow", "sqnr_db", "scale"} & set(record)


def test_of_nan_alone_nothing_overflows():
    model = Net()
    records = watched(model, 1, torch.full_like(X, torch.nan), format="E4M3")
    (record,) = [r for r in records if (r["layer"], r["role"]) == ("up", "input")]
    assert record["nonfinite_frac"] == 1.0
    assert not {"overflow", "underflow", "amax", "sqnr_db"} & set(record)


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
