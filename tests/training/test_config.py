"""Configs, the committed ones too: overrides, and errors that name the nearest valid key or the limit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from altgrad.errors import ConfigError
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import recipe_of
from altgrad.training.config.identity import ADDED_LATER, NOT_IDENTITY, experiment_hash
from altgrad.training.config.loading import dump_config, key_paths, load_config, nearest_key
from altgrad.training.step.stepping import usable_device
from altgrad.training.trainer import build_model


def test_defaults_are_valid_and_survive_yaml(tmp_path):
    config = load_config()
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_overrides_reach_nested_keys(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\nmodel: {n_layer: 3}\n")
    config = load_config(tmp_path / "c.yaml", ["seed=7", "optimizer.lr=3e-4", "model.bias=true", "fp8_format=e3m4"])
    assert (config.seed, config.optimizer.lr, config.model.bias) == (7, 3e-4, True)
    assert config.model.n_layer == 3
    assert config.fp8_format == "E3M4"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=7", "'seed'"),
        ("lr=3", "'optimizer.lr'"),
        ("model.n_lyer=3", "'model.n_layer'"),
        ("optimizer.weightdecay=0", "'optimizer.weight_decay'"),
        ("zzzzqqq=1", "--print-config"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(override, expected):
    with pytest.raises(ConfigError, match="unknown key") as error:
        load_config(None, [override])
    assert expected in str(error.value)


def test_the_short_keys_become_the_recipe():
    keys = ["fp8_format=E3M4", "gradient_format=e5m2", "overflow=native", "scaling=none", "weight_storage=grid"]
    config = load_config(None, [*keys, "storage_rounding=stochastic"])
    assert config.gradient_format == "E5M2"
    layer = recipe_of(config).default
    assert (layer.forward.input.format, layer.input_grad.grad_output.format) == ("E3M4", "E5M2")
    assert layer.forward.input.overflow.value == "native"
    assert (layer.storage.rounding.value, layer.storage.scale, layer.storage.refresh_every) == ("stochastic", 1.0, 0)
    assert layer.forward.input.rounding.value == "nearest_even"
    scaled = recipe_of(load_config(None, ["fp8_format=E3M4", "weight_storage=grid"])).default
    assert (scaled.storage.scale, scaled.storage.refresh_every) == (None, config.storage_refresh_interval)
    assert (
        recipe_of(load_config(None, ["gradient_format=FP32", "fp8_format=E3M4"])).default.input_grad.grad_output.format
        is None
    )
    assert recipe_of(load_config()) is None


@pytest.mark.parametrize(
    ("override", "limit"),
    [
        ("max_steps=0", "greater than 0"),
        ("seed=1.5", "integer"),
        ("weight_storage=gird", "'master' or 'grid'"),
        ("optimizer.betas=[0.9,2]", "less than or equal to 1"),
        ("optimizer.lr=nan", "finite"),
        ("model.n_head=3", "use n_head 2"),
        ("fp8_format=E3M5x", "did you mean"),
        ("device=tpu", "cpu, cuda"),
        ("data.source=text", "data.path"),
        ("data.name=mine", "set data.source=huggingface"),
        ("data.grad_accumulation=5", "use batch_size 10"),
        ("keep_checkpoints=1", "greater than or equal to 2"),
        ("name=../x", "write letters, digits"),
        ("model=3", "model"),
        ("seed", "key=value"),
        ("seed=", "write seed=null where none is meant"),
        ("optimizer.lr={", "optimizer.lr"),
        ("overflow=wrap", "'native'"),
        ("gradient_format=E3M5x", "did you mean"),
    ],
)
def test_a_wrong_value_is_answered_with_its_limit(override, limit):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert limit in str(error.value)


def test_all_faults_are_listed_at_once():
    with pytest.raises(ConfigError, match=r"seed = -1.*sede") as error:
        load_config(None, ["seed=-1", "sede=2"])
    assert "Traceback" not in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "e3m4_uniform.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"did you mean .*e3m4_uniform"):
        load_config(tmp_path / "e3m4_uniforn.yaml")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "\x00", "", "# nothing yet\n"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")


def test_recipe_and_short_keys_exclude_each_other():
    with pytest.raises(ConfigError, match="fp8_format"):
        load_config({"recipe": {"weight": "E3M4"}, "fp8_format": "E3M4"})


def test_every_key_is_its_own_nearest():
    assert all(nearest_key(path) == path for path in key_paths())


def test_hash_ignores_exactly_paths_device_and_trackers():
    config = load_config({"name": "a", "data": {"source": "text", "path": "x"}})
    digest = experiment_hash(config, "data", "1")
    same = [
        "runs_dir=/elsewhere",
        "checkpoint_dir=c",
        "device=cuda",
        "threads=1",
        "distributed=fsdp2",
        "trackers.wandb=true",
        "data.path=y",
    ]
    assert experiment_hash(load_config(config, same), "data", "1") == digest
    assert {s.partition("=")[0].partition(".")[0] for s in same} == {*NOT_IDENTITY, "data"}
    for override in ["seed=1", "max_steps=3", "fp8_format=E3M4", "optimizer.lr=1", "name=b", "verdict.stop=false"]:
        assert experiment_hash(load_config(config, [override]), "data", "1") != digest
    assert experiment_hash(config, "other data", "1") != digest
    assert experiment_hash(config, "data", "2") != digest
    assert experiment_hash(config, "data", "1", "a model") != digest


def test_settings_that_came_later_leave_earlier_runs_their_names():
    config = load_config({"name": "a"})
    digest = experiment_hash(config, "data", "1")
    resolved = config.model_dump(mode="json", exclude=set(NOT_IDENTITY))
    del resolved["data"]["path"], resolved["formats"]
    resolved["overflow"] = "saturate"  # as the default was called when those runs were made
    for section, key in ADDED_LATER:
        del resolved[section][key]
    facts = {"config": resolved, "data": "data", "numerics": "1", "model": ""}
    assert digest == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    for section, key in ADDED_LATER:
        value = getattr(getattr(config, section), key)
        others = {
            "token_dtype": "int64",
            "factory": "some.package:make",
            "options": "{depth: 3}",
            "reset_every": 5,
            "reset_moments": "first",
        }
        other = others.get(key) or (value * 2 if isinstance(value, int) else value / 2)
        changed = load_config(config, [f"{section}.{key}={other}"])
        assert experiment_hash(changed, "data", "1") != digest, key


def test_every_section_forbids_extra_keys():
    sections = [f.annotation for f in ExperimentConfig.model_fields.values()]
    models = [s for s in sections if isinstance(s, type) and issubclass(s, BaseModel)]
    assert len(models) >= 9
    assert all(m.model_config.get("extra") == "forbid" for m in [ExperimentConfig, *models])


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


def test_a_dotted_key_in_a_file_is_shown_nested():
    with pytest.raises(ConfigError, match=r"stand in it, optimizer: \{lr: \.\.\.\}"):
        load_config({"optimizer.lr": 0.1})


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        (None, "max_steps=20", "overrides are 'max_steps=20'; write a list of settings"),
        (None, {"max_steps": 20}, "write a list of settings, such as"),
        (3, [], "3 is no config; give a YAML file, a mapping or an ExperimentConfig"),
    ],
)
def test_what_is_no_config_and_no_list_of_settings_is_refused(source, overrides, said):
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    assert said in str(error.value)


def test_a_device_that_torch_does_not_know_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="device 'gpu' is none; use cpu, cuda, cuda:N or mps"):
        usable_device("gpu")
