"""The committed experiments: valid, alike but for the format, and of the size they say."""

from pathlib import Path

import pytest
import torch

from altgrad.training.config.loading import load_config
from altgrad.training.trainer import build_model

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
FORMATS = {
    "fp32_baseline": "FP32",
    "e5m2_short": "E5M2",
    "e0m7_uniform": "E0M7",
    "e1m6_uniform": "E1M6",
    "e3m4_uniform": "E3M4",
    "e7m0_uniform": "E7M0",
}


def the_rest(config):
    return config.model_dump(exclude={"name", "fp8_format", "checkpoint_dir"})


@pytest.mark.parametrize("suffix", ["", "_h100"])
def test_the_format_configs_differ_in_the_format_only(suffix):
    configs = {name: load_config(CONFIGS / f"{name}{suffix}.yaml") for name in FORMATS}
    assert {name: config.fp8_format for name, config in configs.items()} == FORMATS
    first = the_rest(configs["fp32_baseline"])
    assert all(the_rest(config) == first for config in configs.values())
    for name, config in configs.items():
        assert config.name == f"{name}{suffix}"
        assert config.checkpoint_dir == f"checkpoints/{name}{suffix}"
        assert (config.max_steps, config.seed) == (500, 42)
        assert (config.weight_storage, config.rounding) == ("grid", "nearest_even")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda p: p.stem)
def test_every_committed_config_is_valid(path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(("name", "millions"), [("e3m4_uniform", 0.85), ("e3m4_uniform_h100", 50)])
def test_models_have_the_size_that_the_configs_say(name, millions):
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / f"{name}.yaml"), 256)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.02)
