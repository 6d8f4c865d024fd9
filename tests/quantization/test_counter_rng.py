"""The counter generator: one definition everywhere, and statistics that an uneven or correlated generator fails."""

import numpy as np
import pytest
import torch

from altgrad.quantization import quantize
from altgrad.randomness import hash_words, key_words, philox_words, random_bits, random_words, splitmix64
from benchmarks.rng_statistics import LIMIT, TESTS, chi_square

KEY = torch.tensor([-3, 2**62])


def test_splitmix64_has_its_published_outputs():
    # outputs of the C reference (Vigna) for state 1234567: state advances by the golden gamma
    gamma, state, found = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        found.append(splitmix64(state))
        state = (state + gamma) % 2**64
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_philox_has_its_published_outputs():
    # Random123's known answers for philox4x32-10: counter and key zero
    assert int(philox_words(0, 0, 0, 1)[0]) == 0x6627E8D5


def test_words_depend_on_key_and_index_alone():
    words = random_words(KEY, 1000)
    assert torch.equal(random_words(KEY, 400, first=600), words[600:])
    assert torch.equal(random_bits(KEY, 1000, 7), words >> 25)
    assert np.array_equal(hash_words(-3, 2**62, 600, 400), words[600:].numpy())
    across = random_words(KEY, 10, first=2**32 - 5)
    assert torch.equal(across[5:], random_words(KEY, 5, first=2**32))
    assert key_words(1, 2, 0) != key_words(1, 2, 1)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    quantize(torch.randn(100, generator=torch.Generator()), "E4M3", rounding="stochastic", key=(1, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
def test_statistics(test):
    assert test(hash_words, 2**20) > LIMIT


def _two_multiplications(seed, stream, first, count):
    """The hash that was tried first, whose streams are unevenly spread."""
    before, between = (np.uint32(w) for w in key_words(seed, stream))
    x = np.arange(first, first + count, dtype=np.uint32)
    x = (x ^ before) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15)) ^ between) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _same_for_all_streams(seed, stream, first, count):
    return hash_words(seed, 0, first, count)


def _shifted_streams(seed, stream, first, count):
    return hash_words(seed, 0, first + stream, count)


def _sticky(seed, stream, first, count):
    words = hash_words(seed, stream, first, count)
    words[1:] = np.where(words[1:] % 64 == 0, words[:-1], words[1:])
    return words


def _biased(seed, stream, first, count):
    words = hash_words(seed, stream, first, count)
    return words | np.where(words % 32 == 0, np.uint32(1 << 31), np.uint32(0))


@pytest.mark.parametrize(
    "generator", [_same_for_all_streams, _shifted_streams, _sticky, _biased], ids=lambda g: g.__name__
)
def test_bad_generators_are_found(generator):
    assert any(test(generator, 2**18) < LIMIT for test in TESTS)


def test_two_multiplications_are_found_uneven():
    cells = [np.bincount(_two_multiplications(seed, 1, 0, 2**22) >> 16, minlength=65536) for seed in range(4)]
    assert min(chi_square(c.astype(float)) for c in cells) < 1e-9


def test_stochastic_rounding_is_unbiased_per_element():
    x = torch.linspace(0.5, 1.0, 33)[:-1] + 0.01  # 32 values between E4M3's neighbours, 1/16 apart
    mean = sum(quantize(x, "E4M3", rounding="stochastic", key=(0, t)).double() for t in range(2000)) / 2000
    assert ((mean - x).abs() < 5 * (1 / 16) / 2 / 2000**0.5).all()
