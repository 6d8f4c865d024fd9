"""Checkpoints and optimizer state: exact round trip, damage found and passed over, directories that belong to one run."""

import json
import math

import pytest
import torch

from altgrad.errors import CheckpointError
from altgrad.loop.states import load_optimizer_state, optimizer_state
from altgrad.records.files import ASIDE
from altgrad.training.run.checkpoint import (
    checkpoints,
    claim_directory,
    load_checkpoint,
    load_newest,
    prune,
    save_checkpoint,
)
from tests.training.tiny import differing

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]


def state_of(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(3, 5, generator=generator), "transposed": torch.arange(6.0).view(2, 3).t()},
        "optimizer": {0: {"step": torch.tensor(float(step)), "empty": torch.empty(0, 4)}, 1: {"lr": 1e-3 / 3}},
        "history": [math.nan, math.inf, -0.0, 0.1, 2**60],
        "shape": (1, None, True, "text"),
        "dtypes": {str(d): torch.ones(2).to(d) for d in DTYPES},
        "special": torch.tensor([math.nan, math.inf, -0.0]),
    }


def same(a, b) -> bool:
    """Equal in structure, type and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
            if a.dim()
            else same(a[None], b[None])
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return (a == b and repr(a) == repr(b)) or (a != a and b != b)


def test_round_trip_is_exact_in_bits_types_and_keys(tmp_path):
    path = save_checkpoint(tmp_path, 7, state_of(7))
    found = load_checkpoint(path)
    assert found.step == 7
    assert same(found.state, state_of(7))
    assert not same(found.state, state_of(8))


def test_loading_executes_nothing(tmp_path):
    path = save_checkpoint(tmp_path, 1, state_of(1))
    assert sorted(p.name for p in path.iterdir()) == ["checksums.json", "state.json", "tensors.safetensors"]
    with pytest.raises(CheckpointError, match="only tensors and plain values"):
        save_checkpoint(tmp_path, 2, {"f": print})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_newest_first_and_pruned(tmp_path):
    for step in (100, 20, 3):
        save_checkpoint(tmp_path, step, state_of(step))
    save_checkpoint(tmp_path, 50, state_of(50), label="last-good")
    assert load_newest(tmp_path).step == 100
    prune(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000100", "step-00000020"]
    assert (tmp_path / "last-good-00000050").is_dir()


def test_one_checkpoint_from_before_the_verdicts_window_is_kept(tmp_path):
    kept = {}
    for step in range(0, 200, 10):
        save_checkpoint(tmp_path, step, {"step": step})
        prune(tmp_path, 2, reach=50)
        kept[step] = sorted(int(p.name[5:]) for p in checkpoints(tmp_path))
    assert kept[20] == [0, 10, 20]
    assert kept[40] == [0, 30, 40]
    for step, steps in kept.items():
        assert {step, max(0, step - 10)} <= set(steps)
        assert steps[0] <= max(0, step - 50)
        assert steps[0] >= step - 100
        assert len(steps) <= 6


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_newest_is_reported_and_the_previous_used(tmp_path, name, damage):
    save_checkpoint(tmp_path, 1, state_of(1))
    victim = save_checkpoint(tmp_path, 2, state_of(2)) / name
    content = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes({"flip": content, "cut": content[:-3], "empty": b""}[damage])
    found = load_newest(tmp_path)
    assert found.step == 1
    assert same(found.state, state_of(1))
    assert len(found.damaged) == 1
    assert "step-00000002" in found.damaged[0]


def test_when_all_are_damaged_it_says_so(tmp_path):
    (save_checkpoint(tmp_path, 2, state_of(2)) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        load_newest(tmp_path)
    assert load_newest(tmp_path / "nowhere") is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 5, {"a": 1})
    save_checkpoint(tmp_path, 5, {"a": 2})
    assert load_newest(tmp_path).state == {"a": 2}


def test_a_directory_belongs_to_one_run(tmp_path):
    wanted = tmp_path / "checkpoints" / "e3m4"
    mine, other = "a" * 64, "b" * 64
    assert claim_directory(wanted, mine) == (wanted, None)
    (wanted / f"{ASIDE}step-00000009").mkdir()
    assert claim_directory(wanted, mine) == (wanted, None)
    assert not list(wanted.glob(f"{ASIDE}*"))
    directory, said = claim_directory(wanted, other)
    assert directory == tmp_path / "checkpoints" / "e3m4-bbbbbbbb"
    assert str(directory) in said
    assert claim_directory(wanted, other)[0] == directory
    assert json.loads((wanted / "owner.json").read_text()) == {"run": mine}


@pytest.mark.parametrize("content", [{"thesis.tex": "x"}, {"owner.json": "{"}, {"owner.json": "[]"}])
def test_a_foreign_folder_is_left_alone(tmp_path, content):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    directory, said = claim_directory(folder, "c" * 64)
    assert directory != folder
    assert said
    assert {p.name: p.read_text() for p in folder.iterdir()} == content


class Keeper(torch.optim.Optimizer):
    """Keeps codes, a float64 sum and a number for each parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("codes", torch.zeros(parameter.shape, dtype=torch.uint8)).add_(3)
            state.setdefault("sum", torch.zeros(parameter.shape, dtype=torch.float64)).add_(1e-12)
            state.setdefault("step", torch.zeros(())).add_(1)
            state["count"] = state.get("count", 0) + 1


def test_state_is_restored_bit_for_bit_and_shares_nothing():
    optimizer = Keeper([torch.nn.Parameter(torch.ones(2, 3))])
    optimizer.step()
    saved = optimizer_state(optimizer)
    kept = optimizer_state(optimizer)
    for _ in range(2):
        optimizer.step()
        load_optimizer_state(optimizer, saved)
        assert not differing(optimizer_state(optimizer), kept)
    optimizer.step()
    assert not differing(saved, kept)
    state = optimizer_state(optimizer)["state"][0]
    assert (state["codes"].dtype, state["sum"].dtype) == (torch.uint8, torch.float64)
