"""The registry: names, options, errors."""

import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import OptionError
from altgrad.optim import OPTIMIZERS, find_optimizer, make_optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_make_their_class_and_cite_a_source(name):
    row = OPTIMIZERS[name]
    optimizer = make_optimizer(name.upper(), [Parameter(torch.ones(2))], lr=0.1)
    assert type(optimizer) is row.cls
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert row.source
    assert {"lr"} <= row.options
    assert not row.options & {"self", "params", "options"}


def test_unknown_names_and_options_are_told():
    with pytest.raises(OptionError, match="manifold_adamw"):
        find_optimizer("manifold_adam")
    with pytest.raises(OptionError, match="does not take betas"):
        make_optimizer("grid_optim", [Parameter(torch.ones(2))], betas=(0.9, 0.95))
