"""What makes no sense is refused with value, limit and remedy; names work where formats do."""

from collections import Counter
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from altgrad import quantization
from altgrad.errors import (
    AltGradError,
    CodeError,
    DtypeError,
    FormatError,
    OptionError,
    RandomKeyError,
    ScaleError,
)
from altgrad.quantization import (
    E4M3,
    CurrentScaling,
    amax,
    amax_scale,
    block_scales,
    code_index,
    compute_ulp_distance,
    decode,
    encode,
    from_code_index,
    grid_spacing,
    quantize,
    scale_from_amax,
)
from altgrad.quantization.cast import Cast
from altgrad.quantization.quantized import Want
from benchmarks.fuzz_quantization import FAULTS, kept, run
from tests.quantization.oracles import assert_same_bits


def draws(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def test_names_work_where_formats_do():
    x = draws(6, 64)
    assert torch.equal(amax_scale(x, "E4M3"), amax_scale(x, E4M3))
    assert torch.equal(scale_from_amax(amax(x), "e4m3"), scale_from_amax(amax(x), E4M3))
    assert torch.equal(CurrentScaling().update(amax(x), (), "E4M3")[0], amax_scale(x, E4M3))
    codes = encode(x, "E3M2")
    index = code_index(codes, "E3M2")
    assert torch.equal(from_code_index(index, "E3M2"), from_code_index(index, quantization.get_format("E3M2")))


BAD_CALLS = [
    ("encode of a meta tensor", lambda x: encode(x.to("meta"), "E4M3"), None),
    ("amax of an axis that is not there", lambda x: amax(x, 5), OptionError),
    ("amax of axis by name", lambda x: amax(x, "rows"), OptionError),
    ("amax of a third axis of two", lambda x: amax(x, (0, 2)), OptionError),
    ("amax of an axis named twice", lambda x: amax(x, (0, -2)), OptionError),
    ("amax of integers", lambda x: amax(x.int()), DtypeError),
    ("amax of complex numbers", lambda x: amax(x.to(torch.complex64)), DtypeError),
    ("amax of a list", lambda x: amax([1.0]), DtypeError),
    ("amax_scale with a block format", lambda x: amax_scale(x, "MXFP8"), FormatError),
    ("amax_scale without a format", lambda x: amax_scale(x, 3), FormatError),
    ("scale_from_amax of a number", lambda x: scale_from_amax(3.0, E4M3), ScaleError),
    ("scale_from_amax of integers", lambda x: scale_from_amax(torch.tensor(3), E4M3), ScaleError),
    ("key of floats", lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1.5, 2)), RandomKeyError),
    ("key of whole floats", lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1.0, 2)), RandomKeyError),
    ("key of strings", lambda x: quantize(x, "E4M3", rounding="stochastic", key=("1", "2")), RandomKeyError),
    ("key of bools", lambda x: quantize(x, "E4M3", rounding="stochastic", key=(True, False)), RandomKeyError),
    ("key that is a word", lambda x: quantize(x, "E4M3", rounding="stochastic", key="12"), RandomKeyError),
    ("key that is a number", lambda x: quantize(x, "E4M3", rounding="stochastic", key=12), RandomKeyError),
    ("key tensor of floats", lambda x: quantize(x, "E4M3", rounding="stochastic", key=torch.ones(2)), RandomKeyError),
    ("key tensor of three", lambda x: quantize(x, "E4M3", rounding="stochastic", key=torch.arange(3)), RandomKeyError),
    (
        "meta key",
        lambda x: quantize(x, "E4M3", rounding="stochastic", key=torch.ones(2).long().to("meta")),
        RandomKeyError,
    ),
    (
        "random_bits 2.5",
        lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1, 2), random_bits=2.5),
        AltGradError,
    ),
    (
        "random_bits True",
        lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1, 2), random_bits=True),
        AltGradError,
    ),
    ("scale as a word", lambda x: quantize(x, "E4M3", "0.5"), ScaleError),
    ("scale complex", lambda x: quantize(x, "E4M3", 1j), ScaleError),
    ("scale as a list", lambda x: quantize(x, "E4M3", [1.0]), ScaleError),
    ("sparse scale", lambda x: quantize(x, "E4M3", torch.ones(6, 1).to_sparse()), ScaleError),
    ("complex scale tensor", lambda x: quantize(x, "E4M3", torch.tensor(1j)), ScaleError),
    ("rounding as a dict", lambda x: quantize(x, "E4M3", rounding={}), OptionError),
    ("overflow as a list", lambda x: quantize(x, "E4M3", overflow=[]), OptionError),
    ("kernel as a dict", lambda x: quantize(x, "E4M3", kernel={}), OptionError),
    ("axis as a word", lambda x: quantize(x, "MXFP8", axis="1"), AltGradError),
    ("axis as a float", lambda x: quantize(x, "MXFP8", axis=1.0), AltGradError),
    ("format as a list", lambda x: quantize(x, ["E4M3"]), FormatError),
    ("format as a dtype", lambda x: quantize(x, torch.float16), FormatError),
    ("sparse", lambda x: quantize(x.to_sparse(), "E4M3"), DtypeError),
    ("sparse rows", lambda x: quantize(x.to_sparse_csr(), "E4M3"), DtypeError),
    ("mkldnn", lambda x: quantize(x.to_mkldnn(), "E4M3"), DtypeError),
    ("mkldnn in blocks", lambda x: quantize(x.to_mkldnn(), "MXFP8"), DtypeError),
    ("sparse in blocks", lambda x: quantize(x.to_sparse(), "MXFP8"), DtypeError),
    ("nested", lambda x: quantize(torch.nested.nested_tensor([x[0], x[1, :3]]), "E4M3"), DtypeError),
    (
        "quantized tensor of torch",
        lambda x: quantize(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "E4M3"),
        DtypeError,
    ),
    ("a list", lambda x: quantize([1.0], "E4M3"), DtypeError),
    ("an array", lambda x: quantize(x.numpy(), "MXFP8"), DtypeError),
    ("nothing", lambda x: quantize(None, "E4M3"), DtypeError),
    ("amax of a sparse tensor", lambda x: amax(x.to_sparse()), DtypeError),
    ("decode of a list", lambda x: decode([1, 2], "E4M3"), CodeError),
    ("decode of sparse codes", lambda x: decode(x.to(torch.uint8).to_sparse(), "E4M3"), CodeError),
    ("decode to a name", lambda x: decode(encode(x, "E4M3"), "E4M3", dtype="float32"), DtypeError),
    ("decode to integers", lambda x: decode(encode(x, "E4M3"), "E4M3", dtype=torch.int32), DtypeError),
    ("decode of bools", lambda x: decode(x > 0, "E4M3"), CodeError),
    ("decode of int8", lambda x: decode(x.to(torch.int8), "E4M3"), CodeError),
    (
        "decode to a meta scale",
        lambda x: decode(encode(x, "E4M3"), "E4M3", torch.tensor(1.0, device="meta")),
        ScaleError,
    ),
    ("decode of FP32 codes", lambda x: decode(torch.zeros(2, dtype=torch.int32), "FP32"), FormatError),
    ("code_index of floats", lambda x: code_index(x, E4M3), CodeError),
    ("from_code_index of floats", lambda x: from_code_index(x, E4M3), CodeError),
    ("grid_spacing under scale 0", lambda x: grid_spacing(x, "E4M3", 0.0), ScaleError),
    ("block_scales of integers", lambda x: block_scales(x.int(), "MXFP8"), DtypeError),
    ("compute_ulp_distance of lists", lambda x: compute_ulp_distance([1.0], [2.0]), AltGradError),
]


@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|nested|quantize_per_tensor).*:UserWarning")
@pytest.mark.parametrize(("name", "call", "error"), BAD_CALLS, ids=[row[0] for row in BAD_CALLS])
def test_what_makes_no_sense_is_refused_with_value_limit_and_remedy(name, call, error):
    if error is None:
        assert call(draws(6, 64)).device.type == "meta"
        return
    with pytest.raises(error) as raised:
        call(draws(6, 64))
    assert isinstance(raised.value, AltGradError)
    assert len(str(raised.value)) > 30


def test_stochastic_rounding_takes_numpy_and_bounded_python_integers():
    x = draws(64)
    expected = quantize(x, "E4M3", rounding="stochastic", key=(7, 9))
    assert_same_bits(quantize(x, "E4M3", rounding="stochastic", key=(np.int64(7), np.uint8(9))), expected)
    assert_same_bits(quantize(x, "E4M3", rounding="stochastic", key=[7, 9]), expected)


def test_a_sample_of_drawn_calls_is_right_or_refused_and_kept(tmp_path):
    lines = run(count=120, seed=1, workers=1, folder=tmp_path)
    assert not [line.fault for line in lines if line.fault]
    verdicts = Counter(line.verdict for line in lines)
    assert verdicts["bits"] > 50
    assert verdicts["refused"] > 15
    assert not any(verdicts[name] for name in FAULTS)
    assert [line.index for line in lines] == list(range(120))
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    path.write_text(
        text[: text.rindex("118 ")] + '118 {"index": 118, "verdict": "crash", "words": "exit status -11"}\n119 '
    )
    assert [line.index for line in kept(path)] == list(range(119))  # the torn line is none
    assert run(count=120, seed=1, workers=1, folder=tmp_path, again=True) == lines


# -- memory: storages that end before their tensor does -------------------------------------------------------------


def shrunk(x: torch.Tensor, bytes_less: int = 1) -> torch.Tensor:
    """x in a storage that lacks its last bytes."""
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - bytes_less)
    return x


def every_second(x: torch.Tensor) -> torch.Tensor:
    """Every second element of a storage that ends before the last of them."""
    view = torch.stack([x, x], -1)[..., 0]
    view.untyped_storage().resize_(8 * x.numel() - 8)
    return view


class Named(torch.Tensor):
    """A subclass that changes nothing."""


ALL = Want.VALUES | Want.CODES | Want.STATS
CHANNELS = shrunk(torch.ones(32))
PACKED = encode(draws(4, 32), "NVFP4")
SHORT = {
    "x": lambda x: quantize(shrunk(x), "E4M3"),
    "x, all of it": lambda x: quantize(shrunk(x, x.nbytes), "MXFP8"),
    "every second element": lambda x: encode(every_second(x), "E4M3"),
    "a subclass": lambda x: quantize(shrunk(x).as_subclass(Named), "E4M3"),
    "amax": lambda x: amax(shrunk(x)),
    "amax of channels": lambda x: amax(shrunk(x), 0),
    "diagnostics": lambda x: grid_spacing(shrunk(x), "E4M3"),
    "scale": lambda x: quantize(x, "E4M3", shrunk(torch.tensor(0.5))),
    "scale of channels": lambda x: quantize(x, "E4M3", shrunk(torch.ones(32))),
    "scale in traced code": lambda x: torch.func.functionalize(lambda t: quantize(t, "E4M3", CHANNELS))(x),
    "tensor scale": lambda x: quantize(x, "NVFP4", shrunk(torch.tensor(0.5))),
    "key": lambda x: quantize(x, "E4M3", rounding="stochastic", key=shrunk(torch.tensor([1, 2]))),
    "out": lambda x: quantize(x, "E4M3", out=shrunk(x)),
    "out in traced code": lambda x: quantize(x.as_subclass(Named), "E4M3", out=shrunk(x)),
    "codes": lambda x: decode(shrunk(encode(x, "E4M3")), "E4M3"),
    "codes of blocks": lambda x: decode(replace(PACKED, codes=shrunk(PACKED.codes))),
    "scales of blocks": lambda x: decode(replace(PACKED, scales=shrunk(PACKED.scales))),
    "tensor scale of blocks": lambda x: decode(replace(PACKED, tensor_scale=shrunk(torch.tensor(0.5)))),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(name):
    with pytest.raises(AltGradError, match=r"storage|pass both on one device"):
        SHORT[name](draws(4, 32))


def test_views_with_all_their_memory_are_as_good_as_copies():
    wide = draws(40, 64)
    for view in (wide[3:, ::2], wide[5:9].T, wide[0].expand(7, 64), wide[-1:], wide.view(-1).unfold(0, 5, 2)):
        assert_same_bits(quantize(view, "E4M3"), quantize(view.clone(memory_format=torch.contiguous_format), "E4M3"))


# -- what stands beside x -------------------------------------------------------------------------------------------


def leaked():
    """A wrapper that outlived its vmap."""
    kept = []
    torch.vmap(lambda t: kept.append(t) or t)(torch.ones(2))
    return kept[0]


STRAY = {
    "a fake scale under vmap": lambda x: torch.vmap(lambda t: quantize(t, "E4M3", FakeTensorMode().from_tensor(HALF)))(
        x
    ),
    "a leaked scale": lambda x: torch.func.functionalize(lambda t: quantize(t, "E4M3", leaked()))(x),
    "a scale of nan beside a subclass": lambda x: grid_spacing(
        x.as_subclass(Named), "E4M3", torch.tensor(float("nan"))
    ),
    "a scale of nan beside a meta tensor": lambda x: quantize(x.to("meta"), "E4M3", torch.tensor(float("nan"))),
    "a meta key": lambda x: encode(
        x.as_subclass(Named), "E4M3", rounding="stochastic", key=torch.ones(2, dtype=torch.int64, device="meta")
    ),
    "an out of another type": lambda x: quantize(x.as_subclass(Named), "E4M3", out=TwoTensor(x.clone(), x.clone())),
    "an out that shares memory": lambda x: quantize(x.as_subclass(Named), "E4M3", out=x[:1].expand(4, 32)),
    "an out of a transform that x is not in": lambda x: quantize(
        x.as_subclass(Named), "E4M3", out=torch._to_functional_tensor(x.clone())
    ),
    "codes of another shape": lambda x: decode(replace(PACKED, codes=PACKED.codes[:1], scales=PACKED.scales[:1])),
}
HALF = torch.tensor(0.5)


@pytest.mark.parametrize("name", STRAY)
def test_what_does_not_belong_to_x_is_refused(name):
    with pytest.raises(AltGradError):
        STRAY[name](draws(4, 32))


def test_subclasses_beside_one_another_and_in_inference_mode_are_taken_as_their_values():
    x = draws(4, 32)
    two, named = TwoTensor(x.clone(), x.clone()), torch.tensor(0.5).as_subclass(Named)
    assert_same_bits(quantize(two, "E4M3", named).a, quantize(x, "E4M3", 0.5))
    inferred = torch.inference_mode()(torch.clone)(x)
    assert torch.equal(grid_spacing(inferred, "E4M3", torch.nn.Parameter(HALF)), grid_spacing(x, "E4M3", 0.5))
    with torch.inference_mode():
        assert_same_bits(quantize(two, "E4M3").a, quantize(x, "E4M3"))
        assert_same_bits(amax(two).a, amax(x))


# -- traced calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [quantize, encode, lambda x, fmt: quantize(x, fmt, 2.0**-130)])
@pytest.mark.parametrize("flush", [False, True])
def test_a_traced_call_on_a_subclass_reads_its_argument(call, flush):
    x = draws(64)
    try:
        assert torch.set_flush_denormal(flush) or not flush
        graph = make_fx(lambda t: call(t, "E4M3"))(torch.zeros_like(x).as_subclass(Named))
        found = graph(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.as_subclass(torch.Tensor), call(x, "E4M3"))


@pytest.mark.parametrize(
    "options",
    [{"random_bits": -1}, {"overflow": []}, {"scale": 1j}, {"scale": {}}, {"kernel": "fpga"}, {"fmt": "E99M1"}],
)
def test_a_compiled_call_raises_the_error_of_the_plain_one(options):
    given = {"fmt": "E4M3", **options}
    torch._dynamo.reset()
    with pytest.raises(AltGradError) as plain:
        encode(draws(8), **given)
    with pytest.raises(AltGradError) as compiled:
        torch.compile(lambda x: encode(x, **given), backend="eager")(draws(8))
    assert str(compiled.value) == str(plain.value)


def test_a_graph_made_while_the_thread_flushes_is_one_graph():
    torch._dynamo.reset()
    x = draws(8)
    try:
        assert torch.set_flush_denormal(True)
        found = torch.compile(lambda t: decode(encode(t, "E4M3", HALF), "E4M3", 0.5), backend="eager", fullgraph=True)(
            x
        )
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(found, quantize(x, "E4M3", 0.5))


def test_a_numpy_number_is_a_scale_in_compiled_code_too():
    x, scale = draws(8), np.float32(0.3)
    torch._dynamo.reset()
    found = torch.compile(lambda t: quantize(t, "E4M3", scale), backend="eager", fullgraph=True)(x)
    assert_same_bits(found, quantize(x, "E4M3", scale))


# -- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["E4M3", "E2M13", "E2M1"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", "up"])
def test_an_overflow_without_a_code_has_code_0_and_is_told(name, rounding):
    x = torch.tensor([-1e6, 1e6, -1.0, 1.0, 0.0])
    cast = Cast(name, rounding=rounding, overflow="inf")
    for dtype in (torch.float32, torch.float64):
        found = [cast(x.to(dtype), key=(1, 2), want=ALL, kernel=kernel) for kernel in ("cpu", "eager", "reference")]
        for each in found:
            assert each.codes[:2].tolist() == [0, 0]
            assert each.problems
            assert torch.equal(each.codes, found[0].codes)


def test_codes_of_32_bits_are_the_bit_patterns():
    x = torch.cat([draws(64), torch.tensor([-0.0, inf, -inf])])
    for kernel in ("cpu", "eager"):
        assert torch.equal(encode(x, "FP32", kernel=kernel), x.view(torch.int32))


def test_indices_of_one_byte_serve_wide_formats():
    index = torch.tensor([0, 1, 255], dtype=torch.uint8)
    assert from_code_index(index, "BF16").tolist() == [0, 1, 255]
    assert from_code_index(torch.tensor([2**40, -(2**40)]), "E4M3").tolist() == [126, 254]
