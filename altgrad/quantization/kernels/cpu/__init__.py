"""The CPU kernels: fused passes compiled by Numba."""
