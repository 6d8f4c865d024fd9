"""Optimizers that know the grid their weights live on; all are `torch.optim.Optimizer`s.

>>> import torch
>>> from altgrad.optim import ManifoldAdamW
>>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.125]))
>>> weight.grad = torch.ones(2)
>>> ManifoldAdamW([weight], "E4M3", lr=0.5).step()  # half a grid step each: 1/16 and 1/128
    >>> weight.tolist()
    [0.9375, 0.1171875]
"""

from altgrad.optim.base import COUNT_NAMES, GridOptimizer, state_bytes
from altgrad.optim.compensated import ECO, KahanAdamW
from altgrad.optim.grid import position, spacing, value_at
from altgrad.optim.grid_optim import GridOptim
from altgrad.optim.lmd import LMD
from altgrad.optim.madam import LNSMadam, Madam
from altgrad.optim.manifold_adamw import ManifoldAdamW, Movement, SRAdamW
from altgrad.optim.registry import OPTIMIZERS, OptimizerRow, find_optimizer, make_optimizer
from altgrad.optim.resets import reset_moments
from altgrad.optim.sign_based import Lion, SignSGD

__all__ = [
    "COUNT_NAMES",
    "ECO",
    "LMD",
    "OPTIMIZERS",
    "GridOptim",
    "GridOptimizer",
    "KahanAdamW",
    "LNSMadam",
    "Lion",
    "Madam",
    "ManifoldAdamW",
    "Movement",
    "OptimizerRow",
    "SRAdamW",
    "SignSGD",
    "find_optimizer",
    "make_optimizer",
    "position",
    "reset_moments",
    "spacing",
    "state_bytes",
    "value_at",
]
