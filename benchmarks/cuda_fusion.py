"""What torch's compiler makes of quantized code for a GPU: its kernels, compiled for compute capability 9.0. Needs no GPU.

    python -m benchmarks.cuda_fusion

A function is traced on fake CUDA tensors and lowered by Inductor, which is told of an H100; the Triton code that it writes
is compiled as `cuda_instructions` compiles the library's own. Inductor gives a thread few elements (8 of a pointwise kernel, or
2 where its measurements prefer that), so that what a program does once for its scale counts; a further element is what the two
differ by. GELU alone is beside, since nearest rounding joins it.

A norm and an MLP are compiled as a whole, too, as `torch.compile` would for a GPU, and what a step of theirs launches is counted.
"""

from __future__ import annotations

import importlib.util
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, rms_norm
from torch.utils._triton import has_triton
from triton.compiler import ASTSource

from altgrad.formats.rounding import Overflow
from altgrad.nn import Recipe, quantize_model, uniform
from altgrad.nn.layer import emulated, gemm
from altgrad.nn.layer.gemm import power_range
from altgrad.quantization import Cast, pointwise, tensor_cores
from benchmarks.cuda_instructions import TARGET, instructions

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    gcnArchName="",
)


@contextmanager
def believed_in() -> Iterator[None]:
    """Within the block torch and its compiler take an H100 for there; only what is fake can be put on it."""
    told = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (H100.major, H100.minor),
        "get_device_properties": lambda *_: H100,
    }
    with ExitStack() as stack:
        for name, answer in told.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name, found in (("get_device_properties", H100), ("get_compute_capability", TARGET.arch)):
            answer = staticmethod(lambda *_, found=found: found)
            stack.enter_context(mock.patch.object(CudaInterface, name, answer))
        stack.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", return_value="no driver"))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        has_triton.cache_clear()
        stack.callback(has_triton.cache_clear)
        yield


def lowered(function: Callable[..., Any], *inputs: tuple[tuple[int, ...], torch.dtype]) -> str:
    """The code that Inductor writes for a function of CUDA tensors of these shapes and dtypes; int64 ones are on the CPU."""
    from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized  # warns where it is imported

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with believed_in(), mode, torch.no_grad():
        given = [
            torch.empty(shape, dtype=dtype, device="cpu" if dtype == torch.int64 else "cuda") for shape, dtype in inputs
        ]
        graph = make_fx(function, select_decomp_table())(*given)
        decompose_auto_functionalized(graph.graph)
        lowering = GraphLowering(graph, given, is_inference=True)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            lowering.run(*given)
            return lowering.codegen()[0].value


def sources(code: str) -> dict[str, str]:
    """The Triton modules in such code, by the name of the kernel in each."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", code, re.DOTALL))


def loaded(name: str, source: str) -> ModuleType:
    """A module of such code; the kernel is its attribute."""
    with tempfile.TemporaryDirectory() as folder, believed_in():
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _anything(*_: object) -> bool:  # a plain function, which Dynamo traces
    return True


def _capability(*_: object) -> tuple[int, int]:
    return H100.major, H100.minor


def graphs_of(recipe: Recipe | None, features: int = 768) -> list[tuple[torch.fx.GraphModule, list[Tensor]]]:
    """(graph, its inputs) of the compiled forward and backward of a norm and an MLP under bf16 autocast, as on a GPU.

    They are traced on fake CPU tensors, on the routes of a GPU.
    """
    found = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        found.append((graph, inputs))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    with ExitStack() as stack:
        for module, name in ((gemm, "interpreted"), (tensor_cores, "interpreted"), (emulated, "on_unit")):
            stack.enter_context(mock.patch.object(module, name, _anything))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", _capability))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )
        if recipe is not None:
            quantize_model(model, recipe)
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
        x = torch.randn(8192, features, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.compile(model, fullgraph=True, backend=backend)(x)
        y.float().sum().backward()
    return found


def code_of(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> str:
    """The code that Inductor writes for such a graph where its tensors are on a GPU."""
    gpu = torch.device("cuda", 0)
    for node in graph.graph.nodes:
        if node.kwargs.get("device") == torch.device("cpu") and node.kwargs.get("dtype") is not torch.int64:
            node.update_kwarg("device", gpu)
        if node.op == "call_function" and "key_beside" in str(node.target):
            node.update_arg(4, gpu)
    graph.recompile()
    return lowered(graph, *((tuple(t.shape), t.dtype) for t in inputs))


def launches(code: str) -> Counter[str]:
    """What such code launches: kernels of Inductor's, operators of a library, operators of AltGrad's."""
    call = code[code.index("def call(") : code.index("runner = Runner")]
    ran = re.findall(r"(triton_)\w+\.run|extern_kernels\.(\w+)|torch\.ops\.altgrad\.(\w+)\.default\(", call)
    return Counter("".join(names) for names in ran)


class Kernel(NamedTuple):
    """One kernel of Inductor's in one of the shapes that it would try.

    elements: of a thread. asm: as Triton keeps it.
    """

    name: str
    elements: float
    asm: dict[str, Any]

    @property
    def instructions(self) -> int:
        """Of the program, without padding."""
        return len(instructions(self.asm["cubin"]))


def compiled(code: str) -> list[Kernel]:
    """Every kernel of such code, compiled for the target, in each shape."""
    found = []
    for name, source in sources(code).items():
        tuner = getattr(loaded(name, source), name)
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            given = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            binary = triton.compile(given, target=TARGET, options=tuner._create_compile_options(config, meta))
            across = re.search(r"R0_BLOCK: tl\.constexpr = (\d+)", source)  # of a row that a program reduces
            block = math.prod(config.kwargs.values()) * (int(across[1]) if across else 1)
            elements = block / (config.num_warps * TARGET.warp_size)
            found.append(Kernel(name, elements, binary.asm))
    return found


CAST = Cast("E4M3", overflow=Overflow.SATURATE_FINITE)
FACTS = pointwise.facts_of(CAST.format, CAST.grid, CAST.rounding, CAST.overflow)
BF16, FLOAT32 = torch.bfloat16, torch.float32
WIDE, ROWS = ((8192, 3072), BF16), ((8192, 768), BF16)
SCALE, WEIGHT = ((), FLOAT32), ((768,), BF16)


def operand(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes of an operand in compiled code."""
    assert FACTS is not None
    return pointwise.payload(x, scale, FACTS, power_range(CAST.grid))


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """A norm before a layer."""
    return rms_norm(x, (x.shape[1],), weight)


def unit_operand(x: Tensor, scale: Tensor) -> Tensor:
    """What it makes of one for an FP8 unit."""
    assert FACTS is not None
    return pointwise.codes(x, scale, FACTS, torch.float8_e4m3fn)


class Row(NamedTuple):
    """A piece of a model: what it is called, the function, shapes and dtypes of its tensors."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]


ROWS_OF_CODE = [
    Row("nearest", operand, (WIDE, SCALE)),
    Row("nearest, codes of FP8", unit_operand, (WIDE, SCALE)),
    Row("gelu", gelu, (WIDE,)),
    Row("gelu, nearest", lambda x, scale: operand(gelu(x), scale), (WIDE, SCALE)),
    Row("norm", normed, (ROWS, WEIGHT)),
    Row("norm, nearest", lambda x, weight, scale: operand(normed(x, weight), scale), (ROWS, WEIGHT, SCALE)),
]


class Cost(NamedTuple):
    """What one kernel costs: instructions per element where it gives a thread most elements, and of each further element
    (None: it has one shape)."""

    each: float
    further: float | None


def cost(row: Row) -> tuple[Cost, list[Kernel]]:
    """(the cost of the kernel that makes the tensor, all kernels)."""
    kernels = compiled(lowered(row.function, *row.inputs))
    shapes = sorted((k for k in kernels if k.elements >= 1), key=lambda kernel: -kernel.elements)
    most, *fewer = shapes
    if not fewer:
        return Cost(most.instructions / most.elements, None), kernels
    apart = (most.instructions - fewer[0].instructions) / (most.elements - fewer[0].elements)
    return Cost(most.instructions / most.elements, apart), kernels


COMPILED: dict[str, Recipe | None] = {
    "BF16": None,
    "E4M3, amax": uniform("E4M3"),
    "E4M3, delayed amax": uniform("E4M3", scaling="delayed"),
    "E4M3, stochastic": uniform("E4M3", rounding="stochastic"),
    "E4M3, sums of the FP8 unit": uniform("E4M3").with_(accumulator="fp8_unit"),
    "MXFP8": uniform("MXFP8"),
    "NVFP4": uniform("NVFP4"),
}


def counts(recipe: Recipe | None) -> tuple[int, int, int]:
    """Launches of the compiled forward and backward of `graphs_of`: by Inductor, of products, of other operators."""
    ran = sum((launches(code_of(*one)) for one in graphs_of(recipe)), Counter())
    products = sum(n for name, n in ran.items() if name in ("mm", "addmm", "_scaled_mm", "routed_mm"))
    return ran["triton_"], products, ran.total() - ran["triton_"] - products


def main() -> None:
    """Trace, compile, count and print."""
    table = Table(title="Launches of a compiled norm and MLP, forward and backward, bf16 autocast")
    for column in ("recipe", "Inductor's kernels", "products", "other operators"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for name, recipe in COMPILED.items():
        table.add_row(name, *map(str, counts(recipe)))
    Console(width=90).print(table)
    table = Table(title=f"Instructions per element of Inductor's kernels, sm_90, torch {torch.__version__}")
    for column in ("compiled code, E4M3, bf16 tensor", "of an element", "of a further one"):
        table.add_column(column, justify="left" if column.startswith("compiled") else "right")
    for row in ROWS_OF_CODE:
        found, _ = cost(row)
        table.add_row(row.name, f"{found.each:.1f}", "" if found.further is None else f"{found.further:.1f}")
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
