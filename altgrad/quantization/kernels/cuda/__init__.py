"""The CUDA kernels, written in Triton."""
