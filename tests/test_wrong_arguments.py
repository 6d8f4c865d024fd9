"""What is no model, config or budget is refused with what to pass, at every entry of the library that takes one."""

from __future__ import annotations

from typing import Any

import pytest

from altgrad import nn
from altgrad.advise import Budget, advise_weights
from altgrad.errors import AltGradError
from altgrad.training import Trainer

NOTHING: Any = None
TEXT: Any = "eight"


def enter_cached_weights(model) -> None:
    with nn.cached_weights(model):
        pass


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nn.quantize_model(NOTHING, nn.uniform("E4M3")), "the model is a NoneType, no torch.nn.Module"),
        (lambda: nn.restore_model(TEXT), "the model is a str, no torch.nn.Module"),
        (lambda: enter_cached_weights(NOTHING), "the model is a NoneType, no torch.nn.Module"),
        (lambda: nn.quant_state(NOTHING), "the model is a NoneType, no torch.nn.Module"),
        (lambda: nn.load_quant_state(NOTHING, {}), "the model is a NoneType, no torch.nn.Module"),
        (lambda: nn.set_observer(NOTHING, None), "the model is a NoneType, no torch.nn.Module"),
        (lambda: Trainer(TEXT), "the config is a str, no ExperimentConfig; read a file by load_config"),
        (lambda: Budget(bits=TEXT), "bits are 'eight'; write a number"),
        (lambda: advise_weights(NOTHING), "a NoneType is no checkpoint; give a module or a path"),
    ],
)
def test_what_is_no_model_config_or_budget_is_refused(call, says):
    with pytest.raises(AltGradError, match=says):
        call()
