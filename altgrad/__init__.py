"""AltGrad: the wind tunnel and flight recorder for low-precision training.

Put any number format on any tensor role of any PyTorch model, train it, and see when, where and why it breaks.
Submodules load on first use, so `import altgrad` costs next to nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

__all__ = (
    "__version__",
    "advise",
    "analysis",
    "autopsy",
    "errors",
    "loop",
    "monitor",
    "nn",
    "optim",
    "quantization",
    "report",
    "sweep",
    "training",
)


def __getattr__(name: str):
    if name in __all__:
        return import_module(f"altgrad.{name}")
    raise AttributeError(f"module 'altgrad' has no attribute {name!r}")
