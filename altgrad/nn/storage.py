"""Weights that live on a grid: who wrote the stored weight decides its grid, and each optimizer step is rounded back to it.

    before     the grid values at the start of the step, kept as codes
    attempted  what the optimizer wrote: before + update, in float32
    after      attempted, rounded to the grid under the scale at the start of the step

The storage of a parameter is the one owner of its grid. It knows the values that it wrote by the parameter, its memory,
its version counter and, on the CPU, their checksum: `weight.data.normal_()` counts no version. Anything else is somebody
else's write (loading, initialisation, averaging, an editor) and gets a fresh scale by the policy before the weight is next
used; foreign values are never pressed into an old scale. They are rounded where the grid matters, at the start of the next
step, and counted as a regrid; a forward quantizes them as they are. Values that moved without changing (deepcopy,
pickle, `.to`) keep their grid: they still match the codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from altgrad.errors import RecipeError
from altgrad.formats.rounding import Rounding
from altgrad.nn.kept_scale import kept_scale, lies_on
from altgrad.nn.recipe.spec import StorageSpec
from altgrad.nn.session import Session
from altgrad.nn.spread import all_agree, from_part, is_spread, largest, local, part_of, shard_name, summed, whole
from altgrad.nn.written import Written, checksum, same_memory, written
from altgrad.quantization import Quantized, Want, code_index, scale_from_amax
from altgrad.quantization.checks import traced
from altgrad.quantization.parameter_grid import ParameterGrid, declare_grid, grid_owner
from altgrad.quantization.tensor_cores import serve
from altgrad.randomness import stream_base

_VALUES_CODES = Want.VALUES | Want.CODES
_NUMBERS = count()
_BY_NUMBER: WeakValueDictionary[int, GridStorage] = WeakValueDictionary()


class GridStorage:
    """The storage of one parameter on a grid: the policy of its spec, the grid, and the codes of the values there.

    Args:
        spec: format, rounding and scale policy.
        session: clock and seed of the stochastic rounding.
        name: the parameter's qualified name.
        channel_axis: axis of the output channels, for per-channel scales.
    """

    def __init__(self, spec: StorageSpec, session: Session, name: str, channel_axis: int = 0) -> None:
        self.spec, self.session, self.name, self.channel_axis = spec, session, name, channel_axis
        self.fmt = spec.resolved
        self.cast = spec.cast  # of the values that a step leaves
        self._taking = replace(spec.cast, rounding=Rounding.NEAREST_EVEN, clamp=True)  # of what somebody else wrote
        self.grid = ParameterGrid(self.fmt, torch.ones(()))
        self.codes: Tensor | None = None  # of the values, where they were rounded to the grid
        self._room: Tensor | None = None  # where the codes of the last step are
        self._steps: int | Tensor = 0  # on a GPU counted there
        self.original: Tensor | None = None  # float values before the last rounding, until the first step after it
        self._stated: ParameterGrid | None = None  # by a loaded state: values on it keep it
        self._changed: Tensor | None = None  # how many values a fresh scale changed since the last step
        self._zero: Tensor | None = None  # where nothing but zeros are, so that the step sets the scale
        self._base = stream_base(name, "storage", "update")
        self._unbind()

    def __getstate__(self) -> dict:
        # A copy belongs to another parameter, which it meets when that is next used.
        left_out = ("_parameter", "_memory", "_written", "_checksum", "_number", "_stepping")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._unbind()

    def _unbind(self) -> None:
        self._parameter: ref[Tensor] | None = None
        self._memory: StorageWeakRef | None = None  # keeps the address from being given to other values
        self._written: Written | None = None
        self._checksum: int | None = None  # of the values that were there then
        self._stepping = False
        self._number = next(_NUMBERS)
        _BY_NUMBER[self._number] = self

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has a scale of its own."""
        return self.spec.per_channel

    @property
    def scale(self) -> Tensor:
        """The scale of the grid that was last found."""
        assert isinstance(self.grid.scale, Tensor)
        return self.grid.scale

    @property
    def steps(self) -> int:
        """How many steps this storage has rounded back (on a GPU this waits)."""
        return int(self._steps)

    def kept_scale(self, weight: Tensor) -> Tensor:
        """The scale of the values that are there now, which no later step writes to."""
        scale: Tensor = self.grid_of(weight).scale  # type: ignore[assignment]
        return scale.clone() if serve(scale) else scale

    def _rescale(self, scale: Tensor) -> None:
        """Go on with another scale: on a GPU in the tensor of the old one, which CUDA graphs go on reading."""
        old = self.scale
        stays = serve(old) and old.device == scale.device and old.shape == scale.shape and old.dtype == scale.dtype
        self.grid = ParameterGrid(self.fmt, old.copy_(scale) if stays else scale)

    @property
    def _powers_of_two(self) -> bool:
        return self.spec.power_of_two if self.spec.scale is None else math.frexp(self.spec.scale)[0] == 0.5

    @property
    def _axis(self) -> int | None:
        return self.channel_axis if self.spec.per_channel else None

    # -- whose grid -----------------------------------------------------------------------------------------------

    def bind(self, weight: Tensor) -> None:
        """Belong to this parameter, and be its grid's owner."""
        if self._parameter is None or self._parameter() is not weight:
            self._parameter, self._written = ref(weight), None
        declare_grid(weight, self)

    def of(self, weight: Tensor) -> GridStorage:
        """The storage of a layer's present parameter: this one, a tied layer's, or a new one for a new parameter.

        Raises:
            RecipeError: the parameter is stored on another layer's grid already, and the two specs differ.
        """
        owner = grid_owner(weight)
        if isinstance(owner, GridStorage):
            if owner.spec != self.spec:
                raise RecipeError(
                    f"{owner.name!r} and {self.name!r} share one weight but store it differently ({owner.spec}, "
                    f"{self.spec}); give both the same storage, or untie them"
                )
            return owner
        held = None if self._parameter is None else self._parameter()
        found = (
            self
            if held is None
            or held is weight
            or (is_spread(weight) and not is_spread(held))  # `fully_shard` replaced it
            else GridStorage(self.spec, self.session, self.name, self.channel_axis)
        )
        if is_spread(weight) and found._stated is None:
            found._stated = replace(
                found.grid, scale=found.scale.clone()
            )  # values that lie on the grid of the whole weight keep it
        found.bind(weight)
        return found

    def release(self, weight: Tensor) -> None:
        """Give the parameter back: with the values from before the last rounding, if nobody has written since."""
        if self.original is not None and self._holds(weight):
            with torch.no_grad():
                local(weight).copy_(self.original)
        self.original = None
        declare_grid(weight, None)

    # -- which grid -----------------------------------------------------------------------------------------------

    def scale_of(self, weight: Tensor) -> Tensor:
        """The scale of the values that are there now; compiled code asks when it runs."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                return self.scale  # an exported program holds the weights of its export
            return _present_scale(weight.detach(), self._number, -1 if self._axis is None else self._axis)
        return self.grid_of(weight).scale  # type: ignore[return-value]

    def grid_of(self, weight: Tensor) -> ParameterGrid:
        """The grid of the values that are there now: a fresh one where somebody else has written them."""
        if self._parameter is not None and self._parameter() is weight and self._wrote(weight):
            return self.grid
        return self._found(weight)

    def _wrote(self, weight: Tensor) -> bool:
        weight = local(weight)
        if self._written is None or self._written != written(weight):
            return False
        return self._checksum is None or traced(weight) or self._checksum == checksum(weight)

    def _found(self, weight: Tensor) -> ParameterGrid:
        plain = _without_transforms(weight)
        held = None if self._parameter is None else self._parameter()
        if held is not None and is_spread(held) and not is_spread(plain):  # FSDP2 gathered it for a forward
            if self._stepping:
                return self._stepped(plain)
            return self.grid if lies_on(plain, self.grid) else ParameterGrid(self.fmt, self.fresh_scale(plain))
        if plain.shape != weight.shape or plain.is_meta or (traced(local(plain)) and plain is weight):
            return self.grid if held is weight else ParameterGrid(self.fmt, self.policy_scale(weight))
        if held is not None and same_memory(plain, held):
            plain = held
        elif isinstance(plain, nn.Parameter):
            own = self.of(plain)
            if own is not self:
                return own.grid_of(plain)
        else:  # computed from parameters (pruned, parametrized, a functional call): nobody stores it
            return ParameterGrid(self.fmt, self.fresh_scale(plain))
        if self._stepping:  # an optimizer evaluates the loss within its step
            return self._stepped(plain)
        if not self._wrote(plain):
            self._take(plain)
        return self.grid

    @torch.no_grad()
    def _take(self, weight: Tensor) -> None:
        """Take over values that this storage did not write, or wrote elsewhere."""
        if not self._holds(weight):
            self.codes, self.original, self._zero = None, None, None
            values = whole(weight)
            stated = self._stated
            if stated is not None and lies_on(values, stated):
                self._rescale(stated.scale)  # type: ignore[arg-type]
            else:
                self._rescale(self.fresh_scale(values))
        if self.scale.device != weight.device:
            self.grid = replace(self.grid, scale=self.scale.to(weight.device))
        self._know(weight)

    def _holds(self, weight: Tensor) -> bool:
        """Whether the values are those of the codes."""
        return all_agree(self._part_holds(weight), weight)

    def _part_holds(self, weight: Tensor) -> bool:
        values = local(weight).detach()
        if self.codes is None or self.codes.shape != values.shape:
            return False
        if self.codes.device != values.device:
            self.codes = self.codes.to(values.device)
        values, stored = self._beside_stored(weight)
        return torch.equal(stored, values) or bool(((stored == values) | values.isnan()).all())

    def _beside_stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(the values, those of the codes)."""
        values = local(weight).detach()
        values = values.to(_compute_dtype(values.dtype == torch.float64))
        assert self.codes is not None
        scale = self._scale_of_part(weight).to(values.device)
        return values, self.cast.decode(self.codes, scale, dtype=values.dtype)

    def _scale_of_part(self, weight: Tensor) -> Tensor:
        return part_of(self.scale, weight)

    def _know(self, weight: Tensor) -> None:
        self.bind(weight)
        weight = local(weight)
        self._written = written(weight)
        self._checksum = checksum(weight) if weight.device.type == "cpu" and not traced(weight) else None
        self._memory = StorageWeakRef(weight.untyped_storage())

    def state_grid(self, weight: Tensor, scale: Tensor, steps: int) -> None:
        """Take the scale and the step count of an earlier state; values that lie on that grid, now or once loaded, keep it."""
        self._stated = ParameterGrid(self.fmt, scale.to(weight.device, copy=True))
        self._rescale(self._stated.scale)
        self.codes, self.original, self._changed = None, None, None
        if isinstance(self._steps, int):
            self._steps = steps
        else:
            self._steps.fill_(steps)
        self.bind(weight)
        self._written = None

    # -- scale ----------------------------------------------------------------------------------------------------

    def policy_scale(self, weight: Tensor) -> Tensor:
        """The scale that the spec gives these values."""
        if self.spec.scale is not None:
            return torch.tensor(self.spec.scale, dtype=torch.float32, device=weight.device)
        found = largest(weight, self._axis)
        if self.fmt.emax >= 127:  # the range of float32: nothing to scale
            return torch.ones_like(found)
        return scale_from_amax(found, self.fmt, power_of_two=self.spec.power_of_two) * 2.0**self.spec.headroom

    def fresh_scale(self, weight: Tensor) -> Tensor:
        """The scale for values that somebody else wrote: the policy's, or another of it that changes none of them."""
        weight, scale = weight.detach(), self.policy_scale(weight)
        if self.spec.scale is not None or self.fmt.emax >= 127:
            return scale
        policy = {"power_of_two": self.spec.power_of_two, "headroom": self.spec.headroom}
        return kept_scale(weight, self.fmt, scale, self._axis, **policy)

    def _stepped(self, weight: Tensor) -> ParameterGrid:
        """The grid of values that an optimizer has moved within its step."""
        return self.grid if self._zero is None else ParameterGrid(self.fmt, self._set_by(weight))

    def _set_by(self, weight: Tensor) -> Tensor:
        """The scale, or that of these values where there were only zeros, which have none."""
        assert self._zero is not None
        return torch.where(self._zero, self.policy_scale(weight), self.scale)

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def snap(self, weight: Tensor, *, keep_original: bool = False) -> None:
        """Round the values that are there to their grid, to nearest."""
        self.grid_of(weight)
        if self.codes is not None or weight.is_meta:
            return
        values = local(weight).detach()
        self.original = values.clone() if keep_original else None
        found = self._taking(values, self._scale_of_part(weight), want=_VALUES_CODES)
        self._changed = ((found.values != values) & ~values.isnan()).sum()
        self._write(weight, found)

    def set_grid(self, weight: Tensor, *, snap: bool, keep_original: bool = False) -> None:
        """Put a parameter on this grid, in place of any earlier one; the values of a meta tensor once there are some."""
        self.bind(weight)
        if snap:
            self.snap(weight, keep_original=keep_original)
        self._changed = None

    def _write(self, weight: Tensor, found: Quantized) -> None:
        assert found.values is not None
        local(weight).copy_(found.values)
        room, codes = self._room, found.codes
        assert codes is not None
        if room is not None and serve(room) and room.device == codes.device and room.shape == codes.shape:
            codes = room.copy_(codes)  # the tensor that CUDA graphs go on reading
        self.codes = self._room = codes
        self._know(weight)

    @torch.no_grad()
    def asked(self, weight: Tensor) -> Tensor | None:
        """What `before_step` has to know, bool [2] on a GPU: whether the values are those of the codes, and whether a scale is
        lacking. None where nothing is to be asked beforehand."""
        codes, part = self.codes, local(weight)
        if not serve(part) or self.session.capturing() or is_spread(weight) or codes is None:
            return None
        if codes.shape != part.shape or {codes.device, self.scale.device} != {part.device}:
            return None
        (values, stored), zero = self._beside_stored(weight), self._without_scale(weight)
        lacks = torch.zeros((), dtype=torch.bool, device=part.device) if zero is None else zero.any()
        return torch.stack([((stored == values) | values.isnan()).all(), lacks])

    @torch.no_grad()
    def before_step(self, weight: Tensor, known: tuple[bool, bool] | None = None) -> None:
        """Have the grid values that the step starts from, whatever was written since the last one; known: as `asked`.

        While a CUDA graph captures the step they are those of the step before; somebody else's writes between replays go
        unseen until a step outside of the graph.
        """
        if self.session.capturing():
            if self.codes is None or not self._wrote(weight):
                self.session.refuse_capture(f"the values of {self.name!r} are not those of a step")
            self._zero = self._without_scale(weight)
            return
        if known is not None and known[0]:
            self._know(weight)
        else:
            self._written = known = (
                None  # a write through `weight.data` leaves no trace in the version: compare the values
            )
            self.snap(weight)
        zero = self._without_scale(weight)
        self._zero = zero if zero is not None and (bool(zero.any()) if known is None else known[1]) else None
        if self.grid.settled != (self._zero is None):
            self.grid = replace(self.grid, settled=self._zero is None)

    def _without_scale(self, weight: Tensor) -> Tensor | None:
        """Where nothing but zeros are, which have no scale of their own; None where they need none."""
        return largest(weight, self._axis) == 0 if self.spec.scale is None and self.fmt.emax < 127 else None

    @contextmanager
    def within_step(self) -> Iterator[None]:
        """Meanwhile what is written is the optimizer's own doing, which `round_back` will round."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    @torch.no_grad()
    def round_back(self, weight: Tensor, observer=None, layer: str = "", counted: Tensor | None = None) -> Tensor:
        """Round what the optimizer wrote back to the grid; returns the step's counts, int64 [5] in `COUNTS`' order.

        Args:
            counted: counts (attempted, flips, stalled, sign flips, clipped, overflow) of an optimizer that rounds to
                the grid itself; None counts here.
        """
        assert self.codes is not None
        self.original = self._stated = None
        written = local(weight).detach()
        before = self.cast.decode(self.codes, self._scale_of_part(weight), dtype=weight.dtype)
        if self._zero is not None and counted is None:
            self._rescale(self._set_by(weight))
        key = self._key(weight)
        found = self.cast(written, self._scale_of_part(weight), key=key, want=_VALUES_CODES | Want.STATS)
        stats = found.stats
        assert found.values is not None
        assert stats is not None
        attempted = written != before
        if not self._powers_of_two:  # fl(s * p) / s may lie off the grid: what was not touched stays
            codes = torch.where(attempted, found.codes, self.codes)
            found = found._replace(values=torch.where(attempted, found.values, before), codes=codes)
        if observer is not None:
            self.session.refuse_capture("an observer reads each step's update", "set_observer(model, None) before")
            observer.observe_update(
                layer=layer,
                parameter=weight,
                before=from_part(weight, before),
                attempted=weight.detach(),
                after=from_part(weight, found.values),
                scale=self.scale,
                fmt=self.fmt,
                rounding=self.spec.rounding,
            )
        if counted is None:
            flips = code_index(found.codes, self.fmt) != code_index(self.codes, self.fmt)
            counts = [attempted.sum(), flips.sum(), (attempted & ~flips).sum(), stats.overflow]
        else:
            counts = [counted[0], counted[1], counted[2], counted[5]]
        hidden = None if counted is None else summed(counted[5].clone(), weight)
        found, regridded = self._refreshed(weight, found, key, hidden)
        regridded, self._changed = regridded if self._changed is None else regridded + self._changed, None
        self._write(weight, found)
        return summed(torch.stack([number.to(torch.int64) for number in (*counts, regridded)]), weight)

    def _key(self, weight: Tensor) -> tuple[int, int] | Tensor | None:
        """The random key of this step's rounding: each part of a spread weight has its own, replicas of it the same."""
        if self.cast.rounding is not Rounding.STOCHASTIC:
            return None
        base = stream_base(self.name, "storage", shard_name(weight)) if is_spread(weight) else self._base
        part = local(weight)
        return self.session.key_beside(part, base, False) if serve(part) else self.session.key(base, per_rank=False)

    def _refreshed(
        self, weight: Tensor, landed: Quantized, key: tuple[int, int] | Tensor | None, hidden: Tensor | None
    ) -> tuple[Quantized, Tensor]:
        """What to write, `landed` or under a fresh scale where one is due; and the number of values that it changed.

        On a GPU nothing is asked for: both are made, and the device takes one.

        Args:
            hidden: how many weights an optimizer that lands by itself aimed beyond max. It hands over the landed values,
                so how far beyond is not known: grids with a weight at their edge grow by a binade.
        """
        on_gpu = serve(local(weight))
        if on_gpu and not isinstance(self._steps, Tensor):
            self.session.refuse_capture(f"{self.name!r} has not been stepped yet")
            self._steps = torch.full((), self._steps, dtype=torch.int64, device=weight.device)
        self._steps += 1
        none = torch.zeros((), dtype=torch.int64, device=weight.device)
        if not self.spec.refresh_every:
            return landed, none
        scale = self.policy_scale(weight)  # of what was attempted: stored values could only shrink it
        if hidden is not None:
            found = largest(weight, self._axis)
            scale = torch.where((hidden > 0) & (found >= self.fmt.max * self.scale), 2 * scale, scale)
        larger = torch.maximum(scale, self.scale)
        waits = self._steps % self.spec.refresh_every
        scale = torch.where(waits > 0, larger, scale) if isinstance(waits, Tensor) else larger if waits else scale
        same = (scale == self.scale).all() if on_gpu else torch.equal(scale, self.scale)
        if same is True:
            return landed, none
        self._rescale(scale)
        regridded = self.cast(local(weight).detach(), self._scale_of_part(weight), key=key, want=_VALUES_CODES)
        changed = (regridded.values != landed.values).sum()
        if same is False:
            return regridded, changed
        values, codes = (torch.where(same, *pair) for pair in zip(landed[:2], regridded[:2], strict=True))
        return landed._replace(values=values, codes=codes), torch.where(same, none, changed)


def _compute_dtype(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _without_transforms(tensor: Tensor) -> Tensor:
    """The tensor below the wrappers of `torch.func`'s transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@torch.library.custom_op("altgrad::present_scale", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _present_scale(weight: Tensor, number: int, axis: int) -> Tensor:
    """The scale of a stored weight's present values, found by the storage of that number when compiled code runs."""
    storage = _BY_NUMBER.get(number)
    if storage is None:
        raise RecipeError("compiled code outlived the grid storage of its layer; compile the model again")
    scale = storage.grid_of(weight).scale
    return torch.as_tensor(scale).to(_compute_dtype(weight.dtype == torch.float64), copy=True)


@_present_scale.register_fake
def _(weight: Tensor, number: int, axis: int) -> Tensor:
    shape = [n if d == axis else 1 for d, n in enumerate(weight.shape)] if axis >= 0 else []
    return weight.new_empty(shape, dtype=_compute_dtype(weight.dtype == torch.float64))
