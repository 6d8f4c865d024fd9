"""A recipe's one-line text: it parses back to an equal recipe, and what is no recipe is refused plainly."""

import random

import pytest

from altgrad.errors import AltGradError, RecipeError
from altgrad.nn import GemmRecipe, LayerRecipe, OperandSpec, Override, Recipe, StorageSpec, layer_recipe, uniform
from altgrad.quantization import CurrentScaling, DelayedScaling, StaticScaling
from tests.nn.test_recipe import RICH

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
