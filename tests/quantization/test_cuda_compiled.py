"""What torch.compile makes of quantized code for a GPU: the divisions, launches and CUDA graphs of lowered and compiled code."""

import re
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)

import triton

from altgrad.quantization import amax_scale
from altgrad.quantization.codec import divided
from benchmarks import cuda_fusion
from tests.quantization.page_of_benchmarks import of_the_page

pytestmark = pytest.mark.filterwarnings("ignore")  # Triton's own deprecations
COMPILED, LAUNCHED = of_the_page("| compiled code"), of_the_page("| compiled norm and MLP")
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


@pytest.mark.parametrize("row", cuda_fusion.ROWS_OF_CODE, ids=lambda row: row.name)
def test_compiled_code_rounds_within_the_kernel_that_makes_the_tensor(row):
    found, kernels = cuda_fusion.cost(row)
    large = [kernel for kernel in kernels if kernel.elements >= 1]
    assert len({kernel.name for kernel in large}) == 1
    for kernel in large:
        code = kernel.asm["ptx"]
        assert "f64" not in code
        assert ".local" not in code, "registers spill"
        assert code.count("div.rn.f32") == ("nearest" in row.name), "one of the scale, none of elements"
        assert code.count("div.full") <= (row.name.startswith("norm") and OLDER), "but of the mean in torch's own norm"
    for number, cell in zip(found, COMPILED[row.name], strict=True):
        assert (number is None) == (cell == "")
        assert number is None or round(number, 1) <= float(cell) + 0.5 * OLDER, "Triton 3.9's; none may need more"


@pytest.mark.parametrize(
    ("divides", "times"),
    [
        (lambda x, scale: amax_scale(x, "E4M3"), 1),
        (lambda x, scale: amax_scale(x, "E4M3", power_of_two=True, axis=0), 1),
        (lambda x, scale: divided(x.float(), scale).abs() <= 448, 2),
    ],
    ids=["scale", "scales of rows", "mask"],
)
def test_compiled_scales_and_masks_are_quotients_that_round(divides, times):
    """A compiler multiplies by the reciprocal of a constant, and divides tensors within two units of the last place."""
    kernels = cuda_fusion.compiled(cuda_fusion.lowered(divides, cuda_fusion.WIDE, cuda_fusion.SCALE))
    code = {kernel.name: kernel.asm["ptx"] for kernel in kernels}.values()
    assert [sum(text.count(one) for text in code) for one in ("div.rn.f32", "div.full")] == [times, 0]


@pytest.mark.parametrize("name", cuda_fusion.COMPILED)
def test_a_compiled_mlp_is_lowered_for_a_gpu_as_a_whole(name):
    kernels, products, others = cuda_fusion.counts(cuda_fusion.COMPILED[name])
    stated = list(map(int, LAUNCHED[name]))
    assert [products, others] == stated[1:]
    assert kernels == stated[0] or (kernels <= 1.25 * stated[0] and not torch.__version__.startswith("2.13."))


@pytest.mark.parametrize("name", ["E4M3, stochastic", "E4M3, delayed amax"])
def test_reduce_overhead_captures_nothing_that_reads_the_host(name):
    """A replay of a CUDA graph runs no Python: counts of uses and histories would stay as they were captured."""
    host = re.compile(r"altgrad\.(key_beside|delayed_scale|present_scale|offset_of_use)")
    captured, found = [], 0
    for graph, inputs in cuda_fusion.graphs_of(cuda_fusion.COMPILED[name]):
        with torch._inductor.config.patch({"triton.cudagraphs": True}):
            code = cuda_fusion.code_of(graph, inputs)
        found += len(host.findall(code))
        captured += re.findall(r"def partition_\d+\(.*?(?=\n    def |\nclass |\ndef |\Z)", code, re.DOTALL)
    assert found
    assert captured
    assert not any(host.search(body) for body in captured)
