"""What a config's monitor section means: steps of the groups that the schedule leaves out, and the thresholds."""

from altgrad.training.config.loading import load_config
from altgrad.training.trainer import Trainer

TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "data": {"batch_size": 4},
    "fp8_format": "E4M3",
}


def monitor_of(**section):
    return Trainer(load_config({**TINY, "monitor": {"enabled": True, **section}})).measuring.monitor


def test_groups_that_the_schedule_leaves_out_follow_the_interval():
    groups = monitor_of(interval=7, schedule={"stall": 2}).schedule.groups
    assert {name: when.every for name, when in groups.items() if name not in ("rank", "reference")} == {
        **dict.fromkeys(
            ("operands", "norms", "sparsity", "stiffness", "alignment", "movement", "correlation", "units"), 7
        ),
        "stall": 2,
    }
    assert monitor_of(interval=7, schedule={"default": 3}).schedule.groups["norms"].every == 3


def test_thresholds_come_from_the_config():
    monitor = monitor_of(near_zero=1e-6, rank_fraction=0.2, rank_fraction_projections=0.4)
    assert monitor._collector.near_zero == 1e-6
    assert (monitor._ranks.limits.limit("blocks.0.mlp.up"), monitor._ranks.limits.limit("head")) == (0.2, 0.4)
