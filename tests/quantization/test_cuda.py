"""The Triton kernels: the CPU's bits in Triton's interpreter and on a real GPU, and machine code that keeps them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)


from altgrad.diagnostics.update import measure_update
from altgrad.nn import quantize_model, uniform
from altgrad.nn.layer import gemms
from altgrad.nn.layer.contractions import Matrices
from altgrad.nn.session import STATE
from altgrad.nn.weight_cache import WeightCache
from altgrad.quantization import amax_scale, decode, encode, get_format, quantize
from altgrad.quantization.kernels.cuda import block_codes, clock, codes, operands, products
from altgrad.quantization.kernels.cuda import blocks as cuda_blocks
from altgrad.quantization.kernels.cuda import scalar as cuda
from benchmarks import bench_cuda, cuda_waits
from benchmarks.cuda_instructions import FLOATS, POINTERS, ROWS, compiled, instructions
from benchmarks.cuda_traffic import MOST_BYTES, MOST_OPERATIONS, _Context, counted, of_linear
from benchmarks.cuda_traffic import ROWS as ROWS_OF_LAYERS
from tests.quantization.oracles import same_bits
from tests.quantization.page_of_benchmarks import of_the_page

pytestmark = pytest.mark.filterwarnings("ignore")  # Triton's own deprecations
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.parametrize("part", ["kernels", "layers", "half", "graphs", "generated", "codes"])
def test_kernels_have_the_cpus_bits_in_the_interpreter(part):
    command = [sys.executable, "-m", "tests.quantization.interpreter_checks", part]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"


TRAFFIC = of_the_page("| layer | operations")
SCALAR_NAMES = ("E4M3", "E5M2", "E3M4", "INT8", "E0M7", "E7M0", "E2M1", "BF16", "FP16", "binary8p3", "E4M3FNUZ")
BLOCK_NAMES = ("MXFP8", "MXFP8_E5M2", "MXFP6", "MXINT8", "NVFP4", "MXFP4:ceil", "E3M4/24:even", "E4M3/128x128:FP32")


def on_a_gpu(test):
    """A test that needs a GPU, and is skipped without."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")(test))


@pytest.fixture(scope="module")
def checks():
    from tests.quantization import interpreter_checks

    return interpreter_checks


@on_a_gpu
def test_scalar_kernel_on_the_gpu(checks):
    assert checks.check_scalars("cuda", SCALAR_NAMES) == []


@on_a_gpu
def test_block_kernels_on_the_gpu(checks):
    assert checks.check_blocks("cuda", BLOCK_NAMES) == []
    assert checks.check_blocks("cuda", ("MXFP8", "NVFP4"), (torch.bfloat16, torch.float16)) == []


@on_a_gpu
@pytest.mark.parametrize("name", ["E4M3", "MXFP8", "NVFP4", "E4M3/128x128:FP32"])
def test_public_calls_give_the_cpus_bits(name):
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    on_gpu = x.cuda()
    scale = amax_scale(x, name) if name == "E4M3" else 1.0
    for options in ({}, {"rounding": "stochastic", "key": (1, 2)}):
        expected = quantize(x, name, scale, **options)
        assert same_bits(quantize(on_gpu, name, scale, **options).cpu(), expected)
    if name != "E4M3":
        assert same_bits(decode(encode(on_gpu, name)).cpu(), quantize(x, name))


BLOCK_POINTERS = {
    **POINTERS,
    "scales": "*u8",
    "factor": "*fp32",
    "element_table": "*i64",
    "scale_table": "*i64",
    "upper": "*fp32",
}
ONLY_VALUES = {"VALUES": True, "CODES": False, "STATS": False, "LACKS": False}
EVERYTHING = {"VALUES": True, "CODES": True, "STATS": True, "LACKS": True}
SCALAR = {"KEEPS_INF": True, "WIDE": False, "DOUBLE": False, "ONE_SCALE": True, "ELEMENTS": 2048}
BLOCK = {
    "PAYLOAD": False,
    "KEEPS_INF": True,
    "POISONS": False,
    "SETTLES": False,
    "ONE_BLOCK": True,
    "CHUNKS": 1,
    "MODE": 0,
    "LEAN": True,
}
TILES = {  # name: tiles per program and their shape
    "MXFP8": {"TILE_ROWS": 1, "TILE_COLUMNS": 32, "STRIPS": False, "TILES": 64, "ELEMENTS": 32, "SCALE": 0},
    "MXFP8 down": {"TILE_ROWS": 32, "TILE_COLUMNS": 1, "STRIPS": True, "TILES": 64, "ELEMENTS": 32, "SCALE": 0},
    "NVFP4": {"TILE_ROWS": 1, "TILE_COLUMNS": 16, "STRIPS": False, "TILES": 128, "ELEMENTS": 16, "SCALE": 2},
}


def of_tiles(name: str) -> dict:
    return {**BLOCK, **ONLY_VALUES, **TILES[name], "TWO_LEVELS": name == "NVFP4"}


def test_general_rounding_divides_as_ieee_and_fuses_nothing():
    code = compiled(cuda._process, POINTERS, {**SCALAR, **EVERYTHING, "LEAN": False, "MODE": 7}).asm["ptx"]
    assert "div.rn.f32" in code
    assert "fma.rn" not in code
    assert "ld.global.v4.b32" in code


def test_training_casts_fuse_what_is_written_as_fused_alone():
    pointers = {**POINTERS, "x": "*bf16", "out": "*bf16"}
    code = compiled(cuda._process, pointers, {**SCALAR, **ONLY_VALUES, "LEAN": True, "MODE": 0}).asm["ptx"]
    elements = 2048 // 128
    assert code.count("fma.rn.f32") == 5 * elements + 1, "three of a quotient, two of a rounding; one of the divisor"
    assert code.count("cvt.rn.bf16x2.f32") == elements // 2
    assert ".ftz" not in code


@pytest.mark.parametrize("name", TILES)
def test_block_kernel_divides_as_ieee_and_moves_vectors(name):
    code = compiled(cuda_blocks._process, BLOCK_POINTERS, of_tiles(name)).asm["ptx"]
    assert ("div.rn.f32" in code) == (name == "NVFP4")
    assert code.count("fma.rn.f32") == 2 * 2048 // 128, "two of a rounding"
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name} {row.dtype}")
def test_instructions_per_element_are_within_their_budget(row):
    assert row.per_element() <= row.budget


def test_operand_kernels_divide_by_a_reciprocal_and_move_vectors():
    pointers = {**POINTERS, "out": "*bf16", "factor": "*fp32", "amax": "*i32", "scale": "*fp32"}
    facts = {
        "LEAN": True,
        "KEEPS_INF": True,
        "ON_DEVICE": True,
        "CHANNELS": False,
        **dict.fromkeys(("inner", "channels"), 1),
        "COLLECTS": True,
        **dict.fromkeys(("CODES", "LACKS"), False),
        "VALUES": True,
        "ELEMENTS": operands.ELEMENTS,
        "MODE": 0,
    }
    code = compiled(operands._payload, {**pointers, "number": "fp32"}, {**facts, "low": 1, "high": 1, "random_bits": 1})
    assert code.asm["ptx"].count("fma.rn.f32") == 5 * operands.ELEMENTS // 128 + 1
    assert "ld.global.v4.b32" in code.asm["ptx"]
    assert "st.global.v4.b32" in code.asm["ptx"]
    assert len(instructions(code.asm["cubin"])) * 128 / operands.ELEMENTS <= 28, "25 of the cast, 3 of the amax"
    half = {**pointers, "out": "*fp16", "number": "fp32"}
    code = compiled(operands._payload, half, {**facts, "low": 1, "high": 1, "random_bits": 1})
    assert len(instructions(code.asm["cubin"])) * 128 / operands.ELEMENTS <= 28
    as_codes = {**pointers, "codes": "*u8", "poison": "*i32", "number": "fp32"}
    ones = {"low": 1, "high": 1, "random_bits": 1}
    code = compiled(operands._payload, as_codes, {**facts, "VALUES": False, "CODES": True, **ones})
    assert len(instructions(code.asm["cubin"])) * 128 / operands.ELEMENTS <= 36, (
        "35 of an encoding cast, 3 of the amax, less"
    )
    code = compiled(operands._payload, as_codes, {**facts, "CODES": True, **ones})
    assert len(instructions(code.asm["cubin"])) * 128 / operands.ELEMENTS <= 40, "codes beside payloads"
    assert compiled(
        operands._payload, as_codes, {**facts, "CODES": True, "LACKS": True, "LEAN": False, "MODE": 7, **ones}
    ).asm["cubin"]
    ends = {"SCALES": True, "POWER_OF_TWO": True, "PARTIALS": operands.MOST_PARTIALS, "count": 1}
    assert compiled(operands._scale, {"partials": "*i32", "out": "*fp32", "divisor": "fp32"}, ends).asm["cubin"]
    step = {"POWER_OF_TWO": True, "ENTRIES": 16, "history": 1}
    assert (
        "bar.sync"
        in compiled(
            operands._roll,
            {**dict.fromkeys(("window", "pending", "scale"), "*fp32"), "divisor": "fp32", "headroom": "fp32"},
            step,
        ).asm["ptx"]
    )
    payload = {**of_tiles("NVFP4"), "PAYLOAD": True, "low": 1, "high": 1}
    assert compiled(cuda_blocks._process, {**BLOCK_POINTERS, "out": "*bf16"}, payload).asm["cubin"]
    search = {"ELEMENTS": operands.ELEMENTS, "size": 1}
    assert compiled(operands._largest, {"x": "*bf16", "partials": "*i32"}, search).asm["cubin"]
    sums = {"sums": "*fp32", "out": "*bf16", "of_a": "*fp32", "of_b": "*fp32", "bias": "*fp32"}
    whole = {"HAS_A": True, "HAS_B": True, "HAS_BIAS": True, "ELEMENTS": operands.FINISHED}
    for columns in ({}, {"columns": 1, "a_step": 1, "b_step": 1}):
        assert compiled(operands._finished, sums, {**whole, **columns}).asm["cubin"]


@pytest.mark.parametrize(("name", "most"), [("E4M3", 14), ("E5M2", 16), ("E0M7", 14), ("INT8", 20)])
def test_codes_are_decoded_to_payloads_by_arithmetic_and_move_vectors(name, most):
    digits, size = codes.digits_of(get_format(name)), operands.ELEMENTS
    facts = dict(zip(("BITS", "SHIFT", "SPECIAL", "HAS_INF"), (8, 0, 0, False)))
    if digits is not None:
        facts = {"BITS": digits.bits, "SHIFT": digits.shift, "SPECIAL": digits.special, "HAS_INF": digits.has_inf}
    facts |= {
        "TABLE": digits is None,
        "ON_DEVICE": True,
        "CHANNELS": False,
        "POISONED": name == "E0M7",
        "ELEMENTS": size,
    }
    pointers = {"codes": "*u8", "out": "*bf16", **dict.fromkeys(("factor", "poison", "scale", "values"), "*fp32")}
    kinds = {**pointers, "number": "fp32", "lift": "fp32"}
    code = compiled(codes._decoded, kinds, facts)
    names = instructions(code.asm["cubin"])
    loads = [one for one in names if one.startswith("LDG")]
    assert (len(loads) < 8) == (digits is not None), "no table"
    assert len([one for one in names if one.startswith("STG")]) == size // 128 // 8 + 1, "and the factor"
    assert len(names) * 128 / size <= most
    assert ".ftz" not in code.asm["ptx"]
    ones = dict.fromkeys(("last", "size", "inner", "channels", "low", "high"), 1)
    assert compiled(codes._decoded, kinds, {**facts, "CHANNELS": True, **ones}).asm["cubin"]


@pytest.mark.parametrize(("name", "axis", "most"), [("MXFP8", 0, 40), ("MXFP8", -1, 40), ("NVFP4", 0, 40)])
def test_codes_of_blocks_are_decoded_by_arithmetic_and_move_vectors(name, axis, most):
    fmt = get_format(name)
    digits, tile = codes.digits_of(fmt.element), fmt.tile if axis else fmt.tile[::-1]
    facts = {"BITS": digits.bits, "SHIFT": digits.shift, "SPECIAL": digits.special, "HAS_INF": digits.has_inf}
    facts |= {"TILE_ROWS": tile[0], "TILE_COLUMNS": tile[1], "TABLE": False, "TWO_LEVELS": fmt.tensor_scale}
    facts |= {"POWER_OF_TWO": fmt.power_of_two, "ROWS": block_codes.ROWS, "COLUMNS": block_codes.COLUMNS}
    floats = ("upper", "factor", "values", "scale_values")
    kinds = {"codes": "*u8", "scales": "*u8", "out": "*bf16", **dict.fromkeys(floats, "*fp32"), "lift": "fp32"}
    code = compiled(block_codes._decoded, kinds, facts)
    names, elements = instructions(code.asm["cubin"]), block_codes.ROWS * block_codes.COLUMNS
    assert len([one for one in names if one.startswith("STG") and ".128" in one]) == elements // 128 // 8
    assert len(names) * 128 / elements <= most
    ones = ("last", "last_scale", "lines", "rows", "columns", "tiles_down", "tiles_across", "low", "high")
    for table in (False, True):
        assert compiled(block_codes._decoded, kinds, {**facts, "TABLE": table, **dict.fromkeys(ones, 1)}).asm["cubin"]


TURNED = {**POINTERS, **dict.fromkeys(("codes", "turned"), "*u8"), "amax": "*i32", "scale": "*fp32", "number": "fp32"}
PATCH = {
    "LEAN": True,
    "KEEPS_INF": True,
    "ON_DEVICE": True,
    "CHANNELS": False,
    "COLLECTS": False,
    "BOTH": True,
    "MODE": 0,
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_codes_are_written_in_both_layouts_by_whole_vectors(dtype):
    sizes = {"ROWS": codes.ROWS, "COLUMNS": codes.COLUMNS}
    code = compiled(codes._turned, {**TURNED, "x": f"*{dtype}"}, {**PATCH, **sizes})
    names = instructions(code.asm["cubin"])
    written = [name for name in names if name.startswith("STG")]
    assert len(written) == 2 * codes.ROWS * codes.COLUMNS // 128 // 16
    assert all(".128" in name for name in written)
    assert not any(name.startswith(("STL", "LDL")) for name in names), "registers spill"
    assert len(names) * 128 / (codes.ROWS * codes.COLUMNS) <= 35, "as codes of rows alone"
    ones = dict.fromkeys(("random_bits", "rows", "columns", "row_step", "column_step"), 1)
    general = {"LEAN": False, "CHANNELS": True, "COLLECTS": True, "MODE": 7}
    assert compiled(codes._turned, {**TURNED, "x": f"*{dtype}"}, {**PATCH, **sizes, **general, **ones}).asm["cubin"]


def test_a_product_with_its_epilogue_runs_on_tensor_cores_and_overlaps_its_loads():
    pointers = {"a": "*bf16", "b": "*bf16", "out": "*bf16", **dict.fromkeys(("of_a", "of_b", "bias"), "*fp32")}
    facts = {"HAS_A": True, "HAS_B": True, "HAS_BIAS": True, **{n: getattr(products, n) for n in SIZES}}
    strides = {"a_depth": 1, "b_depth": 1, "a_row": 768, "b_column": 768, "depth": 768}
    code = compiled(products._product, pointers, {**facts, **strides}).asm["ptx"]
    assert "wgmma.mma_async" in code
    assert "cp.async" in code
    assert ".local" not in code, "registers spill"
    ones = ("rows", "columns", "depth", "a_row", "a_depth", "b_depth", "b_column", "a_step", "b_step")
    assert compiled(products._product, pointers, {**facts, **dict.fromkeys(ones, 1)}).asm["cubin"]
    half = {**pointers, "a": "*fp16", "b": "*fp16"}
    code = compiled(products._product, half, {**facts, **strides}).asm["ptx"]
    assert ".f32.f16.f16" in code, "float16 operands are summed in float32"
    assert "wgmma.mma_async" in code
    assert ".local" not in code


def test_kernels_of_channels_compile_with_every_integer_at_one():
    ends = {"SCALES": True, "POWER_OF_TWO": True, "ALONG": operands.ALONG}
    patch = {"CHANNELS": operands.CHANNELS, "ALONG": operands.ALONG}
    kernels = [
        (operands._largest_of_rows, {"x": "*bf16", "out": "*fp32"}, {**patch, **ends, "rows": 1, "columns": 1}),
        (
            operands._largest_of_columns,
            {"x": "*bf16", "partials": "*i32"},
            {**patch, "rows": 1, "columns": 1, "piece": 1},
        ),
        (operands._scales, {"partials": "*i32", "out": "*fp32"}, {**ends, "pieces": 1, "columns": 1}),
    ]
    for kernel, pointers, constants in kernels:
        assert compiled(kernel, {**pointers, "divisor": "fp32"}, constants).asm["cubin"]


SIZES = ("ROWS", "COLUMNS", "DEPTH", "GROUP")


def test_kernels_compile_with_every_integer_at_one():
    """Triton makes a constant of an integer argument that is 1, such as the columns of a tensor that has one."""
    decode = {"ONE_SCALE": True, "ELEMENTS": 2048}
    tiles = {"TILE_ROWS": 1, "TILE_COLUMNS": 32, "ELEMENTS": 2048}
    stochastic = {**SCALAR, **ONLY_VALUES, "LEAN": False, "MODE": 7}
    kernels = [
        (cuda._process, POINTERS, {**stochastic, "random_bits": 1, "size": 1, "inner": 1, "channels": 1}),
        (cuda._decode, {**POINTERS, "values": "*fp32"}, {**decode, "size": 1, "last": 1, "inner": 1, "channels": 1}),
        (clock._key_at, {"key": "*i64", "clock": "*i64"}, dict.fromkeys(("seed", "base", "rank", "shift"), 1)),
        (cuda_blocks._decode, {**BLOCK_POINTERS, "scales": "*fp32", "values": "*fp32"}, {**tiles, **ONES}),
    ]
    for name in ("MXFP8", "MXFP8 down"):
        facts = {**of_tiles(name), "LEAN": False, "MODE": 7}
        kernels.append((cuda_blocks._process, BLOCK_POINTERS, {**facts, **ONES}))
    for kernel, pointers, constants in kernels:
        known = {name: value for name, value in constants.items() if name in kernel.arg_names}
        left = {name for name in kernel.arg_names if name not in known and name not in pointers}
        assert left <= set(FLOATS), f"an integer is not covered: {left}"
        assert compiled(kernel, pointers, known).asm["cubin"]


def test_the_page_has_rows_of_this_table():
    assert len({name for name, *_ in ROWS_OF_LAYERS} & set(TRAFFIC)) == 12


@pytest.mark.parametrize(("name", "fmt", "recipe"), ROWS_OF_LAYERS, ids=lambda value: str(value))
def test_a_linear_layer_asks_little_of_a_gpu_and_waits_for_nothing(name, fmt, recipe):
    found, _ = of_linear(fmt, torch.bfloat16, **recipe)
    assert found.waits == []
    assert len(found.names) <= MOST_OPERATIONS, found.names
    assert not [made for made in found.names if made.startswith(("clone", "copy", "_to_copy", "cat"))]
    assert len(found.clock) <= 4, "a kernel for each history, and one for the clock of all layers"
    assert found.bytes <= MOST_BYTES
    if (stated := TRAFFIC.get(name)) is not None:
        told = [len(found.names), len(found.clock), round(found.bytes / 1e9, 2), round(found.kept / 1e6, 1)]
        assert told == [float(cell) for cell in (*stated[:3], stated[5])]


@pytest.mark.parametrize(("fmt", "saved"), [("E4M3", 3), ("MXFP8", 2), ("FP16", 3)])
def test_later_micro_batches_launch_nothing_for_a_cached_weight(fmt, saved):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantize_model(model, uniform(fmt))
    state, launched = model[0].__dict__[STATE], []
    with counted() as traffic:
        w, bias = torch.nn.Parameter(torch.empty(64, 64, device="cuda")), torch.empty(64, device="cuda")
        for use in range(5):
            if use == 2:  # tables are on the device
                state.session.weights, traffic.waits = WeightCache(), []
            traffic.names = []
            x, dy = (torch.empty(96, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            call, context = gemms.Call(state, Matrices(), True, False, torch.bfloat16, 0), _Context()
            of_x, of_w = (
                state.scale_pair(state.x, state.x_back, x, True),
                state.scale_pair(state.w, state.w_back, w, True),
            )
            gemms._Products.forward(context, call, x, w, bias, *of_x, *of_w)
            gemms._Products.backward(context, dy)
            launched.append(len(traffic.names))
        state.session.weights = None
    assert launched[2:] == [launched[1], launched[1] - saved, launched[1] - saved]
    assert traffic.waits == []


@pytest.mark.parametrize(
    "name", ["E4M3, norms too", "E4M3, no scaling", "MXFP8", "E4M3, weights on the grid, stochastic"]
)
def test_a_monitored_step_waits_for_the_intervals_copy_alone(name):
    """And for one answer about all weights that are stored on a grid."""
    found, stored = cuda_waits.of_training(cuda_waits.ROWS[name]), "grid" in name
    assert [len(waits) for waits in found.steps] == [stored, stored, stored + 1], found.steps
    metrics = {key for record in found.records for key in record}
    assert {"oscillation", "dead_outputs", "l2"} <= metrics


@pytest.mark.parametrize("name", ["E4M3", "FP32"])
def test_an_update_is_measured_on_a_gpu_without_a_wait(name):
    with counted() as traffic:
        before, after, gradient = (torch.empty(64, 96, device="cuda") for _ in range(3))
        for _ in range(2):  # the first puts the format's table there
            traffic.names, traffic.waits = [], []
            measure_update(before, after, gradient=gradient, attempted=after, format=name, scale=0.5)
    assert traffic.waits == []
    assert len(traffic.names) > 100


def test_a_session_on_a_gpu_runs_through_on_a_cpu_and_says_what_fails(capsys, monkeypatch, tmp_path):
    assert bench_cuda.main(["--dry"]) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    assert all(name in said for name in bench_cuda.VARIANTS)
    assert said.count("where a step's time goes") == len(bench_cuda.LOOKED_INTO)
    monkeypatch.setattr(bench_cuda, "checks", lambda device: [("bits", False, "3 differ")])
    monkeypatch.setattr(bench_cuda, "rows", lambda x: 1 / 0)
    session = bench_cuda.Session(0.0, tmp_path / "cuda.json", dry=True)
    assert bench_cuda.run(session, 4, 1, [1], bench_cuda.GPT_124M) == 1
    assert [entry["figure"] for entry in session.records[:1]] == ["3 differ"]
    assert session.records[1]["error"] == "ZeroDivisionError: division by zero"
    assert [entry["not_measured"] for entry in session.records[2:]] == ["no time was left"] * len(bench_cuda.VARIANTS)
    assert json.loads((tmp_path / "cuda.json").read_text())["cuda"] == session.records


def test_the_checks_of_the_benchmark_see_a_wrong_gradient(monkeypatch):
    calls = []

    def results(recipe, device):
        calls.append(device)
        wrong = 1.001 if len(calls) % 4 == 1 else 1.0  # every other recipe's on the GPU
        return [torch.ones(3, 4), torch.ones(3, 4), torch.full((4, 4), wrong)]

    monkeypatch.setattr(bench_cuda, "layer_results", results)
    monkeypatch.setattr(bench_cuda, "quantize", lambda x, *_, **__: x)
    found = [holds for name, holds, _ in bench_cuda.checks("cpu") if name.startswith("linear")]
    assert found == [False, True] * (len(bench_cuda.RECIPES) // 2)


def test_what_a_step_remembers_stays_in_place_on_a_gpu():
    _, state = of_linear("E4M3", scaling={"policy": "delayed", "history": 9}, rounding="stochastic")
    delayed = [o for o in state.distinct() if o.delayed]
    places = [[o.window, o.pending, o._scale] for o in delayed] + [[*state.session._clocks.values()]]
    with counted() as traffic:
        state.session.advance()
    assert traffic.waits == []
    assert len(places) == 4
    now = [[o.window, o.pending, o._scale] for o in delayed] + [[*state.session._clocks.values()]]
    for kept, there in zip(places, now, strict=True):
        assert kept
        assert all(a is b and a.device.type == "cuda" for a, b in zip(kept, there, strict=True))


ONES = dict.fromkeys(
    (
        "random_bits",
        "emax",
        "up_from",
        "low",
        "high",
        "outer_tiles",
        "rows",
        "columns",
        "count",
        "tiles_down",
        "tiles_across",
        "last",
    ),
    1,
)
