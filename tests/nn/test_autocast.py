"""Under autocast a layer's output is the exact result cast once, and nothing about its gradients changes."""

import pytest
import torch
from torch import nn

from altgrad.nn import functional, quantize_model, uniform
from altgrad.nn.layer.gemm import conv_precision, matmul_precision

FORMATS = ["E4M3", "E5M2", "E0M7", "NVFP4", "BF16"]


def linear():
    return nn.Linear(64, 64), torch.randn(32, 64)


def conv():
    return nn.Conv2d(16, 16, 3, padding=1), torch.randn(16, 16, 8, 8)


def outputs(layer, x, dy, autocast):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(leaf)
    y.backward(dy.to(y.dtype))
    return y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize("name", FORMATS)
def test_autocast_casts_the_exact_result_once_and_leaves_the_gradients(name, make):
    torch.manual_seed(0)
    layer, x = make()
    quantize_model(layer, uniform(name))
    dy = torch.randn_like(layer(x)).bfloat16().float()
    plain, cast = (outputs(layer, x, dy, autocast) for autocast in (False, True))
    assert cast[0].dtype == torch.bfloat16
    assert torch.equal(cast[0], plain[0].bfloat16())
    for a, b in zip(plain[1:], cast[1:], strict=True):
        assert torch.equal(a, b)


def test_a_backward_inside_autocast_is_the_one_outside():
    torch.manual_seed(0)
    layer, x = linear()
    quantize_model(layer, uniform("E4M3"))
    dy, grads = torch.randn(32, 64).bfloat16(), []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            if inside:
                y.backward(dy)
        if not inside:
            y.backward(dy)
        grads.append(layer.weight.grad.clone())
    assert torch.equal(*grads)


def test_matmul_under_autocast():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 32), torch.randn(32, 16)
    plain = functional.matmul(a, b, recipe="E4M3")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.matmul(a, b, recipe="E4M3"), plain.bfloat16())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("make", [linear, conv])
def test_compiled_layers_under_autocast_give_the_eager_bits(make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = make()
    quantize_model(layer, uniform("E4M3"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


@pytest.fixture
def precisions():
    """Every precision setting of torch, given back afterwards."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for library, operations in (("cuda", ["matmul"]), ("mkldnn", ["matmul", "conv"]), ("cudnn", ["conv", "rnn"])):
        for operation in operations:
            getattr(getattr(torch.backends, library), operation).fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


def every_setting() -> list:
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda: torch.backends.cudnn.rnn.fp32_precision,
        lambda: torch.backends.mkldnn.conv.fp32_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:  # torch refuses the older flag beside the newer setting
            found.append("refused")
    return found


def _older_flag():
    torch.backends.cuda.matmul.allow_tf32 = True


def _newer_setting():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _everything():
    torch.backends.fp32_precision = "tf32"


def _cudnn_off():
    torch.backends.cudnn.allow_tf32 = False


WAYS = {
    "fresh": lambda: None,
    "older flag": _older_flag,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer setting": _newer_setting,
    "everything": _everything,
    "cudnn off": _cudnn_off,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("precisions")
def test_whichever_way_a_precision_was_set_it_is_ieee_inside_readable_and_found_again(way):
    WAYS[way]()
    before = every_setting()
    with matmul_precision("cuda", "ieee"), conv_precision("cuda"):
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
        assert torch.backends.cudnn.conv.fp32_precision in ("ieee", "none")
        inside = every_setting()
        if before[0] != "refused":  # the older flags are in use
            assert "refused" not in (inside[0], inside[1], inside[4])
    assert every_setting() == before
    with matmul_precision("cpu", "ieee"), conv_precision("cpu"):
        assert torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none")
        assert torch.backends.mkldnn.conv.fp32_precision in ("ieee", "none")
    assert every_setting() == before


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("precisions")
def test_a_coarser_precision_reaches_neither_eager_nor_compiled_products(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = linear()
    quantize_model(layer, uniform("E4M3"))
    expected = layer(x)
    seen, plain = [], torch.matmul

    def spied(a, b):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return plain(a, b)

    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(torch, "matmul", spied)
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        assert torch.equal(one(x), expected)
    assert seen == ["ieee", "ieee"]
