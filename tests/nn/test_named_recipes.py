"""Recipes by name: their layers against the formulas written out, ablations, and torchao's own bits."""

import math
from dataclasses import astuple

import pytest
import torch
from torch import nn

from altgrad.errors import AltGradError, RecipeError
from altgrad.nn import NAMED, Recipe, functional, load_quant_state, quant_state, quantize_model, recipe
from altgrad.nn.layer_error import Sizes, layer_error
from altgrad.nn.recipe.ingredients import INGREDIENTS
from altgrad.quantization import (
    ACCUMULATORS,
    Accumulator,
    accumulate,
    block_format,
    block_scales,
    get_format,
    quantize,
)
from altgrad.quantization.accumulation import accumulate_terms, terms
from altgrad.quantization.hadamard import Hadamard
from altgrad.quantization.inverse_scaling import inverse_scale, multiply_blocks

E4M3 = get_format("E4M3")


# -- layers against the formulas written out ----------------------------------------------------------------------------


def call(name: str | Recipe, steps: int = 1, shape=(20, 48, 17)) -> dict[str, torch.Tensor]:
    """x, w, dy and what a layer under the recipe makes of them (of the last of some steps with equal tensors)."""
    tokens, inner, outer = shape
    g = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    layer = nn.Linear(inner, outer)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outer, inner, generator=g) * torch.exp2(torch.randn(outer, 1, generator=g)))
    x = torch.randn(tokens, inner, generator=g) * torch.exp2(2 * torch.randn(tokens, 1, generator=g))
    dy = torch.randn(tokens, outer, generator=g) * 1e-3
    model = nn.Sequential(layer)
    quantize_model(model, recipe(name) if isinstance(name, str) else name)
    for _ in range(steps):
        model.zero_grad()
        given = x.clone().requires_grad_()
        y = model(given)
        y.backward(dy)
    return {
        "x": x,
        "w": layer.weight.detach(),
        "b": layer.bias.detach(),
        "dy": dy,
        "y": y,
        "dx": given.grad,
        "dw": layer.weight.grad,
    }


def inverse(x: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes' values, what dequantizes them) under s = fl(max / amax)."""
    s = torch.tensor(get_format(fmt).max, dtype=torch.float32) / x.abs().max()
    return quantize(x * s, fmt, overflow="saturate"), 1 / s


@pytest.mark.parametrize("name", ["te_current", "ao_tensorwise", "nanochat"])
def test_per_tensor_recipes_are_their_formulas(name):
    found = call(name)
    (x, sx), (w, sw), (dy, sdy) = inverse(found["x"], "E4M3"), inverse(found["w"], "E4M3"), inverse(found["dy"], "E5M2")
    fast, slow = "hopper_fp8", "hopper_fp8_promoted"
    y = accumulate(x, w.T, fast, formats=("E4M3", "E4M3"), kernel="reference") * sx * sw + found["b"]
    dx = accumulate(dy, w, slow, formats=("E5M2", "E4M3"), kernel="reference") * sdy * sw
    dw = accumulate(dy.T, x, slow, formats=("E5M2", "E4M3"), kernel="reference") * sdy * sx
    assert torch.equal(found["y"], y)
    assert torch.equal(found["dx"], dx)
    assert torch.equal(found["dw"], dw)


def test_delayed_scales_are_one_in_the_first_region_and_then_those_of_the_amax():
    first = call("te_delayed")
    plain = [
        quantize(first[key], fmt, overflow="saturate") for key, fmt in (("x", "E4M3"), ("w", "E4M3"), ("dy", "E5M2"))
    ]
    y = accumulate(plain[0], plain[1].T, "hopper_fp8", formats=("E4M3", "E4M3"), kernel="reference")
    dw = accumulate(plain[2].T, plain[0], "hopper_fp8_promoted", formats=("E5M2", "E4M3"), kernel="reference")
    assert torch.equal(first["y"], y + first["b"])
    assert torch.equal(first["dw"], dw)
    second, current = call("te_delayed", steps=2), call("te_current")
    assert all(torch.equal(second[key], current[key]) for key in ("y", "dx", "dw")), "the tensors did not change"


def test_a_layers_regions_are_saved_and_loaded():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    quantize_model(model, recipe("te_delayed"))
    model(x).sum().backward()
    state = quant_state(model)
    other = nn.Sequential(nn.Linear(8, 8))
    other.load_state_dict(model.state_dict())
    quantize_model(other, recipe("te_delayed"))
    assert not torch.equal(other(x), model(x))
    load_quant_state(other, state)
    load_quant_state(model, state)
    assert torch.equal(other(x), model(x))


def mx(x: torch.Tensor, fmt: str, axis: int = -1, **options) -> torch.Tensor:
    return quantize(x, fmt, axis=axis, pad=True, **options)


@pytest.mark.parametrize("name", ["te_mxfp8", "ao_mxfp8"])
def test_mxfp8_recipes_quantize_along_each_products_own_axis(name):
    found = call(recipe(name).without("accumulator"))
    x, w, dy = (lambda axis, key=key: mx(found[key], "MXFP8:ceil", axis) for key in ("x", "w", "dy"))
    assert torch.allclose(found["y"], x(1) @ w(1).T + found["b"], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found["dx"], dy(1) @ w(0), rtol=1e-5, atol=1e-9)
    assert torch.allclose(found["dw"], dy(0).T @ x(0), rtol=1e-5, atol=1e-9)


def test_block_exponents_enter_blackwells_sums():
    found = call("te_mxfp8")
    grid = get_format("E4M3")
    sides = []
    for key in ("x", "w"):
        scales = block_scales(torch.nn.functional.pad(found[key], (0, 16)), "MXFP8:ceil").repeat_interleave(32, 1)[
            :, :48
        ]
        sides.append(terms(mx(found[key], "MXFP8:ceil") / scales, grid, multipliers=scales))
    y = accumulate_terms(*sides, ACCUMULATORS["blackwell_fp8"], "reference").float() + found["b"]
    assert torch.equal(found["y"], y)
    assert not torch.equal(found["y"], call(recipe("te_mxfp8").without("accumulator"))["y"])


@pytest.mark.parametrize("name", ["te_block", "deepseek_v3"])
def test_blocks_of_128_are_promoted_with_their_scales(name):
    found = call(name, shape=(6, 300, 9))
    spec = recipe(name).default.forward
    padded = [torch.nn.functional.pad(found[key], (0, 84, 0, -len(found[key]) % 128)) for key in ("x", "w")]
    sides = []
    for x, one, rows in zip(padded, (spec.input, spec.weight), (6, 9)):
        scales = block_scales(x, one.format)
        down = x.shape[0] // scales.shape[0]
        scales = scales.repeat_interleave(down, 0)
        payload = quantize(x, one.format) / scales.repeat_interleave(128, 1)
        payload = quantize(payload, "E4M3")  # the quotient of a product is not always exact
        sides.append(terms(payload[:rows, :300], E4M3, scales=scales[:rows]))
    y = accumulate_terms(*sides, spec.accumulator, "reference").float() + found["b"]
    assert torch.equal(found["y"], y)


def test_deepseeks_inputs_are_quantized_twice_for_the_weight_gradient():
    bare = recipe("deepseek_v3").without("accumulator")
    found, once = call(bare), call(bare.without("requantization"))
    x = mx(mx(found["x"], "E4M3/128:FP32"), "E4M3/128:FP32", 0)
    dy = mx(found["dy"], "E4M3/128:FP32", 0)
    assert torch.allclose(found["dw"], dy.T @ x, rtol=1e-5, atol=1e-9)
    assert torch.equal(found["y"], once["y"])
    assert not torch.equal(found["dw"], once["dw"])


def test_rows_and_columns_have_scales_of_their_own_in_torchaos_rowwise():
    found = call("ao_rowwise")

    def rows(x):
        s = inverse_scale(x.abs().amax(1, keepdim=True), 448.0, power_of_two=True)
        return quantize(x * s, "E4M3", overflow="saturate"), 1 / s

    (x, sx), (w, sw) = rows(found["x"]), rows(found["w"])
    y = accumulate(x, w.T, "hopper_fp8", formats=("E4M3", "E4M3"), kernel="reference") * sx * sw.T + found["b"]
    assert torch.equal(found["y"], y)
    (dy, sdy), (x, sx) = rows(found["dy"].T), rows(found["x"].T)
    dw = accumulate(dy, x.T, "hopper_fp8_promoted", formats=("E4M3", "E4M3"), kernel="reference") * sdy * sx.T
    assert torch.equal(found["dw"], dw)


def test_high_precision_weight_gradients_are_plain():
    for name in ("ao_rowwise_gw_hp", "ao_mxfp8_wgrad_hp"):
        found = call(name)
        assert torch.allclose(found["dw"], found["dy"].T @ found["x"], rtol=1e-5, atol=1e-9)


def test_nvfp4_layers_are_their_formulas_but_for_chance():
    bare = recipe("nvfp4_te").without("accumulator", "stochastic_rounding")
    found = call(bare)
    rows, tile = get_format("NVFP4"), block_format("E2M1", (16, 16), "E4M3", tensor_scale=True)
    w = multiply_blocks(found["w"], tile).values
    y = multiply_blocks(found["x"], rows).values @ w.T + found["b"]
    assert torch.allclose(found["y"], y, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found["dx"], multiply_blocks(found["dy"], rows).values @ w, rtol=1e-5, atol=1e-8)
    mixed = Hadamard(16, "fixed", bfloat16=True)
    signs = mixed.draw(None, torch.device("cpu"))
    dy, x = (multiply_blocks(mixed(found[key].T, signs), rows).values for key in ("dy", "x"))
    assert torch.allclose(found["dw"], dy @ x.T, rtol=1e-4, atol=1e-7)


def test_stochastic_gradients_have_the_right_mean():
    bare = recipe("nvfp4_te").without("accumulator")
    g = torch.Generator().manual_seed(3)
    x, dy = torch.randn(64, 16, generator=g), torch.randn(64, 16, generator=g)
    layer = nn.Linear(16, 16, bias=False)
    w = multiply_blocks(layer.weight.detach(), block_format("E2M1", (16, 16), "E4M3", tensor_scale=True)).values
    means = []
    for seed in range(2):
        total = torch.zeros_like(x)
        model = nn.Sequential(nn.Linear(16, 16, bias=False))
        model[0].weight.data.copy_(layer.weight.detach())
        quantize_model(model, bare, seed=seed)
        for _ in range(200):
            given = x.clone().requires_grad_()
            model(given).backward(dy)
            total += given.grad
        means.append(total / 200)
    error = (means[0] - dy @ w).abs().mean()
    single = (multiply_blocks(dy, get_format("NVFP4")).values @ w - dy @ w).abs().mean()
    assert error < single / 4
    assert not torch.equal(means[0], means[1])


def test_a_random_transform_changes_from_use_to_use_and_not_the_product():
    text = "hadamard(size=32,signs='random',bfloat16=False)"
    made = Recipe.from_dict(f"x:FP16|FP16({text}) w:FP16|FP16({text}) dy:FP16({text})")
    found, again = call(made), call(made, steps=2)
    for key, plain in (("dx", found["dy"] @ found["w"]), ("dw", found["dy"].T @ found["x"])):
        assert torch.allclose(found[key], plain, rtol=1e-2, atol=2e-3 * plain.abs().max())
        assert not torch.equal(found[key], again[key])


def test_a_forward_mixed_and_requantized_is_mixed_back():
    mixed = "hadamard(size=32,signs='none',bfloat16=False)"
    made = Recipe.from_dict(f"x:FP16({mixed})|FP16(requantized) w:FP16({mixed})|FP16(requantized) dy:FP16")
    found = call(made)
    for key, plain in (
        ("y", found["x"] @ found["w"].T + found["b"]),
        ("dx", found["dy"] @ found["w"]),
        ("dw", found["dy"].T @ found["x"]),
    ):
        assert torch.allclose(found[key], plain, rtol=1e-2, atol=2e-3 * plain.abs().max()), key


def test_evaluation_is_plain_where_the_recipe_says_so():
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(8, 16)
    plain = model(x)
    quantize_model(model, recipe("nanochat"))
    assert not torch.equal(model(x), plain)
    model.eval()
    assert torch.equal(model(x), plain)


def test_transposed_weights_are_read_as_they_lie():
    w, x = torch.randn(24, 16), torch.randn(8, 24)
    spec = recipe("te_current").default
    assert torch.equal(functional.matmul(x, w, recipe=spec), functional.linear(x, w.T.contiguous(), recipe=spec))


@pytest.fixture(scope="module")
def torchao():
    """torchao's own casts on the CPU; it warns while it is imported, of extensions built for other Pythons."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import config, float8_scaling_utils, float8_training_tensor
        from torchao.prototype.mx_formats import config as mx_config
        from torchao.prototype.mx_formats import mx_tensor
    plain = float8_training_tensor.LinearMMConfig()
    return {
        "tensor": lambda x, dtype: float8_scaling_utils.hp_tensor_to_float8_dynamic(x, dtype, plain),
        "rows": lambda x, dtype: float8_scaling_utils.hp_tensor_to_float8_dynamic(
            x,
            dtype,
            plain,
            scaling_granularity=config.ScalingGranularity.AXISWISE,
            axiswise_dim=-1,
            round_scales_to_power_of_2=True,
        ),
        "mx": lambda x: mx_tensor.to_mx(x, torch.float8_e4m3fn, 32, mx_config.ScaleCalculationMode.RCEIL),
    }


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_the_bits_are_torchaos(torchao, spread):
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(256, 256, generator=g) * torch.exp2(spread * torch.randn(256, 1, generator=g))).bfloat16().float()
    for dtype, fmt in ((torch.float8_e4m3fn, "E4M3"), (torch.float8_e5m2, "E5M2")):
        theirs = torchao["tensor"](x, dtype)
        s = inverse_scale(x.abs().max(), get_format(fmt).max, floor=1e-12)
        assert theirs._scale == s
        assert torch.equal(theirs._data.float(), quantize(x * s, fmt, overflow="saturate"))
    theirs = torchao["rows"](x, torch.float8_e4m3fn)
    s = inverse_scale(x.abs().amax(1, keepdim=True), 448.0, power_of_two=True, floor=1e-12)
    assert torch.equal(theirs._scale.flatten(), s.flatten())
    assert torch.equal(theirs._data.float(), quantize(x * s, "E4M3", overflow="saturate"))
    scales, data = torchao["mx"](x)
    powers = torch.exp2(scales.view(torch.uint8).float() - 127).repeat_interleave(32, 1)
    assert torch.equal(data.float() * powers, quantize(x, "MXFP8:ceil"))


# -- values, text, ablations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe_reads_back_from_every_spelling(name):
    made = recipe(name)
    assert Recipe.from_dict(name) == made
    assert Recipe.from_dict(made.text) == made
    assert Recipe.from_dict(made.to_dict()) == made
    assert Recipe.from_yaml(made.to_yaml()) == made
    row = NAMED[name]
    assert row.source
    assert row.certainty in ("code", "one gap", "report")
    assert (row.certainty == "code") or row.gaps


@pytest.mark.parametrize("name", NAMED)
def test_each_ingredient_can_be_removed_alone(name):
    made = recipe(name)
    for ingredient in made.ingredients:
        less = made.without(ingredient)
        assert less != made
        assert ingredient not in less.ingredients
        assert Recipe.from_dict(less.text) == less
        assert set(less.ingredients) < set(made.ingredients) or ingredient == "delayed_scales"
    found = call(made)
    assert all(found[key].isfinite().all() for key in ("y", "dx", "dw"))


def test_an_ablation_in_text_is_the_ablation_as_a_value():
    text = "nvfp4_te without hadamard, tiles; name='blocks.3.*': FP32"
    made = recipe("nvfp4_te").without("hadamard").without("tiles").with_(high="blocks.3.*")
    assert Recipe.from_dict(text) == made
    assert made.for_layer("blocks.3.mlp", "Linear") is None
    assert made.for_layer("blocks.2.mlp", "Linear") is not None


def test_ingredients_are_added_as_values():
    base = Recipe.from_dict("E4M3")
    made = base.with_(accumulator=["hopper_fp8", None, "hopper_fp8_promoted"], stochastic_rounding="grad_output")
    assert made.text == "x:E4M3 w:E4M3 dy:E4M3(stochastic) sum:hopper_fp8|float32|hopper_fp8_promoted"
    assert made.without("accumulator", "stochastic_rounding") == base
    assert base.with_(plain_evaluation=True, hadamard={"size": 16}).ingredients == ["hadamard", "plain_evaluation"]
    assert base.with_(accumulator=Accumulator(4, 8)).default.forward.accumulator.fraction_bits == 8


def test_promotion_is_what_hopper_lacks_without_it():
    less = recipe("te_current").without("promotion").default
    assert all(str(one.accumulator) == "hopper_fp8" for one in less.gemms.values())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda: recipe("te_mxfp9"), "did you mean"),
        (lambda: recipe("te_mxfp8").without("hadamard"), "it has accumulator"),
        (lambda: recipe("te_mxfp8").without("salt"), "no ingredient is called"),
        (lambda: recipe("te_mxfp8").with_(salt=1), "with_ takes"),
        (lambda: recipe("te_mxfp8").with_(high=3), "give a name"),
        (lambda: recipe("te_mxfp8").with_(accumulator=["exact"]), "1 accumulators"),
        (lambda: recipe("te_mxfp8").with_(accumulator="hopper"), "not known"),
        (lambda: recipe("te_mxfp8").with_(accumulator="deepgemm"), "promoted every 128"),
        (lambda: recipe("te_mxfp8").with_(stochastic_rounding="bias"), "no role"),
        (lambda: Recipe.from_dict("x:E4M3 w:E4M3 dy:FP32 sum:hopper_fp8"), "no format"),
        (lambda: Recipe.from_dict("x:E4M3(amax(axis=1)) w:E4M3 dy:E4M3 sum:hopper_fp8"), "vary along"),
        (lambda: Recipe.from_dict("x:E4M3/128:FP32 w:E4M3 dy:E4M3 sum:hopper_fp8"), "no powers of two"),
        (lambda: Recipe.from_dict("x:E4M3(requantized) w:E4M3 dy:E4M3"), "drop requantize"),
        (lambda: Recipe.from_dict("x:E4M3 w:E4M3 dy:E4M3(hadamard(size=16))"), "same transform"),
        (lambda: Recipe.from_dict("x:E4M3 w:E4M3 dy:E4M3(hadamard(size=15))"), "power of two"),
        (lambda: Recipe.from_dict("x:E4M3(amax(arithmetic='twice')) w:E4M3 dy:E4M3"), "arithmetic"),
        (lambda: Recipe.from_dict("x:MXFP8(block(arithmetic='multiply')) w:E4M3 dy:E4M3"), "NVFP4"),
        (lambda: Recipe.from_dict("x:E4M3 w:E4M3 dy:E4M3 sum:exact|exact"), "2 accumulators"),
        (lambda: Recipe.from_dict("x:E4M3 w:E4M3 dy:E4M3 eval:E5M2"), "eval:FP32"),
        (lambda: Recipe.from_dict("nvfp4_te without salt"), "no ingredient"),
        (
            lambda: quantize_model(nn.Sequential(nn.Conv2d(1, 1, 1)), "x:E4M3 w:E4M3 dy:E4M3 sum:hopper_fp8"),
            "name='0': FP32",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_remedy(what, said):
    with pytest.raises(AltGradError, match=said):
        what()


def test_what_emulation_does_not_know_is_refused():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8, requires_grad=True)
    quantize_model(model, recipe("te_current"))
    with pytest.raises(RecipeError, match="eager"):
        torch.func.vmap(model)(x)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_every_ingredient_says_what_it_is():
    assert all(one.says for one in INGREDIENTS.values())


def test_reports_call_a_recipe_by_its_name():
    assert recipe("te_block").label == "te_block"
    assert (
        recipe("nvfp4_te").without("hadamard").with_(high="a.*").label == "nvfp4_te without hadamard; name='a.*': FP32"
    )
    assert Recipe.from_dict("E4M3").label == "E4M3"
    for name in (
        "nvfp4_te without accumulator, tiles",
        "te_current without promotion",
        "te_current without accumulator",  # and not te_delayed without two things
    ):
        assert Recipe.from_dict(name).label == name
        assert Recipe.from_dict(Recipe.from_dict(name).label) == Recipe.from_dict(name)


@pytest.mark.parametrize("name", NAMED)
def test_the_command_line_says_all_of_a_recipe(name, capsys):
    from altgrad.cli import recipe_pages

    recipe_pages.print_recipe(name)
    said = " ".join(capsys.readouterr().out.split())
    row = NAMED[name]
    for text in (row.title, row.source, *row.gaps, *row.beyond, *row.recipe.ingredients):
        assert " ".join(text.split()) in said
    assert said.count("sum") >= 3


def test_errors_of_one_layer_rank_formats_and_sums():
    sizes = Sizes(64, 256, 32)
    fine, coarse = layer_error("E4M3", sizes), layer_error("x:E3M2 w:E3M2 dy:E3M2", sizes)
    narrow = layer_error("x:E4M3 w:E4M3 dy:E4M3 sum:accumulator(products=32,fraction_bits=4,output=E8M4)", sizes)
    assert all(a < b for a, b in zip(astuple(fine), astuple(coarse)))
    assert all(a < b for a, b in zip(astuple(fine), astuple(narrow)))
    assert layer_error("te_delayed", sizes).y == pytest.approx(layer_error("te_current", sizes).y)
    for wrong in ("512x1024", "0x1x1", "99999x99999x99999", "axbxc"):
        with pytest.raises(AltGradError):
            Sizes.parse(wrong)


def test_the_command_line_prints_and_draws_errors_of_each_ablation(capsys, tmp_path):
    from altgrad.cli import recipe_pages

    recipe_pages.print_errors("te_block", "32x128x16", tmp_path / "e.html")
    said = capsys.readouterr().out
    assert all(word in said for word in ("te_block", "without tiles", "without accumulator", "%", "figure: "))
    page = (tmp_path / "e.html").read_text()
    assert all(word in page for word in ("<svg", "without tiles", "log2 K", "--sizes 32x128x16 --figure"))
    with pytest.raises(AltGradError, match="folder that is there"):
        recipe_pages.print_errors("E4M3", "8x8x8", tmp_path / "e.html" / "f.html")


@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_laundered_and_empty_batches_pass(name):
    torch.manual_seed(0)
    layer = nn.Linear(24, 10)
    model = nn.Sequential(nn.Linear(24, 10))
    model[0].load_state_dict(layer.state_dict())
    quantize_model(model, recipe(name))
    for value in (math.inf, math.nan):
        found = []
        for one in (layer, model):
            one.zero_grad()
            torch.manual_seed(1)
            x, dy = torch.randn(5, 24), torch.ones(5, 10)
            x[2, 3] = value
            given = x.requires_grad_()
            y = one(given)
            dy[1, 1] = value
            y.backward(dy)
            found.append([t.isfinite() for t in (y, given.grad)])
        assert all(torch.equal(a, b) for a, b in zip(*found)), value
    empty = torch.randn(0, 24, requires_grad=True)
    model(empty).sum().backward()
    assert empty.grad.shape == (0, 24)
    assert model(torch.randn(2, 3, 24)).shape == (2, 3, 10)
