"""FP4 recipes beyond NVFP4: Q-EMA, TetraJet-v2 and Quartet against hand vectors and formulas, and the count of oscillations."""

import pytest
import torch
from torch import nn

from altgrad.errors import AltGradError
from altgrad.nn import Oscillation, Recipe, attach_optimizer, load_quant_state, quant_state, quantize_model, recipe
from altgrad.nn.oscillation import Ways
from altgrad.quantization import get_format, quantize
from altgrad.quantization.hadamard import Hadamard
from altgrad.quantization.inverse_scaling import outer_blocks
from altgrad.quantization.mxfp4 import EmaRounding, between_neighbours, power_blocks

MXFP4, NVFP4, E2M1 = get_format("MXFP4"), get_format("NVFP4"), get_format("E2M1")
H32 = Hadamard(32)


def block(*values: float) -> torch.Tensor:
    """One row: a block of 32 that begins with these numbers."""
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]])


def layer_call(made: Recipe, tokens: int = 20, inner: int = 96, outer: int = 34) -> dict[str, torch.Tensor]:
    """x, w, dy and what a layer under the recipe makes of them."""
    g = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(inner, outer, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(outer, inner, generator=g))
    x, dy = torch.randn(tokens, inner, generator=g, requires_grad=True), torch.randn(tokens, outer, generator=g)
    quantize_model(model, made)
    y = model(x)
    y.backward(dy)
    w = model[0].weight
    return {"x": x.detach(), "w": w.detach(), "dy": dy, "y": y.detach(), "dx": x.grad, "dw": w.grad}


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


# -- TetraJet's Q-EMA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "average", "chosen"),
    [
        (2.4, 2.4, 2.0),
        (2.4, 2.5, 3.0),  # at the midpoint: the upper one, though 2 is nearer
        (2.6, 2.49, 2.0),
        (-2.4, -2.6, -3.0),
        (-2.4, 2.6, -2.0),  # an average on the other side of zero
        (3.0, 5.0, 3.0),  # on the grid
        (0.1, 0.3, 0.5),
        (5.9, 4.0, 4.0),
    ],
)
def test_an_average_chooses_between_the_neighbours_of_a_weight(weight, average, chosen):
    found = between_neighbours(torch.tensor([weight]), torch.tensor([average]), E2M1)
    assert found.item() == chosen


def steps_of_a_layer(made: Recipe, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(16, 64)
    quantize_model(model, made)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    attach_optimizer(model, optimizer)
    train(model, optimizer, x, steps)
    return model, optimizer, x


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def weight_of(model: nn.Module) -> torch.Tensor:
    """The weight that the forward multiplies by: its products with unit vectors, which MXFP4 holds exactly."""
    return model(torch.eye(64)).T.detach()


def test_q_ema_decides_from_its_start_on_and_is_a_mean_of_past_weights():
    made = Recipe.from_dict(recipe("tetrajet_q_ema").text.replace("decay=0.9983,start=10", "decay=0.75,start=3"))
    model, optimizer, x = steps_of_a_layer(made, 0)
    average = model[0].weight.detach().clone()
    for step in range(1, 6):
        train(model, optimizer, x, 1)
        w = model[0].weight.detach()
        average = 0.75 * average + 0.25 * w
        scales = torch.exp2(torch.ceil(torch.log2(w.unflatten(1, (-1, 32)).abs().amax(-1) / 6)))
        spread = scales.repeat_interleave(32, 1)
        nearest = quantize(w, "MXFP4:ceil", rounding="nearest_away")
        steadied = between_neighbours(w / spread, average / spread, E2M1) * spread
        assert torch.equal(weight_of(model), steadied if step >= 3 else nearest), step
        assert not torch.equal(steadied, nearest)


def test_q_ema_is_saved_and_moves_once_a_step():
    made = Recipe.from_dict(recipe("tetrajet_q_ema").text.replace("start=10", "start=2"))
    model, optimizer, x = steps_of_a_layer(made, 4)
    state, weights = quant_state(model), {name: t.clone() for name, t in model.state_dict().items()}
    train(model, optimizer, x, 2)
    after = model[0].weight.detach().clone()
    other, again, _ = steps_of_a_layer(made, 0)
    other.load_state_dict(weights)
    load_quant_state(other, state)
    for _ in range(3):  # evaluations and further uses of a step move nothing
        weight_of(other.eval())
        other.train()(x)
    load_quant_state(other, state)
    train(other, again, x, 2)
    assert torch.equal(other[0].weight, after)
    forgetful, again, _ = steps_of_a_layer(made, 0)
    forgetful.load_state_dict(weights)
    train(forgetful, again, x, 2)
    assert not torch.equal(forgetful[0].weight, after)


def test_without_its_average_it_is_tetrajet():
    assert recipe("tetrajet_q_ema").without("ema") == recipe("tetrajet")


# -- TetraJet-v2 --------------------------------------------------------------------------------------------------------


def test_scales_of_128_stand_above_those_of_16():
    x = torch.zeros(2, 256)
    x[0, :4] = torch.tensor([2688.0, 1000.0, 200.0, 0.0])  # outer 1, inner 448: x / 448 = 6, 2.23, 0.45
    x[0, 16:20] = torch.tensor([6.0, 5.0, 2.5, -0.25])  # inner 1: ties to even
    x[0, 128:130] = torch.tensor([5376.0, 2688.0])  # the next 128: outer 2
    found = outer_blocks(x, NVFP4, 128)
    assert found.values[0, :4].tolist() == [2688.0, 896.0, 224.0, 0.0]
    assert found.values[0, 16:20].tolist() == [6.0, 4.0, 2.0, 0.0]
    assert found.values[0, 128:130].tolist() == [5376.0, 2688.0]
    assert found.scales[0, :3].tolist() == [448.0, 1.0, 2.0**-9]  # a block of zeros has the smallest scale
    assert found.scales[1].tolist() == [2.0**-9] * 16
    assert torch.equal(outer_blocks(x[:, :130], NVFP4, 128).values, found.values[:, :130]), "a short end"


def test_tetrajet_v2_is_its_formulas_but_for_chance():
    bare = recipe("tetrajet_v2").without("stochastic_rounding", "hadamard")
    found = layer_call(bare, tokens=40, inner=160, outer=48)

    def q(x):
        return outer_blocks(x.contiguous(), NVFP4, 128).values

    x, w, dy = q(found["x"]), q(found["w"]), found["dy"]
    assert close(found["y"], x @ w.T)
    assert close(found["dx"], q(dy) @ q(w.T).T)
    assert close(found["dw"], q(dy.T) @ q(x.T).T)
    whole = layer_call(recipe("tetrajet_v2"), tokens=40, inner=160, outer=48)
    assert torch.equal(whole["y"], found["y"])
    for key in ("dx", "dw"):
        assert torch.nn.functional.cosine_similarity(whole[key].flatten(), found[key].flatten(), 0) > 0.95


# -- Quartet ------------------------------------------------------------------------------------------------------------


def test_a_deviation_scales_and_ties_go_to_the_smaller_magnitude():
    ones = torch.tensor([[1.0, -1.0] * 16])  # sigma 1: 0.487 gives 2^-2
    found = power_blocks(ones, MXFP4, deviation=2.92247856 / 6)
    assert found.scales.tolist() == [[0.25]]
    assert found.values.tolist() == ones.tolist()
    shifted = power_blocks(ones + 100, MXFP4, deviation=2.92247856 / 6)
    assert shifted.scales.tolist() == [[0.25]], "the mean is removed"
    assert set(shifted.values.flatten().tolist()) == {1.5}, "and elements beyond 6 scales are clipped"
    assert not shifted.inside.any()
    ties = torch.tensor([5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25])
    high, low = torch.nextafter(ties, ties + 1), ties - 1e-6
    x = torch.cat([ties, -ties, high, low, torch.tensor([6.0, 5.99, 0.0, 0.0])])[None]
    sigma = float((x.square().mean() - x.mean() ** 2).sqrt())
    row = power_blocks(x, MXFP4, deviation=1.01 / sigma)
    assert row.scales.item() == 1
    assert row.payload[0, :7].tolist() == [4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert row.payload[0, 7:14].tolist() == [-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0]
    assert row.payload[0, 14:21].tolist() == [6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5]
    assert row.payload[0, 21:28].tolist() == [4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert row.inside[0, 28:30].tolist() == [False, True]


def test_a_gain_keeps_the_largest_from_being_clipped():
    found = power_blocks(block(7.9, 4.0), MXFP4, gain=0.75)
    assert found.scales.tolist() == [[1.0]]
    assert found.factor == pytest.approx(4 / 3)
    assert found.values[0, :2].tolist() == pytest.approx([8.0, 4.0])  # 5.925 to 6, 3 stays
    clipped = quantize(block(7.9), "MXFP4")
    assert clipped[0, 0] == 6.0


def test_quartet_is_its_formulas_but_for_chance():
    bare = recipe("quartet").without("stochastic_rounding")
    found = layer_call(bare)

    def forward(x):
        return power_blocks(H32(x), MXFP4, deviation=0.48707976)

    def backward(x):
        return power_blocks(H32(x), MXFP4, gain=0.75).values

    x, w, dy = forward(found["x"]), forward(found["w"]), found["dy"]
    assert not x.inside.all()
    assert close(found["y"], x.values @ w.values.T)
    dx = backward(dy) @ backward(w.values.T).T
    assert close(found["dx"], H32.back(torch.where(x.inside, dx, 0), None, 96))
    dw = backward(dy.T) @ backward(x.values.T).T
    assert close(found["dw"], H32.back(torch.where(w.inside, dw, 0), None, 96))
    unmasked = layer_call(bare.without("clip_mask"))
    assert torch.equal(unmasked["y"], found["y"])
    assert close(unmasked["dx"], H32.back(dx, None, 96))


def test_quartets_gradients_have_no_bias_but_that_of_the_mask():
    made, g = recipe("quartet").without("clip_mask"), torch.Generator().manual_seed(1)
    x, dy = torch.randn(32, 32, generator=g), torch.randn(32, 32, generator=g)
    weight = torch.randn(32, 32, generator=g)
    rotated = power_blocks(H32(weight), MXFP4, deviation=0.48707976).values
    wanted = H32.back(dy @ rotated, None, 32)
    total, single = torch.zeros(32, 32), None
    for seed in range(200):
        model = nn.Sequential(nn.Linear(32, 32, bias=False))
        model[0].weight.data.copy_(weight)
        quantize_model(model, made, seed=seed)
        given = x.clone().requires_grad_()
        model(given).backward(dy)
        assert given.grad is not None
        single = given.grad if single is None else single
        total += given.grad
    assert single is not None
    assert (total / 200 - wanted).abs().mean() < (single - wanted).abs().mean() / 8


# -- what goes together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x:MXFP4(ema(decay=0.9)) w:MXFP4 dy:MXFP4", "forward weight"),
        ("x:MXFP4 w:MXFP4(ema(decay=0.9)) dy:MXFP4", "forward weight"),  # of both products
        ("x:MXFP4 w:MXFP4(ema(decay=1.5))|MXFP4 dy:MXFP4", "outside"),
        ("x:MXFP4 w:MXFP4(ema(start=-1))|MXFP4 dy:MXFP4", "number of steps"),
        ("x:MXFP4 w:MXFP4(stochastic,ema(decay=0.9))|MXFP4 dy:MXFP4", "nearest"),
        ("x:MXFP4 w:E4M3(ema(decay=0.9))|MXFP4 dy:MXFP4", "E8M0"),
        ("x:MXFP4 w:MXFP4 dy:MXFP4 norm:MXFP4(ema(decay=0.9))", "norm_weight"),
        ("x:MXFP4(block(deviation=-1)) w:MXFP4 dy:MXFP4", "outside"),
        ("x:NVFP4(block(deviation=0.5)) w:MXFP4 dy:MXFP4", "E8M0"),
        ("x:MXFP4(block(deviation=0.5,gain=0.5)) w:MXFP4 dy:MXFP4", "one of the two"),
        ("x:NVFP4(block(outer=128)) w:NVFP4 dy:NVFP4", "multiplied"),
        ("x:NVFP4(block(arithmetic='multiply',outer=100)) w:NVFP4 dy:NVFP4", "divide them"),
        ("x:NVFP4(block(arithmetic='multiply',outer=128)) w:NVFP4 dy:NVFP4 sum:blackwell_fp4", "float32's only"),
        ("x:MXFP4(masked) w:MXFP4 dy:MXFP4", "drop mask_saturated"),
        ("x:MXFP4(block(deviation=0.5),masked,hadamard(size=32)) w:MXFP4(hadamard(size=32)) dy:MXFP4", "requantized"),
    ],
)
def test_what_contradicts_itself_is_refused(text, said):
    with pytest.raises(AltGradError, match=said):
        Recipe.from_dict(text)


@pytest.mark.parametrize("name", ["quartet", "tetrajet_v2", "tetrajet_q_ema"])
def test_every_cell_can_be_rescued_and_every_format_replaced(name):
    from altgrad.nn.recipe.reformat import reformat

    model = nn.Sequential(nn.Linear(32, 32))
    made = recipe(name)
    cells = made.cells(model)
    assert len(cells) == 6
    for cell in cells:
        rescued = made.rescue([cell], model)
        assert len(rescued.cells(model)) == 5
        assert Recipe.from_dict(rescued.text) == rescued
        assert made.only([cell], model).cells(model).keys() == {cell}
    for fmt in ("MXFP8", "E4M3", "NVFP4"):
        assert {spec.format for spec in reformat(made, lambda _, fmt=fmt: fmt).operands()} == {fmt}


# -- oscillation --------------------------------------------------------------------------------------------------------


def test_ways_to_and_fro_are_counted():
    model = nn.Sequential(nn.Linear(32, 1, bias=False))
    model[0].weight.data.copy_(block(6.0, 2.49, 2.0, 1.0))
    quantize_model(model, "x:MXFP4 w:MXFP4 dy:MXFP4")
    counter = Oscillation(model)
    for step in range(4):  # 2.49 <-> 2.51 crosses the midpoint of 2 and 3; 2.0 + 0.1 a step goes nowhere on the grid
        model[0].weight.data[0, 1] = 2.49 + 0.02 * ((step + 1) % 2)
        model[0].weight.data[0, 2] += 0.1
        counter.update()
    ways = counter.layers["0"]
    assert ways.steps == 4
    assert ways.flips[0].tolist()[:4] == [0, 4, 0, 0]
    assert ways.ratio[0, 1].item() == pytest.approx(50, rel=1e-3)
    assert ways.ratio[0, [0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert counter.share() == ways.share() == 1 / 32
    assert counter.total == pytest.approx(4 / 0.48, rel=1e-3)
    assert counter.flip_rate == pytest.approx(1 / 32)
    counter.reset()
    assert counter.layers["0"].steps == 0
    assert counter.flip_rate == counter.total == 0
    assert Ways(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int32), 3).share() == 0.0


def test_q_ema_oscillates_less():
    def total(name: str) -> float:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        quantize_model(model, recipe(name))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attach_optimizer(model, optimizer)
        g = torch.Generator().manual_seed(9)
        counter = None
        for step in range(60):
            x = torch.randn(16, 64, generator=g)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
            if step == 20:
                counter = Oscillation(model)
            elif counter is not None:
                counter.update()
        assert counter is not None
        return counter.total

    assert total("tetrajet_q_ema") < total("tetrajet") / 2


def test_a_model_without_rounded_weights_has_no_ways_to_count():
    model = nn.Sequential(nn.Linear(8, 8))
    quantize_model(model, "x:E4M3 w:E4M3(stochastic) dy:E4M3")
    with pytest.raises(AltGradError, match="to nearest"):
        Oscillation(model)


def test_the_average_is_bounded():
    assert EmaRounding().moved(torch.ones(2), torch.zeros(2)).tolist() == pytest.approx([0.9983, 0.9983])
