"""Recipes: short forms, text, YAML, overrides, printing, and the contradictions that are refused when they are built."""

import random

import pytest
import torch

from altgrad.errors import AltGradError, RecipeError
from altgrad.nn import (
    GemmRecipe,
    LayerRecipe,
    OperandSpec,
    Override,
    Recipe,
    StorageSpec,
    layer_recipe,
    quantize_model,
    uniform,
)
from altgrad.nn.recipe.reformat import reformat
from altgrad.nn.session import STATE
from altgrad.quantization import E3M4, CurrentScaling, DelayedScaling, StaticScaling

RICH = uniform(
    "E4M3",
    grad="E5M2",
    scaling=DelayedScaling(history=4, margin=1),
    storage="grid",
    storage_rounding="stochastic",
    norm_weight="E3M4",
    overrides=(
        Override(layer_recipe("E3M4", rounding="stochastic", scaling=CurrentScaling(axis=0)), name="*.mlp.*"),
        Override(layer_recipe("MXFP8"), type="Conv2d"),
        Override(layer_recipe("E2M5", scaling=StaticScaling(0.25), mask_saturated=True), position="after_norm"),
        Override(None, name="re:head|lm_head"),
    ),
)


@pytest.mark.parametrize(
    "recipe",
    [
        uniform("E4M3"),
        uniform("E4M3", weight=None),
        uniform("BF16"),
        uniform("NVFP4", grad="MXFP8"),
        RICH,
        uniform("E3M4", save_codes=True, overrides=(Override(layer_recipe("E4M3"), name="head"),)),
        Recipe(None),
    ],
    ids=["plain", "no weight", "BF16", "blocks", "rich", "saved codes", "none"],
)
def test_yaml_and_dict_round_trips(recipe, tmp_path):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert hash(Recipe.from_dict(recipe.to_dict())) == hash(recipe)


def test_short_yaml_form():
    text = """
    uniform: e4m3
    grad: fp8_e5m2
    storage: {format: E4M3, rounding: stochastic, refresh_every: 100}
    overrides:
      - {name: lm_head, recipe: null}
      - {type: Conv2d, recipe: E3M4}
    """
    recipe = Recipe.from_yaml(text)
    assert recipe.default == layer_recipe(
        "E4M3", grad="E5M2", storage=StorageSpec("E4M3", "stochastic", refresh_every=100)
    )
    assert recipe.for_layer("lm_head", "Linear") is None
    assert recipe.for_layer("body.conv", "Conv2d") == layer_recipe(E3M4)


def test_uniform_defaults_are_those_of_the_design():
    for gemm, role, spec in uniform("E4M3").default.entries():
        assert spec == OperandSpec("E4M3", "nearest_even", "saturate_finite", CurrentScaling()), (gemm, role)
    assert uniform("E4M3").default.storage is None
    assert uniform("E4M3").default.norm_weight.format is None
    assert uniform("FP32").default == uniform(None).default
    assert not uniform("FP32").default.quantizes_products


def test_printing_shows_formats_and_what_differs_from_the_defaults():
    assert str(uniform("E4M3", grad="E5M2").default) == "x:E4M3 w:E4M3 dy:E5M2"
    assert (
        str(RICH.default) == "x:E4M3(delayed(history=4,margin=1)) w:E4M3(storage) dy:E5M2(delayed(history=4,margin=1)) "
        "grid(E4M3,stochastic) norm:E3M4"
    )
    assert "name='*.mlp.*': x:E3M4(stochastic,amax(axis=0))" in str(RICH)


def gemms(**changed):
    parts = {
        "forward": GemmRecipe(input=OperandSpec("E4M3"), weight=OperandSpec("E4M3")),
        "input_grad": GemmRecipe(grad_output=OperandSpec("E4M3"), weight=OperandSpec("E4M3")),
        "weight_grad": GemmRecipe(grad_output=OperandSpec("E4M3"), input=OperandSpec("E4M3")),
    }
    return LayerRecipe(**{**parts, **changed})


CONTRADICTIONS = {
    "no format to round": (lambda: OperandSpec(None, "stochastic"), "name a format"),
    "no code for inf": (lambda: uniform("E3M4", overflow="inf"), "E3M4 has no code for inf.*saturate"),
    "no code for nan": (lambda: OperandSpec("E2M5", overflow="nan"), "E2M5 has no code for nan"),
    "mask under amax": (lambda: uniform("E4M3", mask_saturated=True), "masks nothing"),
    "mask of a gradient": (
        lambda: gemms(
            input_grad=GemmRecipe(
                grad_output=OperandSpec("E4M3", scaling="none", mask_saturated=True), weight=OperandSpec()
            )
        ),
        "input and weight operands only",
    ),
    "scale format": (lambda: uniform("E8M0"), "without zero"),
    "E0 without subnormals": (lambda: uniform("E0M7", subnormals=False), "uniform grid is all subnormals"),
    "random bits": (lambda: OperandSpec("E4M3", "stochastic", random_bits=40), "40 is outside 1..32"),
    "unknown scaling": (lambda: uniform("E4M3", scaling="absmax"), "'absmax' is not one of amax, delayed"),
    "static without scale": (lambda: uniform("E4M3", scaling="static"), "needs scale"),
    "block with amax": (lambda: OperandSpec("MXFP8", scaling="delayed"), "find their own block scales"),
    "wrong operand": (
        lambda: gemms(forward=GemmRecipe(input=OperandSpec(), grad_output=OperandSpec())),
        "forward names grad_output, input; its operands are input and weight",
    ),
    "grid without format": (lambda: uniform("E4M3", weight=None, storage="grid"), "needs a weight format"),
    "grid in blocks": (lambda: StorageSpec("MXFP8"), "scalar format"),
    "two grids": (lambda: gemms(storage=StorageSpec("E4M3")), "two different grids.*storage"),
    "storage scaling without storage": (
        lambda: gemms(forward=GemmRecipe(input=OperandSpec(), weight=OperandSpec("E4M3", scaling="storage"))),
        "stored on a grid of the same format; storage is master",
    ),
    "a grid too fine": (lambda: StorageSpec("E7M22"), "29 bits beside the sign.*at most 18, such as TF32"),
    "fixed and refreshed": (lambda: StorageSpec("E4M3", scale=1.0, refresh_every=5), "cannot be refreshed"),
    "unknown storage": (lambda: uniform("E4M3", storage="disk"), "not one of master, grid"),
    "override of everything": (lambda: Override(None), "matches everything"),
    "unknown position": (lambda: Override(None, position="first"), "use 'after_norm'"),
    "same condition twice": (
        lambda: Recipe(None, (Override(None, name="a"), Override(layer_recipe("E4M3"), name="a"))),
        "two overrides with different recipes for name='a'",
    ),
    "unknown format": (lambda: uniform("E4M4x"), "E4M4x"),
    "misspelt key": (lambda: Recipe.from_dict({"uniform": "E4M3", "gard": "E5M2"}), "did you mean 'grad'"),
    "misspelt operand key": (
        lambda: Recipe.from_dict({"default": {"forward": {"input": {"fromat": "E4M3"}}}}),
        "default.forward.input has no key 'fromat'; did you mean 'format'",
    ),
    "missing gemm": (
        lambda: Recipe.from_dict({"default": {"forward": {"input": "E4M3", "weight": "E4M3"}}}),
        "input_grad",
    ),
    "no yaml": (lambda: Recipe.from_yaml("a: [1\n"), "no YAML"),
    "bad pattern": (
        lambda: Recipe(None, (Override(None, name="re:("),)).for_layer("x", "Linear"),
        "no regular expression",
    ),
}


@pytest.mark.parametrize(("build", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_refused_when_built(build, message):
    with pytest.raises(AltGradError, match=message):
        build()


def test_two_overrides_that_claim_one_layer_are_refused():
    recipe = Recipe(None, (Override(layer_recipe("E4M3"), name="a.*"), Override(layer_recipe("E5M2"), type="Linear")))
    with pytest.raises(RecipeError, match=r"two recipes claim layer 'a.b' \(Linear\).*name='a.\*' and type='Linear'"):
        recipe.for_layer("a.b", "Linear")
    assert recipe.for_layer("a.b", "Conv2d") == layer_recipe("E4M3")
    same = Recipe(None, (Override(layer_recipe("E4M3"), name="a.*"), Override(layer_recipe("E4M3"), type="Linear")))
    assert same.for_layer("a.b", "Linear") == layer_recipe("E4M3")


FORMATS = ("E4M3", "E5M2", "E3M4", "BF16", "MXFP8", "NVFP4", "E3M4/64:E8M0:ceil", None)
SCALINGS = (None, "none", "delayed", DelayedScaling(4, 1), StaticScaling(0.25), CurrentScaling((0, 1), True))


def random_operand(draw: random.Random) -> OperandSpec:
    fmt = draw.choice(FORMATS)
    if fmt is None:
        return OperandSpec()
    options = {"rounding": draw.choice(["nearest_even", "stochastic", "up"]), "random_bits": draw.choice([24, 8])}
    if "/" not in fmt and "F" not in fmt[1:4]:
        options |= {"scaling": draw.choice(SCALINGS), "overflow": draw.choice(["saturate", "native"])}
        options |= {"subnormals": draw.choice([True, False])}
    return OperandSpec(fmt, **options)


def random_layer(draw: random.Random) -> LayerRecipe:
    x, w, dy, other = (random_operand(draw) for _ in range(4))
    storage = draw.choice(
        [None, StorageSpec("E6M1", "stochastic"), StorageSpec("E2M5", scale=0.5, subnormals=False), StorageSpec("E1M6", per_channel=True, headroom=2, refresh_every=7)]
    )  # fmt: skip
    return LayerRecipe(
        GemmRecipe(input=x, weight=w),
        GemmRecipe(grad_output=dy, weight=draw.choice([w, other])),
        GemmRecipe(grad_output=draw.choice([dy, other]), input=draw.choice([x, other])),
        storage,
        draw.choice([OperandSpec(), OperandSpec("E4M3")]),
    )


def effective(recipe: Recipe) -> Recipe:
    """A layer recipe that quantizes nothing reads back as none at all."""

    def one(layer):
        return layer if layer is not None and Recipe(layer).quantizes else None

    return Recipe(
        one(recipe.default), tuple(Override(one(o.recipe), o.name, o.type, o.position) for o in recipe.overrides)
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_recipes_parse_back(seed):
    draw = random.Random(seed)
    names = ["*.mlp.*", 're:head|it\'s "x"; a', "a and b: E4M3", "x\\"]
    overrides = [
        Override(draw.choice([None, random_layer(draw)]), name=name, type=draw.choice([None, "Linear"]))
        for name in draw.sample(names, draw.randrange(4))
    ]
    recipe = Recipe(random_layer(draw), tuple(overrides))
    assert Recipe.from_dict(recipe.text) == effective(recipe), recipe.text
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "recipe", [RICH, uniform("E4M3", storage="grid"), uniform("FP32", grad="E5M2"), uniform("MXFP8")]
)
def test_the_texts_of_common_recipes(recipe):
    assert Recipe.from_dict(recipe.text) == recipe
    assert "\n" not in recipe.text


def test_short_texts():
    assert uniform("E4M3").text == "E4M3"
    assert uniform(None).text == Recipe(None).text == "FP32"
    assert uniform("E4M3", grad="E5M2").text == "x:E4M3 w:E4M3 dy:E5M2"
    head = Recipe(layer_recipe("MXFP8"), (Override(None, name="head"), Override(layer_recipe("E4M3"), type="Conv2d")))
    assert head.text == "MXFP8; name='head': FP32; type='Conv2d': E4M3"


def test_labels_are_plain_names_in_the_uniform_case_only():
    assert uniform("E4M3", storage="grid", rounding="stochastic", scaling="delayed").label == "E4M3"
    assert uniform("e4m3", grad="E5M2").label == "x:E4M3 w:E4M3 dy:E5M2"
    assert uniform("E4M3", weight=None).label == "x:E4M3 w:FP32 dy:E4M3"
    assert Recipe(layer_recipe("E4M3"), (Override(None, name="head"),)).label == "E4M3; name='head': FP32"
    assert Recipe(None).label == uniform("FP32").label == "FP32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:E4M3 w:E4M3", "lacks dy"),
        ("x:E4M3 w:E4M3 dy:E4M3 dy:E5M2", "names dy twice"),
        ("x:E4M3 w:E4M3 dz:E4M3", "'dz:E4M3' is no part of a recipe"),
        ("x:E4M3|E5M2|E3M4 w:E4M3 dy:E4M3", "gives 3 operands"),
        ("x:E4M3(stochastic w:E4M3 dy:E4M3", "lacks w"),
        ("x:E4M3(wobbly) w:E4M3 dy:E4M3", "'wobbly' is not one of amax"),
        ("x:E4M3(delayed(4)) w:E4M3 dy:E4M3", "argument without a name"),
        ("x:E4M3(up,down) w:E4M3 dy:E4M3", "says rounding twice"),
        ("x:E4M3 w:E4M3 dy:E4M3 grid(E3M4,sideways)", "'sideways' is not known"),
        ("x:E4M3 w:E4M3 dy:E4M3 grid(E3M4,every=__import__('os'))", "is no number"),
        ("E4M3; head: FP32", "is no override"),
        ("E4M3; name='head' FP32", "is no override"),
        ("E9M9x", "unknown format"),
        ("x" * 30_000, "characters long"),
        ("", "unknown format"),
    ],
)
def test_what_is_no_recipe_is_refused(text, message):
    with pytest.raises(AltGradError, match=message):
        Recipe.from_dict(text)


@pytest.mark.parametrize(
    "data",
    [
        [1], 3, {"uniform": 4}, {"uniform": "E4M3", "random_bits": "x"}, {"uniform": "E4M3", "subnormals": "no"},
        {"uniform": "E4M3", "storage": {"format": 3}}, {"uniform": "E4M3", "scaling": [1]}, {"default": 3},
        {"default": "E4M3", "overrides": 3}, {"default": "E4M3", "overrides": [3]}, {"default": {"forward": 3}},
        {"uniform": "E4M3", "storage": {"format": "E4M3", "scale": "x"}}, {"uniform": "E4M3", "rounding": {}},
        {"default": "E4M3", "overrides": [{"name": 3, "recipe": None}]}, {"uniform": "E4M3", "scaling": {"policy": []}},
        {"uniform": "E4M3", "scaling": {"policy": "delayed", "history": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused(data):
    with pytest.raises(AltGradError):
        Recipe.from_dict(data)


def test_the_error_is_a_recipe_error():
    with pytest.raises(RecipeError):
        Recipe.from_dict({"uniform": "E4M3", "storage": {"format": "E4M3", "headroom": "two"}})


def test_codes_that_are_kept_are_written_in_text_and_refused_where_they_cannot_be():
    recipe = uniform("E4M3", save_codes=True)
    assert recipe.text == "x:E4M3 w:E4M3 dy:E4M3 saved:codes"
    assert Recipe.from_dict(recipe.text) == recipe == uniform("E4M3").with_(save_codes=True)
    assert recipe.with_(save_codes=False) == uniform("E4M3")
    assert Recipe.from_yaml("{uniform: E4M3, save_codes: true}") == recipe
    assert reformat(recipe, {"E4M3": "E5M2"}.get) == uniform("E5M2", save_codes=True)
    with pytest.raises(RecipeError, match="saved:bf16; write saved:codes"):
        Recipe.from_dict("x:E4M3 w:E4M3 dy:E4M3 saved:bf16")
    with pytest.raises(RecipeError, match="save_codes 'yes' is neither true nor false"):
        layer_recipe("E4M3", save_codes="yes")
    with pytest.raises(RecipeError, match="drop save_codes"):
        recipe.with_(accumulator="fp8_unit")


def test_a_layer_on_a_cpu_says_that_codes_are_kept_anyhow_and_computes_the_same():
    results = []
    for recipe in (uniform("E4M3"), uniform("E4M3", save_codes=True)):
        torch.manual_seed(0)
        model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(32, 64, requires_grad=True)
        manifest = quantize_model(model, recipe)
        model(x).square().sum().backward()
        results.append([x.grad, model[0].weight.grad])
        told = "saved as codes, as everywhere but on GPUs" in str(manifest) and "saved:codes" in str(manifest)
        assert told == recipe.default.save_codes == ("saved as codes, as everywhere but on GPUs" in str(model))
    assert all(map(torch.equal, *results))
    assert model[0].__dict__[STATE].routes("cuda").endswith("bf16; saved as codes")
