"""What makes no sense is refused with value, limit and remedy; names work where formats do."""

import numpy as np
import pytest
import torch

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
from benchmarks.fuzz_quantization import FAULTS, run
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
    ("amax of a repeated axis", lambda x: amax(x, (0, 2)), OptionError),
    ("amax of integers", lambda x: amax(x.int()), DtypeError),
    ("amax of complex numbers", lambda x: amax(x.to(torch.complex64)), DtypeError),
    ("amax of a list", lambda x: amax([1.0]), DtypeError),
    ("amax_scale with a block format", lambda x: amax_scale(x, "MXFP8"), FormatError),
    ("amax_scale without a format", lambda x: amax_scale(x, 3), FormatError),
    ("scale_from_amax of a number", lambda x: scale_from_amax(3.0, E4M3), ScaleError),
    ("key of floats", lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1.5, 2)), RandomKeyError),
    ("key of whole floats", lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1.0, 2)), RandomKeyError),
    ("key of strings", lambda x: quantize(x, "E4M3", rounding="stochastic", key=("1", "2")), RandomKeyError),
    ("key of bools", lambda x: quantize(x, "E4M3", rounding="stochastic", key=(True, False)), RandomKeyError),
    ("key that is a word", lambda x: quantize(x, "E4M3", rounding="stochastic", key="12"), RandomKeyError),
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
    ("scale None", lambda x: quantize(x, "E4M3", None), ScaleError),
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


def test_a_sample_of_drawn_calls_is_right_or_refused():
    verdicts, faults = run(count=250, seed=1, workers=1)
    assert not faults, faults
    assert verdicts["bits"] > 100
    assert verdicts["refused"] > 30
    assert not any(verdicts[name] for name in FAULTS)
    assert sum(verdicts.values()) == 250
