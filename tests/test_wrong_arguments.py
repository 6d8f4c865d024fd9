"""What is no model, config or budget is refused with what to pass, at every entry of the library that takes one."""

from __future__ import annotations

from typing import Any

import pytest

from altgrad.advise import Budget, advise_weights
from altgrad.errors import AltGradError
from altgrad.nn import (
    cached_weights,
    load_quant_state,
    quant_state,
    quantize_model,
    restore_model,
    set_observer,
    uniform,
)
from altgrad.training import Trainer

NOTHING: Any = None
TEXT: Any = "eight"


def enter_cached_weights(model) -> None:
    with cached_weights(model):
        pass


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: quantize_model(NOTHING, uniform("E4M3")), "the model is a NoneType, no torch.nn.Module"),
        (lambda: restore_model(TEXT), "the model is a str, no torch.nn.Module"),
        (lambda: enter_cached_weights(NOTHING), "the model is a NoneType, no torch.nn.Module"),
        (lambda: quant_state(NOTHING), "the model is a NoneType, no torch.nn.Module"),
        (lambda: load_quant_state(NOTHING, {}), "the model is a NoneType, no torch.nn.Module"),
        (lambda: set_observer(NOTHING, None), "the model is a NoneType, no torch.nn.Module"),
        (lambda: Trainer(TEXT), "the config is a str, no ExperimentConfig; read a file by load_config"),
        (lambda: Budget(bits=TEXT), "bits are 'eight'; write a number"),
        (lambda: advise_weights(NOTHING), "a NoneType is no checkpoint; give a module or a path"),
    ],
)
def test_what_is_no_model_config_or_budget_is_refused(call, says):
    with pytest.raises(AltGradError, match=says):
        call()
