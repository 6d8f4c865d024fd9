"""A plain GPT that knows nothing of number formats.

    tokens -> embedding -> n_layer x [x + attention(norm(x)); x + mlp(norm(x))] -> norm -> logits

`style="modern"` has RMSNorm, rotary positions, squared ReLU, no biases and an untied head; `style="gpt2"` has
LayerNorm, learned positions, GELU, biases and a head tied to the embedding. Every choice can be made by itself. There
is no dropout: a forward pass is a function of its input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STYLES = {
    "modern": {
        "norm": "rmsnorm",
        "position": "rotary",
        "activation": "relu_squared",
        "bias": False,
        "tie_weights": False,
    },
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tie_weights": True},
}


@dataclass
class GPTConfig:
    """A GPT's shape. Choices left None are those of `style`."""

    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 64
    style: Literal["modern", "gpt2"] = "modern"
    norm: Literal["rmsnorm", "layernorm"] | None = None
    position: Literal["rotary", "learned"] | None = None
    activation: Literal["relu_squared", "gelu", "swiglu"] | None = None
    bias: bool | None = None
    tie_weights: bool | None = None

    def __post_init__(self) -> None:
        for choice, value in _STYLES[self.style].items():
            if getattr(self, choice) is None:
                setattr(self, choice, value)


class GPT(nn.Module):
    """Decoder-only transformer (Radford et al. 2019).

    Args:
        config: its shape.
        seed: of the initial weights, drawn without touching the global generator.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # the layers' own initial draws are overwritten below
            self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
            learned = config.position == "learned"
            self.positions = nn.Embedding(config.block_size, config.n_embd) if learned else None
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.norm = _norm(config)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tie_weights:
                self.head.weight = self.embedding.weight
        self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        """GPT-2's: normal with std 0.02, projections into the residual stream smaller by sqrt(2 * n_layer)."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = residual_std if name.endswith("out.weight") else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of shape (batch, time, vocab_size) for int64 tokens of shape (batch, time); with targets also the
        mean cross entropy in nats per token."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Block(nn.Module):
    """One transformer layer, normalized before each half."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention over n_head heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bool(config.bias))
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=bool(config.bias))
        self.rotary = Rotary(config.n_embd // config.n_head, config.block_size) if config.position == "rotary" else None

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.n_head, width // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, head, time, head width)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): pairs (x_i, x_{i + half}) turn by time * 10000^(-i / half)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, block_size: int) -> None:
        super().__init__()
        half = head_width // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(block_size, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        time, half = x.shape[-2], self.cos.shape[1]
        cos, sin = self.cos[:time], self.sin[:time]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class MLP(nn.Module):
    """Two matrices around an activation, 4 times as wide; SwiGLU gates at 8/3 of the width (Shazeer 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gated = config.activation == "swiglu"
        hidden = 8 * config.n_embd // 3 if gated else 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, 2 * hidden if gated else hidden, bias=bool(config.bias))
        self.out = nn.Linear(hidden, config.n_embd, bias=bool(config.bias))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return self.out(F.silu(gate) * x)
        return self.out(F.gelu(x) if self.activation == "gelu" else F.relu(x).square())


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, bias=bool(config.bias))
