"""Recipes: short forms, YAML, overrides, printing, and the contradictions that are refused when they are built."""

import pytest

from altgrad.errors import AltGradError, RecipeError
from altgrad.nn import GemmRecipe, LayerRecipe, OperandSpec, Override, Recipe, StorageSpec, layer_recipe, uniform
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
        Recipe(None),
    ],
    ids=["plain", "no weight", "BF16", "blocks", "rich", "none"],
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
