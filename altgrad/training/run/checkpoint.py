"""Checkpoints: a nested state of tensors and plain values as safetensors + JSON, checksummed, loading executes nothing.

    <directory>/owner.json                  the run that the directory belongs to
    <directory>/step-00000100/              one checkpoint; appears whole or not at all
        tensors.safetensors                 every tensor of the state, bit for bit
        state.json                          everything else, with references to the tensors
        checksums.json                      SHA-256 of the two

A damaged checkpoint is reported, and the newest sound one before it is used.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from altgrad.errors import CheckpointError, RunBusyError
from altgrad.records.documents import read_json
from altgrad.records.files import file_sha256, new_folder, remove_folder, remove_leftovers, write_json
from altgrad.records.lock import LOCK, RunLock
from altgrad.records.verify import CHECKSUMS, broken_checkpoint

_TENSORS, _STATE = "tensors.safetensors", "state.json"
_TENSOR, _TUPLE, _DICT = "$tensor", "$tuple", "$dict"


@dataclass(frozen=True)
class Checkpoint:
    """A state read back, and the damaged checkpoints that were passed over to find it."""

    path: Path
    step: int
    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], *, label: str = "step") -> Path:
    """Write `state` as `<directory>/<label>-<step>`; returns that path.

    Args:
        state: nested dicts, lists and tuples of tensors (any device and dtype), numbers, strings, bools and None.

    Raises:
        CheckpointError: the state holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = _flatten(state, "", tensors)
    path = directory / f"{label}-{step:08d}"
    with new_folder(path) as folder:
        _save_tensors(tensors, folder / _TENSORS)
        (folder / _STATE).write_text(json.dumps({"step": step, "state": plain}))
        sums = {name: file_sha256(folder / name) for name in (_TENSORS, _STATE)}
        (folder / CHECKSUMS).write_text(json.dumps(sums))
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: it is incomplete or does not match its checksums.
    """
    try:
        if broken := broken_checkpoint(path, (_TENSORS, _STATE)):
            raise CheckpointError(f"checkpoint {path} is damaged: {broken}; delete it")
        content = json.loads((path / _STATE).read_text())
        tensors = load_file(path / _TENSORS)
        return Checkpoint(path, content["step"], _unflatten(content["state"], tensors))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}; delete it") from None


def checkpoints(directory: Path) -> list[Path]:
    """The run's checkpoints, newest first; those kept under other labels are not among them."""
    return sorted((p for p in directory.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def load_newest(directory: Path) -> Checkpoint | None:
    """The newest sound checkpoint, with a line for each damaged one passed over; None if there are none at all.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    damaged: list[str] = []
    for path in checkpoints(directory):
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        return Checkpoint(found.path, found.step, found.state, damaged)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged; delete it to start anew. " + " ".join(damaged)
        )
    return None


def prune(directory: Path, keep: int, reach: int = 0) -> None:
    """Delete what is no longer needed.

    Kept are the newest `keep` checkpoints, the newest that lies `reach` steps or more behind them (a verdict's window is
    that long, so it is from before whatever a verdict will be about; while there is none, the oldest), and between the
    two one for every `reach` / 2 steps, to take that place later.
    """
    found = checkpoints(directory)
    steps = {path: int(path.name[5:]) for path in found}
    behind = [path for path in found if steps[path] <= steps[found[0]] - reach]
    last_kept = steps[behind[0]] if behind else -reach
    for path in reversed(found[keep:]):
        if (behind and path == behind[0]) or steps[path] >= last_kept + max(1, reach / 2):
            last_kept = steps[path]
        else:
            remove_folder(path)


def claim_directory(wanted: Path, run_hash: str) -> tuple[Path, str | None]:
    """The directory for a run's checkpoints, and a line to announce if it is not the one wanted.

    A directory that holds anything but this run's is left alone; the run then takes `<wanted>-<hash8>`.
    """
    taken = None if _belongs_to(wanted, run_hash) else f"{wanted}-{run_hash[:8]}"
    directory = Path(taken) if taken else wanted
    if taken and not _belongs_to(directory, run_hash):
        raise CheckpointError(f"{wanted} and {directory} both belong to other runs; set another checkpoint_dir")
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    write_json(directory / "owner.json", {"run": run_hash})
    return directory, taken and f"{wanted} belongs to another run; this run's checkpoints go to {directory}"


def lock_directory(wanted: Path, run_hash: str, run_dir: Path) -> tuple[Path, str | None, RunLock | None]:
    """`claim_directory`, under the directory's own lock; no lock below `run_dir`, which the run has locked already.

    Raises:
        RunBusyError: another process writes there.
        CheckpointError: as `claim_directory`.
    """
    directory = wanted if _belongs_to(wanted, run_hash) else Path(f"{wanted}-{run_hash[:8]}")
    inside = directory.resolve().is_relative_to(run_dir.resolve())
    lock = None if inside or not _belongs_to(directory, run_hash) else RunLock.acquire(directory)
    try:
        claimed, said = claim_directory(wanted, run_hash)
        if claimed != directory:  # another run took it between the look and the lock
            raise RunBusyError(f"another process is working in {directory}; wait until it ends, or set checkpoint_dir")
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return claimed, said, lock


def _belongs_to(directory: Path, run_hash: str) -> bool:
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    if not (directory / "owner.json").exists():
        return all(child.name == LOCK for child in directory.iterdir())
    return read_json(directory / "owner.json").content.get("run") == run_hash


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write the tensors; what the disk refuses is an OSError, as of any other file."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))  # the second: before safetensors 0.6
        if found is None:
            raise CheckpointError(f"checkpoint {path.parent} cannot be written: {error}") from None
        code = int(found[1] or found[2])
        raise OSError(code, os.strerror(code), str(path)) from None


def _flatten(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The plain half of a state; its tensors are put into `tensors` by their path."""
    if isinstance(node, torch.Tensor):
        tensors[path] = node.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(node, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in node):
            return {key: _flatten(value, f"{path}/{key}", tensors) for key, value in node.items()}
        return {_DICT: [[key, _flatten(value, f"{path}/{key}", tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        items = [_flatten(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]
        return {_TUPLE: items} if isinstance(node, tuple) else items
    if node is None or type(node) in (bool, int, float, str):
        return node
    raise CheckpointError(f"state entry {path} is a {type(node).__name__}; only tensors and plain values can be saved")


def _unflatten(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_unflatten(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if _TENSOR in node:
        return tensors[node[_TENSOR]]
    if _TUPLE in node:
        return tuple(_unflatten(value, tensors) for value in node[_TUPLE])
    if _DICT in node:
        return {key: _unflatten(value, tensors) for key, value in node[_DICT]}
    return {key: _unflatten(value, tensors) for key, value in node.items()}
