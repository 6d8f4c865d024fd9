"""STAB-05 the partition-relative clip and STAB-06 the emergency shift: decisions on given numbers."""

import math

import pytest
import torch
from torch import nn

from altgrad.errors import ConfigError, FormatError, OptionError
from altgrad.quantization import E3M4, E5M2, E7M0, FORMAT_REGISTRY, EmergencyMantissaShift, PartitionRelativeClipper
from altgrad.quantization.stability import FALLBACK_CHAIN


def model_with_gradients(norm: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)
    factor = norm / global_norm(model)
    for p in model.parameters():
        p.grad.mul_(factor)
    return model


def global_norm(model) -> float:
    return math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


# -- STAB-05: partition-relative clipping -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMAT_REGISTRY.values(), ids=str)
def test_stab05_threshold_is_proportional_to_the_largest_value(fmt):
    assert PartitionRelativeClipper(fmt, base_clip=2.5).clip_threshold == pytest.approx(
        2.5 * fmt.max / 57344, rel=1e-15
    )


def test_stab05_e5m2_clips_at_base_clip_and_names_work():
    assert PartitionRelativeClipper(E5M2).clip_threshold == 1.0
    assert PartitionRelativeClipper("e5m2", 0.3).clip_threshold == 0.3
    assert PartitionRelativeClipper("E3M4").format is E3M4


def test_stab05_clip_rescales_all_gradients_to_the_threshold():
    model = model_with_gradients(100.0)
    before = gradients(model)
    clipper = PartitionRelativeClipper(E3M4, base_clip=1.0)
    assert clipper.clip_if_needed(model, 0.02) is True
    assert global_norm(model) == pytest.approx(clipper.clip_threshold, rel=1e-4)
    torch.testing.assert_close(
        gradients(model) / before, torch.full_like(before, clipper.clip_threshold / 100), rtol=1e-4, atol=0
    )
    record = clipper.last_clip
    assert record is not None
    assert record.grad_norm == pytest.approx(100.0, rel=1e-5)
    assert (record.overflow_rate, record.clip_threshold) == (0.02, clipper.clip_threshold)


def test_stab05_gradients_below_the_threshold_keep_their_values():
    model = model_with_gradients(0.5)
    before = gradients(model)
    assert PartitionRelativeClipper(E5M2, base_clip=1.0).clip_if_needed(model, 1.0) is True
    assert torch.equal(gradients(model), before)


@pytest.mark.parametrize(
    ("rate", "acts"), [(0.0, False), (0.0099, False), (0.01, True), (0.5, True), (math.nan, False)]
)
def test_stab05_acts_from_the_overflow_threshold_on(rate, acts):
    model = model_with_gradients(100.0)
    clipper = PartitionRelativeClipper(E5M2, overflow_threshold=0.01)
    assert clipper.clip_if_needed(model, rate) is acts
    assert (clipper.last_clip is not None) is acts
    assert global_norm(model) == pytest.approx(1.0 if acts else 100.0, rel=1e-4)


def test_stab05_a_threshold_of_zero_means_any_overflow_not_none():
    model = model_with_gradients(100.0)
    clipper = PartitionRelativeClipper(E5M2, overflow_threshold=0.0)
    assert clipper.clip_if_needed(model, 0.0) is False
    assert clipper.clip_if_needed(model, 1e-12) is True


def test_stab05_the_rate_may_be_a_tensor():
    model = model_with_gradients(100.0)
    assert PartitionRelativeClipper(E5M2).clip_if_needed(model, torch.tensor(0.02, dtype=torch.float64)) is True


def test_stab05_the_widest_format_never_clips_ordinary_gradients():
    model = model_with_gradients(1e6)
    before = gradients(model)
    assert PartitionRelativeClipper(E7M0).clip_if_needed(model, 1.0) is True
    assert torch.equal(gradients(model), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("base_clip", 0.0), ("base_clip", -1.0), ("base_clip", math.nan), ("overflow_threshold", 1.5)],
)
def test_stab05_impossible_settings_are_refused(name, value):
    with pytest.raises(OptionError, match=f"{name} {value}"):
        PartitionRelativeClipper(E5M2, **{name: value})


# -- STAB-06: emergency mantissa shift --------------------------------------------------------------------------------


def run(shift, fmt, steps):
    """The answers to a sequence of (has_nan, stall_rate)."""
    return [shift.check_and_shift(fmt, has_nan, rate) for has_nan, rate in steps]


NAN, FINE = (True, None), (False, 0.1)


def test_stab06_the_known_chain():
    assert dict(FALLBACK_CHAIN) == {"E7M0": "E5M2", "E1M6": "E3M4", "E0M7": "E3M4", "E3M4": "E5M2", "E5M2": None}


@pytest.mark.parametrize(("fmt", "target"), FALLBACK_CHAIN.items())
def test_stab06_each_format_shifts_to_the_next_of_the_chain(fmt, target):
    assert EmergencyMantissaShift(nan_patience=1).check_and_shift(fmt, True, 0.0) == target


def test_stab06_nonfinite_steps_shift_when_patience_is_used_up():
    shift = EmergencyMantissaShift(nan_patience=3)
    assert run(shift, "E7M0", [NAN, NAN, NAN]) == [None, None, "E5M2"]
    record = shift.last_shift
    assert record is not None
    assert (record.from_format, record.to_format, record.reason, record.consecutive_nans) == ("E7M0", "E5M2", "nan", 3)


def test_stab06_a_finite_step_in_between_resets_the_patience():
    shift = EmergencyMantissaShift(nan_patience=3)
    assert run(shift, "E7M0", [NAN, NAN, FINE, NAN, NAN, FINE]) == [None] * 6
    assert shift.consecutive_nans == 0


@pytest.mark.parametrize(
    ("rate", "target"), [(0.5, None), (0.51, "E3M4"), (1.0, "E3M4"), (None, None), (math.nan, None)]
)
def test_stab06_a_stall_rate_above_the_threshold_shifts(rate, target):
    shift = EmergencyMantissaShift(stall_threshold=0.5)
    assert shift.check_and_shift("E1M6", False, rate) == target
    assert target is None or shift.last_shift.reason == "stall"


def test_stab06_the_stall_rate_may_be_a_tensor_and_the_format_a_format():
    assert EmergencyMantissaShift().check_and_shift(E7M0, False, torch.tensor(0.9)) == "E5M2"


def test_stab06_stall_patience_waits_for_consecutive_stalls():
    shift = EmergencyMantissaShift(stall_patience=3)
    stalled = (False, 0.9)
    assert run(shift, "E7M0", [stalled, stalled, FINE, stalled, stalled, stalled]) == [None] * 5 + ["E5M2"]


def test_stab06_at_most_one_shift_per_patience_window():
    shift = EmergencyMantissaShift(nan_patience=3)
    assert shift.check_and_shift("E1M6", False, 0.9) == "E3M4"
    assert run(shift, "E3M4", [(False, 0.9)] * 4) == [None, None, None, "E5M2"]


def test_stab06_a_new_format_gets_its_own_nan_patience():
    shift = EmergencyMantissaShift(nan_patience=2)
    assert run(shift, "E1M6", [NAN, NAN]) == [None, "E3M4"]
    assert run(shift, "E3M4", [NAN, NAN]) == [None, "E5M2"]


def test_stab06_the_end_of_the_chain_stays_and_keeps_counting():
    shift = EmergencyMantissaShift(nan_patience=2)
    assert run(shift, "E5M2", [NAN] * 5) == [None] * 5
    assert shift.consecutive_nans == 5
    assert shift.last_shift is None


def test_stab06_formats_outside_the_chain_stay():
    assert EmergencyMantissaShift(nan_patience=1).check_and_shift("E4M3", True, 1.0) is None


def test_stab06_the_chain_is_extended_and_overridden_by_config():
    shift = EmergencyMantissaShift(nan_patience=1, chain={"E5M2": "BF16", "fp8_e4m3": "E5M2", "E7M0": "E6M1"})
    assert [shift.next_format(f) for f in ("E5M2", "E4M3", "E7M0", "E1M6", "BF16")] == [
        "BF16",
        "E5M2",
        "E6M1",
        "E3M4",
        None,
    ]


def test_stab06_a_chain_that_returns_or_names_no_format_is_refused():
    with pytest.raises(OptionError, match="returns to where it was"):
        EmergencyMantissaShift(chain={"E5M2": "E3M4"})
    with pytest.raises(FormatError, match="E9Q1"):
        EmergencyMantissaShift(chain={"E5M2": "E9Q1"})


@pytest.mark.parametrize(
    ("name", "value"), [("nan_patience", 0), ("stall_patience", 0), ("stall_threshold", 1.1), ("stall_threshold", -0.5)]
)
def test_stab06_impossible_settings_are_refused(name, value):
    with pytest.raises(OptionError, match=f"{name} {value}"):
        EmergencyMantissaShift(**{name: value})


def test_stab06_reset_forgets_the_counters():
    shift = EmergencyMantissaShift(nan_patience=3)
    run(shift, "E7M0", [NAN, NAN])
    shift.reset()
    assert run(shift, "E7M0", [NAN, NAN]) == [None, None]


def test_stab06_state_goes_through_a_checkpoint_at_every_point():
    steps = [NAN, NAN, NAN, (False, 0.9), (False, 0.9), NAN, (False, 0.9), (False, 0.9)]
    whole = run(EmergencyMantissaShift(nan_patience=3), "E7M0", steps)
    assert whole.count("E5M2") == 2
    for cut in range(len(steps)):
        first, second = EmergencyMantissaShift(nan_patience=3), EmergencyMantissaShift(nan_patience=3)
        head = run(first, "E7M0", steps[:cut])
        second.load_state_dict(first.state_dict())
        assert head + run(second, "E7M0", steps[cut:]) == whole


# -- both, in the training step ---------------------------------------------------------------------------------------

SMALL = [
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.block_size=32", "data.batch_size=8"),
    *("optimizer.warmup_steps=0", "max_steps=200", "optimizer.lr=0.003", "monitor.enabled=true", "monitor.interval=1"),
]


def trainer_of(*overrides, name="e7m0_uniform"):
    from altgrad.training.config.loading import load_config
    from altgrad.training.trainer import Trainer

    trainer = Trainer(load_config(f"experiments/configs/{name}.yaml", [*SMALL, *overrides]))
    trainer.measuring.sink = (records := []).extend
    return trainer, records


def steps_of(trainer, n):
    return [trainer.train_step(*trainer.batch(trainer.step + 1)) for _ in range(n)]


def events(records, kind):
    return [event for record in records for event in record.events if event["event"] == kind]


# An unscaled E4M3 whose overflow is NaN: one large weight ends every step.
NAN_RUN = ["fp8_format=E4M3", "scaling=none", "overflow=nan", "weight_storage=master", "optimizer.lr=0.01"]


def with_one_large_weight(trainer):
    """A weight beyond E4M3's largest value, 448, in the embedding of the space."""
    with torch.no_grad():
        trainer.model.embedding.weight[32, 0] = 600.0
    return trainer


def test_stab06_a_run_that_would_be_nan_comes_back_and_learns():
    lost = with_one_large_weight(trainer_of(*NAN_RUN)[0])
    assert not any(record.finite for record in steps_of(lost, 6))

    options = ["enable_emergency_shift=true", "shift.chain={E4M3: E5M2}", "shift.nan_patience=3"]
    saved = with_one_large_weight(trainer_of(*NAN_RUN, *options)[0])
    records = steps_of(saved, 30)
    (shift,) = events(records, "shift")
    assert (shift["from_format"], shift["to_format"], shift["reason"]) == ("E4M3", "E5M2", "nan")
    assert [r.finite for r in records[:3]] == [False] * 3
    finite = [r.loss for r in records if r.finite]
    assert len(finite) == 27
    assert min(finite[-5:]) < finite[0] - 0.5  # below where it was when it came back
    assert all(torch.isfinite(p).all() for p in saved.model.parameters())


def test_stab06_a_stalled_run_shifts_once_per_window_and_learns_again():
    options = ["enable_emergency_shift=true", "shift.stall_patience=5", "shift.nan_patience=3", "optimizer.lr=0.0003"]
    trainer, _ = trainer_of(*options)
    records = steps_of(trainer, 30)
    (shift,) = events(records, "shift")
    assert (shift["from_format"], shift["to_format"], shift["reason"]) == ("E7M0", "E5M2", "stall")
    assert trainer.step == 30
    assert shift["stall_rate"] > 0.5
    at = next(i for i, r in enumerate(records) if r.events and any(e["event"] == "shift" for e in r.events))
    assert records[-1].loss < records[at].loss
    assert records[-1].stall_rate < records[at].stall_rate


@pytest.mark.parametrize(("target", "said"), [("FP32", "no quantization"), ("MXFP8", "grid storage in MXFP8")])
def test_stab06_a_chain_that_the_run_cannot_follow_is_refused_at_the_start(target, said):
    with pytest.raises(ConfigError, match=f"E5M2 to {target}.*{said}"):
        trainer_of("enable_emergency_shift=true", f"shift.chain.E5M2={target}")


CLIPPED = [
    "fp8_format=E1M6",
    "gradient_format=BF16",
    "scaling=none",
    "weight_storage=master",
    "optimizer.grad_clip=0",
    "optimizer.name=sgd",
    "optimizer.weight_decay=0",
]


def test_stab05_the_clip_changes_the_weights_of_that_very_step():
    free, _ = trainer_of(*CLIPPED)
    held, _ = trainer_of(
        *CLIPPED, "enable_partition_clipping=true", "clipping.overflow_threshold=1e-9", "clipping.base_clip=1"
    )
    for trainer in (free, held):
        with torch.no_grad():
            trainer.model.norm.weight.mul_(8.0)  # the head's input overflows E1M6
    before = [p.detach().clone() for p in held.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, free.model.parameters(), strict=True))
    record, unclipped = steps_of(held, 1)[0], steps_of(free, 1)[0]
    assert record.loss == unclipped.loss
    (clip,) = events([record], "clip")
    threshold = 3.96875 / 57344
    assert clip["clip_threshold"] == pytest.approx(threshold)
    assert clip["overflow_rate"] > 0
    moved = [
        float(torch.cat([(a - b).detach().flatten() for a, b in zip(t.model.parameters(), before, strict=True)]).norm())
        for t in (held, free)
    ]
    assert moved[0] == pytest.approx(moved[1] * threshold / clip["grad_norm"], rel=5e-2)
    assert moved[0] < 0.01 * moved[1]


@pytest.mark.parametrize(("scaling", "overflows"), [("amax", False), ("none", True)])
def test_stab05_overflow_is_measured_without_scaling_and_absent_under_amax(scaling, overflows):
    trainer, _ = trainer_of(
        *CLIPPED, f"scaling={scaling}", "enable_partition_clipping=true", "clipping.overflow_threshold=1e-9"
    )
    with torch.no_grad():
        trainer.model.norm.weight.mul_(8.0)
    records = steps_of(trainer, 3)
    assert all((r.overflow_rate > 0) is overflows for r in records)
    assert (len(events(records, "clip")) == 3) is overflows


def test_stab05_stab06_interventions_survive_a_fork_bit_for_bit():
    options = ["enable_emergency_shift=true", "shift.stall_patience=4", "optimizer.lr=0.0003"]
    whole, _ = trainer_of(*options)
    losses = [r.loss for r in steps_of(whole, 10)]
    part, _ = trainer_of(*options)
    steps_of(part, 2)  # in the middle of the patience
    fork, _ = trainer_of(*options)
    fork.restore(part.capture())
    assert [r.loss for r in steps_of(fork, 8)] == losses[2:]
    assert fork.formats.recipe == whole.formats.recipe


def test_stab05_stab06_the_scheduled_reference_goes_with_the_step():
    trainer, records = trainer_of("fp8_format=E3M4", "monitor.schedule={default: 0, reference: 2}")
    plain, _ = trainer_of("fp8_format=E3M4", "monitor.enabled=false")
    assert [r.loss for r in steps_of(trainer, 3)] == [r.loss for r in steps_of(plain, 3)]
    trainer.measuring.close()
    assert {r["step"] for r in records} == {1, 3}
    assert all(0.5 < r["reference_cosine"] <= 1 for r in records if r["layer"].endswith("mlp.up"))
