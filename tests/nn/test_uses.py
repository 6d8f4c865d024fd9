"""Each use of a layer in a step draws its own random bits; recomputation and replay repeat them, evaluation draws none."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from altgrad.formats.rounding import Rounding
from altgrad.nn import (
    GemmRecipe,
    LayerRecipe,
    OperandSpec,
    Recipe,
    attach_optimizer,
    change_format,
    functional,
    layer_recipe,
    load_quant_state,
    quant_state,
    quantize_model,
    set_step,
    uniform,
)
from altgrad.nn.recipe.scaling_choice import CurrentScaling

STOCHASTIC = uniform("E3M4", rounding="stochastic")


def made(model=None, recipe=STOCHASTIC):
    torch.manual_seed(5)
    model = nn.Linear(16, 16) if model is None else model
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    quantize_model(model, recipe, seed=1)
    return model


def batch(*shape, seed=0):
    return torch.randn(*(shape or (8, 16)), generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "linear": (lambda: nn.Linear(16, 16), STOCHASTIC, batch()),
    "conv": (lambda: nn.Conv2d(4, 4, 3), STOCHASTIC, batch(2, 4, 6, 6)),
    "embedding": (lambda: nn.Embedding(32, 16), STOCHASTIC, torch.arange(8)),
    "blocks": (lambda: nn.Linear(16, 16), uniform("MXFP8", rounding="stochastic"), batch()),
}


@pytest.mark.parametrize(("layer", "recipe", "x"), LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_called_twice_draws_twice(layer, recipe, x):
    model = made(layer(), recipe)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    set_step(model, 0)
    assert torch.equal(model(x), first)
    assert torch.equal(model(x), second)


def test_a_norm_called_twice_draws_twice():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    nn.init.uniform_(model[1].weight)
    recipe = replace(
        layer_recipe(None), norm_weight=OperandSpec("E2M3", rounding=Rounding.STOCHASTIC, scaling=CurrentScaling())
    )
    quantize_model(model, Recipe(recipe), seed=1)
    assert not torch.equal(model[1](batch()), model[1](batch()))


def test_the_backward_of_a_use_draws_with_the_index_of_its_forward():
    w, dy = OperandSpec("E4M3"), OperandSpec("E5M2", rounding=Rounding.STOCHASTIC)
    recipe = LayerRecipe(
        GemmRecipe(input=w, weight=w), GemmRecipe(grad_output=dy, weight=w), GemmRecipe(grad_output=dy, input=w)
    )
    model = made(recipe=Recipe(recipe))

    def run(order):
        set_step(model, 3)
        leaves = [batch().requires_grad_() for _ in range(2)]
        outputs = [model(leaf) for leaf in leaves]
        assert torch.equal(*outputs)  # only grad_output is rounded at random
        for at in order:
            outputs[at].sin().sum().backward()
        return [leaf.grad for leaf in leaves]

    forward, backward = run((0, 1)), run((1, 0))
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(*forward)


def test_micro_batches_of_ones_own_loop_draw_their_own_bits_and_a_step_starts_anew():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    attach_optimizer(model, optimizer)
    x, steps = batch(), []
    for _ in range(2):
        micro = []
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            micro.append(model.weight.grad.clone())
        optimizer.step()
        steps.append(micro)
    micro = [grad for step in steps for grad in step]
    assert not any(torch.equal(a, b) for i, a in enumerate(micro) for b in micro[:i])
    for step, expected in enumerate(steps):  # the first use of a step is what `set_step` alone determines
        set_step(model, step)
        for gradient in expected:
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            assert torch.equal(model.weight.grad, gradient)


def test_evaluation_draws_as_the_first_use_and_takes_none():
    model, other, x = made(), made(), batch()
    first = other(x)
    with torch.no_grad():
        assert torch.equal(model(x), first)
        assert torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), first)
    model.train()
    with torch.inference_mode():
        model(x)
    assert torch.equal(model(x), first)
    second = model(x)
    assert torch.equal(second, other(x))
    with torch.no_grad():
        assert torch.equal(model(x), first)
        checkpoint(model, x.requires_grad_(), use_reentrant=True)
        checkpoint(model, x, use_reentrant=False)
    assert torch.equal(model(x), other(x))


def test_a_copy_and_a_loaded_state_go_on_alike():
    model, x = made(), batch()
    model(x)
    other = copy.deepcopy(model)
    assert torch.equal(model(x), other(x))
    state = quant_state(model)
    load_quant_state(other, state)  # states belong between steps: the step starts anew
    set_step(model, 0)
    assert torch.equal(model(x), other(x))


def test_a_changed_format_keeps_the_count_within_the_step():
    model, other, x = made(), made(), batch()
    model(x)
    change_format(model, uniform("E4M3", rounding="stochastic"))
    change_format(other, uniform("E4M3", rounding="stochastic"))
    first, second = other(x), other(x)
    assert torch.equal(model(x), second)
    assert not torch.equal(first, second)


def test_a_functional_product_is_a_function_of_its_key():
    x, w = batch(), batch(16, 16, seed=1).requires_grad_()
    recipe = layer_recipe("E3M4", rounding="stochastic")
    first, second = (functional.linear(x, w, recipe=recipe, key=(1, 2)) for _ in range(2))
    assert torch.equal(first, second)


pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:None of the inputs have requires_grad=True:UserWarning"
    ),  # nested reentrant ones
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # dynamo, of a region's inputs
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's own, while tracing
]


# -- activation checkpointing -------------------------------------------------------------------------------------------


def straight(fn, *args):
    return fn(*args)


def reentrant(fn, *args):
    return checkpoint(fn, *args, use_reentrant=True)


def early(fn, *args):
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)


def whole(fn, *args):
    with set_checkpoint_early_stop(False):
        return checkpoint(fn, *args, use_reentrant=False)


def twice_inside_and_outside(m, outer, inner, x):
    return m(m(outer(lambda v: m(torch.tanh(m(v))), m(x))))


def one_after_the_other(m, outer, inner, x):
    for around in (outer, inner, outer):
        x = around(lambda v: torch.tanh(m(v)), x)
    return x


def nested(m, outer, inner, x):
    def middle(v):
        return m(inner(lambda u: torch.tanh(m(torch.tanh(m(u)))), m(v)))

    return m(outer(lambda v: torch.tanh(middle(v)) + inner(m, v), m(x)))


def three_deep(m, outer, inner, x):
    return outer(lambda v: m(inner(lambda u: m(outer(lambda t: torch.tanh(m(t)), m(u))), m(v))), x)


def branches(m, outer, inner, x):
    left, right = outer(lambda v: torch.tanh(m(v)), x), inner(lambda v: torch.tanh(m(v)), x)
    return left * right + outer(m, left)


def without_gradients_inside(m, outer, inner, x):
    def body(v):
        with torch.no_grad():
            m(v)
        return torch.tanh(m(v))

    return m(outer(body, inner(body, x)))


PROGRAMS = [twice_inside_and_outside, one_after_the_other, nested, three_deep, branches]
KINDS = [(early, early), (whole, whole), (reentrant, reentrant), (early, reentrant), (reentrant, early)]
each_kind = pytest.mark.parametrize("kinds", KINDS, ids=["-".join(k.__name__ for k in pair) for pair in KINDS])


def losses(model, program, kinds, count=1):
    set_step(model, 2)
    model.zero_grad()
    leaves = [batch(seed=i).requires_grad_() for i in range(count)]
    return leaves, [program(model, *kinds, leaf).sin().square().mean() for leaf in leaves]


def assert_gradients(model, leaves, expected):
    """The leaves' to the bit; the sum over the uses of one weight up to the order of summation."""
    for leaf, wanted in zip(leaves, expected[0], strict=True):
        assert wanted.abs().max() > 0
        assert torch.equal(leaf.grad, wanted)
    torch.testing.assert_close(model.weight.grad, expected[1], rtol=1e-5, atol=1e-7)


def references(model, program, count=1):
    leaves, found = losses(model, program, (straight, straight), count)
    for loss in found:
        loss.backward()
    return [leaf.grad for leaf in leaves], model.weight.grad.clone()


@each_kind
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_recomputation_repeats_the_bits_of_each_use(program, kinds):
    model = made()
    expected = references(model, program)
    leaves, (loss,) = losses(model, program, kinds)
    loss.backward()
    assert_gradients(model, leaves, expected)
    following = model(batch())  # and takes no use of its own
    losses(model, program, (straight, straight))
    assert torch.equal(model(batch()), following)


@pytest.mark.parametrize("kind", [early, whole])
def test_what_runs_without_gradients_inside_a_checkpoint_is_no_use(kind):
    model = made()
    expected = references(model, without_gradients_inside)
    leaves, (loss,) = losses(model, without_gradients_inside, (kind, kind))
    loss.backward()
    assert_gradients(model, leaves, expected)


def test_what_runs_without_gradients_inside_a_reentrant_checkpoint_is_repeated():
    model = made()
    model.zero_grad()
    seen = []

    def body(v):
        with torch.no_grad():
            target = m_values(v)
        return torch.tanh(m_values(v)) * target

    def m_values(v):
        y = model(v)
        seen.append(y.detach())
        return y

    reentrant(body, batch().requires_grad_()).sum().backward()
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


@each_kind
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_outstanding_micro_batches_are_recomputed_in_any_order(order, kinds):
    model = made()
    expected = references(model, nested, 3)
    leaves, found = losses(model, nested, kinds, 3)
    with torch.no_grad():
        model(batch())
    for at in order:
        found[at].backward()
    assert_gradients(model, leaves, expected)


@each_kind
def test_a_retained_graph_is_recomputed_alike_each_time(kinds):
    model = made()
    expected = references(model, nested)
    leaves, (loss,) = losses(model, nested, kinds)
    for _ in range(3):
        leaves[0].grad = None
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert_gradients(model, leaves, expected)


def test_part_of_a_graph_is_recomputed_alike():
    model = made(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)))
    found = []
    for around in (straight, early):
        set_step(model, 0)
        x = batch().requires_grad_()
        y = around(lambda v: model(model(v)), x)
        found.append([*torch.autograd.grad(y.sum(), model[2].bias, retain_graph=True)])
        found[-1] += torch.autograd.grad(y.sin().sum(), x)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layers_within_one_checkpoint_are_told_apart():
    """One layer is used more often than its neighbour; both are recomputed from their own counts."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    quantize_model(model, STOCHASTIC, seed=2)
    a, b = model

    def body(v):
        return b(torch.tanh(a(torch.tanh(a(v)))))

    found = []
    for around in (straight, early, reentrant):
        set_step(model, 0)
        x = a(batch()).detach().requires_grad_()
        around(body, around(body, x)).sin().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_recomputation_that_another_library_starts_repeats_the_latest_use():
    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x)
            return y.detach().clone()

        @staticmethod
        def backward(ctx, dy):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                y = model(x)
            outputs.append(y.detach())
            return torch.autograd.grad(y, x, dy)[0], None

    model, outputs, x = made(), [], batch().requires_grad_()
    model(x)
    outputs.append(model(x).detach())
    Recomputed.apply(x, outputs[0]).sum().backward()
    assert torch.equal(*outputs)


# -- transforms and compilers -------------------------------------------------------------------------------------------


def test_transforms_take_a_use_and_samples_share_it():
    model = made(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)))
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    x = batch()
    first, second = grad(loss)(parameters, x), grad(loss)(parameters, x)
    assert not any(torch.equal(first[name], second[name]) for name in ("0.weight", "2.weight"))
    set_step(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), grad(loss)(parameters, x).values(), strict=True))
    same = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:1].expand(3, 16))
    assert all(torch.equal(g[0], g[1]) and torch.equal(g[0], g[2]) for g in same.values())


class Twice(nn.Module):
    def __init__(self, around=straight):
        super().__init__()
        self.layer, self.around = nn.Linear(16, 16), around

    def forward(self, x):
        return self.layer(self.around(lambda v: torch.tanh(self.layer(torch.tanh(self.layer(v)))), x))


@pytest.mark.parametrize("around", [straight, early])
def test_compiled_uses_draw_as_eager_ones_without_breaks_or_recompiles(around):
    torch._dynamo.reset()
    eager, model = made(Twice()), made(Twice(around))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch()
    compiled(x).sum().backward()
    set_step(model, 0)
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2):
            for one in (eager, model):
                set_step(one, step)
            outputs = []
            for _ in range(2):
                pair = [one(x) for one in (eager, compiled)]
                assert torch.equal(*pair)
                for y in pair:
                    y.sin().sum().backward()
                outputs.append(pair[0])
            assert not torch.equal(*outputs)
    torch.testing.assert_close(eager.layer.weight.grad, model.layer.weight.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(eager(x), compiled(x))


@pytest.mark.parametrize("around", [early, whole, reentrant])
def test_compiled_layers_inside_checkpoints_of_eager_code_repeat_their_bits(around):
    torch._dynamo.reset()
    model = made()
    expected = references(model, nested)
    compiled = torch.compile(model, backend="aot_eager")
    set_step(model, 2)
    model.zero_grad()
    leaf = batch().requires_grad_()
    nested(compiled, around, around, leaf).sin().square().mean().backward()
    torch.testing.assert_close(leaf.grad, expected[0][0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.weight.grad, expected[1], rtol=1e-5, atol=1e-7)


def between(m, around, v):
    return m(around(lambda u: torch.tanh(m(torch.tanh(m(u)))), torch.tanh(m(v))))


def two_regions(m, around, v):
    return around(lambda u: torch.tanh(m(u)), around(lambda u: torch.tanh(m(u)), v)) + m(v)


@pytest.mark.parametrize("program", [between, two_regions])
def test_checkpoints_inside_compiled_code_repeat_their_bits_in_outstanding_micro_batches(program):
    torch._dynamo.reset()
    model = made()
    compiled = torch.compile(lambda v: program(model, early, v), fullgraph=True, backend="aot_eager")
    found = []
    for call in (lambda v: program(model, straight, v), compiled):
        set_step(model, 1)
        leaves = [batch(seed=i).requires_grad_() for i in range(3)]
        outputs = [call(leaf) for leaf in leaves]
        for at in (1, 2, 0):
            for _ in range(2):
                leaves[at].grad = None
                outputs[at].sin().sum().backward(retain_graph=True)
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
