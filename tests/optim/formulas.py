"""Each optimizer's rule from its paper, written again in NumPy float64: what the implementations are judged by.

A formula is a function (weights [n], gradients [steps, n], options) -> weights after the last step. Rounding to a grid is
a search among the listed values.
"""

from __future__ import annotations

import numpy as np

from altgrad.quantization import get_format


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
    "lion": (lion, [{"lr": 0.01, "weight_decay": 0.1}]),
    "signsgd": (signsgd, [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "momentum": 0.0}]),
}
