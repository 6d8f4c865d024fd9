"""What a quantized layer carries: its recipe resolved into operands, shared where the recipe's entries are equal.

The state is a plain attribute of the module, in no state_dict; it holds no parameter and no module, so deepcopy and
pickle take it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from altgrad.errors import RecipeError
from altgrad.nn.layer import tensor_cores
from altgrad.nn.layer.contractions import LINEAR_REDUCED
from altgrad.nn.layer.gemm import Needs, Route, choose_route, needed_route
from altgrad.nn.layer.operand import Operand
from altgrad.nn.layer.uses import Uses
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.recipe.scaling_choice import is_block
from altgrad.nn.recipe.spec import GEMMS, OperandSpec
from altgrad.nn.session import Session, recomputing
from altgrad.nn.spread import group_of, mesh_of
from altgrad.nn.weight_cache import cache_for
from altgrad.quantization.products.units import common_unit

if TYPE_CHECKING:
    from altgrad.nn.storage import GridStorage

LARGE = (4096, 4096, 4096)  # rows, columns, reduced: of a GEMM that any rule calls large


def _shown(routes: list[str]) -> str:
    """One name, or one for each GEMM."""
    return routes[0] if len(set(routes)) == 1 else ", ".join(map("{} {}".format, GEMMS, routes))


class Plans(dict):
    """What a layer's calls came to, by shapes (`at_once`); they hold addresses, so copies of the layer make their own.

    possible: whether the operands allow any; None: not asked yet.
    """

    possible: bool | None = None

    def __reduce__(self):
        return Plans, ()


class LayerState:
    """Operands, name and session of one quantized layer.

    Args:
        recipe: the layer's recipe.
        session: shared by the layers of the model.
        name: qualified module name.
        transposed: the weight is stored [in, out], as in Hugging Face's Conv1D.
        reduced: axis of each (GEMM, role) that the GEMM reduces, in the tensor's own layout.
        everywhere: whether all processes that train the model use the layer at the same place of a step; experts are used
            where they have tokens.
    """

    def __init__(
        self,
        recipe: LayerRecipe,
        session: Session,
        name: str,
        *,
        transposed: bool = False,
        reduced: Mapping[tuple[str, str], int] = LINEAR_REDUCED,
        everywhere: bool = True,
    ) -> None:
        self.everywhere = everywhere
        self.session, self.name, self.transposed = session, name, transposed
        self.reduced = {**reduced}
        if transposed:
            self.reduced[("forward", "weight")], self.reduced[("input_grad", "weight")] = 0, 1
        self.set_recipe(recipe)

    def set_recipe(self, recipe: LayerRecipe) -> None:
        """Resolve a recipe into operands; scale histories start anew."""
        self.recipe = recipe
        self.storage: GridStorage | None = None
        self.operands: dict[tuple[str, str], Operand] = {}
        made: dict[tuple, Operand] = {}
        for gemm, role, spec in recipe.entries():
            block_axis = self.reduced[(gemm, role)]
            same = (role, spec, block_axis if is_block(spec.resolved) else None)
            if same not in made:
                axis = self._own_axis(role, spec)
                made[same] = Operand(spec, self.session, self.name, role, gemm, axis, block_axis)
                made[same].everywhere = self.everywhere
            made[same].reduced += (block_axis % 2,)
            made[same].compact = recipe.save_codes
            self.operands[(gemm, role)] = made[same]
        get = self.operands
        self.x, self.w = get["forward", "input"], get["forward", "weight"]
        self.dy, self.w_back = get["input_grad", "grad_output"], get["input_grad", "weight"]
        self.dy_back, self.x_back = get["weight_grad", "grad_output"], get["weight_grad", "input"]
        self.norm = Operand(recipe.norm_weight, self.session, self.name, "weight", "norm")  # a key of its own in states
        draws = recipe.mixes_at_random or any(operand.stochastic for operand in self.distinct())
        self.uses = Uses(self.session) if draws else None
        self._find_needs()
        self.shares_amax = any(operand.shares_amax for operand in self.distinct())
        self.whole_blocks = any(operand.spec.whole_blocks for operand in self.operands.values())
        self.plans = Plans()

    def change_recipe(self, recipe: LayerRecipe) -> None:
        """Replace the recipe. Operands whose entry stays keep their scale history, a grid that stays keeps its scale."""
        before = {**self.operands, ("norm", "weight"): self.norm}
        storage, uses = self.storage, self.uses
        self.leave_session()
        self.set_recipe(recipe)
        if uses is not None and self.uses is not None:
            self.uses.count[:1].copy_(uses.count[:1])
        for place, operand in (*self.operands.items(), (("norm", "weight"), self.norm)):
            if operand.spec == before[place].spec and operand.window is None and operand.pending is None:
                operand.window, operand.pending = before[place].window, before[place].pending
                operand.average, operand.averaged = before[place].average, before[place].averaged
        if storage is not None and recipe.storage == storage.spec:
            self.set_storage(storage)

    def leave_session(self) -> None:
        """Have the clock forget this layer's operands: their keys and histories end here."""
        dropped = {id(self.uses), *map(id, self.distinct())}
        self.session.operands[:] = [o for o in self.session.operands if id(o) not in dropped]

    def set_storage(self, storage: GridStorage | None) -> None:
        """Say which grid the weight lies on; operands with storage scaling take its scale."""
        self.storage = storage
        for (_, role), operand in self.operands.items():
            operand.storage = storage if role == "weight" else None
        self._find_needs()
        self.plans = Plans()

    def storage_of(self, weight: Tensor | None) -> GridStorage | None:
        """The storage of the layer's present weight, which may have been replaced or tied since; None without one."""
        if self.storage is None or not isinstance(weight, nn.Parameter):
            return None
        found = self.storage.of(weight)
        if found is not self.storage:
            self.set_storage(found)
        return found

    def _own_axis(self, role: str, spec: OperandSpec):
        axis = getattr(spec.scaling, "axis", None)
        if axis is None or not (self.transposed and role == "weight"):
            return axis
        return 1 - axis if isinstance(axis, int) else tuple(1 - a for a in axis)

    def distinct(self) -> list[Operand]:
        """The layer's operands, each once, in the order of the GEMMs."""
        return list({id(o): o for o in (*self.operands.values(), self.norm)}.values())

    # -- routes ---------------------------------------------------------------------------------------------------

    def _find_needs(self) -> None:
        self._needed = {gemm: self._needs(gemm) for gemm in GEMMS}
        for operand in self.distinct():
            routes = [self._needed[gemm].cores for (gemm, _), one in self.operands.items() if one is operand]
            operand.cores = next(filter(None, routes), None)

    def _needs(self, gemm: str) -> Needs:
        """What the operands of a GEMM allow: those scaled along the reduction must stay float32."""
        left, right = (self._coded_format(gemm, role) for role in GEMMS[gemm])
        unit = None if left is None or right is None else common_unit(left, right)
        values = needed_route(*(self._pulled_format(gemm, role) for role in GEMMS[gemm]))
        taken = {self._taken_by_tensor_cores(gemm, role) for role in GEMMS[gemm]}
        return Needs(values, unit, taken.pop() if len(taken) == 1 else None, self.recipe.by_unit)

    def _taken_by_tensor_cores(self, gemm: str, role: str) -> Route | None:
        operand, reduced = self.operands[(gemm, role)], self.reduced[(gemm, role)]
        along = self._storage_axis() if operand.follows_storage else operand.kept_axes
        kept = reduced >= 0 and len(along) < 2 and reduced not in along and reduced - 2 not in along  # of a matrix
        return tensor_cores.taken_as(operand, bool(along) and not kept)

    def _coded_format(self, gemm: str, role: str):
        """The format of an operand whose codes can be multiplied; None where its scale varies along the reduction."""
        operand = self.operands[(gemm, role)]
        if operand.fmt is None or not operand.saves_codes:
            return None
        reduced = self.reduced[(gemm, role)]
        along = self._storage_axis() if operand.follows_storage else operand.kept_axes
        return None if reduced in along or reduced - 2 in along else operand.fmt

    def _storage_axis(self) -> tuple[int, ...]:
        """The axis that a stored weight's scales are kept along."""
        per_channel = self.storage is None or self.storage.per_channel
        return (1 if self.transposed else 0,) if per_channel else ()

    def _pulled_format(self, gemm: str, role: str):
        operand = self.operands[(gemm, role)]
        if operand.fmt is None or operand.block or not operand.saves_codes:
            return None
        per_channel = self._storage_axis() if operand.follows_storage else operand.kept_axes
        return None if per_channel else operand.fmt

    def route(
        self, gemm: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, codes: bool = True
    ) -> Route:
        """The unit that multiplies this GEMM (`gemm.choose_route`)."""
        return choose_route(self._needed[gemm], shape, device.type, dtype=dtype, codes=codes)

    def routes(self, device_type: str) -> str:
        """Which unit multiplies each GEMM where it is large, and where torch.compile compiles it: one name, or one for each."""
        eager, traced = (
            [choose_route(self._needed[gemm], LARGE, device_type, codes=codes).value for gemm in GEMMS]
            for codes in (True, False)
        )
        shown = _shown(eager) + ("" if traced == eager else f"; compiled {_shown(traced)}")
        if not any(tensor_cores.is_compact(operand) for operand in self.distinct()):
            return shown
        return f"{shown}; saved as codes" + ("" if device_type == "cuda" else ", as everywhere but on GPUs")

    # -- the present call -----------------------------------------------------------------------------------------

    def is_plain(self, x: Tensor, training: bool) -> bool:
        """Whether the layer computes as an unquantized one does now: within `full_precision`, on the meta device, and in
        evaluation where the recipe says so."""
        return self.session.bypass or x.is_meta or (self.recipe.plain_evaluation and not training)

    def records(self, training: bool) -> bool:
        """Whether this call belongs to training: scale histories and observers hear of it."""
        if training and self.shares_amax and not torch.compiler.is_compiling():
            self._meet_the_others()
        return training and torch.is_grad_enabled()

    def _meet_the_others(self) -> None:
        """Learn which processes train the model together, from DDP or FSDP2 around it."""
        session, wrapper = self.session, DistributedDataParallel._active_ddp_module
        if wrapper is not None:
            session.group, session.in_step = wrapper.process_group, not wrapper.find_unused_parameters
        elif (
            session.group is None
            and session.step == 0
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            model = None if session.model is None else session.model()
            mesh = None if model is None else mesh_of(model.parameters())
            if mesh is not None:
                session.group, session.in_step = group_of(mesh), True

    def use(self, training: bool) -> int | Tensor:
        """Which use of the layer within the step this forward is, for its random bits (`Uses.take`).

        Raises:
            RecipeError: `torch.jit.trace` is at work, which would record this very input's values as constants.
        """
        if torch._C._get_tracing_state() is not None:
            raise RecipeError(
                f"torch.jit.trace cannot record the quantized layer {self.name!r}; use torch.export.export or "
                "torch.compile, or restore_model(model) before"
            )
        return 0 if self.uses is None else self.uses.take(training)

    def keys_of_gradients(self, use: int | Tensor, x: Tensor) -> tuple:
        """What the two products of a gradient draw with: one key where they have one entry of the recipe."""
        first = self.dy.key_of(use, x)
        return first, first if self.dy_back is self.dy else self.dy_back.key_of(use, x)

    def watched(self, record: bool) -> bool:
        """Whether an observer hears of this call: of its gradients also where its forward is recomputed."""
        return record and self.session.observer is not None

    def observed(self, record: bool) -> bool:
        """Whether this forward's statistics are published: not those of a recomputation."""
        if not self.watched(record):
            return False
        self.session.refuse_capture("an observer reads each step's statistics", "set_observer(model, None) before")
        return not recomputing()

    def scale_pair(self, first: Operand, second: Operand, x: Tensor, record: bool):
        """Scales of the two uses of one tensor; the second is None where the entries are shared.

        (A traced autograd function must not get one tensor twice.) Both are None, too, where they are found with the codes.
        """
        if (cache := cache_for(first, x)) is not None and cache_for(second, x) is not None:
            return cache.get(first, ("scales", record), x, lambda: self._scale_pair(first, second, x, record))
        return self._scale_pair(first, second, x, record)

    @staticmethod
    def _scale_pair(first: Operand, second: Operand, x: Tensor, record: bool):
        found = first.scale_before(x, record)
        if second is first:
            return found, None
        return found, found if second.shares_tensor_scale(first, found) else second.scale_before(x, record)

    def __repr__(self) -> str:
        return f"LayerState({self.name!r}, {self.recipe})"
