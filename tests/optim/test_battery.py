"""Each optimizer against its paper's rule, written again in NumPy float64, and against what all of them promise.

A formula is a function (weights [n], gradients [steps, n], options) -> weights after the last step. Rounding to a grid is
a search among the listed values.
"""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from altgrad.optim import OPTIMIZERS, GridOptimizer, make_optimizer
from altgrad.quantization import encode, get_format, quantize
from altgrad.quantization.parameter_grid import ParameterGrid, declare_grid


def nearest(x, fmt):
    """The listed value nearest to each x (no ties in random numbers)."""
    values = get_format(fmt).values()
    return values[np.abs(x[:, None] - values[None, :]).argmin(axis=1)]


def spacing(w, fmt):
    return get_format(fmt).ulp(w)


def adam_moments(grads, t, m, v, betas):
    m = betas[0] * m + (1 - betas[0]) * grads
    v = betas[1] * v + (1 - betas[1]) * grads**2
    return m, v, m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)


def adamw(w, grads, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v, m_hat, v_hat = adam_moments(g, t, m, v, betas)
        w = w - lr * weight_decay * w - lr * m_hat / (np.sqrt(v_hat) + eps)
    return w


def manifold_adamw(w, grads, *, lr, format, precondition="update", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
    m = v = np.zeros_like(w)
    relative = 2.0 ** -get_format(format).mantissa_bits
    for t, g in enumerate(grads, 1):
        s = spacing(w, format)
        seen = s * g if precondition in ("both", "gradient") else g
        m, v, m_hat, v_hat = adam_moments(seen, t, m, v, betas)
        on_step = precondition in ("update", "both")
        direction = m_hat / (np.sqrt(v_hat) + (eps * s if precondition == "both" else eps))
        decay = lr * weight_decay * (relative if on_step else 1.0)
        w = w - decay * w - lr * (s if on_step else 1.0) * direction
    return w


def sgd(w, grads, *, lr, momentum=0.9, **_):
    buffer = np.zeros_like(w)
    for g in grads:
        buffer = momentum * buffer + g
        w = w - lr * buffer
    return w


def grid_optim(w, grads, *, lr, format, momentum=0.9, weight_decay=0.0, step_clip=np.inf, normalize=None, **_):
    buffer = np.zeros_like(w)
    for g in grads:
        buffer = momentum * buffer + g
        size = np.sqrt(np.mean(buffer**2)) if normalize == "rms" else 1.0
        grid_steps = np.clip(-lr * buffer / size, -step_clip, step_clip)
        decay = lr * weight_decay * 2.0 ** -get_format(format).mantissa_bits
        w = w + grid_steps * spacing(w, format) - decay * w
    return w


def kahan_adamw(w, grads, *, lr, format, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
    m = v = c = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v, m_hat, v_hat = adam_moments(g, t, m, v, betas)
        total = c - lr * weight_decay * w - lr * m_hat / (np.sqrt(v_hat) + eps)
        new = nearest(w + total, format)
        c = total - (new - w)
        w = new
    return w


def eco(w, grads, *, lr, format, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v, m_hat, v_hat = adam_moments(g, t, m, v, betas)
        denominator = np.sqrt(v_hat) + eps
        attempted = w - lr * weight_decay * w - lr * m_hat / denominator
        w = nearest(attempted, format)
        m = m + (1 - betas[0] ** t) / lr * (1 - 1 / betas[0]) * denominator * (attempted - w)
    return w


def madam(w, grads, *, lr, beta=0.999, p_scale=3.0, g_bound=10.0, base=np.e, **_):
    v, bound = np.zeros_like(w), p_scale * np.sqrt(np.mean(w**2))
    for t, g in enumerate(grads, 1):
        v = beta * v + (1 - beta) * g**2
        pull = np.clip(g / np.sqrt(v / (1 - beta**t)), -g_bound, g_bound)
        w = np.clip(w * base ** (-lr * pull * np.sign(w)), -bound, bound)
    return w


def lns_madam(w, grads, **options):
    return madam(w, grads, base=2.0, **options)


def lmd(w, grads, *, lr, betas=(0.9, 0.95), weight_decay=0.0, spread=0.5, **_):
    center = spread * np.sqrt(np.mean(w**2))
    angle = np.arcsinh(w / (2 * center))
    medians = {1.0: center * np.exp(angle), -1.0: center * np.exp(-angle)}
    averages = {1.0: np.zeros_like(w), -1.0: np.zeros_like(w)}
    for g in grads:
        for sign, m in medians.items():
            pull, v = sign * m * g, averages[sign]
            direction = np.sign(betas[0] * v + (1 - betas[0]) * pull) + weight_decay * np.log(m / center)
            averages[sign] = betas[1] * v + (1 - betas[1]) * pull
            medians[sign] = m * np.exp(-lr * direction)
    return medians[1.0] - medians[-1.0]


def lion(w, grads, *, lr, betas=(0.9, 0.99), weight_decay=0.0, **_):
    m = np.zeros_like(w)
    for g in grads:
        w = w - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * w)
        m = betas[1] * m + (1 - betas[1]) * g
    return w


def signsgd(w, grads, *, lr, momentum=0.9, weight_decay=0.0, **_):
    m = np.zeros_like(w)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        w = w - lr * (np.sign(m) + weight_decay * w)
    return w


# name -> (formula, cases of options); a new row of OPTIMIZERS needs an entry here
FORMULAS = {
    "adamw": (adamw, [{"lr": 0.01, "weight_decay": 0.1}]),
    "sgd": (sgd, [{"lr": 0.01}]),
    "manifold_adamw": (
        manifold_adamw,
        [
            {"lr": 0.3, "format": fmt, "precondition": p, "weight_decay": 0.1}
            for fmt, p in [
                ("E4M3", "update"),
                ("E4M3", "both"),
                ("E4M3", "gradient"),
                ("E5M2", "none"),
                ("E0M7", "update"),
                ("E7M0", "both"),
                ("BF16", "update"),
            ]
        ],
    ),
    "grid_optim": (
        grid_optim,
        [
            {"lr": 0.2, "format": "E4M3", "rounding": None},
            {"lr": 0.2, "format": "E7M0", "rounding": None, "step_clip": 0.1, "weight_decay": 0.1},
            {"lr": 0.5, "format": "E3M4", "rounding": None, "normalize": "rms", "momentum": 0.5},
        ],
    ),
    "sr_adamw": (adamw, [{"lr": 0.01, "weight_decay": 0.1, "rounding": None}]),
    "kahan_adamw": (
        kahan_adamw,
        [{"lr": 0.01, "format": "E4M3", "weight_decay": 0.1, "compensation_format": "FP32"}],
    ),
    "eco": (eco, [{"lr": 0.01, "format": "E4M3", "weight_decay": 0.1}]),
    "madam": (madam, [{"lr": 0.05}, {"lr": 0.05, "p_scale": 1.0, "g_bound": 0.5}]),
    "lns_madam": (lns_madam, [{"lr": 0.25, "format": "E7M0", "rounding": None}]),
    "lmd": (lmd, [{"lr": 0.02}, {"lr": 0.02, "weight_decay": 0.1, "spread": 2.0, "betas": (0.8, 0.9)}]),
    "lion": (lion, [{"lr": 0.01, "weight_decay": 0.1}]),
    "signsgd": (signsgd, [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "momentum": 0.0}]),
}


every = pytest.mark.parametrize("name", OPTIMIZERS)
own = pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if issubclass(row.cls, GridOptimizer)])


def grid_of(name):
    """A format that the optimizer can step along."""
    return "E7M0" if name == "lns_madam" else "E4M3"


def options_of(name, **more):
    """Options for a run on a grid, with stochastic landing where the optimizer lands."""
    row = OPTIMIZERS[name]
    chosen = {"lr": {"distance": 0.02, "grid steps": 0.3, "log factor": 0.02}[row.lr_unit]}
    if issubclass(row.cls, GridOptimizer):
        chosen |= {"format": grid_of(name), "rounding": "stochastic", "seed": 7}
    return {**chosen, **more}


def start(name, n=200, dtype=torch.float32, seed=0):
    """Weights on the optimizer's grid."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator) * 2.0 ** torch.randint(-6, 3, (n,), generator=generator)
    return Parameter(quantize(w, grid_of(name)).to(dtype))


def gradients(n, steps, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, n, generator=generator).to(dtype)


def run(optimizer, parameters, grads):
    for row in grads:
        offset = 0
        for p in parameters:
            p.grad = row[offset : offset + p.numel()].view_as(p).to(p.dtype).clone()
            offset += p.numel()
        optimizer.step()


def test_every_row_has_a_formula():
    assert set(FORMULAS) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("name", "options"), [(n, case) for n, (_, cases) in FORMULAS.items() for case in cases], ids=str
)
def test_equals_its_formula_in_float64(name, options):
    w = start(name, 60, torch.float64)
    grads = gradients(60, 12, dtype=torch.float64)
    expected = FORMULAS[name][0](w.detach().numpy().copy(), grads.numpy(), **options)
    run(make_optimizer(name, [w], **options), [w], grads)
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-11, atol=1e-14)


@every
def test_converges_on_a_quadratic(name):
    goal = torch.tensor([1.0, -0.5, 0.25, 2.0, -1.0, 0.125]).repeat(20)
    w = Parameter(goal * torch.tensor([4.0, 0.25, 2.0]).repeat(40))
    optimizer = make_optimizer(name, [w], **options_of(name))
    first = float((w.detach() - goal).square().sum())
    averaged = torch.zeros_like(goal)
    for step in range(800):
        w.grad = w.detach() - goal
        optimizer.step()
        averaged += (w.detach() - goal) / 100 if step >= 700 else 0
    assert float(averaged.square().sum()) < 0.01 * first


@every
def test_is_deterministic_and_leaves_global_generators_alone(name):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        w = start(name)
        run(make_optimizer(name, [w], **options_of(name)), [w], gradients(200, 10))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(w.detach().clone())
    assert torch.equal(*results)


@own
def test_another_seed_rounds_differently(name):
    results = []
    for seed in (0, 1):
        w = start(name)
        run(make_optimizer(name, [w], **options_of(name, seed=seed)), [w], gradients(200, 10))
        results.append(w.detach().clone())
    assert not torch.equal(*results)


@every
@pytest.mark.parametrize("moment_format", [None, "BF16", ("E4M3", "E5M2")], ids=str)
def test_resumes_bit_for_bit(name, moment_format):
    row = OPTIMIZERS[name]
    if moment_format is not None and "moment_format" not in row.options:
        pytest.skip("torch's own optimizer")
    more = {} if moment_format is None else {"moment_format": moment_format, "moment_rounding": "stochastic"}
    grads = gradients(200, 12)
    straight = start(name)
    run(make_optimizer(name, [straight], **options_of(name, **more)), [straight], grads)

    w = start(name)
    first = make_optimizer(name, [w], **options_of(name, **more))
    run(first, [w], grads[:5])
    file = io.BytesIO()
    torch.save({"w": w.detach(), "optimizer": first.state_dict()}, file)
    run(first, [w], grads[5:6])  # the saved state must not follow the live one
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Parameter(saved["w"])
    second = make_optimizer(name, [resumed], **options_of(name, **more))
    second.load_state_dict(saved["optimizer"])
    run(second, [resumed], grads[5:])
    assert torch.equal(resumed, straight)
    for key, value in second.state[resumed].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == first.state[w][key].dtype, key


@own
def test_loading_a_state_does_not_alias_it(name):
    w = start(name)
    optimizer = make_optimizer(name, [w], **options_of(name))
    run(optimizer, [w], gradients(200, 3))
    saved = optimizer.state_dict()
    frozen = copy.deepcopy(saved)
    other = Parameter(w.detach().clone())
    second = make_optimizer(name, [other], **options_of(name))
    second.load_state_dict(saved)
    run(second, [other], gradients(200, 3, seed=5))
    for key, value in frozen["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved["state"][0][key])), key


@every
def test_zero_gradients_move_nothing(name):
    w = start(name)
    before = w.detach().clone()
    still = {"weight_decay": 0.0, "p_scale": 1e3}  # Madam bounds the weights that it is given
    more = {k: v for k, v in still.items() if k in OPTIMIZERS[name].options}
    run(make_optimizer(name, [w], **options_of(name, **more)), [w], torch.zeros(3, 200))
    assert torch.equal(w, before)


@own
def test_eps_zero_gives_no_nan(name):
    if "eps" not in OPTIMIZERS[name].options:
        pytest.skip("no eps")
    w = start(name)
    grads = gradients(200, 4)
    grads[:, :100] = 0
    before = w.detach().clone()
    run(make_optimizer(name, [w], **options_of(name, eps=0.0, weight_decay=0.0)), [w], grads)
    assert torch.isfinite(w).all()
    assert torch.equal(w[:100], before[:100])
    assert not torch.equal(w[100:], before[100:])


@every
def test_empty_groups_and_parameters(name):
    w, empty, unused = start(name), Parameter(torch.zeros(0)), start(name)
    kept = unused.detach().clone()
    optimizer = make_optimizer(name, [{"params": []}, {"params": [empty, unused]}, {"params": [w]}], **options_of(name))
    empty.grad = torch.zeros(0)
    run(optimizer, [w], gradients(200, 2))
    assert torch.equal(unused, kept)
    assert optimizer.state_dict()["state"].keys() <= {0, 1, 2}


@own
def test_mixed_formats_and_dtypes(name):
    """Groups on two grids, a declared one, a bfloat16 parameter, and one off the grid: each lands where it lives."""
    second = "E7M0" if name == "lns_madam" else "E0M7"
    tensors = {
        "a": start(name),
        "b": Parameter(quantize(torch.rand(50) - 0.5, second)),
        "declared": start(name),
        "narrow": start(name, dtype=torch.bfloat16),
        "free": Parameter(torch.randn(30)),
    }
    declare_grid(tensors["declared"], ParameterGrid(get_format(grid_of(name)), torch.tensor(0.25)))
    tensors["declared"].data *= 0.25
    options = options_of(name, off_grid_lr=1e-2)
    optimizer = make_optimizer(
        name,
        [
            {"params": [tensors["a"], tensors["narrow"]]},
            {"params": [tensors["b"]], "format": second},
            {"params": [tensors["declared"], tensors["free"]], "format": None},
        ],
        **options,
    )
    before = {k: v.detach().clone() for k, v in tensors.items()}
    run(optimizer, [p for g in optimizer.param_groups for p in g["params"]], gradients(680, 6))
    for key, p in tensors.items():
        assert torch.isfinite(p).all(), key
        assert not torch.equal(p, before[key]), key
    for key, fmt, scale in (
        ("a", grid_of(name), 1.0),
        ("b", second, 1.0),
        ("declared", grid_of(name), 0.25),
        ("narrow", grid_of(name), 1.0),
    ):
        assert torch.equal(quantize(tensors[key].detach(), fmt, scale), tensors[key]), key
    moved = (tensors["free"].detach() - before["free"]).abs().max()
    assert 0.02 < float(moved) < 0.061  # AdamW at off_grid_lr, six steps


@own
def test_off_grid_parameters_get_torchs_adamw(name):
    free, twin = Parameter(torch.linspace(-1, 1, 40)), Parameter(torch.linspace(-1, 1, 40))
    grads = gradients(40, 5)
    options = options_of(name, format=None, off_grid_lr=2e-3)
    betas = {"betas": (0.8, 0.9)} if "betas" in OPTIMIZERS[name].options else {}
    decay = {"weight_decay": 0.1} if "weight_decay" in OPTIMIZERS[name].options else {}
    optimizer = make_optimizer(name, [free], **{**options, **betas, **decay})
    reference = torch.optim.AdamW(
        [twin], lr=2e-3, betas=betas.get("betas", (0.9, 0.95)), weight_decay=decay.get("weight_decay", 0.0)
    )
    for group, factor in ((optimizer.param_groups[0], 0.5), (reference.param_groups[0], 0.5)):
        group["lr"] *= factor  # a schedule moves both
    run(optimizer, [free], grads)
    run(reference, [twin], grads)
    torch.testing.assert_close(free, twin, rtol=1e-6, atol=0)


@every
def test_closures_and_schedulers(name):
    w = start(name)
    optimizer = make_optimizer(name, [w], **options_of(name))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = float(optimizer.step(closure).detach())
        scheduler.step()
    assert first > 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(options_of(name)["lr"] / 2)


@own
def test_maximize_mirrors_the_gradient(name):
    up, down = start(name), start(name)
    grads = gradients(200, 4)
    run(make_optimizer(name, [up], **options_of(name, maximize=True)), [up], grads)
    run(make_optimizer(name, [down], **options_of(name)), [down], -grads)
    assert torch.equal(up, down)


@own
def test_landing_counts_are_those_of_the_step(name):
    w = start(name)
    optimizer = make_optimizer(name, [w], **options_of(name))
    before = w.detach().clone()
    run(optimizer, [w], gradients(200, 1))
    counts = optimizer.grid_step_counts(w)
    assert counts[1] == (w != before).sum() > 0
    assert counts[0] == counts[1] + counts[2]
    assert counts[3] == (before * w < 0).sum()
    assert optimizer.last_step_stats()["flips"] == counts[1]


@own
def test_no_grid_gives_no_counts(name):
    if OPTIMIZERS[name].cls.needs_grid or name == "manifold_adamw":
        pytest.skip("needs a grid")
    w = start(name)
    optimizer = make_optimizer(name, [w], lr=0.01, format=None)
    run(optimizer, [w], gradients(200, 1))
    assert optimizer.grid_step_counts(w) is None


@own
def test_follows_a_grid_that_storage_changes(name):
    """An emergency shift declares another format between steps; the next step lands there."""
    w = start(name)
    declare_grid(w, ParameterGrid(get_format(grid_of(name))))
    optimizer = make_optimizer(name, [w], **options_of(name, format=None))
    run(optimizer, [w], gradients(200, 2))
    wider = "binary8p1" if name == "lns_madam" else "E5M2"
    w.data = quantize(w.detach(), wider)
    declare_grid(w, ParameterGrid(get_format(wider)))
    run(optimizer, [w], gradients(200, 2))
    assert torch.equal(quantize(w.detach(), wider), w)
    encode(w.detach(), wider)
