"""Every product of a model can be quantized or is listed: experts, raw parameters, attention, transposed convolutions."""

import copy
import pickle
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from altgrad.errors import OptionError, RecipeError
from altgrad.nn import (
    Override,
    attach_optimizer,
    change_format,
    functional,
    keep,
    layer_recipe,
    load_quant_state,
    quant_state,
    quantize_model,
    restore_model,
    uniform,
)
from altgrad.quantization import amax_scale, get_format, quantize
from benchmarks import mixtures
from benchmarks.mixtures import TOKENS

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()


def grid(x, fmt="E4M3"):
    return quantize(x.detach(), fmt, amax_scale(x.detach(), get_format(fmt)), clamp=True)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


# -- mixtures of experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mixtures.MODELS)
def test_one_call_quantizes_the_experts_as_the_page_says(name):
    """`python -m benchmarks.mixtures --write` writes docs/guides/works-with.md."""
    found = mixtures.row(name)
    (stated,) = (row for row in mixtures.rows_of_page(mixtures.PAGE.read_text()) if row["model"] == name)
    apart = {"loss": ""}
    if f"transformers=={version('transformers')}" not in CONSTRAINTS:
        apart["unquantized products"] = ""  # the library's own code, which differs from version to version
    assert {**found, **apart} == {**stated, **apart}
    assert float(found["loss"]) == pytest.approx(float(stated["loss"]), abs=0.005)
    assert name != "GptOss" or found["experts without tokens"] == "2 of 8"
    model = mixtures.mixture(name)
    manifest = quantize_model(model, uniform("E4M3"), example={"input_ids": TOKENS})
    assert not manifest.uncalled
    assert not manifest.uncounted
    assert str(manifest.parameters) in str(manifest)
    assert len(mixtures.experts(manifest)) == (2 if name == "DeepseekV3" else 4)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())
    read = quantize_model(mixtures.mixture(name), uniform("E4M3"))  # the sources tell the same
    assert set(read.swapped) == set(manifest.swapped)


@pytest.mark.parametrize("name", mixtures.MODELS)
def test_routers_are_kept_high_by_a_named_preset(name):
    manifest = quantize_model(mixtures.mixture(name), uniform("E4M3", keep=("routers", "heads")))
    assert len(mixtures.routers(manifest)) == (1 if name == "DeepseekV3" else 2)
    assert "lm_head" in manifest.skipped
    with pytest.raises(RecipeError, match="keep='routes' is none of adapters, routers, heads, embeddings"):
        keep("routes")


def test_each_expert_is_quantized_as_a_linear_layer_of_its_own():
    """Also one without tokens. A recipe with three formats, so that every operand counts."""
    recipe = layer_recipe("E4M3", activation="E3M4", grad="E5M2")
    torch.manual_seed(0)
    x, w = torch.randn(10, 8, requires_grad=True), torch.randn(3, 8, 6, requires_grad=True)
    y = functional.grouped_mm(x, w, torch.tensor([4, 4, 9]), recipe=recipe)
    dy = torch.randn(10, 6)
    y.backward(dy)
    assert torch.equal(y[9], torch.zeros(6))
    assert torch.equal(w.grad[1], torch.zeros(8, 6))
    for i, rows in ((0, slice(0, 4)), (2, slice(4, 9))):
        layer = nn.Linear(8, 6, bias=False)
        with torch.no_grad():
            layer.weight.copy_(w[i].t())
        quantize_model(layer, recipe)
        own = x.detach()[rows].requires_grad_()
        out = layer(own)
        out.backward(dy[rows])
        torch.testing.assert_close(y[rows], out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad[rows], own.grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(w.grad[i].t(), layer.weight.grad, rtol=1e-6, atol=1e-6)
    nothing = functional.grouped_mm(x, w, torch.tensor([0, 0, 0]), recipe=recipe)
    assert torch.equal(nothing, torch.zeros(10, 6))
    with pytest.raises(OptionError, match="give the end of each weight's rows, ascending"):
        functional.grouped_mm(x, w, torch.tensor([4, 3, 10]), recipe=recipe)


def test_the_ways_of_multiplying_experts_agree():
    """`batched_mm` gathers a weight for each token, so that each has a scale of its own; the other two are one arithmetic."""
    found = {}
    for way in ("eager", "grouped_mm", "batched_mm"):
        model = mixtures.mixture("Mixtral", experts_implementation=way)
        model.config._experts_implementation = way
        plain = copy.deepcopy(model)(input_ids=TOKENS, labels=TOKENS).loss
        manifest = quantize_model(model, uniform("E4M3", grad="E5M2"), example={"input_ids": TOKENS})
        assert manifest.multiply_adds.quantized == 860_160
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        assert loss != plain
        found[way] = (loss.detach(), model.model.layers[0].mlp.experts.down_proj.grad)
    torch.testing.assert_close(found["eager"], found["grouped_mm"], rtol=1e-4, atol=1e-6)
    for one, other in zip(found["eager"], found["batched_mm"], strict=True):
        assert (one - other).norm() < 0.4 * one.norm()  # gradients in E5M2


def trained(model, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "recipe",
    [
        uniform("E3M4", storage="grid", storage_rounding="stochastic"),
        uniform("E4M3", scaling="delayed"),
        uniform("E4M3", rounding="stochastic"),
    ],
    ids=["grid", "delayed", "stochastic"],
)
def test_experts_have_storage_history_clock_and_copies_as_layers_do(recipe):
    model = mixtures.mixture("Mixtral")
    quantize_model(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = attach_optimizer(model, optimizer)
    trained(model, optimizer)
    experts = model.model.layers[0].mlp.experts
    if recipe.default.storage is not None:
        stats = handle.last_step_stats()
        assert {"model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight"} <= set(stats)
        assert stats["model.layers.0.mlp.experts.down_proj"].flips > 0
    other = mixtures.mixture("Mixtral")
    quantize_model(other, recipe)
    other.load_state_dict(model.state_dict())
    load_quant_state(other, quant_state(model))
    copies = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = model(input_ids=TOKENS, labels=TOKENS).loss
    wanted.backward()
    for one in copies:
        loss = one(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        assert torch.equal(loss, wanted)
        grad = one.model.layers[0].mlp.experts.down_proj.grad
        assert grad is not None
    restored = restore_model(model)
    assert type(experts).__name__ == "MixtralExperts"
    assert type(restored.model.layers[0].mlp.gate).__name__ == "MixtralTopKRouter"


def test_one_parameter_of_the_experts_goes_to_and_from_full_precision():
    model = mixtures.mixture("Mixtral")
    recipe = uniform("E4M3", overrides=(Override(None, name="*.experts.down_proj"),))
    manifest = quantize_model(model, recipe)
    experts = model.model.layers[0].mlp.experts
    assert set(experts.quantization.states) == {"gate_up_proj"}
    assert "model.layers.0.mlp.experts.down_proj" in manifest.skipped
    change_format(model, uniform("E4M3"))
    assert set(experts.quantization.states) == {"gate_up_proj", "down_proj"}
    cells = {str(cell) for cell in uniform("E4M3").cells(model)}
    assert "model.layers.1.mlp.experts.down_proj.forward.weight" in cells
    change_format(model, uniform("E4M3").rescue([c for c in uniform("E4M3").cells(model) if "experts" in c.layer]))
    assert type(experts).__name__ == "MixtralExperts"
    change_format(model, uniform("E5M2"))
    assert {s.recipe.forward.weight.format for s in experts.quantization.states.values()} == {"E5M2"}


# -- raw parameters ------------------------------------------------------------------------------------------------------


class CastedLinear(nn.Linear):
    """As nanochat and modded-nanogpt cast: a float32 weight in the input's dtype."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Script(nn.Module):
    """As speedrun scripts are: merged weights, products by `@`, `F.linear` and `einsum`, of parameters made by views."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.qkvo = nn.Parameter(torch.randn(4, width, width) / 4)
        self.mlp = nn.ParameterList([torch.randn(32, width) / 4, torch.randn(width, 32) / 4])
        self.mix = nn.Parameter(torch.randn(heads, width // heads, width // heads) / 2)
        self.scales = nn.Parameter(torch.ones(3))
        self.head = CastedLinear(width, 5, bias=False)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = F.linear(x, self.qkvo[:3].flatten(end_dim=1).type_as(x)).view(n, t, 3 * self.heads, -1).chunk(3, 2)
        v = torch.einsum("bthd,hde->bthe", v, self.mix.type_as(x))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + y.transpose(1, 2).reshape(n, t, c) @ self.qkvo[3].T.type_as(x)
        up, down = (w.type_as(x) for w in self.mlp)
        x = x + (x @ up.t()).relu().square() @ down.t() * self.scales[0].type_as(x)
        return self.head(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scripts_on_raw_parameters_compute_with_quantized_products_and_their_gradients(dtype):
    """Against the same script whose products are quantized by hand, one layer at a time."""
    torch.manual_seed(0)
    model = Script()
    by_hand = copy.deepcopy(model)
    manifest = quantize_model(model, uniform("E4M3"))
    assert set(manifest.swapped) == {"qkvo", "mlp.0", "mlp.1", "mix", "head"}
    x = torch.randn(2, 6, 16).to(dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()

    def linear(x, w):
        return functional.linear(x, w, recipe="E4M3")

    def reference(self, x):
        n, t, c = x.shape
        q, k, v = linear(x, self.qkvo[:3].flatten(end_dim=1).type_as(x)).view(n, t, 3 * self.heads, -1).chunk(3, 2)
        heads = [linear(v[:, :, h], self.mix[h].t().type_as(x)) for h in range(self.heads)]
        v = torch.stack(heads, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(n, t, c), self.qkvo[3].type_as(x))
        up, down = (w.type_as(x) for w in self.mlp)
        x = x + linear(linear(x, up).relu().square(), down) * self.scales[0].type_as(x)
        return linear(x, self.head.weight.to(x.dtype))

    wanted = reference(by_hand, x)
    assert torch.equal(y, wanted)
    wanted.float().square().mean().backward()
    for name, grad in gradients(model).items():
        assert torch.equal(grad, gradients(by_hand)[name]), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_code_breaks_its_graph_around_raw_products_and_says_so():
    torch._dynamo.reset()
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.script, self.down = nn.Linear(16, 16), Script(), nn.Linear(5, 5)

        def forward(self, x):
            return self.down(F.gelu(self.script(F.gelu(self.up(x)))))

    model = Model()
    quantize_model(model, uniform("E4M3"))
    eager, x = copy.deepcopy(model), torch.randn(2, 6, 16)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        y, wanted = compiled(x), eager(x)
        assert torch.equal(y, wanted)
        y.sum().backward()
        wanted.sum().backward()
    for name, grad in gradients(model).items():
        assert torch.equal(grad, gradients(eager)[name]), name
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"use fullgraph=False, or register_layer"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)


def test_raw_weights_on_a_grid_are_multiplied_as_they_are():
    torch.manual_seed(0)
    model = Script()
    quantize_model(model, uniform("E3M4", storage="grid"))
    for p in (model.qkvo, model.mix):
        powers = 2.0 ** torch.arange(-12.0, 4)
        assert any(torch.equal(p, quantize(p.detach(), "E3M4", power)) for power in powers)
    plain = restore_model(copy.deepcopy(model))
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    quantize_model(plain, uniform("E3M4", weight=None, grad=None))
    x = torch.randn(2, 6, 16)
    assert torch.equal(model(x), plain(x))


def test_a_source_may_call_the_module_as_it_likes_and_loop_over_its_weights():
    class Loops(nn.Module):
        def __init__(me):
            super().__init__()
            me.ups, me.downs = (nn.ParameterList([torch.randn(8, 8) for _ in range(2)]) for _ in range(2))
            me.pairs, me.table = nn.Parameter(torch.randn(2, 8, 8)), nn.Parameter(torch.randn(4, 8))

        def forward(me, x):
            for up, down in zip(me.ups, me.downs, strict=True):
                x = F.linear(F.linear(x, up).relu(), down)
            return sum([x @ pair for pair in me.pairs]) + me.table[0]

    model = Loops()
    wanted = {"ups.0", "ups.1", "downs.0", "downs.1", "pairs"}
    assert set(quantize_model(copy.deepcopy(model), "E4M3").swapped) == wanted
    assert set(quantize_model(model, "E4M3", example=(torch.randn(2, 8),)).swapped) == wanted
    x = torch.randn(2, 8)
    model.ups, model.downs = nn.ParameterList(), nn.ParameterList()
    by_hand = sum(functional.linear(x, pair.t(), recipe="E4M3") for pair in model.pairs.unbind())
    assert torch.equal(model(x), by_hand + model.table[0])


def test_with_an_example_products_are_found_that_no_source_shows():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.table = nn.Parameter(torch.randn(4, 8))  # multiplies nothing

        def forward(self, x):
            return apply(x, self.w) + self.table.sum(0)

    def apply(x, w):
        return x @ w

    model = Hidden()
    assert set(quantize_model(copy.deepcopy(nn.Sequential(nn.Linear(8, 8), model)), "E4M3").swapped) == {"0"}
    manifest = quantize_model(nn.Sequential(nn.Linear(8, 8), model), "E4M3", example=(torch.randn(2, 8),))
    assert set(manifest.swapped) == {"0", "1.w"}
    assert manifest.multiply_adds.quantized == manifest.multiply_adds.of == 2 * 2 * 8 * 8


# -- attention -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, eager=False):
        super().__init__()
        self.qkv, self.out, self.eager = nn.Linear(16, 48), nn.Linear(16, 16), eager

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.eager:
            scores = torch.matmul(q, k.transpose(-2, -1)) / 8**0.5
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            p = F.dropout(scores.masked_fill(~causal, -torch.inf).softmax(-1), 0.0)
            y = torch.matmul(p, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("eager", [False, True])
def test_attention_is_quantized_where_a_recipe_asks_for_it(eager):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(eager))
    plain = copy.deepcopy(model)
    asked = uniform("E4M3", overrides=(Override(layer_recipe("E3M4"), type="attention"),))
    x = torch.randn(2, 6, 16)
    manifest = quantize_model(model, asked, example=(x,))
    assert set(manifest.swapped) == {"0.qkv", "0.out", "0.attention_products"}
    assert manifest.unseen == ()
    y = model(x)
    y.sum().backward()
    usual = quantize_model(plain, uniform("E4M3"), example=(x,))
    assert {p.module for p in usual.unseen} == {"0"}
    by_hand = plain[0].qkv(x)
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in by_hand.chunk(3, -1))
    scores = functional.matmul(q, k.transpose(-2, -1), recipe="E3M4") / 8**0.5
    p = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    wanted = plain[0].out(functional.matmul(p, v, recipe="E3M4").transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    wanted.sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(plain)[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain(x), y)
    assert {str(c) for c in asked.cells(model)} >= {"0.attention_products.forward.input"}
    restore_model(model)
    assert not model[0].qkv._forward_hooks
    quantize_model(model, uniform("E4M3"))
    assert torch.equal(model(x), plain(x))


def test_attention_with_a_scale_for_each_channel_is_refused():
    recipe = uniform(
        "E4M3", overrides=(Override(layer_recipe("E4M3", scaling={"policy": "amax", "axis": 0}), type="attention"),)
    )
    with pytest.raises(RecipeError, match="attention_products': attention takes one scale per tensor"):
        quantize_model(nn.Sequential(Attention()), recipe)


def test_functional_attention_is_torchs_with_quantized_products():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(5, 7) > 0.3
    mask[2] = False  # a query that may look nowhere
    for arguments in ({}, {"attn_mask": mask}, {"attn_mask": mask.float()}, {"is_causal": True}, {"scale": 0.1}):
        plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments)
        same = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, recipe="FP32", **arguments)
        torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-6)
    low = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, recipe="E2M1")
    assert (low - F.scaled_dot_product_attention(q, k, v, enable_gqa=True)).abs().max() > 1e-2


@pytest.mark.parametrize("kdim", [None, 12])
def test_multihead_attention_quantizes_its_projections(kdim):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True, kdim=kdim, vdim=kdim)
    with torch.no_grad():
        model.in_proj_bias.normal_()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, kdim or 16)
    manifest = quantize_model(model, uniform("E4M3"))
    own = {"in_proj_weight"} if kdim is None else {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    assert set(manifest.swapped) == {*own, "out_proj"}
    y, _ = model(x, memory, memory)
    y.sum().backward()
    assert model.out_proj.weight.grad is not None
    ws = (
        model.in_proj_weight.chunk(3)
        if kdim is None
        else (model.q_proj_weight, model.k_proj_weight, model.v_proj_weight)
    )
    q, k, v = (
        functional.linear(t, w, b, recipe="E4M3").unflatten(-1, (2, 8)).transpose(1, 2)
        for t, w, b in zip((x, memory, memory), ws, model.in_proj_bias.chunk(3), strict=True)
    )
    if kdim is None:  # k and v share a product there: one weight, one scale
        kv = functional.linear(memory, model.in_proj_weight[16:], model.in_proj_bias[16:], recipe="E4M3")
        k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in kv.chunk(2, -1))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    wanted = functional.linear(attended, model.out_proj.weight, model.out_proj.bias, recipe="E4M3")
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # no fast path goes around it
        torch.testing.assert_close(model.eval()(x, memory, memory)[0], y, rtol=1e-4, atol=1e-5)


# -- the rest ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, {"bias": False}]
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_are_exact_products_of_quantized_operands(dims, options):
    torch.manual_seed(0)
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](8, 6, 3, **options)
    plain = copy.deepcopy(layer)
    quantize_model(layer, uniform("E4M3", grad="E5M2"))
    x = torch.randn(2, 8, *(5, 4, 3)[:dims], requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    own = grid(x).requires_grad_()
    with torch.no_grad():
        plain.weight.copy_(grid(plain.weight))
    wanted = plain(own)
    wanted.backward(grid(dy, "E5M2"))
    assert torch.equal(y, wanted)
    assert torch.equal(x.grad, own.grad)
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    size = [n - 1 for n in wanted.shape[2:]] if options.get("stride") else None
    assert layer(x, output_size=size).shape == plain(own, output_size=size).shape
    assert layer(x[0]).shape == y[0].shape


def test_transposed_convolutions_take_blocks_and_channel_scales():
    torch.manual_seed(0)
    for recipe in (uniform("MXFP8"), uniform("E4M3", scaling={"policy": "amax", "axis": 0})):
        model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3))
        quantize_model(model, recipe)
        model(torch.randn(2, 8, 5, 5)).sum().backward()
        assert model[0].weight.grad.isfinite().all()


def test_bags_of_embeddings_quantize_their_weight():
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(10, 8, mode="sum")
    plain = copy.deepcopy(bag)
    quantize_model(bag, uniform("E4M3"))
    with torch.no_grad():
        plain.weight.copy_(grid(plain.weight))
    index = torch.tensor([[1, 2, 3], [4, 4, 9]])
    y = bag(index)
    assert torch.equal(y, plain(index))
    y.sum().backward()
    assert bag.weight.grad[4].sum() == 16
