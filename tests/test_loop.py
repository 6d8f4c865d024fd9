"""Loops of anybody's: one class serves advice and autopsy, gradients are the optimizer's, and what no capture holds is
refused."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from altgrad.advise import Budget, PlainLoop, advise_loop
from altgrad.autopsy import Recorder
from altgrad.autopsy.search import Settings
from altgrad.errors import ConfigError
from altgrad.loop import StepLoop
from altgrad.loop.loop import aside, flat_gradient, slowed
from altgrad.nn import attach_optimizer, quantize_model, uniform
from altgrad.nn.recipe.spec import OperandSpec
from tests.training.tiny import differing

QUICK = Settings(draws=3, most_draws=2, placebos=1, longest=40)
DEAD = OperandSpec("E4M3", scaling={"policy": "static", "scale": 4096.0})  # every activation underflows
FAULTY = uniform("E4M3").with_cell("2", "forward", "input", DEAD)
TEACHER = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def parts(recipe=None, *, drop=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4), nn.Dropout(drop))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if recipe is not None:
        quantize_model(model, recipe)
        attach_optimizer(model, optimizer)
    return model, optimizer


def loss_of(model, step, data=0):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1_000_000 * data + step))
    return (model(x) - (x @ TEACHER).tanh()).square().mean()


def stepping(model, optimizer, *, scaler=None, scheduler=None, clip=math.inf):
    """Ends with zero_grad, as many loops do; clips, and scales the loss, if asked."""

    def step_fn(step, data=0):
        loss = loss_of(model, step, data)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        return loss

    return step_fn


def step_loop(recipe=None, **given):
    model, optimizer = parts(recipe)
    return StepLoop(model, optimizer, stepping(model, optimizer, **given))


class Own:
    """A loop that is no function of the step: it keeps its own place, and its state in its own way."""

    def __init__(self, recipe=None):
        self.model, self.optimizer = parts(recipe)
        self.place = 0

    def advance(self):
        self.optimizer.zero_grad()
        loss = loss_of(self.model, self.place)
        loss.backward()
        self.optimizer.step()
        self.place += 1
        return float(loss.detach())

    def gradient(self, ahead=0):
        self.optimizer.zero_grad()
        loss = loss_of(self.model, self.place + ahead)
        loss.backward()
        return float(loss.detach()), flat_gradient(self.model)

    def capture(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "place": self.place}
        return deepcopy(state)

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.place = state["place"]


@pytest.mark.parametrize("make", [Own, step_loop])
def test_one_class_of_ones_own_serves_advice_and_autopsy(make):
    advice = advise_loop(make(), Budget(formats=("E4M3", "E3M4")), steps=6, schedule=[1e-3] * 50)
    assert {row.layer for row in advice.rows} == {"0", "2"}
    assert {stall["steps"] for stall in advice.stalls} == {50}
    recorder = Recorder(make(FAULTY))
    for _ in range(40):
        recorder.step()
    verdict = recorder.autopsy(settings=QUICK)
    assert verdict.cells == ("2.forward.input",)
    assert recorder.taken == 40


def test_the_gradient_is_what_the_optimizer_finds_and_the_loop_stays_where_it_was():
    model, optimizer = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop = StepLoop(model, optimizer, stepping(model, optimizer, scaler=scaler, clip=0.01), also=[scaler])
    loop.advance()
    state = loop.capture()
    for ahead in (0, 3):
        value, found = loop.gradient(ahead)
        loss = loss_of(model, 2 + ahead)
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert value == float(loss.detach())
        assert torch.equal(found, flat_gradient(model))
        assert float(found.norm()) == pytest.approx(0.01, rel=1e-3)
        torch.testing.assert_close(found / found.norm(), exact / exact.norm())
        assert not differing(loop.capture(), state)


def test_a_gradient_asked_for_leaves_nothing_behind_for_the_next_step():
    plain, asked = step_loop(), step_loop()
    losses = []
    for _ in range(4):
        asked.gradient()
        losses.append(asked.advance())
    assert losses == [plain.advance() for _ in range(4)]


def test_dropout_draws_the_same_masks_from_one_state():
    model, _ = parts(drop=0.5)
    loop = PlainLoop(model, lambda step: (step,), lambda m, step: loss_of(m, step))
    state = loop.capture()
    first = [loop.advance() for _ in range(3)]
    loop.restore(state)
    assert first == [loop.advance() for _ in range(3)]


def test_buffers_that_no_state_dict_holds_are_captured():
    model, optimizer = parts()
    model.register_buffer("seen", torch.zeros(()), persistent=False)

    def step_fn(step):
        model.seen += 1
        return float(model.seen)

    loop = StepLoop(model, optimizer, step_fn)
    with aside(loop):
        assert [loop.advance() for _ in range(3)] == [1, 2, 3]
    assert loop.advance() == 1


@pytest.mark.parametrize("kept", ["gradients", "a place"])
def test_a_step_that_changes_what_no_capture_holds_is_refused_with_the_step(kept):
    model, optimizer = parts(uniform("E4M3"))
    place = iter(range(1000))

    def step_fn(step):
        if kept == "a place":  # the same steps taken twice are alike only by chance
            loss = loss_of(model, next(place) // 40)
        else:  # two steps together make one
            loss = loss_of(model, step)
        loss.backward()
        if kept == "a place" or step % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    recorder = Recorder(model, optimizer, step_fn, every=5)
    for _ in range(20):
        recorder.step()
    with pytest.raises(ConfigError, match=r"step \d+ has loss .*what no capture holds|does not repeat itself"):
        recorder.autopsy(settings=QUICK)


def test_forks_of_the_run_before_it_was_mended_answer_nothing(tmp_path):
    found = {}
    for name, recipe in (("faulty", FAULTY), ("mended", uniform("E4M3")), ("again", FAULTY)):
        recorder = Recorder(step_loop(recipe))
        for _ in range(30):
            recorder.step()
        found[name] = recorder.autopsy(out=tmp_path, settings=QUICK, budget=1 if name == "again" else 200)
    assert found["faulty"].cells == found["again"].cells == ("2.forward.input",)
    assert found["mended"].kind != "cause"


def test_a_resumed_loop_counts_on_and_says_from_where():
    model, optimizer = parts(FAULTY)
    step_fn = stepping(model, optimizer)
    asked = []
    recorder = Recorder(model, optimizer, lambda step: (asked.append(step), step_fn(step))[1], taken=1000)
    losses = [recorder.step() for _ in range(20)]
    assert asked == list(range(1001, 1021))
    assert recorder.losses[1020] == losses[-1]
    assert recorder.autopsy(settings=QUICK).sentence.endswith("Steps count from the state after step 1000 on.")


def test_a_slowed_step_is_one_at_that_learning_rate():
    half, told = step_loop(), step_loop()
    for group in told.optimizer.param_groups:
        group["lr"] *= 0.5
    with slowed(half.optimizer, 0.5):
        assert [half.advance() for _ in range(3)] == [told.advance() for _ in range(3)]
    assert half.optimizer.param_groups[0]["lr"] == 3e-3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StepLoop(*parts(), None), "step_fn is a NoneType"),
        (lambda: StepLoop(*parts(), print, taken=-1), "taken=-1"),
        (lambda: StepLoop(*parts(), print, also=[3]), "holds a int, which has no state_dict"),
        (lambda: Recorder(parts(FAULTY)[0]), "needs its optimizer and a step_fn"),
        (lambda: Recorder(Own(FAULTY), parts()[1]), "leave them out"),
        (lambda: StepLoop(*parts(), lambda step: 1.0).gradient(), "no parameter of Sequential has a gradient"),
        (lambda: StepLoop(*parts(), lambda step: 1.0).advance(data=1), "no argument `data`"),
    ],
)
def test_what_makes_no_loop_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
