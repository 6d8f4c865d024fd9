"""The GPT: shapes, causality, deterministic weights, and that it learns."""

import pytest
import torch

from altgrad.training.model import GPT, GPTConfig, Rotary

VARIANTS = [
    {},
    {"style": "gpt2"},
    {"activation": "swiglu"},
    {"norm": "layernorm", "position": "learned"},
    {"tie_weights": True},
    {"n_embd": 36, "n_head": 4},  # an odd head width leaves one channel unrotated
]


def tiny(**choices) -> GPT:
    return GPT(GPTConfig(**{"vocab_size": 19, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8} | choices))


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_logits_depend_on_the_past_alone(choices):
    model = tiny(**choices)
    tokens = torch.arange(16).view(2, 8) % 19
    changed = tokens.clone()
    changed[:, 5] += 1
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 8, 19)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient_and_the_loss_falls(choices):
    model = tiny(**choices)
    tokens = torch.arange(16).view(2, 8) % 19
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        _, loss = model(tokens, tokens.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert losses[0] == pytest.approx(torch.tensor(19.0).log().item(), rel=0.05)
    assert losses[-1] < 0.6 * losses[0]


def test_weights_are_a_function_of_the_seed():
    state = torch.get_rng_state()
    a, b, c = (GPT(GPTConfig(vocab_size=19, n_embd=16), seed=s) for s in (1, 1, 2))
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not torch.equal(a.head.weight, c.head.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_gpt2_style_is_gpt2s():
    config = GPTConfig(vocab_size=50257, style="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.head.weight is model.embedding.weight


def test_rotary_scores_depend_on_distance_alone():
    rotary = Rotary(8, 16)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    turned_q, turned_k = rotary(q.expand(16, 8)), rotary(k.expand(16, 8))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[3, 1], scores[12, 10], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[5, 5], q @ k, atol=1e-5, rtol=0)
    assert (scores[3, 1] - scores[3, 2]).abs() > 1e-3
