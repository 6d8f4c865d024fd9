"""Read an experiment from YAML and `a.b=c` overrides, and say plainly what is wrong with it.

An unknown key is answered with the nearest valid one, a wrong value with its limit; all faults are listed at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from altgrad.errors import ConfigError
from altgrad.report.text import shortened
from altgrad.training.config.document import literal, merged, nested, read_document, resolved, setting, write_document
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import WHOLE, with_formats
from altgrad.training.config.shipped import shipped_file, shipped_names


def load_config(
    source: str | Path | Mapping[str, Any] | ExperimentConfig | None = None, overrides: Sequence[str] = ()
) -> ExperimentConfig:
    """The experiment in `source` (YAML file, mapping, config, None for the defaults) with `a.b=c` overrides applied.

    Values are read as YAML: `model.n_layer=2`, `optimizer.lr=3e-4`, `model.bias=null`. `${section.key}` in a file,
    mapping or override stands for that key's value. An override of `formats` replaces all that the source says of
    formats; one of a short key (`fp8_format`, ...) changes that part of it.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or a key or value is wrong.
    """
    if isinstance(source, ExperimentConfig):
        origin, base = "config", literal(source.model_dump(mode="json"))
    elif isinstance(source, str | Path):
        origin, base = str(source), _read_yaml(Path(source))
    elif source is None or isinstance(source, Mapping):
        origin, base = "config", dict(source or {})
    else:
        raise ConfigError(f"{shortened(repr(source))} is no config; give a YAML file, a mapping or an ExperimentConfig")
    if isinstance(overrides, str | Mapping):
        raise ConfigError(
            f"overrides are {shortened(repr(overrides))}; write a list of settings, such as ['max_steps=20']"
        )
    for override in overrides:
        path, value = setting(override)
        if len(path) == 1 or path[0] not in WHOLE:  # a key inside a whole recipe changes that recipe
            base = with_formats(base, {path[0]: value})
        base = merged(base, nested(path, value))
    try:
        return ExperimentConfig.model_validate(resolved(base, origin))
    except ValidationError as error:
        raise ConfigError(f"{shortened(origin)}: " + "; ".join(_explain(fault) for fault in error.errors())) from None
    except RecursionError:
        raise ConfigError(f"{shortened(origin)} is nested too deeply") from None


def dump_config(config: ExperimentConfig) -> str:
    """The resolved config as YAML text that `load_config` reads back to an equal one."""
    return write_document(config.model_dump(mode="json"))


def key_paths(model: type[BaseModel] = ExperimentConfig, prefix: str = "") -> Iterable[str]:
    """Every valid key in `a.b` form."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from key_paths(section, f"{prefix}{name}.")


SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "steps": "max_steps",
    "iterations": "max_steps",
    "max_iters": "max_steps",
    "num_steps": "max_steps",
    "epochs": "max_steps",
    "bs": "data.batch_size",
    "format": "formats",
    "precision": "formats",
    "dtype": "formats",
    "quantization": "formats",
    "layers": "model.n_layer",
    "num_layers": "model.n_layer",
    "depth": "model.n_layer",
    "heads": "model.n_head",
    "num_heads": "model.n_head",
    "hidden_size": "model.n_embd",
    "d_model": "model.n_embd",
    "width": "model.n_embd",
    "context_length": "model.block_size",
    "seq_len": "model.block_size",
    "dataset": "data.source",
    "wd": "optimizer.weight_decay",
    "warmup": "optimizer.warmup_steps",
    "schedule": "optimizer.decay",
    "scheduler": "optimizer.decay",
    "clip": "optimizer.grad_clip",
    "gradient_clipping": "optimizer.grad_clip",
    "max_grad_norm": "optimizer.grad_clip",
    "accumulation_steps": "data.grad_accumulation",
    "gradient_accumulation_steps": "data.grad_accumulation",
    "random_seed": "seed",
    "out_dir": "runs_dir",
    "output_dir": "runs_dir",
    "eval_interval": "evaluation.interval",
    "eval_steps": "evaluation.interval",
    "save_steps": "checkpoint_interval",
    "torch_compile": "compile",
    "stochastic_rounding": "rounding",
}
"""Other tools' words for keys."""


def nearest_key(key: str) -> str | None:
    """The valid key most like `key`: by another tool's word, its full path, else its last part (`lr` is `optimizer.lr`)."""
    paths = list(key_paths())
    if key in paths:
        return key
    told = SYNONYMS.get(key.rpartition(".")[2].lower().replace("-", "_"))
    if told is not None:
        return told
    by_path = difflib.get_close_matches(key, paths, n=1, cutoff=0.75)
    if by_path:
        return by_path[0]
    last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    by_last = difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.6)
    return last[by_last[0]] if by_last else None


def _read_yaml(path: Path):
    if not path.is_file():
        found = shipped_file(path, "configs")
        if found is None and path.is_dir():
            inside = next(iter(sorted(path.glob("*.yaml"))), "one of your own, which altgrad init writes")
            raise ConfigError(f"{path} is a folder; give a config file, such as {inside}")
        if found is None:
            raise ConfigError(f"config file {path} does not exist; {_nearest_file(path)}")
        path = found
    base = read_document(path, references=False)
    if base is None:
        raise ConfigError(f"{path} is empty; write lines such as 'seed: 42', or have altgrad init write a first file")
    if not isinstance(base, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values; write lines such as 'seed: 42'")
    if base.keys() <= {"default", "overrides"}:
        raise ConfigError(
            f"{path} is a recipe and no config; load it with Recipe.from_yaml, or write it below formats: in a config"
        )
    return base


def _nearest_file(path: Path) -> str:
    beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    shipped = shipped_names("configs")
    near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.5)
    return (
        f"did you mean {near[0]}?" if near else f"give a file, or one of {', '.join(shipped)}; altgrad init writes one"
    )


_SPELLED = {
    "name": "write letters, digits, _, . and -, at most 200, a letter or digit first; where runs go is runs_dir",
    "factory": "write package.module:function",
}
"""What a text that must match a pattern is made of, by its key."""


def _explain(fault) -> str:
    key = shortened(".".join(str(part) for part in fault["loc"]))
    if fault["type"] == "extra_forbidden":
        near = nearest_key(key)
        if near == key and "." in key:
            section, name = key.split(".", 1)
            return f"unknown key {key!r}: in a file a section's keys stand in it, {section}: {{{name}: ...}}"
        return f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else "; see --print-config for all keys")
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] in ("value_error", "model_type"):
        return f"{key}: {message}" if key else message
    if fault["type"] == "string_pattern_mismatch":
        message = _SPELLED.get(str(fault["loc"][-1]), message)
    if fault["type"] == "list_type":
        message = f"must be a list; write [{fault['input']}]"
    return f"{key} = {shortened(repr(fault['input']))}: {shortened(message, 500)}"
