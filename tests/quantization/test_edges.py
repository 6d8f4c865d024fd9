"""The edges of a call: whatever it is handed, the right bits or an AltGradError, never memory that it was not given."""

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from altgrad.errors import (
    AltGradError,
    CodeError,
    DtypeError,
    ScaleError,
)
from altgrad.quantization import (
    E4M3,
    CurrentScaling,
    amax,
    amax_scale,
    block_scales,
    code_index,
    compute_stiffness_field,
    compute_ulp_distance,
    decode,
    encode,
    encode_with_stats,
    fake_quantize,
    from_code_index,
    grid_alignment_error,
    grid_spacing,
    ops,
    quantize,
    quantize_with_stats,
    scale_from_amax,
)
from tests.quantization.oracles import assert_same_bits

inf, nan = float("inf"), float("nan")
SCALAR_AND_BLOCK = pytest.mark.parametrize("fmt", ["E4M3", "MXFP8", "NVFP4"])
KERNELS = pytest.mark.parametrize("kernel", ["cpu", "eager"])


def draws(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def guarded(shape, dtype=torch.float32):
    """(tensor of that shape, the buffer around it): a write beyond the tensor shows in the buffer."""
    count = int(np.prod(shape))
    buffer = torch.full((count + 64,), 7.0, dtype=dtype)
    return buffer[32 : 32 + count].view(shape), buffer


# -- out: N1, N4, N9, N10 -------------------------------------------------------------------------------------------

WRITERS = {
    "quantize": lambda x, out: quantize(x, "E4M3", out=out),
    "quantize_with_stats": lambda x, out: quantize_with_stats(x, "E4M3", out=out),
    "quantize_and_encode": lambda x, out: ops.quantize_and_encode(x, "E4M3", out=out),
    "quantize_and_encode_with_stats": lambda x, out: ops.quantize_and_encode_with_stats(x, "E4M3", out=out),
    "decode": lambda x, out: decode(encode(x, "E4M3"), "E4M3", out=out),
    "quantize in blocks": lambda x, out: quantize(x, "MXFP8", out=out),
    "decode of blocks": lambda x, out: decode(encode(x, "MXFP8"), out=out),
    "quantize, eager": lambda x, out: quantize(x, "E4M3", out=out, kernel="eager"),
    "quantize, reference": lambda x, out: quantize(x, "E4M3", out=out, kernel="reference"),
    "decode, eager": lambda x, out: decode(encode(x, "E4M3"), "E4M3", out=out, kernel="eager"),
    "decode, reference": lambda x, out: decode(encode(x, "E4M3"), "E4M3", out=out, kernel="reference"),
}
BAD_OUTS = {
    "too small": lambda x: torch.full((4,), 7.0),
    "too large": lambda x: torch.full((*x.shape, 2), 7.0),
    "float16": lambda x: torch.empty(x.shape, dtype=torch.float16),
    "float64": lambda x: torch.empty(x.shape, dtype=torch.float64),
    "meta": lambda x: torch.empty(x.shape, device="meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(torch.empty(x.shape)),
    "expanded": lambda x: torch.empty(1, x.shape[1]).expand(x.shape),
    "sparse": lambda x: torch.zeros(x.shape).to_sparse(),
    "a leaf that requires grad": lambda x: torch.empty(x.shape).requires_grad_(),
    "efficient zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "a list": lambda x: [0.0] * x.numel(),
}


@pytest.mark.parametrize("bad", BAD_OUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_an_out_that_does_not_fit_is_refused(writer, bad):
    x = draws(90, 96)
    with pytest.raises(AltGradError, match="out"):
        WRITERS[writer](x, BAD_OUTS[bad](x))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_fitting_out_is_written_and_nothing_beside_it(writer):
    x = draws(6, 64)
    out, buffer = guarded((6, 64))
    WRITERS[writer](x, out)
    expected = torch.empty_like(x)
    WRITERS[writer](x, expected)
    assert_same_bits(out, expected, x)
    assert set(buffer[:32].tolist() + buffer[-32:].tolist()) == {7.0}
    transposed = torch.empty(64, 6).t()
    WRITERS[writer](x, transposed)
    assert_same_bits(transposed.contiguous(), expected, x)


@pytest.mark.parametrize("writer", WRITERS)
def test_writing_moves_the_version_counter(writer):
    out = torch.empty(2, 32)
    before = out._version
    WRITERS[writer](draws(2, 32), out)
    assert out._version > before


@SCALAR_AND_BLOCK
def test_autograd_refuses_a_gradient_through_a_tensor_that_was_written_to(fmt):
    a = torch.ones(32, requires_grad=True)
    b = a * 1.3
    loss = (b * b).sum()
    quantize(b.detach(), fmt, out=b.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@SCALAR_AND_BLOCK
def test_a_leaf_may_be_written_where_no_gradient_is_recorded(fmt):
    p = torch.nn.Parameter(draws(2, 32))
    expected = quantize(p, fmt)
    with pytest.raises(AltGradError, match="requires grad"):
        quantize(p.detach(), fmt, out=p)
    with torch.no_grad():
        quantize(p, fmt, out=p)
    assert_same_bits(p.detach(), expected)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
@pytest.mark.parametrize("count", [65, 200_001])
def test_overlapping_memory_gives_the_right_values_or_an_error(fmt, rounding, count):
    torch.set_num_threads(2)
    options = {"rounding": rounding, "key": (1, 2), "pad": True}
    for source, target in ((slice(0, -1), slice(1, None)), (slice(1, None), slice(0, -1))):
        y = draws(count)
        x, out = y[source], y[target]
        expected = quantize(x.clone(), fmt, **options)
        try:
            quantize(x, fmt, out=out, **options)
        except AltGradError:
            continue
        assert_same_bits(out, expected)
    x = draws(64)
    expected = quantize(x, fmt, **options)
    assert_same_bits(quantize(x, fmt, out=x, **options), expected)


def test_decoding_into_the_memory_of_the_codes():
    memory = torch.zeros(64, dtype=torch.float32)
    codes = memory.view(torch.uint8)[:64]
    codes.copy_(torch.arange(64))
    expected = decode(codes.clone(), "E4M3")
    try:
        decode(codes, "E4M3", out=memory)
    except AltGradError:
        return
    assert_same_bits(memory, expected)


# -- devices and memory: N3, N4 -------------------------------------------------------------------------------------

FUNCTIONS = {
    "quantize": lambda x: quantize(x, "E4M3"),
    "quantize stochastically": lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1, 2)),
    "encode": lambda x: encode(x, "E5M2"),
    "decode": lambda x: decode(encode(x, "E4M3"), "E4M3", 0.3),
    "quantize_with_stats": lambda x: [quantize_with_stats(x, "E4M3")[0], quantize_with_stats(x, "E4M3")[1].vector],
    "encode_with_stats": lambda x: [encode_with_stats(x, "E4M3")[0], encode_with_stats(x, "E4M3")[1].vector],
    "quantize_and_encode": lambda x: list(ops.quantize_and_encode(x, "E4M3", 0.3)),
    "fake_quantize": lambda x: fake_quantize(x, "E4M3", mask_saturated=True),
    "amax": lambda x: amax(x),
    "amax of an axis": lambda x: amax(x, 0),
    "amax_scale": lambda x: amax_scale(x, E4M3),
    "amax_scale, power of two": lambda x: amax_scale(x, E4M3, power_of_two=True),
    "scale_from_amax": lambda x: scale_from_amax(x.abs().amax(), E4M3),
    "CurrentScaling": lambda x: CurrentScaling().update(amax(x), (), E4M3)[0],
    "MXFP8": lambda x: quantize(x, "MXFP8"),
    "MXFP8, stochastic": lambda x: quantize(x, "MXFP8", rounding="stochastic", key=(1, 2)),
    "NVFP4": lambda x: quantize(x, "NVFP4"),
    "NVFP4 under a scale": lambda x: quantize(x, "NVFP4", 0.001),
    "NVFP4, eager": lambda x: quantize(x, "NVFP4", 0.001, kernel="eager"),
    "E4M3, eager": lambda x: quantize(x, "E4M3", 0.3, kernel="eager"),
    "E4M3, reference": lambda x: quantize(x, "E4M3", 0.3, kernel="reference"),
    "encode in blocks": lambda x: encode(x, "MXFP4").codes,
    "decode of blocks": lambda x: decode(encode(x, "NVFP4")),
    "block statistics": lambda x: quantize_with_stats(x, "MXFP8")[0],
    "block_scales": lambda x: block_scales(x, "NVFP4"),
    "grid_spacing": lambda x: grid_spacing(x, "E4M3", 0.3),
    "compute_stiffness_field": lambda x: compute_stiffness_field(x, "E4M3"),
    "grid_alignment_error": lambda x: grid_alignment_error(x, "E4M3", 0.3),
    "compute_ulp_distance": lambda x: compute_ulp_distance(x, x * 2, "E4M3"),
    "compute_ulp_distance of the carrier": lambda x: compute_ulp_distance(x, x * 2),
    "from_code_index": lambda x: from_code_index(code_index(encode(x, "E4M3"), E4M3), E4M3),
}


def leaves(result) -> list:
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_result_depends_on_the_default_dtype_or_device(name):
    for dtype in (torch.float32, torch.float64):
        x = draws(4, 64, dtype=dtype)
        expected = leaves(FUNCTIONS[name](x))
        for default in (torch.bfloat16, torch.float64, torch.float16):
            torch.set_default_dtype(default)
            try:
                found = leaves(FUNCTIONS[name](x))
            finally:
                torch.set_default_dtype(torch.float32)
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with torch.device("meta"):
            found = leaves(FUNCTIONS[name](x))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SLOW = ("reference", "eager")  # on tensors that are worth a second thread


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scratch_first_made_under_another_default_device_lies_on_the_tensors_own(name):
    for shape in ((3, 96), (1376, 96))[: 1 if any(word in name for word in SLOW) else 2]:  # met by no other test
        x = draws(*shape)
        with torch.device("meta"):
            found = leaves(FUNCTIONS[name](x))
        assert all(torch.equal(a, b) for a, b in zip(found, leaves(FUNCTIONS[name](x)), strict=True))


META = {name: call for name, call in FUNCTIONS.items() if "reference" not in name}


@pytest.mark.parametrize("name", META)
def test_meta_and_fake_tensors_give_shapes_or_an_error(name):
    x = draws(4, 64)
    expected = leaves(META[name](x))
    for hollow in (x.to("meta"), FakeTensorMode().from_tensor(x)):
        try:
            found = leaves(META[name](hollow))
        except AltGradError:
            continue
        assert [(f.shape, f.dtype, f.device) for f in found] == [(e.shape, e.dtype, hollow.device) for e in expected]


HOLLOW = {
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "efficient zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "outlived its vmap": lambda x: _outlived(x),
}


def _outlived(x):
    kept = []
    torch.vmap(lambda t: kept.append(t) or t)(torch.stack([x, x]))
    return kept[0]


@pytest.mark.parametrize("kind", HOLLOW)
@pytest.mark.parametrize("fmt", ["E4M3", "NVFP4"])
def test_a_scale_without_values_is_refused_with_both_devices(fmt, kind):
    with pytest.raises(ScaleError, match="scale"):
        quantize(draws(4, 32), fmt, HOLLOW[kind](torch.tensor(0.5)))
    if fmt == "E4M3":
        codes = encode(draws(4, 32), fmt)
        with pytest.raises(ScaleError, match="scale"):
            decode(codes, fmt, HOLLOW[kind](torch.tensor(0.5)))
    with pytest.raises(ScaleError, match=r"meta.*cpu|cpu.*meta"):
        quantize(draws(4, 32), fmt, torch.tensor(0.5, device="meta"))


@SCALAR_AND_BLOCK
@KERNELS
def test_a_tensor_without_memory_is_refused_or_read_as_what_it_is(fmt, kernel):
    zeros = torch._efficientzerotensor((2, 32))
    assert_same_bits(quantize(zeros, fmt, kernel=kernel), torch.zeros(2, 32))
    freed = draws(2, 32)
    freed.untyped_storage().resize_(0)
    with pytest.raises(DtypeError, match=r"freed|memory"):
        quantize(freed, fmt, kernel=kernel)
    with pytest.raises(DtypeError, match=r"vmap|functorch|transform"):
        quantize(_outlived(draws(2, 32)), fmt, kernel=kernel)


def test_amax_of_tensors_without_memory():
    assert amax(torch._efficientzerotensor((5,))).item() == 0
    freed = draws(2, 32)
    freed.untyped_storage().resize_(0)
    with pytest.raises(AltGradError, match=r"freed|memory"):
        amax(freed)


# -- lazy views, flags, threads: N5, N6, N11 -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lazy_negative_views_are_resolved(name, dtype):
    x = draws(4, 64, dtype=dtype)
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    found, expected = leaves(FUNCTIONS[name](lazy)), leaves(FUNCTIONS[name](x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_lazy_negative_scales_and_outs():
    x = draws(4, 32)
    scale = torch.complex(torch.zeros(()), -torch.tensor(0.3)).conj().imag
    assert_same_bits(quantize(x, "E4M3", scale), quantize(x, "E4M3", 0.3))
    for out in (torch.complex(torch.zeros(4, 32), torch.zeros(4, 32)).conj().imag, torch._neg_view(torch.zeros(4, 32))):
        assert out.is_neg()
        try:
            quantize(x, "E4M3", out=out)
        except AltGradError:
            continue
        assert_same_bits(out.resolve_neg(), quantize(x, "E4M3"))


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
def test_subclasses_draw_the_same_bits_and_have_their_scales_judged(fmt):
    x = draws(4, 32)
    expected = quantize(x, fmt, rounding="stochastic", key=(1, 2))
    found = quantize(x.as_subclass(Marked), fmt, rounding="stochastic", key=(1, 2))
    assert_same_bits(found.as_subclass(torch.Tensor), expected)
    if fmt == "E4M3":
        with pytest.raises(ScaleError, match="scale holds -1"):
            quantize(x.as_subclass(Marked), fmt, torch.tensor(-1.0))


# -- scales and codes in traced code: N2, N7 ------------------------------------------------------------------------


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager", **options)


@pytest.mark.parametrize("value", [0.0, -1.0, nan, inf])
def test_a_bad_scale_in_traced_code_is_refused_or_gives_nan(value):
    x, scale = torch.ones(12), torch.tensor(value)
    channels = torch.ones(12)
    channels[3] = value
    calls = {
        "quantize": lambda x, s: quantize(x, "E4M3", s),
        "stats": lambda x, s: quantize_with_stats(x, "E4M3", s)[0],
        "round trip": lambda x, s: decode(encode(x, "E4M3"), "E4M3", s),
        "NVFP4": lambda x, s: quantize(x, "NVFP4", s, pad=True),
    }
    for name, call in calls.items():
        for given in (scale, channels) if name != "NVFP4" else (scale,):
            for run in (compiled(call), lambda x, s, call=call: torch.vmap(lambda t: call(t, s))(x[None])[0]):
                try:
                    found = run(x, given)
                except ScaleError:
                    continue
                assert found[(given.expand(12) == 1).logical_not()].isnan().all(), (name, value, found)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_codes_out_of_range_never_leave_the_table():
    values = set(decode(torch.arange(16, dtype=torch.uint8), "E2M1").tolist()) | {0.0}

    def sound(found):
        return all(v in values or v != v for v in found.flatten().tolist())

    codes = torch.tensor([[200], [255]], dtype=torch.uint8)
    runs = {
        "vmap": lambda: torch.vmap(lambda c: decode(c, "E2M1"))(codes),
        "compile": lambda: compiled(lambda c: decode(c, "E2M1"))(torch.tensor([-5, 3, 2**40])),
        "compile, int32": lambda: compiled(lambda c: decode(c, "E2M1"))(
            torch.tensor([-5, 3, 2**30], dtype=torch.int32)
        ),
        "compile, eager kernel": lambda: compiled(lambda c: decode(c, "E2M1", kernel="eager"))(torch.tensor([-5, 99])),
    }
    for run in runs.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = run()
            except CodeError:
                continue
            assert sound(found)


def test_codes_of_blocks_out_of_range_are_refused():
    from altgrad.quantization import QuantizedTensor

    good = encode(draws(2, 32), "MXFP4")
    bad = QuantizedTensor(torch.full_like(good.codes, 255), good.scales, good.format, -1, good.shape)
    with pytest.raises(CodeError, match=r"outside 0\.\.15"):
        decode(bad)
    for scales in (good.scales.double(), good.scales.to("meta"), None, good.scales[:1]):
        with pytest.raises(AltGradError):
            decode(QuantizedTensor(good.codes, scales, good.format, -1, good.shape))


# -- dynamic shapes: N8 ---------------------------------------------------------------------------------------------


def test_dynamic_shapes_and_a_second_scale_trace_one_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(lambda x: quantize(x, "E4M3"), dynamic=True, fullgraph=True, backend=backend)
    for n in (17, 33, 5):
        assert_same_bits(run(draws(n)), quantize(draws(n), "E4M3"))
    assert len(graphs) == 1
    torch._dynamo.reset()
    scaled = torch.compile(lambda x, s: quantize(x, "E4M3", s), fullgraph=True, backend="eager")
    for s in (0.5, 0.25, 0.3, 0.7):
        assert_same_bits(scaled(draws(9), s), quantize(draws(9), "E4M3", s))
    blocks = torch.compile(lambda x: quantize(x, "MXFP8", pad=True), dynamic=True, fullgraph=True, backend="eager")
    for n in (32, 40):
        assert_same_bits(blocks(draws(3, n)), quantize(draws(3, n), "MXFP8", pad=True))


# -- statistics of the last step: N12 -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cpu", "eager", "reference"])
def test_overflow_of_the_tensors_own_dtype_is_counted(kernel):
    x = torch.tensor([65504.0, 1.0, -65504.0], dtype=torch.float16)
    scale = amax_scale(x, E4M3, power_of_two=True)
    found, stats = quantize_with_stats(x, E4M3, 2 * scale, overflow="saturate", clamp=True, kernel=kernel)
    lost = int((found.isinf()).sum())
    assert float(stats.overflow) == lost
    found, stats = quantize_with_stats(x, E4M3, scale, clamp=True, kernel=kernel)
    assert found.tolist() == [inf, 1.0, -inf]
    assert float(stats.overflow) == 2
    wide = torch.tensor([3.3e38, 1.0]).to(torch.bfloat16)
    found, stats = quantize_with_stats(wide, "E4M3", 2.0**120, kernel=kernel)
    assert float(stats.overflow) == int(found.isinf().sum())
    single = torch.tensor([3.4e38, 1.0])
    found, stats = quantize_with_stats(single, "E4M3", 2.0**120, clamp=True, kernel=kernel)
    assert float(stats.overflow) == int(found.isinf().sum()) == 1


def test_infinite_inputs_that_stay_are_no_overflow_of_the_last_step():
    x = torch.tensor([inf, 1.0], dtype=torch.float16)
    assert float(quantize_with_stats(x, "E4M3")[1].overflow) == 0


# -- torch.func: N14 ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own tables of jvp
@pytest.mark.parametrize("fmt", ["E4M3", "MXFP8"])
@pytest.mark.parametrize("mask", [False, True])
def test_fake_quantize_works_under_torch_func(fmt, mask):
    x = draws(4, 32) * 300

    def call(t):
        return fake_quantize(t, fmt, mask_saturated=mask)

    leaf = x.clone().requires_grad_()
    call(leaf).sum().backward()
    assert torch.equal(torch.func.grad(lambda t: call(t).sum())(x), leaf.grad)
    value, tangent = torch.func.jvp(call, (x,), (torch.full_like(x, 3.0),))
    assert_same_bits(value, quantize(x, fmt))
    assert torch.equal(tangent, 3 * leaf.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_bits(torch.vmap(call)(x), torch.stack([quantize(row, fmt) for row in x]))
        each = torch.vmap(torch.func.grad(lambda t: call(t).sum()))(x)
        assert torch.equal(each, leaf.grad)
        jacobian = torch.func.jacrev(lambda t: call(t)[0])(x[:1])
    assert torch.equal(jacobian.diagonal(dim1=0, dim2=2)[0], leaf.grad[:1][0])
    leaf.grad, kept = None, leaf.grad
    (first,) = torch.autograd.grad((call(leaf) * leaf).sum(), leaf, create_graph=True)
    assert torch.equal(torch.autograd.grad(first.sum(), leaf)[0], 2 * kept)
