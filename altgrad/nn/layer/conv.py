"""The quantized convolution: padding and batch axes put in order, then torch's own loops on quantized operands.

Blocks of a block format run along the channels (forward and input_grad) and along the batch (weight_grad).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.nn.layer.contractions import Convolution
from altgrad.nn.layer.gemms import multiply
from altgrad.nn.layer.state import LayerState


def conv_forward(state: LayerState, module: nn.Module, x: Tensor) -> Tensor:
    """The forward of a torch Conv1d, Conv2d or Conv3d: x [n, c, ...] or [c, ...], any padding mode."""
    w, bias, spatial = module.weight, module.bias, len(module.kernel_size)  # type: ignore[arg-type]
    if state.is_plain(x, module.training):
        return module._conv_forward(x, w, bias)  # type: ignore[operator]
    unbatched = x.ndim == spatial + 1
    x = x.unsqueeze(0) if unbatched else x
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        around = (0,) * (2 * spatial) if padding == "valid" else module._reversed_padding_repeated_twice
        x, padding = F.pad(x, around, mode=mode), (0,) * spatial  # type: ignore[arg-type]
    geometry = Convolution(tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups)  # type: ignore[arg-type]
    y = multiply(state, geometry, x, w, bias, module.training)  # type: ignore[arg-type]
    return y.squeeze(0) if unbatched else y


def conv_transpose_forward(state: LayerState, module, x: Tensor, output_size=None) -> Tensor:
    """The forward of a torch ConvTranspose1d, 2d or 3d: x [n, c, ...] or [c, ...]."""
    spatial = len(module.kernel_size)
    sizes = (output_size, module.stride, module.padding, module.kernel_size)
    extra = module._output_padding(x, *sizes, spatial, module.dilation)  # type: ignore[operator]
    unbatched = x.ndim == spatial + 1
    x = x.unsqueeze(0) if unbatched else x
    geometry = Convolution(
        tuple(module.stride), tuple(module.padding), tuple(module.dilation), module.groups, True, tuple(extra)
    )
    if state.is_plain(x, module.training):
        how = (module.stride, module.padding, module.dilation, True, list(extra), module.groups)
        y = torch.convolution(x, module.weight, module.bias, *how)
    else:
        y = multiply(state, geometry, x, module.weight, module.bias, module.training)
    return y.squeeze(0) if unbatched else y
