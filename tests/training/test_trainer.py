"""The step as a transaction: what is applied, measured and recorded, in which order, and what is not."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from altgrad.errors import ConfigError, DataError
from altgrad.training.config.experiment import OptimizerSection
from altgrad.training.config.loading import load_config
from altgrad.training.model import GPT, GPTConfig
from altgrad.training.step.stepping import build_optimizer, lr_at
from altgrad.training.trainer import Trainer, next_token_loss
from tests.training.tiny import differing, tiny_config, tiny_corpus, tiny_trainer, train

GRID = ["fp8_format=E3M4", "weight_storage=grid"]


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


def poisoned_at(*steps):
    """A loss that is NaN at the given calls (the first is 1)."""
    calls = iter(range(1, 10_000))

    def loss(model, x, y):
        return next_token_loss(model, x, y) * (math.nan if next(calls) in steps else 1.0)

    return loss


@pytest.mark.parametrize("options", [[], GRID, ["fp8_format=E3M4", "scaling=delayed"]], ids=str)
def test_nothing_of_a_nonfinite_step_is_applied(options):
    trainer = Trainer(tiny_config(*options), data_dir=tiny_corpus(), loss=poisoned_at(4))
    train(trainer, 3)
    before = trainer.capture()
    (record,) = train(trainer, 1)
    after = trainer.capture()
    assert not record.finite
    assert math.isnan(record.loss)
    assert [event["event"] for event in record.events] == ["skip_nonfinite"]
    assert after["step"] == 4
    differ = differing(without(before, "step", "judge"), without(after, "step", "judge"))
    assert [path for path in differ if not path.endswith("clocks/0/step")] == []
    assert after["judge"]["nonfinite_since"] == 4
    assert train(trainer, 1)[0].finite


def test_one_infinite_gradient_element_is_enough():
    trainer = tiny_trainer()
    trainer.model.norm.weight.register_hook(lambda g: torch.where(torch.arange(32) == 3, torch.inf, g))
    before = trainer.capture()["model"]
    (record,) = train(trainer, 1)
    assert not record.finite
    assert math.isfinite(record.loss)
    assert not differing(before, trainer.capture()["model"])


def test_finite_gradients_whose_squares_overflow_are_finite():
    trainer = tiny_trainer("optimizer.name=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0")
    for parameter in trainer.parameters:
        parameter.register_hook(lambda g: g * 1e25)
    (record,) = train(trainer, 1)
    assert record.finite
    assert 1e22 < record.grad_norm < 1e28
    assert all(p.grad is not None and 0 < p.grad.norm() < 1.01 for p in trainer.parameters)


def test_losses_are_those_of_a_plain_loop():
    trainer, config = tiny_trainer(), tiny_config()
    model = GPT(GPTConfig(256, 1, 2, 32, 16), seed=config.seed)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        x, y = tiny_corpus().batch(config.seed, step, 4, 16)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config.max_steps, config.optimizer)
        optimizer.step()
        assert train(trainer, 1)[0].loss == pytest.approx(loss.item(), rel=1e-6)


def test_grid_weights_stay_on_their_grid_and_are_counted():
    trainer = tiny_trainer(*GRID)
    record = train(trainer, 3)[-1]
    assert 0 < record.stall_rate < 1
    assert 0 < record.flip_rate < 1
    head = trainer.model.head.weight
    scale = trainer.formats.state()["layers"]["storage"]["head.weight"]["scale"]
    from altgrad.quantization import quantize

    assert torch.equal(quantize(head, "E3M4", scale, overflow="saturate"), head)
    assert train(tiny_trainer("fp8_format=E3M4"), 1)[0].stall_rate is None


@pytest.mark.parametrize("style", ["modern", "gpt2"])
def test_micro_batches_add_up_to_the_batch(style):
    whole = tiny_trainer(f"model.style={style}")
    parts = tiny_trainer(f"model.style={style}", "data.grad_accumulation=4")
    for one, other in zip(train(whole, 4), train(parts, 4), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_dropout_is_a_function_of_seed_and_step():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(256, 16), nn.Dropout(0.5), nn.Linear(16, 256))
        return Trainer(tiny_config(), model, tiny_corpus())

    one, other = make(), make()
    first = train(one, 3)
    torch.manual_seed(99)
    train(other, 1)
    torch.rand(5)
    assert train(other, 2) == first[1:]


def test_evaluation_is_under_the_recipe():
    plain, coarse = tiny_trainer(), tiny_trainer("fp8_format=E7M0")
    assert plain.evaluate() == tiny_trainer().evaluate()
    assert plain.evaluate() != coarse.evaluate()
    assert plain.evaluate() == pytest.approx(math.log(256), rel=0.05)
    assert plain.model.training


class TestLearningRate:
    SETTINGS = OptimizerSection(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)

    def test_warmup_rises_from_the_first_step(self):
        assert [lr_at(s, 20, self.SETTINGS) for s in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]

    def test_cosine_ends_at_the_floor(self):
        assert lr_at(12, 20, self.SETTINGS) == pytest.approx(0.55)
        assert lr_at(20, 20, self.SETTINGS) == pytest.approx(0.1)

    def test_constant(self):
        settings = OptimizerSection(lr=1.0, warmup_steps=0, decay="constant")
        assert {lr_at(s, 20, settings) for s in range(1, 21)} == {1.0}


class TestOptimizers:
    def test_only_matrices_decay(self):
        optimizer = build_optimizer(GPT(GPTConfig(19, 1, 2, 16, 8)), OptimizerSection(weight_decay=0.3))
        decay = {g["weight_decay"]: {p.dim() for p in g["params"]} for g in optimizer.param_groups}
        assert decay == {0.3: {2}, 0.0: {1}}

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"name": "adamv"}, "adamw"),
            ({"options": {"amsgradd": True}}, "amsgradd"),
            ({"options": {"lr": "x"}}, "adamw"),
        ],
    )
    def test_what_is_refused(self, section, message):
        with pytest.raises(ConfigError, match=message):
            build_optimizer(GPT(GPTConfig(19, 1, 2, 16, 8)), OptimizerSection(**section))


class TestClipping:
    OPTIONS = ("fp8_format=E5M2", "enable_partition_clipping=true", "optimizer.name=sgd", "optimizer.grad_clip=0")

    def test_unscaled_operands_overflow_and_the_clip_changes_that_steps_weights(self):
        options = [*self.OPTIONS, "scaling=none", "clipping.overflow_threshold=0.0", "optimizer.momentum=0"]
        clipped = tiny_trainer(*options)
        free = tiny_trainer(*options[:-2], "clipping.overflow_threshold=1.0", "optimizer.momentum=0")
        for trainer in (clipped, free):  # an input that E5M2 (max 57344) cannot hold
            trainer.model.norm.weight.data.mul_(1e5)
        (record,), (other,) = train(clipped, 1), train(free, 1)
        assert record.overflow_rate == other.overflow_rate > 0
        assert record.loss == other.loss
        assert [e["event"] for e in record.events] == ["clip"]
        assert record.events[0]["clip_threshold"] == 1.0
        assert not other.events
        assert differing(clipped.capture()["model"], free.capture()["model"])
        norms = [math.sqrt(sum(float(p.grad.square().sum()) for p in t.parameters)) for t in (clipped, free)]
        assert norms[0] == pytest.approx(1.0, rel=1e-3)
        assert norms[1] > 10

    def test_under_amax_scaling_nothing_overflows(self):
        trainer = tiny_trainer(*self.OPTIONS, "scaling=amax")
        trainer.model.norm.weight.data.mul_(1e5)
        records = train(trainer, 3)
        assert [r.overflow_rate for r in records] == [0.0, 0.0, 0.0]
        assert not any(r.events for r in records)

    def test_without_the_clip_nothing_is_measured(self):
        assert train(tiny_trainer("fp8_format=E3M4"), 1)[0].overflow_rate is None


class TestShift:
    OPTIONS = ("fp8_format=E7M0", "weight_storage=grid", "enable_emergency_shift=true", "shift.stall_threshold=1.0")

    def test_a_run_whose_weights_became_nan_comes_back_and_learns(self):
        trainer = tiny_trainer(*self.OPTIONS, "max_steps=60", "shift.snapshot_interval=4")
        before = train(trainer, 6)
        trainer.model.head.weight.data[3, 5] = math.nan
        broken = train(trainer, 3)
        assert [r.finite for r in broken] == [False] * 3
        shift = broken[-1].events[-1]
        assert (shift["event"], shift["from_format"], shift["to_format"]) == ("shift", "E7M0", "E5M2")
        assert (shift["reason"], shift["rewound_to"]) == ("nan", 4)
        assert broken[-1].verdict is None
        after = train(trainer, 25)
        assert all(r.finite for r in after)
        assert after[-1].loss < before[-1].loss
        assert trainer.formats.label == "E5M2"

    def test_bad_batches_alone_rewind_nothing(self):
        trainer = Trainer(tiny_config(*self.OPTIONS), data_dir=tiny_corpus(), loss=poisoned_at(3, 4, 5))
        records = train(trainer, 6)
        shifts = [e for r in records for e in r.events if e["event"] == "shift"]
        assert [(s["rewound_to"], s["consecutive_nans"]) for s in shifts] == [(None, 3)]

    def test_the_chain_ends_in_a_verdict(self):
        options = [*self.OPTIONS, "fp8_format=E3M4"]
        trainer = Trainer(tiny_config(*options), data_dir=tiny_corpus(), loss=poisoned_at(*range(3, 40)))
        records = train(trainer, 12)
        shifts = [(r.step, e["to_format"]) for r in records for e in r.events if e["event"] == "shift"]
        verdicts = [(r.verdict.kind, r.verdict.onset_step, r.step) for r in records if r.verdict]
        assert shifts == [(5, "E5M2")]
        assert verdicts[0] == ("nonfinite", 6, 8)

    def test_stall_shifts_after_warmup_and_patience(self):
        options = ("fp8_format=E7M0", "weight_storage=grid", "enable_emergency_shift=true", "shift.stall_patience=3")
        records = train(tiny_trainer(*options, "optimizer.lr=0.001"), 10)
        shifts = [(r.step, e["reason"]) for r in records for e in r.events if e["event"] == "shift"]
        assert all(r.stall_rate > 0.5 for r in records[:5])
        assert shifts[0] == (5, "stall")  # warmup 2, patience 3


def test_a_full_recipe_is_taken_as_it_is():
    trainer = tiny_trainer(recipe={"uniform": "E4M3", "grad": "E5M2"})
    assert "dy:E5M2" in str(trainer.formats.manifest)


def test_vocabulary_and_length_are_checked_at_the_start():
    with pytest.raises(DataError, match="vocab"):
        tiny_trainer("model.vocab_size=100")
    with pytest.raises(DataError, match="a sequence needs 5001"):
        tiny_trainer("model.block_size=5000")


def test_a_missing_cuda_device_is_said_plainly():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="--device cpu"):
        tiny_trainer("device=cuda")


TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "data": {"batch_size": 4},
    "fp8_format": "E4M3",
}


def monitor_of(**section):
    return Trainer(load_config({**TINY, "monitor": {"enabled": True, **section}})).measuring.monitor


def test_groups_that_the_schedule_leaves_out_follow_the_interval():
    groups = monitor_of(interval=7, schedule={"stall": 2}).schedule.groups
    assert {name: when.every for name, when in groups.items() if name not in ("rank", "reference", "oscillation")} == {
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


def test_moments_begin_anew_at_their_period():
    trainer = tiny_trainer("optimizer.reset_every=3")
    counts = []
    for _ in range(7):
        train(trainer, 1)
        counts.append({int(state["step"]) for state in trainer.optimizer.state.values()})
    assert counts == [{1}, {2}, {3}, {1}, {2}, {3}, {1}]


@pytest.mark.parametrize(
    ("name", "moments", "words"), [("adamw", "second", "take sr_adamw"), ("lion", "second", "no second")]
)
def test_a_reset_that_an_optimizer_cannot_make_is_refused(name, moments, words):
    with pytest.raises(ConfigError, match=words):
        tiny_trainer(f"optimizer.name={name}", "optimizer.reset_every=3", f"optimizer.reset_moments={moments}")


def test_evaluation_is_of_an_optimizers_mean_weights():
    trainer = tiny_trainer("optimizer.name=lmd", "optimizer.options={noise: 0.5}")
    train(trainer, 2)
    drawn, loss = trainer.capture()["model"], trainer.evaluate()
    assert not differing(trainer.capture()["model"], drawn)
    trainer.optimizer.eval()
    assert trainer.evaluate() == loss
    trainer.optimizer.train()
    trainer.optimizer.param_groups[0]["noise"] = trainer.optimizer.param_groups[1]["noise"] = 0.0
    assert trainer.evaluate() != loss


@pytest.mark.parametrize(
    "settings",
    [
        ["fp8_format=E4M3"],
        ["fp8_format=MXFP8"],
        ["fp8_format=E4M3", "weight_storage=grid"],
        ["fp8_format=E4M3", "rounding=stochastic", "monitor.enabled=true", "monitor.interval=2"],
        ["fp8_format=E3M4", "monitor.enabled=true", "monitor.interval=1"],
    ],
    ids=lambda settings: " ".join(settings),
)
def test_micro_batches_share_quantized_weights_to_the_same_bits(settings, monkeypatch):
    found = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(
                "altgrad.training.step.formats_of_run.FormatsOfRun.same_weights", lambda _: nullcontext()
            )
        trainer, records = tiny_trainer(*settings, "data.grad_accumulation=4", "model.n_embd=64"), []
        trainer.measuring.sink = records.extend
        steps = train(trainer, 4)
        trainer.measuring.close()
        said = [{name: value for name, value in record.items() if name != "rank_seconds"} for record in records]
        found.append((steps, said, [p.detach().clone() for p in trainer.model.parameters()]))
    (one, said, weights), (other, also, its) = found
    assert one == other
    assert said == also
    assert all(map(torch.equal, weights, its))
