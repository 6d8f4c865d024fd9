"""AltGrad in somebody else's training loop: Hugging Face's Trainer, Lightning, accelerate; one line each.

    Trainer(..., callbacks=[HuggingFaceCallback("runs/mine")])
    lightning.Trainer(..., callbacks=[LightningCallback("runs/mine")])
    run = track(accelerator, model, optimizer, "runs/mine")  # after accelerator.prepare

Each saves the state of the quantization with the framework's own checkpoints and restores it on resume, so that a resumed
run has the bits of an unbroken one; gives each micro-batch its own random bits; attaches the monitor; and writes the run
folder that `altgrad run` writes, with verdicts and failure reports. `quantize_model` comes before; a model without
quantized layers is recorded as an FP32 run. All of it is `RecordedRun`, which serves any other loop as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from altgrad.errors import OptionError

if TYPE_CHECKING:
    from altgrad.integrations.recorded_run import RecordedRun
    from altgrad.integrations.with_accelerate import track
    from altgrad.integrations.with_lightning import LightningCallback
    from altgrad.integrations.with_transformers import HuggingFaceCallback

__all__ = ["HuggingFaceCallback", "LightningCallback", "RecordedRun", "track"]

_HOMES = {  # name -> its module here, and the package that it needs
    "HuggingFaceCallback": ("with_transformers", "transformers"),
    "LightningCallback": ("with_lightning", "lightning"),
    "track": ("with_accelerate", "accelerate"),
    "RecordedRun": ("recorded_run", None),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, package = _HOMES[name]
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise OptionError(
            f"{name} needs the package {package}, which is not installed: pip install {package}"
        ) from None
