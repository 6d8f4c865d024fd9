"""The kernels in plain torch, for any device."""
