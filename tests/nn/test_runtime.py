"""Quantized models under checkpointing, autocast, DDP, compile, copies and files; and what their layers publish."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from altgrad.nn import (
    attach_optimizer,
    full_precision,
    quant_state,
    quantize_model,
    set_amax_reduction,
    set_observer,
    set_step,
    uniform,
)
from altgrad.nn.layer.operand import Operand
from altgrad.nn.session import STATE, sessions_of
from altgrad.quantization import amax_scale, get_format, ops, quantize_with_stats
from altgrad.quantization.stats import SUM_ERROR
from altgrad.training.model import GPT, GPTConfig

RECIPES = {
    "amax": uniform("E4M3", grad="E5M2"),
    "stochastic": uniform("E4M3", rounding="stochastic"),
    "delayed": uniform("E4M3", scaling="delayed"),
    "MXFP8": uniform("MXFP8"),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


class Net(nn.Module):
    def __init__(self, recompute=False, reentrant=False):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.last = nn.Linear(64, 32)
        self.recompute, self.reentrant = recompute, reentrant

    def body(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant) if self.recompute else self.body(x)


def batch(n=32, seed=0):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def train(model, steps=3, optimizer=None, **forward):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        x = batch(seed=step)
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@each_recipe
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_recomputation_reuses_bits_and_leaves_no_second_trace(recipe, reentrant):
    plain, recomputed = Net(), Net(recompute=True, reentrant=reentrant)
    for model in (plain, recomputed):
        quantize_model(model, recipe)
        attach_optimizer(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
        model.optimizer = optimizer
    x = batch().requires_grad_()
    for model in (plain, recomputed):
        for _ in range(3):
            model(x).square().mean().backward()
            model.optimizer.step()
    assert same_bits(plain, recomputed)
    first, second = quant_state(plain)["operands"], quant_state(recomputed)["operands"]
    assert first.keys() == second.keys()
    for layer in first:
        for operand in first[layer]:
            assert torch.equal(first[layer][operand]["window"], second[layer][operand]["window"])


@each_recipe
def test_autocast_gives_bf16_outputs_and_float32_gradients(recipe):
    model = Net()
    quantize_model(model, recipe)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(batch())
        loss = y.float().square().mean()
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_autocast_quantizes_the_float32_weight_itself():
    model = Net().first
    weight, x = model.weight.detach().clone(), batch()
    quantize_model(model, uniform("E3M4", scaling="none", activation=None))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    from altgrad.quantization import quantize

    expected = x @ quantize(weight, "E3M4").t() + model.bias
    torch.testing.assert_close(y.float(), expected, rtol=2.0**-7, atol=2e-2)


@each_recipe
def test_deepcopy_and_pickle_train_on_like_the_original(recipe):
    model = Net()
    quantize_model(model, recipe)
    train(model, 2)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    train(model, 3)
    for other in copies:
        assert other.first.__dict__[STATE].session is other.last.__dict__[STATE].session
        assert not same_bits(model, other)
        train(other, 3)
        assert same_bits(model, other)


def test_state_dict_and_safetensors_are_those_of_the_plain_model(tmp_path):
    plain, model = Net(), Net()
    quantize_model(model, uniform("E4M3"))
    assert list(model.state_dict()) == list(plain.state_dict())
    train(model, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same_bits(model, plain)
    other = Net()
    quantize_model(other, uniform("E4M3"))
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(batch()), model(batch()))


@each_recipe
def test_accumulated_micro_batches_make_one_step(recipe):
    model = Net()
    quantize_model(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_optimizer(model, optimizer)
    single = []
    for micro in range(2):
        set_step(model, 5, micro)
        gradients = torch.autograd.grad(model(batch(seed=micro)).square().mean(), list(model.parameters()))
        single.append(gradients)
    for micro in range(2):
        set_step(model, 5, micro)
        model(batch(seed=micro)).square().mean().backward()
    for p, a, b in zip(model.parameters(), *single, strict=True):
        assert torch.equal(p.grad, a + b)
    optimizer.step()
    state = quant_state(model)
    assert state["clocks"][0]["step"] == 6
    for operands in state["operands"].values():
        for memory in operands.values():
            assert memory["window"].shape == (1,)  # one amax for the step, not one for each micro-batch


def test_stochastic_bits_are_functions_of_step_and_micro_batch():
    model = Net().first
    quantize_model(model, uniform("E2M5", rounding="stochastic"), seed=1)
    x = batch()
    outputs = {}
    for place in ((0, 0), (0, 1), (1, 0), (0, 0)):
        set_step(model, *place)
        for use in range(2):
            y = model(x)
            assert torch.equal(outputs.setdefault((*place, use), y), y)
    for i, one in enumerate(outputs.values()):
        assert not any(torch.equal(one, other) for other in [*outputs.values()][:i])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("name", ["amax", "stochastic", "delayed", "MXFP8"])
def test_compile_in_one_graph_gives_the_eager_bits(name):
    torch._dynamo.reset()
    eager, model = Net(), Net()
    for one in (eager, model):
        quantize_model(one, RECIPES[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch()
    for step in range(2):
        outputs = []
        for one, call in ((eager, eager), (model, compiled)):
            set_step(one, step)
            y = call(x)
            y.square().mean().backward()
            outputs.append(y)
        assert torch.equal(*outputs)
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("name", ["amax", "delayed"])
def test_a_model_is_compiled_once_as_a_whole_and_goes_on_as_the_eager_one(name):
    from torch._dynamo.testing import CompileCounterWithBackend  # long to import, by each rank too

    torch._dynamo.reset()
    config = GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32, block_size=16, style="gpt2")
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    counter, losses = CompileCounterWithBackend("aot_eager"), []

    def train(compiles: bool, model: nn.Module, steps: int) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach_optimizer(model, optimizer)
        call = torch.compile(model, fullgraph=True, backend=counter) if compiles else model
        for _ in range(steps):
            _, loss = call(tokens, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return remembered(model)

    def remembered(model: nn.Module) -> list[torch.Tensor]:
        return [
            o.window.clone() for o in sessions_of(model)[0].operands if isinstance(o, Operand) and o.window is not None
        ]

    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = GPT(config)
        quantize_model(model, RECIPES[name])
        found.append(train(compiles, model, 4))
    assert counter.frame_count == 1
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
    assert len(found[0]) == len(found[1])
    assert bool(found[0]) == (name == "delayed")
    train(True, copy.deepcopy(model), 1)  # a copy's histories are its own
    assert all(map(torch.equal, found[1], remembered(model)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-6)


def _ddp_worker(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/ranks", rank=rank, world_size=2)
    model = Net()
    quantize_model(model, uniform("E4M3", rounding="stochastic", storage="grid"))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach_optimizer(wrapped, optimizer)
    gradients = []
    for step in range(3):
        optimizer.zero_grad()
        wrapped(batch(seed=10 * step + rank)).square().mean().backward()
        gradients.append(model.first.weight.grad.clone())
        optimizer.step()
    torch.save({"model": model.state_dict(), "gradients": gradients}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_keeps_two_ranks_on_the_same_weights(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for a, b in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(a, b)
    initial = Net()
    quantize_model(initial, uniform("E4M3", storage="grid"))
    assert not torch.equal(first["model"]["first.weight"], initial.first.weight)


def test_ranks_draw_different_bits_for_activations_and_equal_ones_for_weights():
    from altgrad.nn import set_rank

    model = Net().first
    quantize_model(model, uniform("E2M5", rounding="stochastic", activation=None))
    by_rank = []
    for rank in (0, 1):
        set_rank(model, rank)
        by_rank.append(model(batch()))
    assert torch.equal(*by_rank)  # only the weight is rounded in the forward
    model = Net().first
    quantize_model(model, uniform("E2M5", rounding="stochastic", weight=None))
    by_rank = []
    for rank in (0, 1):
        set_rank(model, rank)
        by_rank.append(model(batch()))
    assert not torch.equal(*by_rank)


class Seen:
    def __init__(self):
        self.calls = []

    def observe(self, *, layer, role, gemm, stats, scale, fmt):
        self.calls.append((layer, role, gemm, stats, scale, fmt))

    def observe_update(self, **_):
        raise AssertionError("no grid here")

    def places(self):
        return [call[:3] for call in self.calls]


def model_and_observer(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    quantize_model(model, recipe)
    set_observer(model, seen := Seen())
    return model, seen


def test_statistics_are_those_of_the_quantization():
    model, seen = model_and_observer(uniform("E4M3", grad="E5M2"))
    x = torch.randn(32, 32)
    model(x).sum().backward()
    assert seen.places() == [
        ("0", "input", "forward"),
        ("0", "weight", "forward"),
        ("1", "input", "forward"),
        ("1", "weight", "forward"),
        ("1", "grad_output", "input_grad"),
        ("0", "grad_output", "input_grad"),  # one entry serves both gradients and has the name of the first
    ]
    _, _, _, stats, scale, fmt = seen.calls[0]
    expected = quantize_with_stats(x, "E4M3", amax_scale(x, get_format("E4M3")), clamp=True, overflow="saturate")[1]
    assert torch.equal(stats.vector[:5], expected.vector[:5])  # amax and the counts are exact
    torch.testing.assert_close(stats.vector[5:], expected.vector[5:], rtol=2 * SUM_ERROR, atol=0)
    assert float(scale) == float(amax_scale(x, get_format("E4M3")))
    assert fmt.name == "E4M3"


def test_observed_steps_have_the_bits_of_unobserved_ones():
    x, results = torch.randn(32, 32), []
    for observed in (True, False):
        for name in ("E4M3", "E3M4", "MXFP8", "BF16"):
            model, seen = model_and_observer(uniform(name))
            set_observer(model, seen if observed else None)
            y = model(x)
            y.square().sum().backward()
            assert bool(seen.calls) == observed
            results.append((y.detach(), model[0].weight.grad))
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_block_formats_publish_each_axis():
    model, seen = model_and_observer(uniform("MXFP8"))
    model(torch.randn(32, 32).requires_grad_()).sum().backward()
    first = [place[1:] for place in seen.places() if place[0] == "0"]
    assert first == [
        ("input", "forward"),
        ("weight", "forward"),
        ("input", "weight_grad"),
        ("weight", "input_grad"),
        ("grad_output", "input_grad"),
        ("grad_output", "weight_grad"),
    ]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["E4M3", "E0M7", "MXFP8"])
def test_a_checkpointed_layer_is_observed_where_codes_are_multiplied_too(name, reentrant):
    """What is recomputed keeps what the observed forward kept; reentrant checkpoints publish gradients alone."""
    model, seen = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), Seen()
    quantize_model(model, uniform(name))
    set_observer(model, seen)
    x, roles = torch.randn(128, 64).requires_grad_(), []
    for recompute in (True, False):
        seen.calls.clear()
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        roles.append(sorted(place for place in seen.places() if place[1] == "grad_output" or not reentrant))
        assert recompute is False or len(roles[0]) == len(seen.calls)
    assert roles[0] == roles[1]


def test_recomputation_evaluation_and_full_precision_publish_nothing():
    model, seen = model_and_observer(uniform("E4M3"))
    x = torch.randn(32, 32).requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert len(seen.calls) == len(set(seen.places())) == 6
    seen.calls.clear()
    model.eval()(x)
    model.train()
    with torch.no_grad():
        model(x)
    with full_precision(model):
        y = model(x)
        y.sum().backward()
    assert seen.calls == []
    plain = model[1].weight @ (model[0].weight @ x.t() + model[0].bias[:, None]) + model[1].bias[:, None]
    torch.testing.assert_close(y, plain.t())


def test_without_an_observer_no_statistic_is_computed(monkeypatch):
    model, _ = model_and_observer(uniform("E4M3"))
    set_observer(model, None)

    def fail(*_, **__):
        raise AssertionError("statistics were computed")

    for name in ("quantize_with_stats", "encode_with_stats", "quantize_and_encode_with_stats"):
        monkeypatch.setattr(ops, name, fail)
    model(torch.randn(32, 32)).sum().backward()


@pytest.mark.parametrize(
    ("scaling", "times"), [("amax", 3), ({"policy": "amax", "axis": 0}, 0), ({"policy": "amax", "axis": 1}, 3)]
)
def test_amax_reduction_meets_inputs_and_gradients_of_shared_scales_only(scaling, times):
    model, seen = model_and_observer(uniform("E4M3", scaling=scaling))
    calls = []
    set_amax_reduction(model, lambda amax: calls.append(amax) or amax * 2)
    x = torch.randn(32, 32)
    model(x).sum().backward()
    assert len(calls) == (4 if times else 0)
    scale = next(call[4] for call in seen.calls if call[:2] == ("0", "input"))
    expected = amax_scale(x, get_format("E4M3"), axis=scaling["axis"] if isinstance(scaling, dict) else None)
    assert torch.equal(torch.as_tensor(scale), expected * 2 if times else expected)
