"""LMD with noise: weights that are drawn, evaluated as means, and resumed. Its step is held to its formula by the battery."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import OptionError
from altgrad.optim import make_optimizer
from tests.optim.test_battery import gradients, run


def test_lmd_draws_its_weights_anew_and_evaluates_their_means():
    start_at, grads = torch.linspace(-1, 1, 4000), torch.ones(3, 4000)
    w, still = Parameter(start_at.clone()), Parameter(start_at.clone())
    noisy, plain = (make_optimizer("lmd", [p], lr=0.01, noise=n) for p, n in ((w, 0.1), (still, 0.0)))
    run(noisy, [w], grads[:1])
    run(plain, [still], grads[:1])
    drawn = w.detach().clone()
    assert not torch.equal(w, still)
    noisy.eval()
    noisy.eval()
    torch.testing.assert_close(w.detach(), still.detach() * 1.005012520859401)  # exp(noise^2 / 2)
    noisy.train()
    assert torch.equal(w, drawn)
    state = noisy.state[w]
    spread = torch.log(
        ((drawn - state["plus"] + state["minus"]).square() / (state["plus"] ** 2 + state["minus"] ** 2)).mean()
    )
    assert float(spread) == pytest.approx(2 * np.log(0.1), abs=0.1)
    noisy.eval()
    run(noisy, [w], grads[1:])  # steps from the draw, not from the mean
    run(plain, [still], grads[1:])
    noisy.eval()
    torch.testing.assert_close(
        w.detach(), still.detach() * 1.005012520859401, atol=1e-6, rtol=1e-5
    )  # all gradients are 1
    gridded = Parameter(torch.ones(4))
    with pytest.raises(OptionError, match=r"noise 0\.1: parameter 0 has a grid, where none is drawn"):
        run(make_optimizer("lmd", [gridded], format="E4M3", lr=0.01, noise=0.1), [gridded], torch.ones(1, 4))


def test_lmd_with_noise_resumes_bit_for_bit_and_moves_zeros():
    grads = gradients(50, 6)
    straight = Parameter(torch.zeros(50))
    run(make_optimizer("lmd", [straight], noise=0.05), [straight], grads)
    w = Parameter(torch.zeros(50))
    first = make_optimizer("lmd", [w], noise=0.05)
    run(first, [w], grads[:3])
    resumed = Parameter(w.detach().clone())
    second = make_optimizer("lmd", [resumed], noise=0.05)
    second.load_state_dict(first.state_dict())
    run(second, [resumed], grads[3:])
    assert torch.equal(resumed, straight)
    assert float(straight.detach().abs().min()) > 0
