"""Layers whose products are of codes: their results are those of the same layers on float32, or step by step."""

import copy
import gc
import math
import weakref

import pytest
import torch

from altgrad.nn import change_format, functional, layer_recipe, quantize_model, uniform
from altgrad.nn.layer import at_once, gemm
from altgrad.quantization import CurrentScaling

LIKE_ZEN5, LIKE_HASWELL = gemm.Processor(True, True, False), gemm.Processor(vectors=True)
LIKE_SAPPHIRE_RAPIDS = gemm.Processor(True, True, True)
CLASSES = (LIKE_ZEN5, LIKE_HASWELL, LIKE_SAPPHIRE_RAPIDS)


def matrix(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_both_routes(monkeypatch, processor, x, w, recipe, bias=None):
    """(y, dx, dw) by codes and by float32, with what each element may differ by."""
    found = []
    for each in (processor, gemm.Processor()):
        monkeypatch.setattr(gemm, "PROCESSOR", each)
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = functional.linear(a, b, bias, recipe=recipe)
        y.sum().backward()
        found.append((y.detach(), a.grad, b.grad))
    a, b, ones = x.double().abs(), w.double().abs(), torch.ones(len(x), len(w), dtype=torch.float64)
    bounds = [p.amax(1)[:, None] * q.amax(1) * p.shape[1] * 2e-6 for p, q in ((a, b), (ones, b.t()), (ones.t(), a.t()))]
    return list(zip(*found, bounds, strict=True))


def rows_of_their_own(x, w):
    x, w = x.clone(), w.clone()
    x[3], x[5], w[7], w[8] = x[3] * 1e30, x[5] * 1e-30, w[7] * 1e-20, 0
    return x, w


PRODUCTS_OF_LAYERS = {
    "tiles of odd sides": ("E4M3/1x128", lambda x, w: (x * torch.linspace(-3, 3, len(x)).exp()[:, None], w)),
    "blocks of odd sides": ("E4M3/7", lambda x, w: (x, w)),
    "blocks of large scales beside one scale": (("MXFP8", "E4M3"), lambda x, w: (x * 1e25, w * 1e-25)),
    "blocks of small scales": ("MXFP8", lambda x, w: (x * 1e-41, w * 1e30)),
    "scales of rows far apart": (("E4M3", "rows"), rows_of_their_own),
    "integers with scales of rows far apart": (("INT8", "rows"), rows_of_their_own),
    "scales of rows that overflow together": (("E4M3", "rows"), lambda x, w: (x * torch.tensor([1e30] + [1.0] * 95)[:, None], w * torch.tensor([1e15] + [1.0] * 63)[:, None])),
}  # fmt: skip


@pytest.mark.parametrize("processor", CLASSES, ids=str)
@pytest.mark.parametrize("case", PRODUCTS_OF_LAYERS)
def test_a_layer_by_codes_is_the_layer_by_float32(case, processor, monkeypatch):
    spelled, change = PRODUCTS_OF_LAYERS[case]
    fmt, other = spelled if isinstance(spelled, tuple) else (spelled, None)
    options = {"scaling": CurrentScaling(axis=0)} if other == "rows" else {"weight": other} if other else {}
    generator = torch.Generator().manual_seed(0)
    x, w = change(torch.randn(96, 256, generator=generator), torch.randn(64, 256, generator=generator))
    for codes, reference, bound in of_both_routes(monkeypatch, processor, x, w, layer_recipe(fmt, **options)):
        finite = torch.isfinite(reference)
        assert torch.equal(torch.isfinite(codes), finite)
        assert bool(((codes.double() - reference.double()).abs() <= bound)[finite].all())


@pytest.mark.parametrize("shape", [(), (1,), (1, 64), (96, 64)], ids=str)
def test_a_bias_that_torch_broadcasts_is_added_and_has_its_gradient(shape, monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    x, w = torch.randn(96, 256), torch.randn(64, 256)
    bias = torch.randn(shape, requires_grad=True)
    y = functional.linear(x, w, bias, recipe=layer_recipe("E4M3"))
    assert torch.equal(y, functional.linear(x, w, recipe=layer_recipe("E4M3")) + bias)
    y.sum().backward()
    assert bias.grad is not None
    assert float(bias.grad.sum()) == pytest.approx(96 * 64)


# -- layers whose products and quantizations are one call ---------------------------------------------------------------


def at_once_and_not(monkeypatch, recipe, x, w, bias=None, grad=None, needs=(True, True), processor=LIKE_ZEN5):
    """[(y, dx, dw, db) in one call, the same step by step], and how many calls were one."""
    monkeypatch.setattr(gemm, "PROCESSOR", processor)
    monkeypatch.setattr(gemm, "CPU_CODES_MIN_PRODUCTS", 0)
    found, runs = [], []
    real = at_once.Plan.run
    for run in (lambda *given: runs.append(real(*given)) or runs[-1], lambda *_: None):
        with monkeypatch.context() as patched:
            patched.setattr(at_once.Plan, "run", run)
            leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=True)]
            shift = None if bias is None else bias.clone().requires_grad_()
            y = functional.linear(*leaves, shift, recipe=recipe)
            y.backward(torch.ones_like(y) if grad is None else grad)
        found.append([y.detach(), *(t.grad for t in (*leaves, shift) if t is not None)])
    return found, len([made for made in runs if made is not None])


def agree(found):
    for once, steps in zip(*found, strict=True):
        assert (once is None) == (steps is None)
        if once is not None:
            torch.testing.assert_close(once, steps, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("processor", CLASSES, ids=str)
@pytest.mark.parametrize("shape", [(128, 64, 192), (1, 1, 1), (37, 65, 50), (33, 130, 7)], ids=str)
@pytest.mark.parametrize("fmt", ["E4M3", "E0M7", "MXFP8", "MXINT8", "E4M3/6:E8M0", "E2M1/16x16:E8M0"])
def test_a_layer_in_one_call_has_the_bits_of_its_steps(fmt, shape, processor, monkeypatch):
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(rows)
    x, w, dy = (torch.randn(s, generator=generator) for s in ((rows, depth), (columns, depth), (rows, columns)))
    for bias in (None, torch.randn(columns, generator=generator)):
        found, runs = at_once_and_not(monkeypatch, layer_recipe(fmt), x, w, bias, dy, processor=processor)
        assert runs == 1
        agree(found)


@pytest.mark.parametrize("fmt", ["E4M3", "E0M7", "MXFP8"])
def test_a_layer_in_one_call_on_several_threads_has_the_bits_of_one(fmt, monkeypatch):
    x, w, dy, bias = (matrix(s, i) for i, s in enumerate([(500, 384), (300, 384), (500, 300), (300,)]))
    alone = None
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found, runs = at_once_and_not(monkeypatch, layer_recipe(fmt), x, w, bias, dy)
        assert runs == 1
        agree(found)
        alone = alone or found[0]
        agree((found[0], alone))


@pytest.mark.parametrize("fmt", ["MXFP8", "MXINT8", "E4M3/6:E8M0"])
def test_two_infs_that_two_threads_find_are_not_laundered(fmt, monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    torch.set_num_threads(2)
    x, w = matrix((300, 384), 0), matrix((400, 384), 1)
    w[0, 3], w[-1, 5] = math.inf, -math.inf
    y = functional.linear(x, w, recipe=layer_recipe(fmt))
    assert torch.equal(y.isfinite(), (x @ w.t()).isfinite())


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x", "w"])
@pytest.mark.parametrize("recipe", [("E4M3", "E5M2"), ("MXFP8", "E0M7"), ("E4M3", "MXFP8")], ids=str)
def test_one_call_serves_formats_of_their_own_and_one_gradient(recipe, needs, monkeypatch):
    x, w, dy = (matrix(s, i) for i, s in enumerate([(64, 96), (80, 96), (64, 80)]))
    for wanted in (needs, (True, True)):
        spelled = layer_recipe(recipe[0], grad=recipe[1])
        found, runs = at_once_and_not(monkeypatch, spelled, x, w, None, dy, wanted)
        assert runs == 1
        agree(found)


@pytest.mark.parametrize("shape", [(2, 33, 64), (2, 3, 11, 64), (1, 66, 64), (0, 5, 64)], ids=str)
@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
def test_leading_axes_count_rows_in_one_call(fmt, shape, monkeypatch):
    x, w, bias = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        matrix((80, 64), 1),
        torch.ones(80),
    )
    dy = torch.randn((*shape[:-1], 80), generator=torch.Generator().manual_seed(2))
    found, runs = at_once_and_not(monkeypatch, layer_recipe(fmt), x, w, bias, dy)
    assert runs == (x.numel() > 0)
    agree(found)
    flat, _ = at_once_and_not(monkeypatch, layer_recipe(fmt), x.reshape(-1, 64), w, bias, dy.reshape(-1, 80))
    for one, two in zip(found[0], flat[0], strict=True):
        assert torch.equal(one.reshape(two.shape), two)
    strided = at_once_and_not(
        monkeypatch, layer_recipe(fmt), x, w, bias, dy.transpose(0, 1).contiguous().transpose(0, 1)
    )
    agree([found[0], strided[0][0]])


@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
def test_a_backward_of_one_call_is_differentiated_through_leading_axes(fmt, monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    monkeypatch.setattr(gemm, "CPU_CODES_MIN_PRODUCTS", 0)
    found = []
    for shape in ((2, 33, 64), (66, 64)):
        x, w = (matrix((66, 64), 0).view(shape), matrix((80, 64), 1))
        leaves = [x.requires_grad_(), w.requires_grad_()]
        y = functional.linear(*leaves, recipe=layer_recipe(fmt))
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        found.append([t.detach().reshape(-1) for t in (*grads, *again)])
    assert all(map(torch.equal, *found))


HARD = {
    "inf": lambda t: t.index_fill(0, torch.tensor([1]), math.inf),
    "NaN": lambda t: t.index_fill(1, torch.tensor([2]), math.nan),
    "zeros": torch.zeros_like,
    "subnormal": lambda t: t * 1e-42,
    "huge": lambda t: t.clamp(-3, 3) * 1e38,
    "transposed": lambda t: t.t().contiguous().t(),
    "a view in a larger matrix": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("fmt", ["E4M3", "E0M7", "E3M4", "MXFP8", "MXFP4"])
@pytest.mark.parametrize("change", HARD)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "w", "dy"])
def test_what_one_call_does_not_serve_goes_step_by_step(fmt, change, which, monkeypatch):
    tensors = [matrix(s, i) for i, s in enumerate([(64, 96), (80, 96), (64, 80)])]
    tensors[which] = HARD[change](tensors[which])
    agree(at_once_and_not(monkeypatch, layer_recipe(fmt), *tensors[:2], None, tensors[2])[0])


def test_blocks_of_zeros_are_multiplied_as_codes(monkeypatch):
    x, w = matrix((64, 96), 0), matrix((80, 96), 1)
    x[:32] = 0  # as the gradients of what attention's first token asks for
    found, runs = at_once_and_not(monkeypatch, layer_recipe("MXFP8"), x, w)
    assert runs == 1
    agree(found)


def test_a_copied_or_changed_layer_makes_plans_of_its_own(monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256))
    quantize_model(model, uniform("E4M3"))
    x = matrix((128, 64), 0)
    y = model(x)
    state = model[0].quantization
    assert len(state.plans) == 1
    twin = copy.deepcopy(model)
    assert not twin[0].quantization.plans
    assert torch.equal(twin(x), y)
    change_format(model, "E5M2")
    assert not model[0].quantization.plans
    assert not torch.equal(model(x), y)


def test_nothing_of_a_call_outlives_its_result(monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", LIKE_ZEN5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256))
    quantize_model(model, uniform("E4M3"))
    made = []
    real = at_once.Plan.run
    monkeypatch.setattr(at_once.Plan, "run", lambda *given: made.append(real(*given)) or made[-1])
    gc.disable()
    try:
        y = model(matrix((128, 64), 0).requires_grad_())
        kept = weakref.ref(made.pop().kept)
        assert kept() is not None
        y.sum().backward()
        assert kept() is None, "codes are freed by the backward"
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
        y = model(matrix((128, 64), 0).requires_grad_())
        kept = weakref.ref(made.pop().kept)
        del y
        assert kept() is None, "and by the end of the result"
    finally:
        gc.enable()
