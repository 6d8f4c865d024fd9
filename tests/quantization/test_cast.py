"""A cast is one value: its text, its identity, its gate, and the same bits as the record of all numerics."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from altgrad.errors import FormatError, OptionError, RandomKeyError
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization import (
    BLOCK_FORMATS,
    FORMAT_REGISTRY,
    Cast,
    Want,
    decode,
    encode,
    fake_quantize,
    get_format,
    ops,
    quantize,
)
from benchmarks import digest

ALL = Want.VALUES | Want.CODES | Want.STATS
FORMATS = [*FORMAT_REGISTRY.values(), *BLOCK_FORMATS.values(), get_format("E3M4/24:even"), FloatFormat("own", 3, 2, 5)]
OPTIONS = [
    {},
    {"rounding": "stochastic", "random_bits": 8},
    {"rounding": "down", "overflow": "nan", "clamp": True, "axis": 0, "pad": True},
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_cast_survives_its_text_a_pickle_and_a_copy(fmt, options):
    cast = Cast(fmt, **options)
    for other in (Cast.parse(str(cast)), pickle.loads(pickle.dumps(cast)), copy.deepcopy(cast)):
        assert other == cast
        assert hash(other) == hash(cast)
        assert str(other) == str(cast)


def test_casts_differ_where_one_field_differs():
    cast = Cast("E4M3")
    changes = ({"rounding": "up"}, {"overflow": "inf"}, {"subnormals": False}, {"clamp": True}, {"random_bits": 3})
    others = [replace(cast, **change) for change in (*changes, {"axis": 1}, {"pad": True}, {"format": "E5M2"})]
    assert len({cast, *others}) == 9
    assert len({str(c) for c in (cast, *others)}) == 9
    assert cast == Cast("fp8_e4m3", "nearest_even", "native")
    with pytest.raises(FrozenInstanceError):
        cast.clamp = True


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Cast("E9M9"), FormatError, "E9M9"),
        (lambda: Cast("E4M3", "nearest"), OptionError, "nearest_even"),
        (lambda: Cast("E4M3", random_bits=2.5), RandomKeyError, "2.5"),
        (lambda: Cast("E4M3", random_bits=33), RandomKeyError, "1..32"),
        (lambda: Cast("E4M3", axis="last"), OptionError, "last"),
        (lambda: Cast("E0M7", subnormals=False), FormatError, "uniform"),
        (lambda: Cast.parse("E4M3(sideways)"), OptionError, "sideways"),
        (lambda: Cast("MXFP8").decode(torch.zeros(32, dtype=torch.uint8)), FormatError, "plain codes"),
        (lambda: Cast("E4M3")(torch.ones(3), want=Want.CODES, out=torch.ones(3)), OptionError, "none"),
    ],
)
def test_a_bad_cast_says_value_and_limit(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kernel", ["eager", "cpu"])
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "MXFP8", "NVFP4"])
def test_the_outputs_of_one_pass_are_those_of_the_faces(name, kernel):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 3
    cast = Cast(name, "stochastic", "saturate")
    found = cast(x, key=(3, 4), want=ALL, kernel=kernel)
    options = {"rounding": "stochastic", "overflow": "saturate", "key": (3, 4), "kernel": kernel}
    assert torch.equal(found.values, quantize(x, name, **options))
    encoded = encode(x, name, **options)
    codes, scales = (encoded, None) if isinstance(encoded, torch.Tensor) else (encoded.codes, encoded.scales)
    assert torch.equal(found.codes, codes)
    assert (found.scales is None) == (scales is None)
    assert scales is None or torch.equal(found.scales, scales)
    assert torch.equal(found.stats.vector, ops.quantize_and_encode_with_stats(x, name, **options)[2].vector)
    assert torch.equal(decode(encoded, name, kernel=kernel), found.values)


def test_a_small_sample_of_the_record_of_all_numerics():
    record = json.loads(digest.RECORD.read_text())["kernels"]
    found = {}
    for name in ("E4M3", "E5M2", "E7M0", "BF16", "MXFP8", "NVFP4"):
        for kernel in ("eager", "cpu"):
            found |= dict(digest._calls(name, get_format(name), kernel))
    assert {k: record[k] for k in found} == found


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_a_new_float_scale_and_dynamic_shapes_trace_in_one_graph():
    torch._dynamo.reset()
    traced = torch.compile(lambda x, s: quantize(x, "E4M3", s), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, s in ((17, 0.5), (18, 0.3), (40, 0.7)):
        x = torch.linspace(-9, 9, n)
        assert torch.equal(traced(x, s), quantize(x, "E4M3", s))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does it
def test_a_cast_that_a_function_closes_over_traces():
    cast = Cast("E4M3", overflow="saturate")
    x = torch.linspace(-900, 900, 64)
    assert torch.equal(compiled(lambda x: cast(x, 2.0).values + 1)(x), cast(x, 2.0).values + 1)


@pytest.mark.parametrize("name", ["E4M3", "MXFP8", "NVFP4"])
@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "key": (1, 2)}], ids=str)
def test_vmap_is_the_call_on_each_slice(name, options):
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    for dim in range(2):
        mapped = torch.vmap(lambda t: quantize(t, name, **options), in_dims=dim)(x)
        assert torch.equal(mapped, torch.stack([quantize(t, name, **options) for t in x.unbind(dim)]))


def test_vmap_takes_a_scale_for_each_slice_or_one_for_all():
    x, scales = torch.randn(4, 6), torch.rand(4) + 0.5
    each = torch.stack([quantize(t, "E4M3", s) for t, s in zip(x, scales)])
    assert torch.equal(torch.vmap(lambda t, s: quantize(t, "E4M3", s))(x, scales), each)
    one = torch.vmap(lambda s: quantize(x[0], "E4M3", s))(scales)
    assert torch.equal(one, torch.stack([quantize(x[0], "E4M3", s) for s in scales]))
    codes = encode(x, "E4M3")
    assert torch.equal(
        torch.vmap(lambda c, s: decode(c, "E4M3", s))(codes, scales), decode(codes, "E4M3", scales[:, None])
    )


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, in forward mode
@pytest.mark.parametrize("mask", [False, True])
def test_the_straight_through_gradient_works_under_function_transforms(mask):
    x = torch.linspace(-900, 900, 12)

    def loss(t):
        return (fake_quantize(t, "E4M3", mask_saturated=mask) * torch.arange(12.0)).sum()

    expected = torch.where(x.abs() <= 448, torch.arange(12.0), 0.0) if mask else torch.arange(12.0)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    assert torch.equal(torch.vmap(torch.func.grad(loss))(torch.stack([x, -x])), torch.stack([expected, expected]))
    assert torch.func.jvp(loss, (x,), (torch.ones(12),))[1] == expected.sum()
