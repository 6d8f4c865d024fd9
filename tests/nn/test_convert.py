"""quantize_model and restore_model: what is swapped, skipped and refused, and that everything is undone."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from altgrad.errors import AltGradError, RecipeError
from altgrad.nn import Override, Recipe, layer_recipe, quantize_model, register_layer, restore_model, uniform
from altgrad.quantization import amax_scale, get_format, quantize
from altgrad.quantization.parameter_grid import declared_grid


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.rms = nn.RMSNorm(32)
        self.scale = nn.Parameter(torch.ones(32))
        self.lm_head = nn.Linear(32, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.rms(x) * self.scale
        return torch.einsum("bti,vi->btv", x, self.lm_head.weight) + self.lm_head(x)


TOKENS = torch.arange(24).reshape(2, 12)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "recipe",
    [uniform("E4M3"), uniform("E3M4", storage="grid", norm_weight="E4M3"), uniform("E4M3", scaling="delayed")],
    ids=["master", "grid", "delayed"],
)
def test_restore_undoes_it_bit_for_bit(recipe):
    model = Model()
    classes = {name: type(m) for name, m in model.named_modules()}
    parameters, before, hooks = dict(model.named_parameters()), bits(model), []
    model.blocks[0].up.register_forward_hook(lambda *_: hooks.append(1))
    plain = model(TOKENS)
    quantize_model(model, recipe)
    assert {name for name, p in model.named_parameters() if p is parameters[name]} == set(parameters)
    assert model.lm_head.weight is model.embedding.weight
    assert not torch.equal(model(TOKENS), plain)
    assert isinstance(model.blocks[0].up, nn.Linear)
    restore_model(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(TOKENS), plain)
    assert not any(key.startswith("_altgrad") for m in model.modules() for key in m.__dict__)
    assert declared_grid(model.lm_head.weight) is None
    assert len(hooks) == 3
    restore_model(model)  # nothing left to undo


def test_patterns_of_overrides_that_match_nothing_are_told():
    manifest = quantize_model(Model(), "x:E4M3 w:E4M3 dy:E4M3; name='blocks.?.up': FP32; name='*.upp': FP32")
    assert manifest.idle == ("name='*.upp'",)
    assert "override without a layer: name='*.upp'" in str(manifest)


def test_manifest_says_what_was_swapped_and_why_not():
    model = Model(tied=False)
    manifest = quantize_model(model, uniform("E4M3", grad="E5M2"), exclude=["lm_head", "blocks.1"])
    assert set(manifest.swapped) == {"embedding", "blocks.0.up", "blocks.0.down"}
    assert manifest.skipped["lm_head"] == "excluded by 'lm_head'"
    assert manifest.skipped["blocks.1.up"] == "excluded by 'blocks.1'"
    assert manifest.skipped["blocks.0.norm"] == "norm weights stay unquantized in this recipe"
    assert "not registered" in manifest.skipped[""]  # the model itself owns a parameter
    assert [(p.module, p.call) for p in manifest.unseen] == [("", "einsum")]
    text = str(manifest)
    assert "blocks.0.up (Linear)  x:E4M3 w:E4M3 dy:E5M2" in text
    assert "(root): einsum (source)" in text
    shown = str(model)
    route = manifest.routes["blocks.0.up"]  # which this CPU decides
    assert f"large products by {route}: blocks.0." in text
    assert f"QuantizedLinear(in_features=32, out_features=64, bias=True, x:E4M3 w:E4M3 dy:E5M2 [{route}])" in shown
    assert "QuantizedEmbedding(40, 32, w:E4M3)" in shown


def test_traced_manifest_lists_only_calls_that_no_layer_makes():
    manifest = quantize_model(Model(), uniform("E4M3"), example=TOKENS)
    assert manifest.traced
    assert [(p.module, p.call) for p in manifest.unseen] == [("", "einsum")]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_fused_rnns_are_skipped_with_the_reason_and_listed(layer):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = layer(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    manifest = quantize_model(Tagger(), uniform("E4M3"), example=(torch.randn(2, 4, 8),))
    assert "multiplies in one fused call" in manifest.skipped["rnn"]
    assert {p.module for p in manifest.unseen} == {"rnn"}
    assert manifest.uncounted or manifest.multiply_adds.quantized < manifest.multiply_adds.of
    assert any(p.module == "rnn" for p in quantize_model(Tagger(), uniform("E4M3")).unseen)
    skipped = quantize_model(nn.ModuleList([nn.Linear(4, 4), nn.Bilinear(4, 4, 2)]), "E4M3").skipped
    assert "multiplies three tensors" in skipped["1"]


class Branches(nn.Module):
    """A product in training only, one in evaluation only, and an operator of another library."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.norm(self.layer(x))
        return y + F.dropout(torch.inner(y, y)) @ y if self.training else y + torch.tensordot(y, y, ([0], [0])).sum()


@pytest.mark.parametrize(("training", "calls"), [(True, {"inner", "matmul"}), (False, {"tensordot"})])
def test_the_traced_list_has_every_product_of_the_mode_that_was_traced(training, calls):
    model = Branches().train(training)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    manifest = quantize_model(model, uniform("E4M3"), example=(torch.randn(4, 8, generator=torch.Generator()),))
    assert {p.call for p in manifest.unseen} == calls
    mode = "training" if training else "evaluation"
    assert manifest.mode == mode
    assert f"traced with the example, in {mode}" in str(manifest)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x + self.positions.weight)


def test_a_layer_whose_weight_is_read_without_calling_it_is_named():
    manifest = quantize_model(Positions(), uniform("E4M3"), example=torch.randn(2, 12, 8))
    assert manifest.uncalled == ("positions",)
    assert "swapped, but not called by the example" in str(manifest)
    assert "positions" in str(manifest)


class Added(nn.Module):
    """Parameters in two dimensions that no product takes."""

    def __init__(self):
        super().__init__()
        self.table, self.head, self.unreached = nn.Parameter(torch.zeros(12, 8)), nn.Linear(8, 4), nn.LazyLinear(3)

    def forward(self, x):
        return self.head(x + self.table)


def test_nobody_who_gave_an_example_is_told_to_give_one():
    given = {"example": torch.randn(2, 12, 8)}
    for options, reason in (
        ({}, "pass example= to trace it"),
        (given, "^no product of its own parameters ran with the example$"),
    ):
        manifest = quantize_model(Added(), uniform("E4M3"), exclude=["unreached"], **options)
        assert re.search(reason, manifest.skipped[""])
        assert ("pass example" in str(manifest)) == (not options)
    with pytest.raises(
        RecipeError, match=r"'unreached' is a LazyLinear.*pass an example that reaches it, or exclude it"
    ):
        quantize_model(Added(), uniform("E4M3"), **given)


def test_tracing_leaves_modes_and_hooks_alone():
    model = Model()
    model.blocks[0].eval()
    quantize_model(model, uniform("E4M3"), example=(TOKENS,))
    assert model.training
    assert not model.blocks[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_overrides_by_name_type_and_position():
    fed = layer_recipe("E4M3", activation="E3M4")
    recipe = Recipe(
        layer_recipe("E4M3"),
        (
            Override(layer_recipe("E5M2"), name="*.down"),
            Override(None, type="Embedding"),
            Override(fed, type="Linear", position="after_norm"),
        ),
    )
    model = Model(tied=False)
    manifest = quantize_model(model, recipe, example=TOKENS)
    assert manifest.swapped["blocks.0.down"].recipe == layer_recipe("E5M2")
    assert manifest.swapped["blocks.1.up"].recipe == fed
    assert manifest.swapped["lm_head"].recipe == layer_recipe("E4M3")  # its input is scaled after the norm
    assert manifest.skipped["embedding"] == "left unquantized by the recipe"


def test_embedding_and_norm_weights_are_quantized_at_use():
    model = Model(tied=False)
    quantize_model(model, uniform("E3M4", scaling="none", norm_weight="E2M1"))
    table = quantize(model.embedding.weight.detach(), "E3M4", overflow="saturate")
    assert torch.equal(model.embedding(TOKENS), table[TOKENS])
    model.embedding(TOKENS).sum().backward()
    assert torch.equal(model.embedding.weight.grad[:24], torch.ones(24, 32))
    with torch.no_grad():
        model.rms.weight.copy_(torch.linspace(0.1, 1.7, 32))
    x = torch.randn(4, 32)
    weight = model.rms.weight.detach()
    rounded = quantize(weight, "E2M1", amax_scale(weight, get_format("E2M1")), clamp=True)
    expected = nn.functional.rms_norm(x, (32,), rounded, None)
    assert torch.equal(model.rms(x), expected)
    model.rms(x).sum().backward()
    assert model.rms.weight.grad is not None
    assert model.rms._parameters["weight"] is model.rms.weight


class Scaled(nn.Module):
    """A foreign linear layer whose weight is stored [in, out]."""

    def __init__(self, n, m):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), None

    def forward(self, x):
        return x @ self.weight


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def test_foreign_classes_are_swapped_as_they_multiply_or_as_registered():
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(8, 12), Doubled(12, 6), Renamed(6, 6))
    manifest = quantize_model(copy.deepcopy(model), uniform("E4M3"))
    assert set(manifest.swapped) == {"0", "1", "2"}  # a layer of one's own by what its forward multiplies
    register_layer(Scaled, "linear", transposed=True)
    twin = nn.Linear(8, 12, bias=False)
    with torch.no_grad():
        twin.weight.copy_(model[0].weight.t())
    quantize_model(model, uniform("E4M3", grad="E5M2"))
    quantize_model(twin, uniform("E4M3", grad="E5M2"))
    x = torch.randn(5, 8)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    dy = torch.randn(5, 12)
    model[0](a).backward(dy)
    twin(b).backward(dy)
    torch.testing.assert_close(model[0](x), twin(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].weight.grad.t(), twin.weight.grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(RecipeError, match="registered as"):
        register_layer(Scaled, "linear")
    with pytest.raises(RecipeError, match="'dense' is not one of linear, conv"):
        register_layer(Scaled, "dense")


def test_encoder_layers_do_not_bypass_their_quantized_layers_in_evaluation():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        plain = model.eval()(x)
        quantize_model(model, uniform("E2M1"))
        evaluated = model(x)
        torch.testing.assert_close(evaluated, model.train()(x), rtol=1e-4, atol=1e-4)
        assert (evaluated - plain).abs().max() > 1e-2
        restore_model(model)
        assert torch.equal(model.eval()(x), plain)


ERRORS = {
    "no match": (
        lambda m: quantize_model(m, "E4M3", exclude=["lm_haed"]),
        r"'lm_haed' matches no module; closest names: lm_head",
    ),
    "override": (
        lambda m: quantize_model(m, "x:E4M3 w:E4M3 dy:E4M3; name='blocks.7.up': FP32"),
        r"override's name 'blocks.7.up' matches no module; closest names: blocks.\d.up",
    ),
    "include": (lambda m: quantize_model(m, "E4M3", include=["blocks.7*"]), r"closest names: blocks\.\d"),
    "nothing left": (lambda m: quantize_model(m, "FP32"), "no layer of Model is left to quantize"),
    "too wide": (
        lambda m: quantize_model(m.bfloat16(), "FP16"),
        r"FP16 has 10 mantissa bits.*torch.bfloat16 parameters with 7",
    ),
    "grid in bf16": (lambda m: quantize_model(m.bfloat16(), uniform("E4M3", storage="grid")), "use float32 parameters"),
    "blocks": (
        lambda m: quantize_model(m, uniform("MXFP8", whole_blocks=True)),
        r"'lm_head': out_features 40 is not a multiple of MXFP8's block 32; drop whole_blocks from the recipe, exclude the layer, pad it to 64, or use",
    ),
    "position": (
        lambda m: quantize_model(m, Recipe(None, (Override(layer_recipe("E4M3"), position="after_norm"),))),
        "pass example",
    ),
    "two overrides": (
        lambda m: quantize_model(
            m, Recipe(None, (Override(layer_recipe("E4M3"), name="*up"), Override(layer_recipe("E5M2"), type="Linear")))
        ),
        "two recipes claim layer 'blocks.0.up'",
    ),
    "twice": (
        lambda m: (quantize_model(m, "E4M3", include=["blocks.0"]), quantize_model(m, "E5M2")),
        "two recipes claim layer 'blocks.0.up': it is quantized",
    ),
    "tied": (
        lambda m: quantize_model(m, uniform("E4M3", storage="grid"), exclude=["lm_head"]),
        "'embedding' and 'lm_head' share one weight but store it differently",
    ),
    "format": (lambda m: quantize_model(m, "E4M3x"), "E4M3x"),
}


@pytest.mark.parametrize(("act", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_value_the_limit_and_the_remedy_and_change_nothing(act, message):
    model = Model()
    with pytest.raises(AltGradError, match=message):
        act(model)
    swapped = [name for name, m in model.named_modules() if "_altgrad" in m.__dict__]
    assert swapped == [] or swapped == ["blocks.0.up", "blocks.0.down"]


def test_two_calls_on_disjoint_layers():
    model = Model()
    quantize_model(model, "E4M3", include=["blocks.0"])
    quantize_model(model, "E5M2", include=["blocks.1"])
    assert str(model.blocks[0].up.quantization.recipe) == "x:E4M3 w:E4M3 dy:E4M3"
    assert str(model.blocks[1].up.quantization.recipe) == "x:E5M2 w:E5M2 dy:E5M2"


def test_block_sizes_that_do_not_divide_the_tokens_are_refused_at_the_backward():
    layer = nn.Linear(32, 32)
    quantize_model(layer, uniform("MXFP8", whole_blocks=True))
    with pytest.raises(AltGradError, match="32"):
        layer(torch.randn(20, 32)).sum().backward()


def test_global_settings_are_left_as_found():
    from torch.backends import mkldnn

    before = (
        mkldnn.matmul.fp32_precision,
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.random.get_rng_state(),
    )
    model = Model()
    quantize_model(model, uniform("E4M3", rounding="stochastic"))
    state = torch.random.get_rng_state()
    model(TOKENS).sum().backward()
    assert torch.equal(state, torch.random.get_rng_state())  # no global generator is drawn from
    assert before[:3] == (mkldnn.matmul.fp32_precision, torch.get_num_threads(), torch.is_grad_enabled())


# -- models that have no values yet, and other ways to record them ---------------------------------------------------------


@pytest.mark.parametrize("recipe", [uniform("E4M3"), uniform("E3M4", storage="grid"), uniform("MXFP8")], ids=str)
def test_a_model_made_on_the_meta_device_is_quantized_there_and_filled_later(recipe):
    """The first rounding to the grid waits for values; a forward on the meta device gives shapes and dtypes."""

    def layers():
        return nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Linear(9, 6), nn.LayerNorm(6), nn.Embedding(4, 8))

    def forward(model, x):
        return model[3](torch.tensor([0, 2], device=x.device)).sum() + model[2](model[1](model[0](x)))

    with torch.device("meta"):
        model = layers()
    quantize_model(model, recipe)
    y = forward(model, torch.empty(2, 8, 9, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 8, 6), torch.float32)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in model:
        layer.reset_parameters()
    torch.manual_seed(0)
    plain = layers()
    quantize_model(plain, recipe)
    x = torch.randn(2, 8, 9)
    assert torch.equal(model[1](x), plain[1](x))
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        forward(one, x).square().sum().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lazy_layers_are_quantized_once_their_shape_is_known():
    lazy = [nn.LazyLinear(6), nn.LazyConv1d(4, 3)]
    for layer in lazy:
        with pytest.raises(
            RecipeError, match=rf"layer '0' is a {type(layer).__name__} whose shape is not known yet.*example="
        ):
            quantize_model(nn.Sequential(layer, nn.Linear(4, 4)), "E4M3")
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU())
    x = torch.randn(3, 5)
    assert quantize_model(model, "E2M1", example=(x,)).swapped["0"].type == "Linear"
    with torch.no_grad():
        assert (model(x) - restore_model(copy.deepcopy(model))(x)).abs().max() > 1e-3


def test_recordings_of_a_quantized_model_hold_its_arithmetic_or_are_refused():
    """fx keeps the layers as leaves; torch.jit would bake in values, so it is refused with what works."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    quantize_model(model, "E2M1")
    x, other = torch.randn(3, 8), torch.randn(5, 8)
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(other), model(other))
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    late = torch.fx.symbolic_trace(restore_model(copy.deepcopy(model)))
    assert set(quantize_model(late, "E2M1").swapped) == {"0", "2"}
    assert torch.equal(late(x), model(x))
    for record in (lambda: torch.jit.trace(model, x), lambda: torch.jit.script(model)):
        with (
            pytest.warns(DeprecationWarning, match="torch.jit"),
            pytest.raises(RecipeError, match=r"torch\.export\.export or torch\.compile"),
        ):
            record()
