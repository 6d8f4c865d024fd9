"""Two gloo processes under torchrun make the run that one process makes, for every kind of scaling, storage and sharing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from altgrad.errors import DistributedError
from altgrad.training.config.loading import load_config
from altgrad.training.step.distributed import Ranks
from tests.training.ranks_main import CASES, STEPS

ROOT = Path(__file__).parents[2]
NEAREST = [name for name in CASES if name != "stochastic"]
SHARDED = [name for name in CASES if name.startswith("sharded")]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory):
    """(results per case, (how the run on disk ended, its folders)): one process first, then the two ranks."""
    folders = {n: tmp_path_factory.mktemp(f"ranks{n}") for n in (1, 2)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = {1: [], 2: ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]}
    processes = []
    for n, folder in folders.items():
        command = [sys.executable, "-m", *launch[n], "tests.training.ranks_main", str(folder)]
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=250)
        assert process.returncode == 0, said[-3000:]
    written = [torch.load(folders[n] / f"{rank}.pt") for n, rank in ((1, 0), (2, 0), (2, 1))]
    results = {name: [all_cases[name] for all_cases, _ in written] for name in CASES}
    return results, ([ended for _, ended in written], [folder / "runs" for folder in folders.values()])


@pytest.fixture(scope="module")
def results(launched) -> dict[str, list[dict]]:
    """Per case: what one process did, then what each of two ranks did."""
    return launched[0]


@pytest.mark.parametrize("case", NEAREST)
def test_two_ranks_give_the_one_process_run_to_summation_order(case: str, results) -> None:
    one, two, _ = results[case]
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=5e-7)
    assert two["norms"][0] == pytest.approx(one["norms"][0], rel=2e-5)
    turned = 100 if "fp8_format" in CASES[case] else 1  # a sum's last bit can turn a rounding after the first update
    assert two["losses"] == pytest.approx(one["losses"], rel=5e-7 * turned)
    assert two["norms"] == pytest.approx(one["norms"], rel=2e-5 * turned)
    assert two["val"] == pytest.approx(one["val"], abs=1e-3 if turned > 1 else 1e-4)
    assert two["events"] == one["events"]
    if one["stall"][0] is not None:
        assert two["stall"] == pytest.approx(one["stall"], abs=1e-3)
    moved = torch.cat([(two["model"][name] - one["model"][name]).abs().flatten() for name in one["model"]])
    assert float(moved.max()) < (6e-3 if turned > 1 else 1e-3), (
        "an Adam step is 3e-3, and near zero a sum's sign may turn"
    )
    assert float(moved.mean()) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_bit_for_bit_and_replay_from_a_captured_state(case: str, results) -> None:
    one, *ranks = results[case]
    for key in ("losses", "norms", "stall", "events", "val"):
        assert ranks[0][key] == ranks[1][key], key
    for name, tensor in ranks[0]["model"].items():
        assert torch.equal(tensor, ranks[1]["model"][name]), name
    for run in (one, *ranks):
        assert len(run["losses"]) == STEPS
        assert run["again"] == run["losses"][1:]
        assert run["same_state"]


def test_the_cases_exercise_what_they_name(results) -> None:
    assert any("clip" in events for events in results["clipped"][0]["events"])
    assert all(results[case][1]["held"] < 0.6 * results[case][1]["all"] for case in SHARDED)
    assert results["amax"][1]["held"] == results["amax"][1]["all"]
    assert all(rate is not None for rate in results["grid"][0]["stall"])
    stochastic = results["stochastic"]
    assert stochastic[0]["losses"] != stochastic[1]["losses"], "ranks draw bits of their own for activations"
    assert stochastic[0]["losses"] == pytest.approx(stochastic[1]["losses"], abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"batch_size": 9}}, "micro-batch of 9 sequences .* by 2 processes; use data.batch_size=8"),
        ({"device": "cuda:0"}, "one GPU for all processes; use device=cuda"),
        (
            {"distributed": "fsdp2", "fp8_format": "E3M4", "weight_storage": "grid"},
            "weights on a grid cannot be spread",
        ),
        (
            {"distributed": "fsdp2", "recipe": {"uniform": "E3M4", "storage": "grid"}},
            "weights on a grid cannot be spread",
        ),
        ({"distributed": "fsdp2", "enable_emergency_shift": True}, "use distributed=ddp"),
        ({"distributed": "fsdp2", "monitor": {"enabled": True}}, "use distributed=ddp"),
        ({"distributed": "fsdp2", "optimizer": {"name": "manifold_adamw"}}, "use adamw, adam or sgd"),
    ],
)
def test_what_ranks_cannot_do_is_refused_with_the_remedy(settings: dict, message: str) -> None:
    config = load_config(settings)
    with pytest.raises(DistributedError, match=message):
        Ranks(0, 2, 0, config.distributed).check(config)


def test_one_process_is_a_world_of_one() -> None:
    ranks = Ranks.from_environment(load_config({"distributed": "fsdp2"}))
    assert (ranks.alone, ranks.is_main, ranks.shards) == (True, True, False)
    x = torch.randn(4, 2)
    assert ranks.rows(x) is x
    assert ranks.max(x) is x
    assert ranks.any(True)
    assert not ranks.any(False)
    assert ranks.broadcast("x") == "x"
    assert ranks.device("cuda") == "cuda"


def test_all_ranks_make_one_run_folder_and_stop_at_the_same_step(launched) -> None:
    """One rank alone was told to stop: all did, at the same step, and the next start went on."""
    ended, folders = launched[1]
    assert ended == [[("interrupted", 0), ("completed", 4)]] * 3
    one, two = ([*folder.iterdir()] for folder in folders)
    assert [path.name for path in one] == [path.name for path in two], "how a run is shared is no part of what it is"
    lines = [json.loads(line) for line in (two[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert json.loads((two[0] / "env.json").read_text())["processes"] == 2
    assert "processes" not in json.loads((one[0] / "env.json").read_text())
