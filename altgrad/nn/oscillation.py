"""How much quantized weights move to and fro: `Oscillation`, the counter of TetraJet's paper.

A master weight that lies next to the midpoint of two grid values moves by a little at each step, and its quantized value by
a whole grid step, back and forth. The ratio of both ways, R = sum |Q(w_t) - Q(w_t-1)| / sum |w_t - w_t-1| over some steps, is
about 1 where a weight travels, and large where it oscillates.

Source: Chen et al., Oscillation-Reduced MXFP4 Training (arXiv 2502.20853), which calls a weight oscillating above 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import layers_in, parameter_of, place_name
from altgrad.nn.layer.emulated import forward_weight
from altgrad.nn.layer.state import LayerState
from altgrad.nn.spread import is_spread

OSCILLATES = 16.0


@dataclass(frozen=True)
class Ways:
    """What one weight did over the steps that were counted.

    moved, jumped: sums of |change| of the master and of its quantized value, float32 of the weight's shape (mixed and laid
    out as the forward quantizes it). flips: how often the quantized value changed, int32. steps: how many were counted.
    """

    moved: Tensor
    jumped: Tensor
    flips: Tensor
    steps: int

    @property
    def ratio(self) -> Tensor:
        """R of each element; 0 where the quantized value stood still, inf where it alone moved (its scale did)."""
        return torch.where(self.jumped > 0, self.jumped / self.moved, 0.0)

    def measured(self, above: float = OSCILLATES) -> Tensor:
        """(`total`, `share`, `flip_rate`) as float64 [3] where the counts are, without waiting for a device."""
        if not self.moved.numel():
            return self.moved.new_zeros(3, dtype=torch.float64)
        moved, jumped = self.moved.double().sum(), self.jumped.double().sum()
        flips = self.flips.double().mean() / self.steps if self.steps else torch.zeros_like(moved)
        total = torch.where(moved == 0, 0.0, jumped / moved)
        return torch.stack([total, (self.ratio > above).double().mean(), flips])

    def share(self, above: float = OSCILLATES) -> float:
        """Share of the elements that oscillate."""
        return self.measured(above)[1].item()

    @property
    def total(self) -> float:
        """The way of all quantized values over that of all masters; 0 where no master moved."""
        return self.measured()[0].item()

    @property
    def flip_rate(self) -> float:
        """Share of the elements whose quantized value changes in a step."""
        return self.measured()[2].item()


class Oscillation:
    """Counts the ways of a model's weights and of their quantized values from step to step.

        counter = Oscillation(model)
        for batch in batches:
            ...
            optimizer.step()
            counter.update()
        print(counter.total, counter.share())

    Weights that the forward does not quantize, or rounds stochastically, are left out. Each `update` quantizes every weight
    once; nothing of the model changes. The monitor counts so, too, where its schedule names the group `oscillation`.

    Args:
        or_none: take a model without such a weight, of which there is nothing to count.
        covers: whether a layer, by its name, is counted.

    Raises:
        RecipeError: the model has no such weight, or its parameters are spread over processes.
    """

    def __init__(
        self, model: nn.Module, *, or_none: bool = False, covers: Callable[[str], bool] = lambda layer: True
    ) -> None:
        self._places: dict[str, tuple[nn.Module, str, LayerState]] = {}
        for module in model.modules():
            for parameter, state in layers_in(module).items():
                spec = state.w.spec
                if spec.format is None or state.w.stochastic or parameter_of(module, parameter) is None:
                    continue
                if not covers(place_name(state.name, parameter)):
                    continue
                if is_spread(parameter_of(module, parameter)):
                    raise RecipeError(
                        f"{state.name}: the ways of weights that are spread over processes are not counted"
                    )
                self._places[place_name(state.name, parameter)] = (module, parameter, state)
        if not self._places and not or_none:
            raise RecipeError(
                f"{type(model).__name__} has no weight that a forward quantizes to nearest; quantize_model it first"
            )
        self.reset()

    def reset(self) -> None:
        """Begin anew at the present weights."""
        self._at: dict[str, tuple[Tensor, Tensor]] = {}
        self.layers: dict[str, Ways] = {}
        for name, (module, parameter, state) in self._places.items():
            self._at[name] = w, q = _present(module, parameter, state)
            self.layers[name] = Ways(
                torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(q, dtype=torch.int32), 0
            )

    def state(self) -> dict[str, dict[str, Any]]:
        """What was counted, for a checkpoint: layer -> the fields of its `Ways`, copied."""
        return {
            name: {**{k: v.clone() for k, v in vars(ways).items() if isinstance(v, Tensor)}, "steps": ways.steps}
            for name, ways in self.layers.items()
        }

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from `state`'s result, the model's weights being those of then."""
        for name, ways in self.layers.items():
            if name in state:
                saved = {
                    k: v.to(ways.moved.device, copy=True) if isinstance(v, Tensor) else v
                    for k, v in state[name].items()
                }
                self.layers[name] = Ways(**saved)

    @torch.no_grad()
    def update(self) -> None:
        """Count the way since the last update; call it after each `optimizer.step()`."""
        for name, (module, parameter, state) in self._places.items():
            (w, q), (last_w, last_q), ways = _present(module, parameter, state), self._at[name], self.layers[name]
            self._at[name] = w, q
            self.layers[name] = Ways(
                ways.moved + (w - last_w).abs(),
                ways.jumped + (q - last_q).abs(),
                ways.flips + (q != last_q),
                ways.steps + 1,
            )

    @property
    def total(self) -> float:
        """The way of all quantized values over the way of all masters, over all layers."""
        moved = sum(float(ways.moved.double().sum()) for ways in self.layers.values())
        return sum(float(ways.jumped.double().sum()) for ways in self.layers.values()) / moved if moved else 0.0

    def share(self, above: float = OSCILLATES) -> float:
        """Share of all elements whose R is above."""
        count = sum(ways.moved.numel() for ways in self.layers.values())
        found = sum(ways.share(above) * ways.moved.numel() for ways in self.layers.values())
        return found / count if count else 0.0

    @property
    def flip_rate(self) -> float:
        """Share of all elements whose quantized value changes in a step."""
        count = sum(ways.moved.numel() for ways in self.layers.values())
        return sum(ways.flip_rate * ways.moved.numel() for ways in self.layers.values()) / count if count else 0.0


@torch.no_grad()
def _present(module: nn.Module, parameter: str, state: LayerState) -> tuple[Tensor, Tensor]:
    """(master, its quantized value) as float32."""
    weight = parameter_of(module, parameter)
    assert weight is not None
    return forward_weight(state, weight.detach())
