"""Differentiated gradients, `torch.func` and autocast over quantized models."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from altgrad.nn import functional, quantize_model, uniform
from altgrad.nn.layer import state as layer_state
from altgrad.nn.layer.gemm import Route, conv_precision, matmul_precision
from altgrad.quantization import amax_scale, get_format, quantize
from tests.nn.test_layers import CASES


class Straight(torch.autograd.Function):
    """quantize by amax with the straight-through gradient; independent of the layers."""

    @staticmethod
    def forward(ctx, x):
        return quantize(x, "E4M3", amax_scale(x, get_format("E4M3")), clamp=True)

    @staticmethod
    def backward(ctx, g):
        return g


class StraightBack(torch.autograd.Function):
    """Identity whose gradient is quantized, differentiably."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return Straight.apply(g)


def reference(module, x, w, b):
    """The layer in the plainest terms: both directions of autograd on quantized operands."""
    if isinstance(module, nn.Linear):
        y = nn.functional.linear(Straight.apply(x), Straight.apply(w))
        return StraightBack.apply(y) + b
    return StraightBack.apply(module._conv_forward(Straight.apply(x), Straight.apply(w), None)) + b[:, None, None]


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(4, 4, 3, padding=1)], ids=["linear", "conv"]
)
def test_gradients_can_be_differentiated(make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(5, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    plain = copy.deepcopy(layer)
    quantize_model(layer, uniform("E4M3"))
    found = []
    for module, call in ((layer, layer), (plain, lambda v: reference(plain, v, plain.weight, plain.bias))):
        leaf = x.clone().requires_grad_()
        y = torch.tanh(call(leaf))
        gx, gw = torch.autograd.grad(y.square().sum(), (leaf, module.weight), create_graph=True)
        assert gx.requires_grad
        penalty = gx.square().sum() + gw.sin().sum()
        found.append(torch.autograd.grad(penalty, (leaf, *module.parameters())))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_gradient_penalty_in_a_deeper_model_reaches_every_weight_once_per_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
    plain = copy.deepcopy(model)
    quantize_model(model, uniform("E4M3"))

    def plainly(x):
        for layer in plain:
            x = reference(layer, x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)
        return x

    x = torch.randn(6, 8)
    for repeat in range(2):  # a second run must not see the first one's gradients
        found = []
        for module, call in ((model, model), (plain, plainly)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            g = torch.autograd.grad(y.sum(), leaf, create_graph=True)[0]
            ((g.norm(dim=1) - 1).square().mean() + y.mean()).backward()
            found.append([p.grad for p in module.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=str(repeat))


def test_matmul_and_functional_linear_can_be_differentiated_twice():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 8, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    qa, qb = (Straight.apply(t) for t in (a, b))
    expected = []
    for y in (functional.matmul(a, b, recipe="E4M3"), StraightBack.apply(qa @ qb)):
        ga, gb = torch.autograd.grad(y.sin().sum(), (a, b), create_graph=True)
        expected.append(torch.autograd.grad(ga.square().sum() + gb.square().sum(), (a, b)))
    for p, q in zip(*expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def model_of(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 32))
    quantize_model(model, recipe)
    return model, dict(model.named_parameters())


RECIPES = {
    "E4M3": uniform("E4M3", grad="E5M2", norm_weight="E4M3"),
    "MXFP8": uniform("MXFP8"),
    "stochastic": uniform("E3M4", rounding="stochastic"),
    "channel": uniform("E4M3", scaling={"policy": "amax", "axis": 0}),
    "static, masked": uniform("E4M3", scaling={"policy": "static", "scale": 2.0**-9}, mask_saturated=True),
}
each = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@each
def test_func_grad_is_autograd(recipe):
    model, parameters = model_of(recipe)
    model.eval()  # the same random bits in each call
    x = torch.randn(32, 32)

    def loss(p, v):
        return functional_call(model, p, (v,)).square().mean()

    found, of_x = grad(loss, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(parameters, leaf), [*parameters.values(), leaf])
    for a, b in zip([*found.values(), of_x], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@each
def test_vmap_is_a_loop_over_samples_also_for_per_sample_gradients(recipe):
    model, parameters = model_of(recipe)
    model.eval()
    x = torch.randn(3, 32, 32)

    def loss(p, v):
        return functional_call(model, p, (v,)).square().mean()

    mapped = vmap(lambda v: functional_call(model, parameters, (v,)))(x)
    torch.testing.assert_close(mapped, torch.stack([model(v) for v in x]), rtol=1e-5, atol=1e-6)
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for name in parameters:
        expected = torch.stack([grad(loss)(parameters, v)[name] for v in x])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


def test_an_ensemble_maps_over_parameters():
    models = [nn.Linear(8, 4) for _ in range(3)]
    stacked = {n: torch.stack([dict(m.named_parameters())[n].detach() for m in models]) for n in ("weight", "bias")}
    base = models[0]
    for model in models:
        quantize_model(model, uniform("E4M3"))
    x = torch.randn(5, 8)
    mapped = vmap(lambda p: functional_call(base, p, (x,)))(stacked)
    torch.testing.assert_close(mapped, torch.stack([m(x) for m in models]), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, in its rule for layer_norm
def test_jacobians_and_forward_mode():
    model, parameters = model_of(RECIPES["E4M3"])
    x, tangent = torch.randn(2, 32), torch.randn(2, 32)

    def f(v):
        return functional_call(model, parameters, (v,))

    jacobian = jacfwd(f)(x)
    assert jacobian.shape == jacrev(f)(x).shape == (2, 32, 2, 32)
    value, pushed = jvp(f, (x,), (tangent,))
    assert torch.equal(value, f(x))
    torch.testing.assert_close(pushed, torch.einsum("abcd,cd->ab", jacobian, tangent), rtol=1e-4, atol=1e-5)
    exact, _ = model_of(uniform("E4M3", grad=None))  # with dy unquantized both modes are one matrix
    g = lambda v: functional_call(exact, parameters, (v,))  # noqa: E731
    torch.testing.assert_close(jacrev(g)(x), jacfwd(g)(x), rtol=1e-4, atol=1e-5)
    assert hessian(lambda v: g(v).square().sum())(x[0]).shape == (32, 32)


@pytest.mark.parametrize("name", ["1d", "2d", "strided, dilated, grouped"])
def test_convolutions_under_transforms(name):
    torch.manual_seed(0)
    layer, shape = CASES[name]
    layer = copy.deepcopy(layer)
    quantize_model(layer, uniform("E4M3", grad="E5M2"))
    parameters, x = dict(layer.named_parameters()), torch.randn(3, *shape)

    def loss(p, v):
        return functional_call(layer, p, (v,)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, v in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, v), list(parameters.values()))
        for a, b in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


FORMATS = ["E4M3", "E5M2", "E0M7", "NVFP4", "BF16"]


def linear():
    return nn.Linear(64, 64), torch.randn(32, 64)


def conv():
    return nn.Conv2d(16, 16, 3, padding=1), torch.randn(16, 16, 8, 8)


def outputs(layer, x, dy, autocast):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(leaf)
    y.backward(dy.to(y.dtype))
    return y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize("name", FORMATS)
def test_autocast_casts_the_exact_result_once_and_leaves_the_gradients(name, make):
    torch.manual_seed(0)
    layer, x = make()
    quantize_model(layer, uniform(name))
    dy = torch.randn_like(layer(x)).bfloat16().float()
    plain, cast = (outputs(layer, x, dy, autocast) for autocast in (False, True))
    assert cast[0].dtype == torch.bfloat16
    assert torch.equal(cast[0], plain[0].bfloat16())
    for a, b in zip(plain[1:], cast[1:], strict=True):
        assert torch.equal(a, b)


def test_a_backward_inside_autocast_is_the_one_outside():
    torch.manual_seed(0)
    layer, x = linear()
    quantize_model(layer, uniform("E4M3"))
    dy, grads = torch.randn(32, 64).bfloat16(), []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            if inside:
                y.backward(dy)
        if not inside:
            y.backward(dy)
        grads.append(layer.weight.grad.clone())
    assert torch.equal(*grads)


def test_matmul_under_autocast():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 32), torch.randn(32, 16)
    plain = functional.matmul(a, b, recipe="E4M3")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.matmul(a, b, recipe="E4M3"), plain.bfloat16())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("make", [linear, conv])
def test_compiled_layers_under_autocast_give_the_eager_bits(make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = make()
    quantize_model(layer, uniform("E4M3"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


@pytest.fixture
def precisions():
    """Every precision setting of torch, given back afterwards."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for library, operations in (("cuda", ["matmul"]), ("mkldnn", ["matmul", "conv"]), ("cudnn", ["conv", "rnn"])):
        for operation in operations:
            getattr(getattr(torch.backends, library), operation).fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


def every_setting() -> list:
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda: torch.backends.cudnn.rnn.fp32_precision,
        lambda: torch.backends.mkldnn.conv.fp32_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:  # torch refuses the older flag beside the newer setting
            found.append("refused")
    return found


def _older_flag():
    torch.backends.cuda.matmul.allow_tf32 = True


def _newer_setting():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _everything():
    torch.backends.fp32_precision = "tf32"


def _cudnn_off():
    torch.backends.cudnn.allow_tf32 = False


WAYS = {
    "fresh": lambda: None,
    "older flag": _older_flag,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer setting": _newer_setting,
    "everything": _everything,
    "cudnn off": _cudnn_off,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("precisions")
def test_whichever_way_a_precision_was_set_it_is_ieee_inside_readable_and_found_again(way):
    WAYS[way]()
    before = every_setting()
    with matmul_precision("cuda", "ieee"), conv_precision("cuda"):
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
        assert torch.backends.cudnn.conv.fp32_precision in ("ieee", "none")
        inside = every_setting()
        if before[0] != "refused":  # the older flags are in use
            assert "refused" not in (inside[0], inside[1], inside[4])
    assert every_setting() == before
    with matmul_precision("cpu", "ieee"), conv_precision("cpu"):
        assert torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none")
        assert torch.backends.mkldnn.conv.fp32_precision in ("ieee", "none")
    assert every_setting() == before


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("precisions")
def test_a_coarser_precision_reaches_neither_eager_nor_compiled_products(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = linear()
    quantize_model(layer, uniform("E4M3"))
    monkeypatch.setattr(layer_state, "choose_route", lambda *_, **__: Route.FLOAT32)  # that of values
    expected = layer(x)
    seen, plain = [], torch.matmul

    def spied(a, b):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return plain(a, b)

    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(torch, "matmul", spied)
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        assert torch.equal(one(x), expected)
    assert seen == ["ieee", "ieee"]
