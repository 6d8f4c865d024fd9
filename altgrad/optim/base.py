"""The frame that every optimizer here shares: what a step looks like, where weights land, and what is counted.

A step has two halves. The *attempt* moves each weight by the optimizer's rule, in the compute dtype (float32; float64
for float64 parameters). The *landing* puts it on the parameter's grid: not at all (`rounding=None`: grid storage, or
nobody, does it), to nearest, or stochastically. Subclasses write `_attempt`, and those that need the rounding error
also `_land`. Steps are deterministic functions of parameters, gradients, state and the group's `seed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.errors import DtypeError, OptionError
from altgrad.optim.adam_math import adam_attempt
from altgrad.optim.grid import landing_cast, scalar_format
from altgrad.optim.kernels import fused
from altgrad.optim.moments import MOMENT_ROUNDINGS, moment_formats
from altgrad.quantization import FORMAT_REGISTRY, amax_scale
from altgrad.quantization.checks import FLOAT_DTYPES
from altgrad.quantization.parameter_grid import ParameterGrid, declared_grid
from altgrad.quantization.tensor_cores import capturing
from altgrad.randomness import step_key

ROUNDINGS = (None, "nearest_even", "stochastic")
COUNT_NAMES = ("attempted", "flips", "stalled", "sign_flips", "clipped", "saturated")
COUNTERS = ("step", "first_began", "second_began", "drawn")  # numbers of steps, of every parameter's state
COMMON_OPTIONS = {
    "format": None,
    "scale": 1.0,
    "rounding": None,
    "off_grid_lr": None,
    "moment_format": None,
    "moment_rounding": "nearest_even",
    "seed": 0,
    "maximize": False,
    "fused": None,
}


@dataclass(slots=True)
class Slot:
    """One parameter in one step.

    weight, grad: the parameter (itself, or a float32 copy of a bf16/fp16 one) and its gradient, in the compute dtype.
    grid: where the step is to land, None where it may leave any value: the parameter has no grid, or one whose scale
        this very step is to set (`ParameterGrid.settled`). off_grid: it has none. step: 1 for its first step.
    """

    parameter: Tensor
    weight: Tensor
    grad: Tensor
    state: dict[str, Any]
    grid: ParameterGrid | None
    index: int
    step: int
    off_grid: bool = False
    clipped: Tensor | None = None

    def age(self, moment: str) -> int:
        """How many gradients the "first" or "second" moment has seen with this one: `step`, or since it was reset."""
        began = self.state.get(f"{moment}_began")
        return self.step if began is None else self.step - int(began)


class GridOptimizer(Optimizer):
    """Base of the optimizers that know the grid; a `torch.optim.Optimizer` in every respect.

    Options of every parameter group:
        format: grid of parameters that no storage declared one for; None: they have no grid.
        scale: that grid's multiplier; a positive number, or "amax": the parameter's amax at its first step, as a power
            of two, kept in the state.
        rounding: how the step lands on the grid: None (left to storage), "nearest_even", "stochastic".
        off_grid_lr: learning rate, a real distance, of plain AdamW for parameters without a grid; follows the schedule
            of `lr` in proportion. None: the optimizer's own rule is used for them.
        moment_format, moment_rounding: format of the moments (one name, or a pair) and how they are rounded to it.
        seed: of all stochastic rounding. maximize: ascend. fused: None (where it can), True (or an error), False.

    A declared grid (`altgrad.quantization.parameter_grid`) always wins over `format` and `scale`.
    """

    needs_grid = False  # the rule is meaningless without a grid
    rounds_itself = False  # lands on the grid even where `rounding` is None
    random_bits = 24  # of stochastic landings

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        self._counts: dict[Tensor, Tensor] = {}
        super().__init__(params, {**COMMON_OPTIONS, **defaults})

    # -- options --------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its options are checked.

        Raises:
            OptionError, FormatError: an option outside its range, with the range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_common(group)
            self._check(group)
        except Exception:
            del self.param_groups[-1]
            raise
        if group["off_grid_lr"] is not None and "off_grid_ratio" not in group:
            if not group["lr"] > 0:
                raise OptionError(f"off_grid_lr follows lr in proportion, so lr must start above 0, not {group['lr']}")
            group["off_grid_ratio"] = group["off_grid_lr"] / group["lr"]

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse bad options of the subclass."""

    @staticmethod
    def _check_common(group: dict[str, Any]) -> None:
        check_range(group, "lr", 0, float("inf"))
        if group["format"] is not None:
            group["format"] = portable_format(group["format"])
        scale = group["scale"]
        if not (scale == "amax" or (isinstance(scale, int | float) and 0 < scale < float("inf"))):
            raise OptionError(f'scale {scale!r} is neither a positive number nor "amax"')
        if group["rounding"] not in ROUNDINGS:
            raise OptionError(f"rounding {group['rounding']!r} is not one of {', '.join(map(str, ROUNDINGS))}")
        moment_formats(group["moment_format"])
        if group["moment_rounding"] not in MOMENT_ROUNDINGS:
            raise OptionError(f"moment_rounding {group['moment_rounding']!r} is not one of {MOMENT_ROUNDINGS}")
        if group["off_grid_lr"] is not None:
            check_range(group, "off_grid_lr", 0)

    # -- the step -------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # as torch's own bookkeeping is; the fused steps are compiled already
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given.

        Raises:
            OptionError: a CUDA graph is being captured, whose replays would repeat this very step's number.
        """
        if capturing():
            raise OptionError(
                f"{type(self).__name__} counts its steps on the host, so a CUDA graph would repeat one step; capture "
                "forward and backward alone, or train with an optimizer of torch's with capturable=True"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._counts = {}
        offset = 0
        for group in self.param_groups:
            slots = self._slots(group, offset)
            offset += len(group["params"])
            off_grid = [s for s in slots if s.off_grid] if self._splits(group) else []
            slots = [s for s in slots if not s.off_grid] if off_grid else slots
            if off_grid:
                self._attempt_off_grid(group, off_grid)
            if slots:
                self._step_group(group, slots)
            for slot in chain(slots, off_grid):
                if slot.weight.dtype != slot.parameter.dtype:
                    slot.parameter.copy_(slot.weight)
        return loss

    def _splits(self, group: dict[str, Any]) -> bool:
        """Whether parameters without a grid take another rule (plain AdamW)."""
        return self._steps_along_grid(group) or group["off_grid_lr"] is not None

    def _steps_along_grid(self, group: dict[str, Any]) -> bool:
        """Whether the rule itself, and not only the landing, reads the grid."""
        return self.needs_grid

    def _slots(self, group: dict[str, Any], offset: int) -> list[Slot]:
        slots = []
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is None or parameter.numel() == 0:
                continue
            if parameter.grad.is_sparse or parameter.dtype not in FLOAT_DTYPES:
                raise DtypeError(
                    f"parameter {offset + number} is {parameter.dtype} with a "
                    f"{'sparse' if parameter.grad.is_sparse else 'dense'} gradient; "
                    "use dense gradients and float32, float64, bfloat16 or float16 parameters"
                )
            compute = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            grad = parameter.grad.to(compute)
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            state["step"] += 1
            weight = parameter.detach().to(compute)
            grid = self._grid(group, parameter, state)
            off_grid = grid is None
            if grid is not None and not grid.settled and not self._steps_along_grid(group):
                grid = None
            slot = Slot(
                parameter,
                weight,
                -grad if group["maximize"] else grad,
                state,
                grid,
                offset + number,
                int(state["step"]),
                off_grid,
            )
            slots.append(slot)
        return slots

    def _grid(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> ParameterGrid | None:
        grid = declared_grid(parameter)
        if grid is not None or group["format"] is None:
            return grid
        fmt, scale = scalar_format(group["format"]), group["scale"]
        if isinstance(scale, int | float) and parameter.dtype != torch.float64:
            scale = float(torch.tensor(scale, dtype=torch.float32))  # as the kernels compute with it
        if scale == "amax":
            if "grid_scale" not in state:
                state["grid_scale"] = amax_scale(parameter, fmt, power_of_two=True)
            scale = state["grid_scale"]
        return ParameterGrid(fmt, scale)

    def _attempt_off_grid(self, group: dict[str, Any], slots: list[Slot]) -> None:
        if "off_grid_ratio" not in group:
            raise OptionError(
                f"parameter {slots[0].index} has no grid, and {type(self).__name__} steps along one: give format=..., "
                "attach grid storage, or set off_grid_lr to train such parameters with AdamW"
            )
        plain = {
            "lr": group["lr"] * group["off_grid_ratio"],
            "betas": group.get("betas", (0.9, 0.95)),
            "eps": group.get("eps") or 1e-8,
            "weight_decay": group.get("weight_decay", 0.0),
            "moment_format": None,
        }
        adam_attempt(plain, slots, precondition="none")

    def _step_group(self, group: dict[str, Any], slots: list[Slot]) -> None:
        """Step all slots of a group: in one fused pass each where that can be, the others together."""
        rest = []
        for slot in slots:
            if self._fuses(group, slot) and fused.takes_fused(slot, group):
                counts = self._fused(group, slot)
                if counts is not None:
                    self._counts[slot.parameter] = counts
            else:
                rest.append(slot)
        if rest and group["fused"]:
            raise OptionError(f"fused=True, but {type(self).__name__} has no fused step for these options; use None")
        if rest:
            self._plain(group, rest)

    def _fuses(self, group: dict[str, Any], slot: Slot) -> bool:
        """Whether there is a fused step for the options."""
        return True

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        """The whole step of one parameter in one pass over its memory; returns the landing's counts."""
        raise NotImplementedError

    def _fused_landing(self, group: dict[str, Any], slot: Slot) -> dict[str, Any]:
        """Landing options of a fused step."""
        if slot.grid is None or not self._lands(group, slot):
            return {"landing": fused.NONE}
        rounding = group["rounding"] or "nearest_even"
        key = step_key(group["seed"], slot.index, slot.step, "weight") if rounding == "stochastic" else None
        return {"landing": fused.ROUND, "cast": landing_cast(slot.grid.format, rounding, self.random_bits), "key": key}

    def _plain(self, group: dict[str, Any], slots: list[Slot]) -> None:
        """Attempt and land in plain torch operations, for any device and dtype."""
        before = [slot.weight.clone() if self._lands(group, slot) else None for slot in slots]
        self._attempt(group, slots)
        for slot, old in zip(slots, before):
            if old is not None:
                self._land(group, slot, old)

    def _lands(self, group: dict[str, Any], slot: Slot) -> bool:
        return slot.grid is not None and (group["rounding"] is not None or self.rounds_itself)

    def _attempt(self, group: dict[str, Any], slots: list[Slot]) -> None:
        """Move every slot's weight, in place, to where the rule wants it."""
        raise NotImplementedError

    def _land(self, group: dict[str, Any], slot: Slot, before: Tensor) -> None:
        """Round the attempted weight to its grid, in place; `before` is the weight at the start of the step."""
        landed = self._rounded(group, slot, slot.weight)
        self._count(slot, before, slot.weight, landed)
        slot.weight.copy_(landed)

    def _rounded(self, group: dict[str, Any], slot: Slot, attempted: Tensor) -> Tensor:
        assert slot.grid is not None
        rounding = group["rounding"] or "nearest_even"
        key = step_key(group["seed"], slot.index, slot.step, "weight") if rounding == "stochastic" else None
        landed = landing_cast(slot.grid.format, rounding, self.random_bits)(attempted, slot.grid.scale, key=key).values
        assert landed is not None
        return landed

    def _count(self, slot: Slot, before: Tensor, attempted: Tensor, landed: Tensor) -> None:
        assert slot.grid is not None
        tried, moved = attempted != before, landed != before
        beyond = attempted.abs() > slot.grid.format.max * slot.grid.scale
        zero = torch.zeros((), dtype=torch.int64, device=before.device)
        counts = [
            tried.sum(),
            moved.sum(),
            (tried & ~moved).sum(),
            (before * landed < 0).sum(),
            zero if slot.clipped is None else slot.clipped,
            beyond.sum(),
        ]
        self._counts[slot.parameter] = torch.stack(counts).double()

    def grid_step_counts(self, parameter: Tensor) -> Tensor | None:
        """What the last step did to a parameter that this optimizer rounded itself; None where it did not.

        Returns:
            float64 tensor [6] on the parameter's device (`COUNT_NAMES`): weights whose attempted update was nonzero,
            weights that changed, attempted but unchanged, changed sign, had their step clipped, aimed beyond max.
        """
        return self._counts.get(parameter)

    def last_step_stats(self) -> dict[str, float]:
        """`grid_step_counts` summed over parameters, by name, with `stall_rate` = stalled / attempted (waits for devices)."""
        total = torch.zeros(len(COUNT_NAMES), dtype=torch.float64)
        for counts in self._counts.values():
            total += counts.cpu()
        stats = dict(zip(COUNT_NAMES, total.tolist(), strict=True))
        return {**stats, "stall_rate": stats["stalled"] / max(stats["attempted"], 1.0)}

    # -- state ----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but codes stay codes: state of a number format keeps its dtype.

        Moments kept in full take the parameter's compute dtype. A state of another optimizer, such as torch's AdamW, is
        taken as far as its names are known; options that it lacks stay as they are.
        """
        own_groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        foreign = [number for number, group in enumerate(state_dict["param_groups"]) if "moment_format" not in group]
        for number, (group, own) in enumerate(zip(self.param_groups, own_groups, strict=True)):
            if number in foreign:
                group.pop("fused", None)  # another optimizer's word for another thing
            for name, value in own.items():
                group.setdefault(name, value)
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        held = [(p, number in foreign) for number, group in enumerate(self.param_groups) for p in group["params"]]
        for key, (parameter, is_foreign) in zip(saved, held, strict=True):
            compute = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            full = FLOAT_DTYPES if is_foreign else (torch.float32, torch.float64)
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if name in COUNTERS else parameter.device
                    dtype = compute if value.shape == parameter.shape and value.dtype in full else value.dtype
                    dtype = torch.float32 if name in COUNTERS else dtype
                    self.state[parameter][name] = value.detach().clone().to(device, dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._counts = {}


def portable_format(fmt) -> Any:
    """The format's name where the registry knows it (so state dicts hold plain data), else the format itself."""
    fmt = scalar_format(fmt)
    return fmt.name if FORMAT_REGISTRY.get(fmt.name) == fmt else fmt


def check_range(group: dict[str, Any], name: str, low: float, high: float | None = None) -> None:
    """Refuse a number outside low <= value (< high).

    Raises:
        OptionError: with value and range.
    """
    value = group[name]
    if not (isinstance(value, int | float | Tensor) and float(value) >= low and (high is None or float(value) < high)):
        limit = (
            f">= {low}" if high is None else f"finite and >= {low}" if high == float("inf") else f"in [{low}, {high})"
        )
        raise OptionError(f"{name} {value!r} is out of range; it must be {limit}")


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors that have a parameter's shape or more than one element (step counters left out)."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)
