"""Measurements, each run by itself: `python -m benchmarks.bench_step`. A package, since others bring one of this name."""
