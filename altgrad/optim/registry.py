"""The optimizers by name: one row each, with defaults and source; tests and configs pick up new rows by themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

from altgrad.errors import OptionError
from altgrad.optim.base import COMMON_OPTIONS, GridOptimizer
from altgrad.optim.compensated import ECO, KahanAdamW
from altgrad.optim.grid_optim import GridOptim
from altgrad.optim.lmd import LMD
from altgrad.optim.madam import LNSMadam, Madam
from altgrad.optim.manifold_adamw import ManifoldAdamW, SRAdamW
from altgrad.optim.resets import chosen_moments, one_count_for_both
from altgrad.optim.sign_based import Lion, SignSGD


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer: its class, the defaults that differ from the class's own, what it does, and its paper.

    lr_unit: "distance" (as AdamW), "grid steps", or "log factor". moments: which averages it keeps, "first" (of gradients) and
    "second" (of their squares).
    """

    name: str
    cls: type[Optimizer]
    summary: str
    source: str
    lr_unit: str = "distance"
    moments: tuple[str, ...] = ("first", "second")
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def options(self) -> frozenset[str]:
        """Names of the options that the optimizer takes."""
        names = set()
        for cls in self.cls.__mro__:
            if cls in (Optimizer, GridOptimizer, object):
                break
            if "__init__" in vars(cls):
                names.update(inspect.signature(cls.__init__).parameters)
        common = set(COMMON_OPTIONS) if issubclass(self.cls, GridOptimizer) else set()
        return frozenset((names | common) - {"self", "params", "options"})

    def check_reset(self, moments: str, optimizer: Optimizer) -> None:
        """Refuse a reset of moments (`reset_moments`) that this row's optimizer cannot make.

        Raises:
            OptionError: it has no such moment, keeps none at a momentum of 0, or counts both by one step.
        """
        chosen = chosen_moments(moments)
        if all(group.get("momentum", 1) == 0 for group in optimizer.param_groups):
            raise OptionError(f"{self.name} with momentum 0 keeps no moment that could begin anew; leave resets out")
        if not set(chosen) & set(self.moments):
            raise OptionError(f"{self.name} keeps no {moments} moment; reset the {self.moments[0]}, or both")
        if len(chosen) < len(self.moments) and not issubclass(self.cls, GridOptimizer):
            raise one_count_for_both(self.name, moments)


_ROWS = (
    OptimizerRow(
        "adamw",
        torch.optim.AdamW,
        "torch's AdamW",
        "Loshchilov and Hutter 2019, arXiv:1711.05101",
        defaults={"foreach": True},  # the bits of torch's default on CPUs, its loop over parameters, in less time
    ),
    OptimizerRow(
        "sgd",
        torch.optim.SGD,
        "torch's SGD with momentum",
        "Sutskever et al. 2013",
        moments=("first",),
        defaults={"momentum": 0.9},
    ),
    OptimizerRow(
        "manifold_adamw", ManifoldAdamW, "AdamW in code space: lr counts grid steps", "AltGrad", lr_unit="grid steps"
    ),
    OptimizerRow(
        "grid_optim",
        GridOptim,
        "momentum SGD in grid steps, rounded without bias to actual neighbours",
        "AltGrad",
        lr_unit="grid steps",
        moments=("first",),
    ),
    OptimizerRow(
        "sr_adamw",
        SRAdamW,
        "AdamW, rounded stochastically to the grid",
        "Gupta et al. 2015, arXiv:1502.02551; Zamirai et al. 2020, arXiv:2010.06192",
    ),
    OptimizerRow(
        "kahan_adamw",
        KahanAdamW,
        "AdamW with Kahan-compensated weights",
        "Zamirai et al. 2020, arXiv:2010.06192",
    ),
    OptimizerRow(
        "eco", ECO, "AdamW with the quantization error fed into its momentum", "Nikdan et al. 2026, arXiv:2601.22101"
    ),
    OptimizerRow(
        "madam",
        Madam,
        "multiplicative Adam",
        "Bernstein et al. 2020, arXiv:2006.14560",
        lr_unit="log factor",
        moments=("second",),
    ),
    OptimizerRow(
        "lns_madam",
        LNSMadam,
        "Madam on whole exponents, for power-of-two grids",
        "Zhao et al. 2022, arXiv:2106.13914",
        lr_unit="grid steps",
        moments=("second",),
    ),
    OptimizerRow(
        "lmd",
        LMD,
        "log-normal multiplicative dynamics: two positive halves that move by factors",
        "Nishida et al. 2025, arXiv:2506.17768",
        lr_unit="log factor",
        moments=("first",),
    ),
    OptimizerRow(
        "lion", Lion, "sign of an interpolated momentum", "Chen et al. 2023, arXiv:2302.06675", moments=("first",)
    ),
    OptimizerRow(
        "signsgd",
        SignSGD,
        "sign of the momentum (Signum)",
        "Bernstein et al. 2018, arXiv:1802.04434",
        moments=("first",),
    ),
)

OPTIMIZERS: Mapping[str, OptimizerRow] = MappingProxyType({row.name: row for row in _ROWS})


def find_optimizer(name: str) -> OptimizerRow:
    """The row of that name.

    Raises:
        OptionError: unknown, with the nearest names.
    """
    row = OPTIMIZERS.get(str(name).lower())
    if row is None:
        near = get_close_matches(str(name), OPTIMIZERS, n=3, cutoff=0.4) or list(OPTIMIZERS)
        raise OptionError(f"unknown optimizer {name!r}: did you mean {', '.join(near)}?")
    return row


def make_optimizer(name: str, params: Iterable, **options: Any) -> Optimizer:
    """An optimizer by name.

    Args:
        name: a key of `OPTIMIZERS`, case-insensitively.
        params: parameters, or groups with options of their own.
        options: keyword arguments of its class.

    Raises:
        OptionError: unknown name, or an option that the optimizer does not take.
    """
    row = find_optimizer(name)
    unknown = sorted(set(options) - row.options)
    if unknown:
        raise OptionError(f"{row.name} does not take {', '.join(unknown)}; it takes {', '.join(sorted(row.options))}")
    if options.get("fused"):
        options = {"foreach": None, **options}  # torch takes one of them
    return row.cls(params, **{**row.defaults, **options})
