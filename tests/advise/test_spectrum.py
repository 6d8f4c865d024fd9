"""Spectra against direct quantization of real tensors, over the whole catalog, with the error that they state."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from altgrad.errors import FormatError, OptionError
from altgrad.formats.magnitudes import EDGES
from altgrad.formats.scalar import FloatFormat
from altgrad.formats.spectrum import Spectrum
from altgrad.monitor.spectra import SpectrumWatch, spectrum_of
from altgrad.quantization import BLOCK_FORMATS, FORMAT_REGISTRY, amax_scale, block_format, grid_index, quantize
from altgrad.quantization.ops import quantize_with_stats
from tests.training.tiny import tiny_trainer, train

ELEMENTS = [fmt for fmt in FORMAT_REGISTRY.values() if fmt.has_zero and fmt.signed]
BLOCKS = [
    *BLOCK_FORMATS.values(),
    block_format("E3M4", 64, rule="ceil"),
    block_format("E2M1", 32, rule="even"),
    block_format("E4M3", 32, rule="nearest"),
    block_format("E4M3", (16, 16), "FP32"),
]
SHAPES = (16, 32, 64, (16, 16))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Operands of a trained model, its updates, and tensors with heavy tails, many zeros, or values on a grid."""
    trainer = tiny_trainer()
    found: dict[str, torch.Tensor] = {}
    model = trainer.model
    train(trainer, 12)
    kept = [
        model.blocks[0].mlp.up.register_forward_hook(lambda m, x, y: found.update(input=x[0].detach().flatten(0, 1))),
        model.head.register_full_backward_hook(lambda m, x, y: found.update(grad=y[0].detach().flatten(0, 1))),
    ]
    before = model.head.weight.detach().clone()
    train(trainer, 1)
    for hook in kept:
        hook.remove()
    draw = torch.Generator().manual_seed(0)
    found |= {
        "weight": model.head.weight.detach(),
        "update": model.head.weight.detach() - before,
        "heavy": torch.randn(64, 64, generator=draw) ** 5 * 1e-6,
        "sparse": torch.relu(torch.randn(64, 64, generator=draw)) ** 2,
        "bf16": (torch.randn(64, 64, generator=draw) * 0.03).bfloat16().float(),
    }
    return found


def tolerance(prediction, name: str, fmt) -> float:
    """Stated error in dB: a systematic 0.1 dB of the even spread, and four standard deviations of chance. Values on a grid
    of their own meet another one's steps in few places (all values do where the format is FP32), and Adam's first updates
    are nearly all of one size."""
    return 0.1 + 4 * prediction.spread_db + {"bf16": 0.5, "update": 1.5}.get(name, 0.0) + (fmt.name == "FP32")


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_a_spectrum_predicts_every_scalar_format(fmt, tensors):
    for name, x in tensors.items():
        spectrum = spectrum_of(x)
        for power_of_two in (False, True):
            scale = float(amax_scale(x, fmt, power_of_two=power_of_two))
            assert spectrum.scale_for(fmt, power_of_two=power_of_two) == scale
            for factor in (1.0, 0.125, 8.0):  # far beyond the range, as it is, and with room above
                close_to(x, fmt, spectrum, name, scale=scale * factor)


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
def test_a_spectrum_predicts_every_block_format_whose_blocks_it_counted(fmt, tensors):
    for name, x in tensors.items():
        close_to(x, fmt, spectrum_of(x, SHAPES), name)


def close_to(x: torch.Tensor, fmt, spectrum: Spectrum, name: str, scale: float | None = None) -> None:
    direct = quantize_with_stats(x, fmt, 1.0 if scale is None else scale, overflow="saturate", pad=scale is None)[1]
    found = spectrum.predict(fmt, scale)
    assert found.overflow == pytest.approx(float(direct.overflow_rate), abs=0.01)
    assert found.underflow == pytest.approx(float(direct.underflow_rate), abs=0.01)
    if math.isinf(found.sqnr_db) or math.isinf(float(direct.sqnr_db)):
        assert found.sqnr_db == float(direct.sqnr_db)
    else:
        assert found.sqnr_db == pytest.approx(float(direct.sqnr_db), abs=tolerance(found, name, fmt)), (
            name,
            fmt,
            scale,
        )


@pytest.mark.parametrize("mode", ["nearest_away", "toward_zero", "up", "down", "odd", "stochastic"])
@pytest.mark.parametrize("name", ["E4M3", "E2M1", "E0M7", "E7M0", "E3M4_IEEE"])
def test_a_spectrum_knows_every_rounding_mode(mode, name, tensors):
    fmt = FORMAT_REGISTRY[name]
    for label in ("weight", "input", "heavy"):
        x = tensors[label]
        scale = float(amax_scale(x, fmt)) * 2
        key = (1, 2) if mode == "stochastic" else None
        direct = quantize_with_stats(x, fmt, scale, rounding=mode, overflow="saturate", key=key)[1]
        found = spectrum_of(x).predict(fmt, scale, mode)
        assert found.sqnr_db == pytest.approx(float(direct.sqnr_db), abs=0.25 + 5 * found.spread_db)
        assert found.underflow == pytest.approx(float(direct.underflow_rate), abs=0.03)
        assert found.overflow == pytest.approx(float(direct.overflow_rate), abs=0.01)


@pytest.mark.parametrize("fmt", ["E1M6", "E3M4", "E4M3", "E5M2", "E7M0", "E0M7", "E2M1"])
@pytest.mark.parametrize("storage", ["nearest", "stochastic", "master"])
def test_stall_follows_from_two_spectra_where_updates_are_independent_of_weights(fmt, storage, tensors):
    fmt = FORMAT_REGISTRY[fmt]
    w = tensors["weight"]
    update = w.flatten()[torch.randperm(w.numel(), generator=torch.Generator().manual_seed(1))].view_as(w) * 0.02
    scale = float(amax_scale(w, fmt, power_of_two=storage != "master"))
    start = w if storage == "master" else quantize(w, fmt, scale)
    chance = {"rounding": "stochastic", "key": (3, 4)} if storage == "stochastic" else {}
    landed = quantize(start + update, fmt, scale, overflow="saturate", **chance)
    same = grid_index(landed, fmt, scale) == grid_index(quantize(start, fmt, scale), fmt, scale)
    exact = float((same & (update != 0)).sum() / (update != 0).sum())
    assert spectrum_of(w).stall(spectrum_of(update), fmt, storage=storage) == pytest.approx(exact, abs=0.02)


def test_spectra_add_up_to_that_of_both_tensors_together(tensors):
    x, y = tensors["heavy"], tensors["sparse"]
    parts = spectrum_of(x, (32,)) + spectrum_of(y, (32,))
    whole = spectrum_of(torch.cat([x, y]), (32,))
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert (parts.zeros, parts.amax, parts.mantissa_bits) == (whole.zeros, whole.amax, whole.mantissa_bits)
    assert parts.sum_sq == pytest.approx(whole.sum_sq)
    assert parts.predict("MXFP8") == whole.predict("MXFP8")
    assert not (parts + spectrum_of(x)).blocks


def test_zeros_nan_inf_signs_and_subnormals_are_counted_apart():
    x = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.5, -2.0, 1e-40, -1e-45], np.float32)
    found = Spectrum.of(x)
    assert (found.zeros, found.nonfinite, found.nonzero, found.count) == (2, 3, 4, 9)
    assert found.counts.sum(axis=1).tolist() == [2, 2]
    assert found.amax == 2.0
    assert EDGES[np.flatnonzero(found.counts[1])[-1]] == 2.0
    again = Spectrum.from_dict(found.to_dict())
    np.testing.assert_array_equal(again.counts, found.counts)
    assert again.to_dict() == found.to_dict()


def test_values_on_a_grid_lose_nothing_in_a_format_that_holds_it():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert spectrum_of(x).predict("BF16").sqnr_db == math.inf
    assert spectrum_of(x).predict("BF16").limit == "exact"
    assert spectrum_of(x).predict("FP32").sqnr_db == math.inf


def test_edge_tensors_have_a_prediction():
    empty, zeros = Spectrum.of(np.zeros((0,))), Spectrum.of(np.zeros(5))
    for found in (
        empty.predict("E4M3"),
        zeros.predict("E4M3"),
        Spectrum.of(np.zeros((4, 32)), blocks=(32,)).predict("MXFP8"),
    ):
        assert math.isnan(found.sqnr_db)
        assert (found.overflow, found.underflow, found.noise) == (0, 0, 0)
    assert math.isnan(zeros.stall(empty, "E4M3"))
    one = Spectrum.of(np.array([1.0]))
    assert one.predict("E4M3", 1.0).sqnr_db == math.inf
    assert one.stall(one, "E4M3", factor=0.0) == 1.0


def test_what_limits_a_format_is_named(tensors):
    x = spectrum_of(tensors["heavy"])
    assert x.predict("E2M1").limit == "range below"
    assert x.predict("E4M3", 1e-12).limit == "range above"
    assert spectrum_of(tensors["weight"]).predict("E4M3").limit == "resolution"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda s: s.predict("MXFP8"), FormatError, "blocks=\\(32,\\)"),
        (lambda s: s.predict("E8M0"), FormatError, "element format"),
        (lambda s: s.predict("E4M3", 0.0), OptionError, "positive"),
        (lambda s: s.predict("MXFP8", 1.0), OptionError, "own scales"),
        (lambda s: s.stall(s, "MXFP8"), FormatError, "block format"),
        (lambda s: s.stall(s, "E4M3", storage="grid"), OptionError, "nearest, stochastic, master"),
        (lambda s: s.stall(s, "E4M3", factor=-1.0), OptionError, ">= 0"),
        (lambda s: Spectrum.from_dict({"sign": [3]}), OptionError, "no spectrum"),
        (lambda s: Spectrum.of(np.zeros(4), blocks=((2, 2),)), OptionError, "needs 2"),
    ],
)
def test_what_a_spectrum_cannot_say_is_refused_with_the_remedy(call, error, said):
    with pytest.raises(error, match=said):
        call(Spectrum.of(np.arange(4.0)))


def test_the_watch_collects_operands_weights_and_updates_and_changes_nothing():
    plain = [record.loss for record in train(tiny_trainer(), 5)]
    trainer = tiny_trainer()
    layers = {"head": trainer.model.head.weight}
    watch = SpectrumWatch(trainer.model, trainer.optimizer, layers=layers, every=2, blocks=(32,))
    assert [record.loss for record in train(trainer, 5)] == plain
    watch.close()
    assert watch.steps == [1, 3, 5]
    assert {len(kept) for kept in watch.operands.values()} == {3}
    assert {role for _, role in watch.operands} == {"input", "weight", "grad_output"}
    assert watch.operands["head", "input"][0].predict("MXFP8").sqnr_db > 20
    after = watch.weights["head"][1]
    assert after.count == trainer.model.head.weight.numel()
    assert 0 < watch.updates["head"][0].amax < 0.1
    with pytest.raises(OptionError, match="below 1"):
        SpectrumWatch(trainer.model, every=0)


def test_formats_with_spectra_load_no_torch():
    code = "import altgrad.formats.spectrum, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_format_by_facts_of_its_own_is_predicted_too():
    fmt = FloatFormat("odd", 3, 5, 5)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(5))
    scale = float(amax_scale(x, fmt))
    direct = quantize_with_stats(x, fmt, scale, overflow="saturate")[1]
    assert spectrum_of(x).predict(fmt).sqnr_db == pytest.approx(float(direct.sqnr_db), abs=0.3)
