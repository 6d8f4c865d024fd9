"""Compiled loops: the same result in any floating-point environment, thread count and processor; templates bound once."""

import gc
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

import altgrad
from altgrad.diagnostics.update import measure_update
from altgrad.jit import template
from altgrad.jit.machine import add, in_wide_vectors
from altgrad.jit.storage import KINDS
from altgrad.jit.subnormals import gradual_underflow
from altgrad.jit.threads import run_range
from altgrad.optim import GridOptim, Lion, ManifoldAdamW
from altgrad.quantization import (
    E4M3,
    amax,
    amax_scale,
    decode,
    encode,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.ops import quantize_and_encode_with_stats
from altgrad.quantization.stats import FIELDS, SUM_ERROR

MANY = 1 << 18
SSE, SUM_SQ = FIELDS.index("sse"), FIELDS.index("sum_sq")


def tiny(count: int = MANY) -> torch.Tensor:
    """Numbers on both sides of float32's smallest normal one, all kinds of bits among them."""
    magnitude = (torch.arange(count, dtype=torch.int64) * 2654435761) % (2 << 23)
    return magnitude.to(torch.int32).view(torch.float32) * (1 - 2 * (torch.arange(count) % 2)).float()


def words(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The bits of tensors, for comparisons that do not look at numbers."""
    return [t.contiguous().view(torch.uint8) if t.ndim else t.reshape(1).view(torch.uint8) for t in tensors]


def _update(x: torch.Tensor) -> list[torch.Tensor]:
    found = measure_update(x, x.flip(0), gradient=x, format="E4M3", kernel="cpu")
    assert found.histograms is not None
    return words(found.vector, found.histograms)


def _step(x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for optimizer in (GridOptim, ManifoldAdamW, Lion):
        parameter = torch.nn.Parameter(x.clone())
        parameter.grad = x.clone()
        stepping = optimizer([parameter], "E4M3", lr=1e-3)
        stepping.step()
        state = stepping.state[parameter].values()
        found += [parameter.detach(), *(t for t in state if isinstance(t, torch.Tensor) and t.shape == x.shape)]
    return words(*found)


_DOUBLE, _SMALL = tiny().double() * 2.0**-450, torch.full((1 << 17,), 3e-39)  # made where nothing is flushed

CALLS = {
    "quantize to BF16": lambda x: words(quantize(x, "BF16")),
    "quantize under a small scale": lambda x: words(quantize(x, "E4M3", 2.0**-130)),
    "statistics": lambda x: words(quantize_with_stats(x, "E4M3")[1].vector, *quantize_with_stats(x, "BF16")[:1]),
    "float64 statistics": lambda x: words(quantize_with_stats(_DOUBLE, "E4M3")[1].vector),
    "encode": lambda x: words(encode(x, "BF16")),
    "decode": lambda x: words(decode(torch.arange(MANY, dtype=torch.int32) % (1 << 16), "BF16")),
    "amax": lambda x: words(amax(_SMALL), amax(x[:9])),
    "amax by channel": lambda x: words(amax(x.view(-1, 64), 0), amax_scale(_SMALL, E4M3)),
    "plain torch": lambda x: words(
        *(quantize(x, f, kernel="eager") for f in ("BF16", "MXFP8")), amax_scale(x[:64].view(8, 8), E4M3, axis=0)
    ),
    "blocks": lambda x: words(
        quantize(x.view(-1, 64), "MXFP8"), quantize_with_stats(x.view(64, -1), "MXFP8", axis=0)[0]
    ),
    "decode blocks": lambda x: words(decode(encode(x.view(-1, 64), "MXFP8"))),
    "diagnostics": _update,
    "optimizers": _step,
}


@pytest.fixture
def flushing():
    """Runs a call under flushed subnormals, of which nothing but its bits is brought out."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    torch.set_flush_denormal(False)

    def run(call, *arguments):
        torch.set_flush_denormal(True)
        try:
            return call(*arguments)
        finally:
            torch.set_flush_denormal(False)

    return run


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_flushed_subnormals_change_no_bit(name, threads, flushing):
    x = tiny()
    torch.set_num_threads(1)
    expected = CALLS[name](x)
    torch.set_num_threads(threads)
    for first, second in zip(flushing(CALLS[name], x), expected, strict=True):
        assert torch.equal(first, second)


def test_the_threads_own_setting_is_left_as_found(flushing):
    x = torch.full((2,), 3e-39)

    def call():
        quantize(x, "BF16")
        with gradual_underflow():
            pass
        return (x * 1.0).view(torch.int32)

    assert flushing(call).tolist() == [0, 0]
    quantize(x, "BF16")
    assert (x * 1.0).view(torch.int32).tolist() != [0, 0]


# -- sums -------------------------------------------------------------------------------------------------------------


def sums_in_lanes(x: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """The two sums as they are defined: 512 elements at a time in 16 float32 lanes, all else in float64."""
    totals, chunk = [0.0, 0.0], [0.0, 0.0]
    for start in range(0, len(x), 512):
        v, r = x[start : start + 512], q[start : start + 512]
        for k, terms in enumerate(((v - r) * (v - r), v * v)):
            lanes = np.zeros(16, np.float32)
            for i in range(0, len(terms), 16):
                lanes[: len(terms[i : i + 16])] += terms[i : i + 16]
            wide = lanes.astype(np.float64)
            while len(wide) > 1:
                wide = wide[: len(wide) // 2] + wide[len(wide) // 2 :]
            chunk[k] += float(wide[0])
        if start % 8192 == 8192 - 512 or start + 512 >= len(x):
            totals, chunk = [t + c for t, c in zip(totals, chunk, strict=True)], [0.0, 0.0]
    return totals[0], totals[1]


def sample(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    words_ = (torch.arange(count, dtype=torch.int64) * 0x9E3779B1) % (1 << 32)
    return ((words_.double() / 2**32 - 0.5) * torch.exp2((words_ % 7).double())).to(dtype)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 511, 513, 8192, 20011])
def test_sums_are_taken_in_sixteen_lanes(count):
    x = sample(count)
    values, stats = quantize_with_stats(x, "E4M3")
    assert [float(stats.sse), float(stats.sum_sq)] == list(sums_in_lanes(x.numpy(), values.numpy()))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
def test_every_route_has_the_same_sums(dtype, fmt):
    if fmt == "MXFP8" and dtype == torch.float64:
        return  # only plain torch takes it
    x = sample(70016, dtype).view(-1, 64)
    for change in (lambda x: x, lambda x: torch.where(x > 3, torch.inf, x), lambda x: (x.double() * 1e-30).to(dtype)):
        y = change(x)
        _, stats = quantize_with_stats(y, fmt, overflow="saturate")
        torch.set_num_threads(2)
        *_, both = quantize_and_encode_with_stats(y, fmt, overflow="saturate")
        torch.set_num_threads(1)
        assert torch.equal(stats.vector, both.vector)
        _, plain = quantize_with_stats(y, fmt, overflow="saturate", kernel="eager")
        torch.testing.assert_close(stats.vector[SSE:], plain.vector[SSE:], rtol=SUM_ERROR, atol=0)
        assert torch.equal(stats.vector[:SSE], plain.vector[:SSE])


def everything() -> str:
    """A digest of what compiled loops compute of fp16 (every value of it) and of the sums in float32."""
    state = hashlib.sha256()
    half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    half = torch.where(half.isnan(), torch.nan, half)
    _, codes, stats = quantize_and_encode_with_stats(half, "E5M2")
    parts = [
        codes,
        stats.vector,
        amax(half).reshape(1),
        decode(codes, "E5M2", dtype=half.dtype),
        quantize(half, "MXFP8"),
    ]
    parts += [quantize_with_stats(sample(20011), "E4M3")[1].vector]
    for part in parts:
        clean = part.nan_to_num(nan=7.0) if part.is_floating_point() else part
        state.update(clean.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@pytest.mark.timeout(900)  # compiles for another processor
def test_a_processor_without_vectors_gives_the_same_bits(tmp_path):
    """The target of the compiler is a plain x86-64: vectors of four, no fused multiply-add, no fp16 instructions."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_jit as t; print(t.everything())"
    found = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == everything()


LOOPS = [
    "altgrad.quantization.kernels.cpu.loops",
    "altgrad.quantization.kernels.cpu.block_loops",
    "altgrad.quantization.kernels.cpu.block_decode",
    "altgrad.diagnostics.kernels.cpu",
    "altgrad.optim.kernels.steps",
]


@pytest.fixture(autouse=True)
def _loaded():
    for name in LOOPS:
        __import__(name)


@pytest.mark.parametrize("module", LOOPS)
def test_a_stamp_covers_what_a_loop_is_made_of(module):
    sources = template._sources(module)
    assert {module, "altgrad.jit.machine", "altgrad.jit.memory", "altgrad.jit.storage", "altgrad.jit.template"} <= set(
        sources
    )
    grids = {"altgrad.jit.grid_rounding", "altgrad.jit.grid_table", "altgrad.randomness"}
    assert "diagnostics" in module or "decode" in module or grids <= set(sources)
    assert all(source for source in sources.values())


def test_a_stamp_covers_the_parts_of_a_loop():
    assert {"altgrad.optim.kernels.rules", "altgrad.optim.kernels.self_rounding", "altgrad.jit.element"} <= set(
        template._sources("altgrad.optim.kernels.steps")
    )
    assert {"altgrad.diagnostics.fields", "altgrad.diagnostics.kernels.tiles"} <= set(
        template._sources("altgrad.diagnostics.kernels.cpu")
    )


@pytest.mark.parametrize("module", LOOPS)
def test_any_changed_source_gives_another_stamp(module, monkeypatch):
    stamp = template.stamp.__wrapped__
    found, read = stamp(module), template._read
    for changed in template._sources(module):

        def changed_read(name, changed=changed):
            source, imported = read(name)
            return source + "# changed" * (name == changed), imported

        monkeypatch.setattr(template, "_read", changed_read)
        assert stamp(module) != found, changed
        monkeypatch.setattr(template, "_read", read)
    assert stamp(module) == found


def test_variants_of_a_template_have_names_of_their_own():
    from altgrad.quantization.kernels.cpu.loops import DecodeVariant, _decode

    names = {template.bind(_decode, DecodeVariant(kind, width)).__qualname__ for kind in (0, 1) for width in (1, 4)}
    assert len(names) == 4
    assert all(template.stamp(_decode.__module__) in name for name in names)


def test_variants_that_a_part_cannot_tell_apart_share_it():
    from altgrad.quantization.kernels.cpu.loops import Variant, _record, _span

    few, many = Variant(0, STATS=True), Variant(0, CODE_BYTES=1, STATS=True)
    assert template.part(_record, few) is template.part(_record, many)
    assert template.part(_span, few, DIVIDE=True) is template.part(_span, few, DIVIDE=True)
    assert template.part(_span, few, DIVIDE=True) is not template.part(_span, many, DIVIDE=True)
    assert template.part(_span, few, DIVIDE=True) is not template.part(_span, few, DIVIDE=False)


def test_parts_that_differ_have_names_of_their_own_also_where_a_part_of_theirs_does():
    from altgrad.quantization.products import loops, panels
    from altgrad.quantization.products.units import Unit

    narrow = [template.part(panels._narrow, template.Plain(), MASK=mask, DROPPED=16) for mask in (0, 255)]
    payloads = [template.part(panels._payload, template.Plain(), DECODING=1, SCALED=True, narrow=one) for one in narrow]
    tiles = [
        template.part(loops._tile, loops.Variant(u, False), multiply_tile=loops.tile(Unit.BF16, False)) for u in (0, 1)
    ]
    for pair in (narrow, payloads, tiles):
        assert pair[0].py_func.__qualname__ != pair[1].py_func.__qualname__


def test_a_part_is_linked_into_its_callers_and_no_machine_code_of_its_own():
    twice = template.called(lambda x: add(x, x))  # pyright: ignore[reportCallIssue]  (Numba hands in the typing context)
    four_times = template.called(lambda x: twice(twice(x)))
    called = template.njit(lambda x: four_times(x) + np.uint32(1))
    assert called(np.uint32(5)) == 21
    for part in (twice, four_times):
        (made,) = part.overloads.values()
        assert not made.library.codegen._engine.is_symbol_defined(made.fndesc.llvm_func_name)
    (made,) = called.overloads.values()
    assert made.library.codegen._engine.is_symbol_defined(made.fndesc.llvm_func_name)


def test_kept_loops_are_loaded_without_what_numba_compiles_with(tmp_path):
    code = (
        "import sys, torch\n"
        "from altgrad.quantization import quantize\n"
        "print(quantize(torch.tensor([0.3, 465.0]), 'E4M3').tolist(), 'numba.np.linalg' in sys.modules)\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for compiles in (True, False):
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout == f"[0.3125, 448.0] {compiles}\n"


def test_compiling_leaves_the_collector_of_cycles_as_it_was():
    def broken(keep):
        assert not gc.isenabled()
        raise RuntimeError("broken")

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(RuntimeError, match="broken"):
                template._kept_on_disk(broken)
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_an_error_of_the_compiler_is_no_matter_of_the_cache(monkeypatch):
    monkeypatch.setattr(template, "_cache_refused", False)

    def broken(keep):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        template._kept_on_disk(broken)
    assert not template._cache_refused


def test_a_full_disk_is_said_once_and_costs_no_result(monkeypatch, caplog):
    monkeypatch.setattr(template, "_cache_refused", False)
    asked = []

    def compile_(keep):
        asked.append(keep)
        if keep:
            raise OSError(28, "No space left on device")
        return "compiled"

    assert [template._kept_on_disk(compile_) for _ in range(3)] == ["compiled"] * 3
    assert asked == [True, False, False, False]
    assert [r.message.count("NUMBA_CACHE_DIR") for r in caplog.records] == [1]


def test_without_a_folder_to_write_loops_still_run_and_one_line_says_so(tmp_path):
    """An installed package that cannot be written, and no home: today's root may write anywhere, so files block."""
    package = tmp_path / "altgrad"
    shutil.copytree(Path(altgrad.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        (folder / "__pycache__").touch()
    blocked = tmp_path / "home"
    blocked.touch()
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "PYTHONPATH")},
        "HOME": str(blocked),
        "XDG_CACHE_HOME": str(blocked),
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    code = (
        "import torch, altgrad\n"
        "from altgrad.quantization import amax, quantize\n"
        "x = torch.tensor([0.3, 465.0])\n"
        "print(altgrad.__file__, quantize(x, 'E4M3').tolist(), float(amax(x)))\n"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split(maxsplit=1) == [str(package / "__init__.py"), "[0.3125, 448.0] 465.0\n"]
    assert len(found.stderr.splitlines()) == 1
    assert "NUMBA_CACHE_DIR" in found.stderr


def test_the_drivers_are_compiled_once():
    assert run_range() is run_range()


def test_loops_ask_for_wide_vectors_where_the_processor_has_them():
    made = numba.njit(lambda: in_wide_vectors())  # pyright: ignore[reportCallIssue]
    made.compile(())
    features = made.targetctx.codegen().magic_tuple()[2].split(",")
    assert ('"prefer-vector-width"="512"' in made.inspect_llvm(())) == ("+avx512vbmi2" in features)
