"""A loop of one's own on two gloo processes: DDP, FSDP2 and distributed checkpoints, as `docs/guides/works-with.md` states."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from altgrad.quantization import quantize

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


def test_the_first_step_of_delayed_scaling_has_one_scale_for_all_ranks(ranks):
    """That of all rows, as one process has it, but for gradients: each rank's loss is a mean of half the rows."""
    alone = dict(ranks[0]["first scales alone"])
    for how in ("ddp", "fsdp2"):
        one, other = (rank[f"first scales {how}"] for rank in ranks)
        assert one == other
        assert {name: s for name, s in one if "grad" not in name} == {n: s for n, s in alone.items() if "grad" not in n}
        assert {name for name, _ in one} == set(alone)


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


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("kind", ["nearest", "channels", "no powers of two"])
def test_grids_spread_by_fsdp2_are_those_of_ddp_bit_for_bit(ranks, kind, how):
    """Losses, weights, counts of the last step, scales and everything that the monitor measures, on both ranks."""
    for rank in ranks:
        found, wanted = rank[f"{kind} {how}"], rank[f"{kind} ddp"]
        assert found["losses"] == wanted["losses"]
        for name, weight in wanted["weights"].items():
            assert torch.equal(found["weights"][name], weight), name
        assert found["counts"] == wanted["counts"]
        assert found["counts"]["0.weight"].flips > 0
        for name, scale in wanted["scales"].items():
            assert torch.equal(found["scales"][name], scale), name
        assert found["records"] == wanted["records"]
        assert {record["role"] for record in wanted["records"]} >= {"weight", "gradient", "update", "input"}
        assert found["a fresh one goes on"]
        assert found["restored"]


@pytest.mark.parametrize("how", ["before", "after"])
def test_parts_of_a_grid_draw_bits_of_their_own(ranks, how):
    found, wanted = (ranks[0][f"stochastic {one}"] for one in (how, "ddp"))
    assert all(
        torch.equal(found["weights"][name], ranks[1][f"stochastic {how}"]["weights"][name]) for name in found["weights"]
    )
    assert found["losses"][:3] == pytest.approx(wanted["losses"][:3], rel=0.1)
    assert found["losses"][0] == wanted["losses"][0]
    assert found["a fresh one goes on"]
    weight = found["weights"]["0.weight"]
    assert torch.equal(quantize(weight, "E3M4", found["scales"]["0.weight"]), weight)


def test_a_spread_layer_has_the_class_that_it_was_written_as(ranks):
    recipe = "x:E5M2 w:E5M2 dy:E5M2"
    assert ranks[0]["named"] == {"0.0": ("Linear", recipe), "0.2": ("Linear", recipe)}


def test_a_model_made_without_values_and_spread_gets_its_grid_when_it_is_filled(ranks):
    assert ranks[0]["made on meta"] == ranks[0]["nearest before"]["losses"][:3]


def test_tensor_parallel_layers_are_refused_with_the_remedy(ranks):
    found = ranks[0]["tensor parallel"]
    for case in ("before", "after"):
        assert "RecipeError: layer '0': its weight is a DTensor in the forward (tensor parallelism)" in found[case]
        assert "spread the model by FSDP2 (fully_shard) or DDP" in found[case]
    assert found["beside"] == ["1"]
