"""A loop of one's own on two gloo processes: DDP, FSDP2 and distributed checkpoints, as `docs/guides/works-with.md` states."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks of `ranks_main.py` found."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.integrations.ranks_main"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *launch, str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_delayed_scales_are_those_of_all_ranks_under_ddp_and_fsdp2(ranks):
    """Rank 1's inputs are ten times as large; the histories hold the largest amax of both."""
    for case in ("ddp delayed", "fsdp2 delayed"):
        one, other = (rank[case] for rank in ranks)
        assert one["windows"] == other["windows"]
        assert one["windows"]["0.input.forward"][0] > 15
        assert torch.equal(one["weight"], other["weight"])


def test_grids_and_their_random_bits_agree_over_the_ranks_of_ddp(ranks):
    one, other = (rank["ddp grid"] for rank in ranks)
    assert torch.equal(one["weight"], other["weight"])
    for name, kept in one["state"]["storage"].items():
        assert torch.equal(kept["scale"], other["state"]["storage"][name]["scale"])


def test_models_are_spread_before_or_after_they_are_quantized(ranks):
    before, after = ranks[0]["fsdp2 before"], ranks[0]["fsdp2 after"]
    assert before["losses"] == after["losses"]
    assert torch.equal(before["weight"], after["weight"])
    assert before["losses"][0] != before["losses"][1]


def test_a_distributed_checkpoint_leaves_the_clock_alone(ranks):
    then, now = ranks[0]["fsdp2 delayed"]["clocks"]
    assert then == now
    assert then[0]["step"] == 3


def test_what_needs_whole_weights_is_refused_with_the_remedy(ranks):
    found = ranks[0]["refusals"]
    assert found["nothing moved"]
    for case in ("grid, then fully_shard, at its first step", "grid, then fully_shard, at attach"):
        assert "'0.weight' is stored on a grid (E3M4) and spread over processes" in found[case]
        assert 'use DDP, or storage="master"' in found[case]
    assert "layer '0': grid storage in E3M4 needs whole weights" in found["fully_shard, then grid"]
    assert "pass parameters={} to measure operands only" in found["monitor"]


def test_the_monitor_measures_operands_of_spread_models(ranks):
    assert {("0", "input"), ("0", "weight"), ("2", "grad_output")} <= set(ranks[0]["operands"])
