"""Advice from a checkpoint's weights alone, tensor by tensor: safetensors, a Hugging Face folder, or a `.pth` state dict.

Nothing in a checkpoint is executed: `.pth` files are read with `weights_only=True`. Only one piece of one tensor is in
memory at a time, so size does not matter. Weights alone do not tell of activations, gradients, updates, or which layers
matter: the advice says so.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from altgrad.advise.advice import Advice, options_from, rows_of
from altgrad.advise.choose import Budget, choose
from altgrad.advise.sensitivity import recipe_from
from altgrad.advise.trace import Layer, Tell, Trace
from altgrad.errors import CheckpointError, ConfigError
from altgrad.formats.spectrum import Block, Spectrum
from altgrad.monitor.spectra import spectrum_of

PIECE = 1 << 22
"""Elements of a tensor that are looked at together."""

UNKNOWN = (
    "how activations and gradients are spread: inputs and gradients of outputs stay in full precision here",
    "which updates a stored weight would lose",
    "which layers matter most: every layer counts alike",
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PACKED = tuple(
    getattr(torch, name)
    for name in (
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
    )
    if hasattr(torch, name)
)


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint: `rows(a, b)` reads rows a to b of its first axis, or all of it where it has none."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]


def advise_weights(source: nn.Module | str | Path, budget: Budget | None = None, *, tell: Tell | None = None) -> Advice:
    """Which formats the weights of a model or a checkpoint can take.

    Args:
        source: a module, a `.safetensors` file, a folder of Hugging Face (one file or shards), or a `.pth`, `.pt` or
            `.bin` state dict.

    Raises:
        CheckpointError: it is no such thing, is damaged, misses a shard, or holds quantized weights.
        ConfigError: a budget that asks for weights on a grid.
    """
    budget = budget or Budget()
    if budget.storage != "master":
        raise ConfigError(
            f"storage {budget.storage} rests on updates, which weights alone do not tell; use master, or give a config"
        )
    started = time.perf_counter()
    trace, skipped, facts = spectra_of(source, budget.block_shapes, tell)
    rows = rows_of(trace, tuple(dict.fromkeys((*budget.formats, budget.high))), tell=tell)
    values = {cell: trace.values(*cell) for cell in trace.cells}
    options = options_from(rows)
    choice = choose({cell: options[cell] for cell in values}, values, budget)
    advice = Advice(recipe_from(choice.formats, trace), choice, rows, budget, source="weights")
    advice.unknown, advice.left_high, advice.facts = list(UNKNOWN), skipped, facts
    advice.seconds["advice"] = time.perf_counter() - started
    return advice


def spectra_of(
    source: nn.Module | str | Path, blocks: tuple[Block, ...] = (), tell: Tell | None = None
) -> tuple[Trace, dict[str, str], dict[str, Any]]:
    """(spectra of the weights as a trace, tensors that were left out with the reason, facts for people)."""
    with ExitStack() as open_files:
        entries = _entries(source, open_files)
        layers: dict[str, Layer] = {}
        found: dict[tuple[str, str], list[Spectrum]] = {}
        skipped: dict[str, str] = {}
        total = 0
        for i, entry in enumerate(entries):
            name = entry.name.removesuffix(".weight")
            reason = _without_role(entry)
            if reason is None:
                spectrum = _streamed(entry, blocks)
                if spectrum.nonfinite:
                    raise CheckpointError(
                        f"{entry.name} holds {spectrum.nonfinite} NaN or infinite values; no format mends that: use another checkpoint"
                    )
                reason = None if spectrum.nonzero else "all zero"
            if reason is not None:
                skipped[entry.name] = reason
            else:
                layers[name] = Layer(name, "linear", entry.shape, name)
                found[name, "weight"] = [spectrum]
                total += math.prod(entry.shape)
            if tell is not None:
                tell("weights", i + 1, len(entries))
    if not layers:
        shown = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3]) or "it is empty"
        raise CheckpointError(f"{_called(source)} holds no weight matrix ({shown}); give a model's own weights")
    facts = {"weights": total, "layers": len(layers), "from": _called(source)}
    return Trace(layers, found, blocks=blocks), skipped, facts


def _called(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def _streamed(entry: Entry, blocks: tuple[Block, ...]) -> Spectrum:
    """The spectrum of a tensor, read in pieces of whole rows; tiles stay whole."""
    rows, width = entry.shape[0], max(1, math.prod(entry.shape[1:]))
    step = max(1, PIECE // width)
    tall = math.lcm(*(shape[0] for shape in blocks if isinstance(shape, tuple)), 1)
    step = max(tall, step // tall * tall)
    total: Spectrum | None = None
    for start in range(0, rows, step):
        piece = entry.rows(start, min(rows, start + step)).flatten(1)
        if piece.dtype == torch.float64:
            piece = piece.float()
        one = spectrum_of(piece, blocks)
        total = one if total is None else total + one
    assert total is not None
    return total


def _without_role(entry: Entry) -> str | None:
    """Why a tensor is no weight of a product; None if it is one.

    Raises:
        CheckpointError: its weights are quantized.
    """
    if entry.dtype in _PACKED or (
        entry.dtype in (torch.int8, torch.uint8) and len(entry.shape) > 1 and "weight" in entry.name
    ):
        raise CheckpointError(
            f"{entry.name} is stored as {str(entry.dtype).removeprefix('torch.')}: this checkpoint is quantized already, and what its weights "
            "were is lost; give the one that it was made from"
        )
    if entry.dtype not in _FLOATS:
        return f"no floating numbers ({str(entry.dtype).removeprefix('torch.')})"
    if not math.prod(entry.shape):
        return "empty"
    if len(entry.shape) < 2:
        return "a vector (bias, norm weight or statistic), which recipes leave high"
    if not entry.name.endswith("weight") and entry.name.rpartition(".")[2] not in ("kernel", "in_proj_weight"):
        return "its name does not end in weight, so its role is not known"
    return None


def _entries(source: nn.Module | str | Path, open_files: ExitStack) -> list[Entry]:
    if not isinstance(source, str | Path):
        if not isinstance(source, nn.Module):
            raise CheckpointError(f"a {type(source).__name__} is no checkpoint; give a module or a path")
        return [_held(name, p) for name, p in source.named_parameters()]
    path = Path(source)
    if path.is_dir():
        return _folder(path, open_files)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there; give a .safetensors file, a Hugging Face folder, or a .pth state dict"
        )
    if path.suffix == ".safetensors":
        if (path.parent / f"{path.name}.index.json").is_file() or "-of-0" in path.name:
            raise CheckpointError(f"{path.name} is one shard of several; give the folder {path.parent}")
        return list(_safetensors(path, open_files))
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _pickled(path)
    raise CheckpointError(
        f"{path.name} is no known checkpoint; give .safetensors, .pth, .pt, .bin or a Hugging Face folder"
    )


def _held(name: str, tensor: Tensor) -> Entry:
    held = tensor.detach()
    if held.is_meta:
        raise CheckpointError(f"{name} is on the meta device and has no values; load the weights first")
    return Entry(name, tuple(held.shape), held.dtype, lambda a, b: held[a:b])


def _safetensors(path: Path, open_files: ExitStack) -> Iterator[Entry]:
    try:
        file = open_files.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118, it is no mapping
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path.name}: {name} is stored as {part.get_dtype()}, a quantized or unknown dtype; give the checkpoint that it was made from"
                )
            yield Entry(name, shape, dtype, lambda a, b, part=part: part[a:b])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it is damaged or no safetensors file, fetch it again"
        ) from None


_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": getattr(torch, "float8_e4m3fn", None),
    "F8_E5M2": getattr(torch, "float8_e5m2", None),
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
}


def _folder(path: Path, open_files: ExitStack) -> list[Entry]:
    """A folder as Hugging Face writes it: config.json, and one file or an index with shards."""
    config = _json(path / "config.json") if (path / "config.json").is_file() else {}
    method = config.get("quantization_config")
    if method:
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{path} is quantized already (quant_method {kind}); give the checkpoint that it was made from"
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = _json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise CheckpointError(f"{index} names no shards; fetch it again")
        files = list(dict.fromkeys(shards.values()))
        if bad := [name for name in files if Path(name).name != name]:
            raise CheckpointError(f"{index} names a shard outside the folder: {bad[0]!r}")
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{path} misses {len(missing)} of {len(files)} shards, the first is {missing[0]}; fetch them"
            )
        return [entry for name in files for entry in _safetensors(path / name, open_files)]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return list(_safetensors(found[0], open_files))
    if len(found) > 1:
        raise CheckpointError(
            f"{path} has {len(found)} safetensors files and no model.safetensors.index.json; name one of them"
        )
    pickles = [path / name for name in ("pytorch_model.bin", "model.pth") if (path / name).is_file()]
    if pickles:
        return _pickled(pickles[0])
    if (path / "config.yaml").is_file():
        raise CheckpointError(f"{path} is a run's folder; give its config: {path / 'config.yaml'}")
    raise CheckpointError(f"{path} has no model.safetensors; give the file itself")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); fetch it again") from None
    return found if isinstance(found, dict) else {}


_UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError)


def _pickled(path: Path) -> list[Entry]:
    """A state dict in torch's own format, alone or under "state_dict" or "model"."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        try:  # files of torch < 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path.name} cannot be read as tensors alone ({said[:160]}); it is damaged, or holds code, which is never executed: "
                "save its state_dict as safetensors"
            ) from None
    for key in ("state_dict", "model", "module"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path.name} holds no state dict but {type(found).__name__}; save model.state_dict()")
    return [_held(str(name), value) for name, value in found.items() if isinstance(value, Tensor)]
