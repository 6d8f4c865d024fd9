"""Scales: amax over the finite elements, powers of two, policies as pure functions, and those of named recipes by hand."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from altgrad.errors import OptionError, ScaleError
from altgrad.nn import recipe
from altgrad.quantization import (
    E4M3,
    Cast,
    CurrentScaling,
    DelayedScaling,
    NoScaling,
    StaticScaling,
    amax,
    amax_scale,
    block_scales,
    get_format,
    quantize,
    quantize_with_stats,
    scale_from_amax,
)
from altgrad.quantization.hadamard import TRANSFORMER_ENGINE_SIGNS, Hadamard
from altgrad.quantization.inverse_scaling import RegionScaling, inverse_scale, multiply_blocks
from altgrad.quantization.kernels.cpu.scalar import encode_by_amax
from altgrad.quantization.kernels.eager.blocks import raw_scales
from altgrad.quantization.quantized import Want
from altgrad.quantization.scaling import host_scale, round_up_to_power_of_two, two_level_scale
from altgrad.randomness import random_bits

inf, nan = float("inf"), float("nan")


def test_amax_ignores_nan_and_inf():
    assert amax(torch.tensor([1.0, -3.0, nan, inf])).item() == 3
    assert amax(torch.tensor([nan, inf])).item() == 0
    assert amax(torch.empty(0)).item() == 0
    assert amax(torch.tensor([1.0, -3.0], dtype=torch.bfloat16)).dtype == torch.float32
    assert amax(torch.tensor([1e300], dtype=torch.float64)).item() == 1e300


def test_amax_per_channel():
    x = torch.tensor([[1.0, -2.0], [nan, 0.5], [0.0, 0.0]])
    assert amax(x, axis=0).tolist() == [[2.0], [0.5], [0.0]]
    assert amax(x, axis=1).tolist() == [[1.0, 2.0]]
    assert amax(x, axis=(0, 1)).tolist() == [[1.0, 2.0], [0.0, 0.5], [0.0, 0.0]]
    assert amax(x.t(), axis=-1).tolist() == [[2.0, 0.5, 0.0]]
    assert amax(torch.empty(3, 0), axis=0).tolist() == [[0.0]] * 3


def test_scale_of_all_zero_and_tiny_tensors():
    assert scale_from_amax(torch.tensor(0.0), E4M3).item() == pytest.approx(1 / 448)
    assert scale_from_amax(torch.tensor(1e-42), E4M3).item() == torch.finfo(torch.float32).tiny
    q, _ = quantize_with_stats(torch.zeros(5), "E4M3", amax_scale(torch.zeros(5), E4M3))
    assert q.tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_up_to_powers_of_two_is_exact(dtype):
    powers = torch.tensor([2.0**k for k in range(-126, 128)], dtype=dtype)
    assert torch.equal(round_up_to_power_of_two(powers), powers)
    above = torch.nextafter(powers[:-1], torch.tensor(inf, dtype=dtype))
    assert torch.equal(round_up_to_power_of_two(above), powers[1:])
    below = torch.nextafter(powers[1:], torch.tensor(0.0, dtype=dtype))
    assert torch.equal(round_up_to_power_of_two(below), powers[1:])


def test_quotients_under_amax_scaling_can_exceed_max_and_clamping_prevents_the_overflow():
    exceeding = 0
    for seed in range(300):
        x = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        scale = amax_scale(x, E4M3)
        exceeding += bool((x / scale).abs().max() > 448)
        _, stats = quantize_with_stats(x, E4M3, scale, rounding="up", overflow="inf", clamp=True)
        assert float(stats.overflow) == 0
    assert 0 < exceeding < 100


def test_delayed_scaling_is_pure_and_uses_the_window_before():
    policy = DelayedScaling(history=2, margin=1)
    scale, state = policy.update(torch.tensor(4.0), policy.init(), E4M3)
    assert scale.item() == pytest.approx(4 * 2 / 448)
    scale, second = policy.update(torch.tensor(100.0), state, E4M3)
    assert scale.item() == pytest.approx(4 * 2 / 448)
    scale, third = policy.update(torch.tensor(1.0), second, E4M3)
    assert scale.item() == pytest.approx(100 * 2 / 448)
    scale, fourth = policy.update(torch.tensor(1.0), third, E4M3)
    assert scale.item() == pytest.approx(100 * 2 / 448)
    scale, _ = policy.update(torch.tensor(1.0), fourth, E4M3)
    assert scale.item() == pytest.approx(1 * 2 / 448)
    assert policy.update(torch.tensor(9.0), state, E4M3)[0].item() == pytest.approx(4 * 2 / 448)


def test_the_other_policies():
    assert CurrentScaling(power_of_two=True).update(torch.tensor(448.0), (), E4M3)[0].item() == 1
    assert CurrentScaling(power_of_two=True).update(torch.tensor(449.0), (), E4M3)[0].item() == 2
    assert StaticScaling(0.5).update(None, (), E4M3) == (0.5, ())
    assert NoScaling().update(None, (), E4M3) == (1.0, ())
    with pytest.raises(ScaleError, match="not positive"):
        StaticScaling(0.0)
    with pytest.raises(OptionError, match="history of 0"):
        DelayedScaling(history=0)
    with pytest.raises(OptionError, match="margin"):
        DelayedScaling(margin=99)


@pytest.mark.parametrize("name", ["E4M3", "E0M7", "INT8", "E7M0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_codes_in_one_call_are_those_of_two(name, dtype):
    fmt = get_format(name)
    cast = Cast(fmt, overflow="saturate_finite", clamp=True)
    plan = cast.plan(dtype, torch.device("cpu"), Want.CODES)
    noise = torch.randn(40000).to(dtype)
    samples = [noise[:1], noise[:8192], noise[:8193], noise, noise * 1e30, noise * 1e-38, noise[:64] * 1e-45]
    samples += [torch.zeros(5, dtype=dtype), noise[:24].reshape(4, 6).t(), noise[:24].reshape(4, 6)[:, ::2]]
    samples += [torch.full((3,), torch.finfo(dtype).max, dtype=dtype), torch.randn(1 << 17).to(dtype)]  # many threads
    for x in samples:
        for power_of_two in (False, True):
            codes, scale, problems = encode_by_amax(plan, x, power_of_two, host_scale)
            assert scale == host_scale(float(amax(x)), fmt.max, power_of_two)
            assert problems == 0
            if scale == inf:  # which a cast refuses
                continue
            assert torch.equal(codes, cast(x, scale, want=Want.CODES).codes)
    assert encode_by_amax(plan, torch.empty(0, dtype=dtype), False, host_scale) is None
    if not fmt.has_nan:
        assert encode_by_amax(plan, torch.tensor([1.0, nan], dtype=dtype), False, host_scale)[2] != 0


# -- scales of the named recipes, by hand ------------------------------------------------------------------------------


def test_transformer_engine_delays_its_scale_by_a_region():
    policy = RegionScaling(history=2)
    state, used = policy.init(), []
    for largest in (448.0, 896.0, 224.0, 224.0):
        used.append(state.s.item())
        state = policy.close(torch.tensor(largest), state, E4M3)
    assert used == [1, 1, 0.5, 0.5]
    assert state.s.item() == 2
    assert quantize(torch.tensor(896.0) * used[1], "E4M3", overflow="saturate").item() == 448, (
        "the second region saturates"
    )


def test_a_region_without_an_amax_leaves_no_trace():
    policy = RegionScaling(history=2)
    seen = policy.close(torch.tensor(896.0), policy.init(), E4M3)
    for largest in (0.0, math.inf, math.nan):
        after = policy.close(torch.tensor(largest), seen, E4M3)
        assert after.s == 0.5
    assert torch.equal(policy.close(torch.tensor(0.0), seen, E4M3).window, seen.window)


def test_multiplying_by_the_inverse_scale_breaks_ties_otherwise():
    x = torch.tensor(0.01904296875)
    s = inverse_scale(torch.tensor(0.8125), 448.0)
    assert quantize(x * s, "E4M3").item() == 11
    assert quantize(x, "E4M3", 0.8125 / 448).item() / (0.8125 / 448) == pytest.approx(10)
    assert inverse_scale(torch.tensor([0.0, math.inf, math.nan, 1e-45]), 448.0).tolist() == [
        1,
        1,
        1,
        torch.finfo(torch.float32).max,
    ]


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.0), (448.00003, 2.0), (449.0, 2.0)])
def test_transformer_engine_blocks_round_their_scales_to_powers_of_two(amax, scale):
    x = torch.zeros(1, 128)
    x[0, 5] = amax
    spec = recipe("te_block").default.forward.input
    assert block_scales(x, spec.format).item() == scale


@pytest.mark.parametrize(("amax", "byte"), [(448.0, 127), (449.0, 128), (0.0, 0)])
def test_mxfp8_exponents_are_rounded_up(amax, byte):
    x = torch.zeros(1, 32)
    x[0, 5] = amax
    scale = block_scales(x, recipe("te_mxfp8").default.forward.weight.format).item()
    assert int(math.log2(scale)) + 127 == byte


def test_nvfp4_scales_come_from_an_inverse_tensor_scale():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 1.640625, 35
    assert multiply_blocks(x, get_format("NVFP4")).scales.tolist() == [[22, 448]]
    assert block_scales(x, "NVFP4")[0, 0].item() / (35 / 2688) == pytest.approx(20), "dividing rounds the tie down"


def test_the_fixed_signs_are_those_of_transformer_engine():
    mixed = Hadamard(16, "fixed")
    signs = mixed.draw(None, torch.device("cpu"))
    assert mixed(torch.tensor([*TRANSFORMER_ENGINE_SIGNS]), signs).tolist() == [4] + [0] * 15
    unit = torch.zeros(16)
    unit[3] = 1
    assert mixed(unit, signs).tolist() == [-0.25, 0.25, 0.25, -0.25] * 4


def test_random_signs_are_the_first_bits_of_their_key():
    key = torch.tensor([7, -3])
    signs = Hadamard(64, "random").draw(key, torch.device("cpu"))
    assert signs.tolist() == (1 - 2 * random_bits(key, 64, 1)).tolist()


def test_ms_amp_and_torchao_rows_round_the_inverse_scale_down():
    for policy in (
        recipe("msamp_o1").default.forward.weight.scaling,
        recipe("ao_rowwise").default.forward.weight.scaling,
    ):
        assert isinstance(policy, CurrentScaling)
        assert policy.power_of_two
    assert inverse_scale(torch.tensor(3.0), 448.0, power_of_two=True).item() == 128
    assert CurrentScaling(power_of_two=True).update(torch.tensor(3.0), (), E4M3)[0].item() == 1 / 128


def test_ms_amp_takes_the_present_amax_for_sixteen_steps_and_then_the_windows():
    policy = recipe("msamp_o1").default.forward.input.scaling
    assert isinstance(policy, DelayedScaling)
    state, used = policy.init(), []
    for step in range(18):
        scale, state = policy.update(torch.tensor(448.0 * 2 ** (step % 4)), state, E4M3)
        used.append(float(scale))
    assert used[:16] == [2.0 ** (step % 4) for step in range(16)]
    assert used[16:] == [8, 8]


def test_tetrajets_scale_leaves_nothing_to_saturate():
    x = torch.zeros(1, 32)
    x[0, 0] = 7
    assert block_scales(x, recipe("tetrajet").default.forward.input.format).item() == 2
    assert block_scales(x, "MXFP4").item() == 1, "the OCP rule lets 7 saturate at 6"


class DividesAsCUDA(TorchFunctionMode):
    """Division by a number as a GPU does it: by a product with the number's float32 reciprocal."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__truediv__, torch.Tensor.div, torch.div) and isinstance(args[1], float | int):
            return args[0] * torch.full((), 1 / args[1], dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_no_scale_depends_on_how_a_device_divides_by_a_number():
    amaxes = torch.randn(999, generator=torch.Generator().manual_seed(0)).abs() + 0.01
    none = torch.zeros(len(amaxes), dtype=torch.bool)
    nvfp4, tiles = get_format("NVFP4"), get_format("E4M3/128x128:FP32")
    found = [
        lambda: scale_from_amax(amaxes, "E4M3"),
        lambda: two_level_scale(amaxes, nvfp4),
        lambda: raw_scales(amaxes, none, nvfp4, None),
        lambda: raw_scales(amaxes, none, nvfp4, torch.tensor(0.3)),
        lambda: raw_scales(amaxes, none, tiles, None),
        lambda: torch.stack([multiply_blocks(a.expand(1, 16), nvfp4).tensor_scale for a in amaxes[:99]]),
    ]
    for scales in found:
        expected = scales()
        with DividesAsCUDA():
            assert torch.equal(scales(), expected)
