"""Training loops that can be put back to a state and stepped from there: what advice traces and autopsies fork."""

from altgrad.loop.loop import Loop, Stateful, StepLoop

__all__ = ["Loop", "Stateful", "StepLoop"]
