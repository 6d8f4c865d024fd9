"""Measurements, each run by itself: `python -m benchmarks.bench_step`. A package, since others bring one of this name."""

import os

# torch's profiler tells on stderr that it begins and ends, at a level above all others
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
