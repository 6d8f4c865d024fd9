"""Recipes as algebra, and models changed to the result in place: any layer, any direction, nothing else touched."""

import copy

import pytest
import torch
from torch import nn

from altgrad.errors import RecipeError
from altgrad.nn import (
    Cell,
    OperandSpec,
    Override,
    Recipe,
    StorageSpec,
    change_format,
    layer_recipe,
    load_quant_state,
    quant_state,
    quantize_model,
    restore_model,
    set_step,
    uniform,
)  # fmt: skip
from altgrad.nn.layer.classes import is_quantized

GRID = uniform("E4M3", grad="E5M2", storage="grid", storage_rounding="stochastic", rounding="stochastic")
RECIPES = {
    "plain": uniform("E4M3"),
    "grid": GRID,
    "delayed": uniform("E4M3", scaling="delayed"),
    "blocks": uniform("MXFP8"),
    "norms": uniform("E3M4", norm_weight="E4M3"),
    "overrides": Recipe(
        layer_recipe("E4M3"),
        (
            Override(layer_recipe("E3M4", storage="grid"), name="*.a"),
            Override(None, name="re:out|nothing"),
        ),
    ),
    "types": Recipe(layer_recipe("E4M3"), (Override(layer_recipe("E5M2"), type="Linear"),)),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(self.norm(x))))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 32))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(model, optimizer, first, count):
    """Losses of some steps; everything is a function of the step."""
    losses = []
    for step in range(first, first + count):
        if any(is_quantized(m) for m in model.modules()):
            set_step(model, step)
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def specs(recipe, model):
    return recipe.cells(model)


@pytest.mark.parametrize("name", RECIPES)
def test_cells_are_what_quantize_model_quantizes(name):
    recipe, model = RECIPES[name], net()
    before = recipe.cells(model)
    manifest = quantize_model(model, recipe)
    assert recipe.cells(model) == before
    assert {cell.layer for cell in before} == set(manifest.swapped)
    stored = {cell.layer for cell in before if cell.role == "storage"}
    assert {f"{layer}.weight" for layer in stored} == set(quant_state(model)["storage"])


@pytest.mark.parametrize("name", RECIPES)
def test_cells_print_and_parse(name):
    for cell in RECIPES[name].cells(net()):
        assert Cell.parse(str(cell)) == cell
    assert Cell.parse("0.a.storage") == Cell("0.a", "storage", "storage")
    assert str(Cell("", "forward", "input")) == "forward.input"


@pytest.mark.parametrize("text", ["head", "head.forward.grad_output", "head.backward.input", "", "a.storage.weight"])
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(RecipeError, match="cell"):
        Cell.parse(text)


@pytest.mark.parametrize("name", RECIPES)
def test_rescue_takes_away_exactly_the_cells_named(name):
    recipe, model = RECIPES[name], net()
    there = recipe.cells(model)
    for chosen in ([cell] for cell in there):
        left = recipe.rescue(chosen, model).cells(model)
        expected = {cell: spec for cell, spec in there.items() if cell not in chosen}
        assert left.keys() == expected.keys()
        untouched = {cell for cell in expected if chosen[0].role != "storage" or cell.layer != chosen[0].layer}
        assert all(left[cell] == expected[cell] for cell in untouched)
    assert not recipe.rescue(there, model).cells(model)
    assert recipe.rescue([], model) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_only_keeps_exactly_the_cells_named(name):
    recipe, model = RECIPES[name], net()
    there = recipe.cells(model)
    for cell in there:
        assert recipe.only([cell], model).cells(model).keys() == {cell}
    assert recipe.only(there, model).cells(model) == there
    assert not recipe.only([], model).quantizes


@pytest.mark.parametrize("name", RECIPES)
def test_with_cell_is_undone_by_the_old_spec_and_the_results_print_and_parse(name):
    recipe, model = RECIPES[name], net()
    there = recipe.cells(model)
    for cell, spec in there.items():
        new = StorageSpec("E6M1") if cell.role == "storage" else OperandSpec("E2M5")
        changed = recipe.with_cell(cell.layer, cell.gemm, cell.role, new, model)
        assert changed.cells(model)[cell] == new
        assert Recipe.from_dict(changed.text) == changed
        assert Recipe.from_dict(changed.to_dict()) == changed
        back = changed.with_cell(cell.layer, cell.gemm, cell.role, spec, model)
        assert back.cells(model) == there
    one = recipe.with_cell("2", "forward", "input", "E3M4", model)
    assert one.cells(model)[Cell("2", "forward", "input")] == OperandSpec("E3M4")
    assert {c: s for c, s in one.cells(model).items() if c.layer != "2"} == {
        c: s for c, s in there.items() if c.layer != "2"
    }


def test_operations_need_no_model_where_overrides_go_by_name():
    recipe = RECIPES["overrides"]
    assert recipe.rescue(["0.a.storage"]) == recipe.rescue(["0.a.storage"], net())
    with pytest.raises(RecipeError, match="type or position; pass the model"):
        RECIPES["types"].rescue(["2.forward.input"])


def test_unknown_cells_are_refused():
    with pytest.raises(RecipeError, match="no layer 'tail'"):
        GRID.rescue(["tail.forward.input"], net())
    with pytest.raises(RecipeError, match=r"0\.norm\.norm\.weight is not quantized"):
        GRID.rescue(["0.norm.norm.weight"], net())
    with pytest.raises(RecipeError, match="StorageSpec"):
        GRID.with_cell("2", "storage", "storage", "E4M3")


@pytest.mark.parametrize("name", ["plain", "grid", "delayed", "blocks", "norms", "overrides"])
def test_a_model_is_changed_in_place_to_what_it_would_be_from_the_start(name):
    recipe = RECIPES[name]
    for cells in (list(recipe.cells(net()))[:3], list(recipe.cells(net()))):
        target = recipe.rescue(cells, net())
        changed = net()
        quantize_model(changed, recipe, seed=3)
        change_format(changed, target)
        fresh = net()
        if target.cells(net()):
            quantize_model(fresh, target, seed=3)
        assert same(bits(changed), bits(fresh))
        assert steps(changed, optimizer_of(changed), 1, 3) == steps(fresh, optimizer_of(fresh), 1, 3)


@pytest.mark.parametrize("name", ["plain", "delayed", "grid", "overrides"])
def test_a_change_to_the_same_recipe_changes_no_bit(name):
    model, twin = net(), net()
    both = [(m, optimizer_of(m)) for m in (model, twin)]
    for m, optimizer in both:
        quantize_model(m, RECIPES[name], seed=1)
        steps(m, optimizer, 1, 4)
    assert change_format(model, RECIPES[name]) == 0
    assert steps(*both[0], 5, 3) == steps(*both[1], 5, 3)
    assert same(bits(model), bits(twin))


def test_a_layer_leaves_and_returns_with_the_optimizers_state_and_its_neighbours_untouched():
    recipe = uniform("E3M4", storage="grid", scaling="delayed")
    model = net()
    optimizer = optimizer_of(model)
    quantize_model(model, recipe)
    steps(model, optimizer, 1, 4)
    weights, moments = bits(model), copy.deepcopy(optimizer.state_dict())
    state = quant_state(model)
    parameters = list(model.parameters())
    there = recipe.cells(model)
    change_format(model, recipe.rescue([c for c in there if c.layer == "2"], model))
    assert type(model[2]) is nn.Linear
    assert same(bits(model), weights)
    rest = quant_state(model)
    assert "2.weight" not in rest["storage"]
    assert all(torch.equal(rest["storage"][k]["scale"], state["storage"][k]["scale"]) for k in rest["storage"])
    for layer, memory in rest["operands"].items():
        for key, kept in memory.items():
            assert torch.equal(kept["window"], state["operands"][layer][key]["window"])
    assert change_format(model, recipe) == 1  # on its grid again, where its values lie
    assert same(bits(model), weights)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(
        torch.equal(a, b)
        for k, entry in moments["state"].items()
        for a, b in zip(entry.values(), optimizer.state_dict()["state"][k].values(), strict=True)
    )
    steps(model, optimizer, 5, 2)
    assert "2.weight" in quant_state(model)["storage"]


def test_every_layer_leaves_and_the_model_trains_as_a_plain_one():
    model, plain = net(), net()
    quantize_model(model, uniform("E3M4"))
    change_format(model, Recipe(None))
    assert not any(is_quantized(m) for m in model.modules())
    assert steps(model, optimizer_of(model), 1, 3) == steps(plain, optimizer_of(plain), 1, 3)
    change_format(model, GRID)
    assert len(GRID.cells(model)) > 0
    assert all(is_quantized(m) for m in model.modules() if isinstance(m, nn.Linear))
    optimizer = optimizer_of(model)
    steps(model, optimizer, 4, 2)
    restore_model(model)
    with pytest.raises(RecipeError, match="no quantized layer"):
        change_format(model, GRID)


def test_a_storage_goes_to_master_and_back():
    model, optimizer = net(), None
    quantize_model(model, GRID)
    optimizer = optimizer_of(model)
    steps(model, optimizer, 1, 3)
    held = bits(model)
    master = GRID.rescue([c for c in GRID.cells(model) if c.role == "storage"], model)
    assert change_format(model, master) == 0
    assert same(bits(model), held)
    assert not quant_state(model)["storage"]
    steps(model, optimizer, 4, 1)
    assert change_format(model, GRID) == 5
    steps(model, optimizer, 5, 1)
    assert len(quant_state(model)["storage"]) == 5


def test_a_change_that_does_not_fit_changes_nothing():
    model = net()
    quantize_model(model, uniform("E4M3"))
    held, recipe = bits(model), quant_state(model)["recipes"]
    tied = Recipe(layer_recipe("E4M3"), (Override(layer_recipe("E3M4/24", whole_blocks=True), name="2"),))
    with pytest.raises(RecipeError, match="not a multiple"):
        change_format(model, tied)
    with pytest.raises(RecipeError, match="without watching it run"):
        change_format(model, Recipe(None, (Override(layer_recipe("E4M3"), position="after_norm"),)))
    assert same(bits(model), held)
    assert quant_state(model)["recipes"] == recipe


def test_a_recipe_by_position_can_be_changed_where_the_model_was_watched():
    model = net()
    recipe = Recipe(None, (Override(layer_recipe("E4M3"), position="after_norm"),))
    quantize_model(model, recipe, example=torch.randn(2, 32))
    assert {cell.layer for cell in recipe.cells(model)} == {"0.a", "1.a"}
    rescued = recipe.rescue(["0.a.forward.input"], model)
    change_format(model, rescued)
    assert model[0].a.quantization.recipe.forward.input.format is None
    assert model[1].a.quantization.recipe == layer_recipe("E4M3")


def test_a_state_with_another_recipe_is_loaded_across_directions():
    donor = net()
    quantize_model(donor, GRID)
    steps(donor, optimizer_of(donor), 1, 2)
    state, weights = quant_state(donor), bits(donor)
    model = net()
    quantize_model(model, GRID)
    change_format(model, GRID.only(["2.forward.input"], model))
    model.load_state_dict(weights)
    load_quant_state(model, state)
    assert same(bits(model), weights)
    assert quant_state(model)["storage"].keys() == state["storage"].keys()


def test_copies_of_a_changed_model_can_be_changed():
    model = net()
    quantize_model(model, uniform("E3M4"))
    change_format(model, Recipe(None))
    twin = copy.deepcopy(model)
    change_format(twin, uniform("E3M4"))
    assert all(is_quantized(m) for m in twin.modules() if isinstance(m, nn.Linear))
    assert not any(is_quantized(m) for m in model.modules())
