"""One run on several processes: what the ranks of a `torchrun` agree on, so that together they are one training run.

Every rank computes its rows of each micro-batch and back-propagates its part of the *global* mean loss; gradients are
summed, not averaged, over ranks. So each gradient that a layer quantizes is the one that a single process would see,
and the amax of every activation and gradient is reduced by maximum over the ranks: all quantize on the same grid, and
under nearest rounding the run equals the one-process run up to the order of summation.

A process that was not started by torchrun is a world of one, in which all of this does nothing.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from altgrad.errors import DistributedError
from altgrad.nn.recipe.facts import storage_of
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import recipe_of

KINDS = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Args:
        rank, world_size: as torch.distributed has them.
        local_rank: number of this process on its machine, and of the GPU that it uses.
        kind: "ddp" (every rank holds the model) or "fsdp2" (every rank holds a part of it).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    kind: str = "ddp"

    @classmethod
    def from_environment(cls, config: ExperimentConfig) -> Ranks:
        """The ranks that torchrun started, their process group opened (gloo on CPU, nccl on CUDA); else a world of one.

        Raises:
            DistributedError: the config asks for what several processes cannot do.
        """
        world = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
        if world == 1:
            return cls(kind=config.distributed)
        ranks = cls(int(os.environ["RANK"]), world, int(os.environ["LOCAL_RANK"]), config.distributed)
        ranks.check(config)
        if not dist.is_initialized():
            on_cuda = config.device.startswith("cuda")
            if on_cuda:
                torch.cuda.set_device(ranks.local_rank)
            dist.init_process_group("nccl" if on_cuda else "gloo")
            atexit.register(ranks.close)
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this is the run's only process."""
        return self.world_size == 1

    @property
    def shards(self) -> bool:
        """Whether parameters, gradients and optimizer state are spread over the ranks."""
        return not self.alone and self.kind == "fsdp2"

    def check(self, config: ExperimentConfig) -> None:
        """Raises DistributedError if these ranks cannot make this run."""
        rows = config.data.batch_size // config.data.grad_accumulation
        if rows % self.world_size:
            raise DistributedError(
                f"a micro-batch of {rows} sequences cannot be shared evenly by {self.world_size} processes; use "
                f"data.batch_size={config.data.grad_accumulation * self.world_size * max(1, rows // self.world_size)}"
            )
        if config.device.startswith("cuda:"):
            raise DistributedError(f"device {config.device} names one GPU for all processes; use device=cuda")
        if config.device == "mps":
            raise DistributedError("device mps has no process groups; use device=cpu or device=cuda")
        if self.kind == "fsdp2":
            self._check_sharded(config)

    @staticmethod
    def _check_sharded(config: ExperimentConfig) -> None:
        if storage_of(recipe_of(config)) != "master":
            raise DistributedError(
                "weights on a grid cannot be spread by fsdp2 here: a run's records and checkpoints take whole grids; "
                "use distributed=ddp, or master storage (weight_storage=master)"
            )
        for key in ("enable_emergency_shift", "enable_partition_clipping"):
            if getattr(config, key):
                raise DistributedError(
                    f"{key} needs whole weights and gradients, which fsdp2 spreads; use distributed=ddp"
                )
        if config.monitor.enabled:
            raise DistributedError("the monitor reads whole weights, which fsdp2 spreads; use distributed=ddp")
        if config.optimizer.name not in ("adamw", "adam", "sgd"):
            raise DistributedError(
                f"optimizer {config.optimizer.name!r} is not known to work on spread weights; use adamw, adam or sgd "
                "with fsdp2, or distributed=ddp"
            )

    def facts(self) -> dict[str, Any]:
        """What env.json says of the processes; nothing for one alone."""
        return {} if self.alone else {"processes": self.world_size, "distributed": self.kind}

    # -- the model ------------------------------------------------------------------------------------------------

    def device(self, name: str) -> str:
        """This rank's device for the config's `name`."""
        return f"cuda:{self.local_rank}" if name == "cuda" and not self.alone else name

    def prepare(self, model: nn.Module) -> None:
        """Agree on amax scales and, for fsdp2, spread the parameters; before an optimizer is made for them."""
        if self.alone:
            return
        if _quantized(model):
            from altgrad.nn import set_amax_reduction, set_rank

            set_amax_reduction(model, self.max)
            set_rank(model, self.rank)
        if self.shards:
            from torch.distributed.fsdp import FSDPModule, fully_shard

            # a model may return a view (such as reshaped logits); the losses here change nothing in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            for module in model.modules():
                if isinstance(module, nn.ModuleList):
                    for block in module:
                        fully_shard(block)
            fully_shard(model)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """What is called for the forward pass: the model, under ddp with the summation of gradients."""
        if self.alone or self.shards:
            return model
        from torch.nn.parallel import DistributedDataParallel

        known = signature(DistributedDataParallel).parameters  # the older name is deprecated where there is the newer
        quiet = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        wrapped = DistributedDataParallel(model, **quiet)
        wrapped.register_comm_hook(None, _sum_gradients)
        return wrapped

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around one micro-batch: gradients are exchanged in the last one only."""
        if self.alone:
            yield
        elif self.shards:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif last:
            yield
        else:
            with model.no_sync():  # type: ignore[operator]
                yield

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Around an evaluation, in which every rank sees all of the data: they draw the same random bits, rank 0's."""
        if self.alone or not _quantized(model):
            yield
            return
        from altgrad.nn import set_rank

        set_rank(model, 0)
        try:
            yield
        finally:
            set_rank(model, self.rank)

    # -- data -----------------------------------------------------------------------------------------------------

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a micro-batch: an equal share, in order."""
        return batch if self.alone else batch.chunk(self.world_size)[self.rank]

    # -- agreement ------------------------------------------------------------------------------------------------

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the ranks; NaN anywhere gives NaN or is dropped as the backend does."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the ranks."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def norm(self, local: Tensor) -> Tensor:
        """L2 norm of a vector that is spread over the ranks, from the norm of each part."""
        return self.sum(local.double().square()).sqrt().to(local.dtype) if self.shards else local

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether `flag` holds on some rank."""
        if self.alone:
            return flag
        if dist.get_backend() == "nccl":
            device = f"cuda:{self.local_rank}"
        return bool(self.max(torch.tensor(float(flag), device=device)))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if not self.alone:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main rank's value (anything that pickles), on every rank."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        """Leave the process group."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return x
        result = x.detach().clone()
        dist.all_reduce(result, operation)
        return result


def _sum_gradients(_, bucket):  # DDP compares annotations with types, and postponed ones are strings
    """DDP's exchange without its division by the number of ranks: each rank's loss is its part of the global mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _quantized(model: nn.Module) -> bool:
    from altgrad.nn.layer.classes import is_quantized

    return any(is_quantized(module) for module in model.modules())
