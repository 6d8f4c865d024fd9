"""Scales: amax over the finite elements, powers of two, and policies as pure functions."""

import pytest
import torch

from altgrad.errors import OptionError, ScaleError
from altgrad.quantization import (
    E4M3,
    Cast,
    CurrentScaling,
    DelayedScaling,
    NoScaling,
    StaticScaling,
    amax,
    amax_scale,
    get_format,
    quantize_with_stats,
    scale_from_amax,
)
from altgrad.quantization.kernels.cpu.scalar import encode_by_amax
from altgrad.quantization.quantized import Want
from altgrad.quantization.scaling import host_scale, round_up_to_power_of_two

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
    samples += [torch.full((3,), torch.finfo(dtype).max, dtype=dtype)]
    for x in samples:
        for power_of_two in (False, True):
            codes, scale, problems = encode_by_amax(plan, x, power_of_two)
            assert scale == host_scale(float(amax(x)), fmt.max, power_of_two)
            assert problems == 0
            if scale == inf:  # which a cast refuses
                continue
            assert torch.equal(codes, cast(x, scale, want=Want.CODES).codes)
    assert encode_by_amax(plan, torch.randn(1 << 17).to(dtype), False) is None  # on several threads
    assert encode_by_amax(plan, torch.empty(0, dtype=dtype), False) is None
    if not fmt.has_nan:
        assert encode_by_amax(plan, torch.tensor([1.0, nan], dtype=dtype), False)[2] != 0
