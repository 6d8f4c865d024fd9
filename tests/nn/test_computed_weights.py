"""Layers whose weight is computed from other parameters: what is multiplied is the quantized computed weight."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm

from altgrad.errors import RecipeError
from altgrad.monitor import Monitor
from altgrad.nn import Override, change_format, layer_recipe, quant_state, quantize_model, restore_model, uniform
from altgrad.quantization import amax_scale, get_format, quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
WEIGHT_ALONE = layer_recipe("E4M3", activation=None, grad=None, norm_weight="E4M3")


class LowRank(nn.Module):
    """w + b a, as adapters do."""

    def __init__(self, layer, name="weight"):
        super().__init__()
        rows, *rest = getattr(layer, name).shape
        self.a, self.b = nn.Parameter(torch.randn(2, *rest)), nn.Parameter(torch.randn(rows, 2))

    def forward(self, w):
        return w + torch.tensordot(self.b, self.a, 1)


def low_rank(layer):
    parametrize.register_parametrization(layer, "weight", LowRank(layer))
    return layer


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "low rank": low_rank,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "embedding": (lambda: nn.Embedding(8, 6), None),
    "bag": (lambda: nn.EmbeddingBag(8, 6), None),
}
INDEX = torch.tensor([[1, 7, 1], [0, 2, 3]])


def on_grid(x, fmt="E4M3"):
    return quantize(x.detach(), fmt, amax_scale(x.detach(), get_format(fmt)), clamp=True)


def straight(w):
    """Q(w), with the gradient of w."""
    return w + (on_grid(w) - w).detach()


def product(layer, x, w):
    """What the layer makes of x with that weight."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, w)
    if isinstance(layer, nn.EmbeddingBag):
        return F.embedding_bag(x, w)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, w, layer.bias, padding=1)
    return F.linear(x, w, layer.bias) if isinstance(layer, nn.Linear) else F.conv_transpose1d(x, w, layer.bias)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("made", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_computed_weight_is_quantized_and_its_originals_are_trained(made, shape, way):
    torch.manual_seed(0)
    model = nn.Sequential(way(made()))
    x = INDEX if shape is None else torch.randn(shape)
    with torch.no_grad():
        model.eval()(x)  # spectral_norm's vectors stay as they are now, and hooks compute the weight
    twin = copy.deepcopy(model)
    names, before = list(model.state_dict()), dict(model.named_parameters())
    manifest = quantize_model(model, WEIGHT_ALONE)
    assert list(manifest.swapped) == ["0"]
    assert list(model.state_dict()) == names
    assert all(before[name] is p for name, p in model.named_parameters())
    y = model(x)
    twin(x)  # the older ways compute the weight in a hook
    wanted = product(twin[0], x, straight(twin[0].weight))
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(y, twin(x))
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted.backward(dy)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)
    restore_model(model)
    assert torch.equal(model(x), twin(x))
    assert type(model[0]).__mro__[1:] == type(twin[0]).__mro__[1:]
    assert list(model.state_dict()) == names
    with torch.no_grad():
        model(x)  # torch cannot copy weights that hooks have computed with gradients
        assert torch.equal(copy.deepcopy(model)(x), twin(x))


@pytest.mark.parametrize("way", [WAYS["weight_norm"], WAYS["old weight_norm"], WAYS["low rank"]])
def test_a_computation_may_be_taken_away_or_added_while_the_layer_is_quantized(way):
    torch.manual_seed(0)
    layer = way(nn.Linear(6, 4))
    quantize_model(layer, uniform("E4M3"))
    x = torch.randn(3, 6)
    y = layer(x)
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    else:
        remove_weight_norm(layer)
    assert type(layer).__name__ == "QuantizedLinear"
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer(x), y)
    way(layer)
    torch.testing.assert_close(layer(x), y) if way is not low_rank else layer(x).sum().backward()
    restore_model(layer)
    layer(x).sum().backward()
    assert not any(cls.__name__.startswith("Quantized") for cls in type(layer).__mro__)
    assert not isinstance(layer._parameters.get("weight"), nn.Parameter)


def test_layers_with_computed_weights_train_with_clock_copies_histories_and_monitor():
    torch.manual_seed(0)
    model = nn.Sequential(WAYS["weight_norm"](nn.Linear(8, 16)), nn.ReLU(), WAYS["spectral_norm"](nn.Linear(16, 4)))
    quantize_model(model, uniform("E4M3", rounding="stochastic", scaling="delayed"))
    for one in (model, copy.deepcopy(model)):
        records, losses = [], []
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2)
        monitor = Monitor(one, optimizer, schedule=1, sink=records.extend)
        x = torch.randn(32, 8)
        for _ in range(15):
            optimizer.zero_grad()
            loss = (one(x) - x[:, :4].sin()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        monitor.close()
        state = quant_state(one)
        assert state["clocks"][0]["step"] == 15
        assert state["operands"]["0"]["weight.forward"]["window"].numel() == 15
        assert losses[-1] < 0.9 * losses[0]
        assert ("0", "weight") in {(record["layer"], record["role"]) for record in records}
    change_format(model, "E5M2")
    assert str(model[0].quantization.recipe).startswith("x:E5M2")
    with pytest.raises(RuntimeError, match="only supported through state_dict"):  # torch's own
        pickle.dumps(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
def test_compiled_code_quantizes_computed_weights():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(WAYS["weight_norm"](nn.Linear(6, 4)), low_rank(nn.Linear(4, 4)))
    quantize_model(model, uniform("E4M3"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    y = compiled(x)
    assert torch.equal(y, model(x))
    y.sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for grad, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-5, atol=1e-6)


def test_grid_storage_of_a_computed_weight_is_refused_with_the_remedy():
    recipe = uniform("E4M3", storage="grid")
    for way in WAYS.values():
        model = nn.Sequential(way(nn.Linear(8, 8)), nn.Linear(8, 4))
        with pytest.raises(
            RecipeError, match=r"layer '0': grid storage in E4M3 needs a weight that is stored.*override"
        ):
            quantize_model(model, recipe)
        assert type(model[1]) is nn.Linear
        assert list(quantize_model(model, recipe, exclude=["0"]).swapped) == ["1"]
        model = nn.Sequential(way(nn.Linear(8, 8)), nn.Linear(8, 4))
        quantize_model(model, uniform("E4M3", storage="grid", overrides=(Override(layer_recipe("E4M3"), name="0"),)))
        model(torch.randn(2, 8)).sum().backward()


def test_a_computed_weight_of_a_module_that_multiplies_by_function_calls_is_quantized():
    """nn.MultiheadAttention with a low-rank sum as its projection, against one with that sum as its weight."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2)
    parametrize.register_parametrization(model, "in_proj_weight", LowRank(model, "in_proj_weight"))
    plain = nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        plain.in_proj_weight.copy_(model.in_proj_weight)
        plain.out_proj.weight.copy_(model.out_proj.weight)
    x = torch.randn(5, 8)
    for example in (None, (x, x, x)):
        one, other = copy.deepcopy(model), copy.deepcopy(plain)
        manifest = quantize_model(one, uniform("E4M3"), example=example)
        assert set(manifest.swapped) == {"in_proj_weight", "out_proj"}
        assert all("it computes a layer's weight" in reason for reason in manifest.skipped.values())
        quantize_model(other, uniform("E4M3"))
        for training in (True, False):
            y = one.train(training)(x, x, x)[0]
            assert torch.equal(y, other.train(training)(x, x, x)[0])
        y.sum().backward()
        assert one.parametrizations.in_proj_weight[0].a.grad.abs().sum() > 0
        assert torch.equal(restore_model(one)(x, x, x)[0], plain.eval()(x, x, x)[0])


def test_a_speech_models_positional_convolution_is_quantized():
    """The client whose model was refused as a whole: Wav2Vec2's convolution has a weight_norm."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,),
        conv_kernel=(10,),
        conv_stride=(5,),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=1,
    )
    model = transformers.Wav2Vec2Model(config).train()
    manifest = quantize_model(model, uniform("E4M3"))
    assert "encoder.pos_conv_embed.conv" in manifest.swapped
    model(torch.randn(1, 400)).last_hidden_state.sum().backward()
    assert model.encoder.pos_conv_embed.conv.parametrizations.weight.original0.grad is not None
