"""An independent statement of what a quantized product is: search over the format's values, products in float64."""

import numpy as np
import torch

from altgrad.quantization import get_format


def scale_of(x: torch.Tensor, name: str, axis: int | None = None) -> np.ndarray:
    """amax / max in float32, as numpy computes it; `axis` keeps scales of its own."""
    data = x.detach().float().numpy()
    kept = None if axis is None else tuple(d for d in range(data.ndim) if d != axis)
    largest = np.abs(data).max(axis=kept, keepdims=axis is not None)
    largest = np.where(largest > 0, largest, np.float32(1)).astype(np.float32)
    return largest / np.float32(get_format(name).max)


def on_grid(x: torch.Tensor, name: str | None, axis: int | None = None, scale=None) -> np.ndarray:
    """scale * (nearest value of the format to x / scale), float64; refuses ties, which random data do not have."""
    data = x.detach().float().numpy()
    if name is None:
        return data.astype(np.float64)
    scale = scale_of(x, name, axis) if scale is None else np.float32(scale)
    values = get_format(name).values()
    quotient = np.clip((data / scale).astype(np.float64), values[0], values[-1])
    right = np.clip(np.searchsorted(values, quotient), 1, len(values) - 1)
    below, above = values[right - 1], values[right]
    assert not np.any((quotient - below == above - quotient) & (quotient != 0)), "a tie: choose other data"
    nearest = np.where(quotient - below < above - quotient, below, above)
    return (scale.astype(np.float32) * nearest.astype(np.float32)).astype(np.float64)


def close(got: torch.Tensor, expected: np.ndarray, magnitude: np.ndarray, relative: float = 2e-6) -> None:
    """|got - expected| <= relative * (|A| |B|), elementwise: float32 accumulation of exact products."""
    error = np.abs(got.detach().double().numpy() - expected)
    assert np.all(error <= relative * magnitude), (error.max(), (error / (magnitude + 1e-300)).max())
