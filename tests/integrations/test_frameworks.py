"""Runs of Hugging Face's Trainer, Lightning and accelerate: what their checkpoints keep, and what the run folders hold."""

import json
import warnings

import accelerate
import lightning
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from altgrad.errors import CheckpointError, OptionError, RecipeError, RunBusyError
from altgrad.integrations import HuggingFaceCallback, LightningCallback, RecordedRun, track
from altgrad.nn import load_quant_state, quant_state, quantize_model, uniform
from altgrad.records.lock import RunLock, is_locked
from altgrad.records.run import read_run
from altgrad.records.verify import verify_run

STEPS, HALF, ACCUMULATE, WIDTH = 6, 3, 2, 16
RECIPES = {
    "nearest": uniform("E4M3"),
    "stochastic": uniform("E3M4", rounding="stochastic"),
    "delayed": uniform("E4M3", scaling="delayed"),
    "grid": uniform("E3M4", storage="grid", storage_rounding="stochastic"),
}
DATA = torch.randint(24, (2 * HALF * ACCUMULATE, 8), generator=torch.Generator().manual_seed(0))


def language_model(recipe):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=8, n_embd=WIDTH, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    if recipe is not None:
        quantize_model(model, recipe, exclude=["lm_head", "transformer.wte"])
    return model


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(DATA)

    def __getitem__(self, i):
        return {"input_ids": DATA[i], "labels": DATA[i]}


class Lit(lightning.LightningModule):
    def __init__(self, recipe, lr=1e-2):
        super().__init__()
        self.model, self.lr = language_model(recipe), lr

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def with_trainer(folder, recipe, *, resume=False, bf16=False, recorded=True, **options):
    model = language_model(recipe)
    args = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATE,
        save_steps=HALF,
        eval_steps=HALF,
        eval_strategy="steps",
        logging_steps=2,
        learning_rate=options.pop("lr", 1e-2),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=bf16,
        logging_nan_inf_filter=False,
    )
    callbacks = [HuggingFaceCallback(folder / "run", monitor=2, **options)] if recorded else []
    data = Rows()
    trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{HALF}") if resume else None)
    return model


def with_lightning(folder, recipe, *, resume=False, bf16=False, recorded=True, **options):
    module = Lit(recipe, options.pop("lr", 1e-2))
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        folder / "out", save_top_k=-1, filename="{step}", enable_version_counter=False, save_on_train_epoch_end=True
    )
    callbacks = [keep] + ([LightningCallback(folder / "run", monitor=2, **options)] if recorded else [])
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        accelerator="cpu",
        precision="bf16-mixed" if bf16 else "32-true",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    trainer.fit(module, loader, loader, ckpt_path=str(folder / "out" / f"step={HALF}.ckpt") if resume else None)
    return module.model


def with_accelerate(folder, recipe, *, resume=False, bf16=False, recorded=True, **options):
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATE, mixed_precision="bf16" if bf16 else "no"
    )
    model = language_model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.pop("lr", 1e-2))
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = None
    if recorded:
        run = track(
            accelerator, model, optimizer, folder / "run", monitor=2, max_steps=STEPS, resumed=resume, **options
        )
    if resume:
        accelerator.load_state(str(folder / "out"))
    for epoch in range(1 if resume else 0, 2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if run is not None and run.collapsed:
                break
        if epoch == 0:
            accelerator.save_state(str(folder / "out"))
    accelerator.end_training()
    return accelerator.unwrap_model(model)


FRAMEWORKS = {"trainer": with_trainer, "lightning": with_lightning, "accelerate": with_accelerate}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Other people's warnings are theirs; accelerate and its state are one for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same(a, b):
    mine, other = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[name], other[name]) for name in mine)


def losses(folder):
    return read_run(folder / "run").metrics().columns["loss"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", RECIPES)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, framework, kind):
    train = FRAMEWORKS[framework]
    whole = train(tmp_path, RECIPES[kind], bf16=kind == "delayed")
    unbroken, state = losses(tmp_path), quant_state(whole)
    again = train(tmp_path, RECIPES[kind], resume=True, bf16=kind == "delayed")
    assert same(whole, again)
    assert state["clocks"] == quant_state(again)["clocks"]
    assert state["clocks"][0]["step"] == STEPS
    resumed = losses(tmp_path)
    assert resumed.steps.tolist() == list(range(1, STEPS + 1))
    assert resumed.values.tolist() == unbroken.values.tolist()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_the_integration_a_resumed_stochastic_run_is_another(tmp_path, framework):
    for kind, expected in (("nearest", True), ("stochastic", False)):
        whole = FRAMEWORKS[framework](tmp_path / kind, RECIPES[kind], recorded=False)
        again = FRAMEWORKS[framework](tmp_path / kind, RECIPES[kind], recorded=False, resume=True)
        assert same(whole, again) == expected


def test_three_frameworks_take_the_same_steps_and_record_them_alike(tmp_path):
    """The loop is the same arithmetic in all three but for Trainer's clip, which this gradient does not reach."""
    found = {}
    for name, train in FRAMEWORKS.items():
        (tmp_path / name).mkdir()
        train(tmp_path / name, RECIPES["grid"])
        found[name] = read_run(tmp_path / name / "run")
    for name, run in found.items():
        assert (run.status, run.storage, run.result["steps"], run.max_steps) == ("completed", "grid", STEPS, STEPS), (
            name
        )
        assert verify_run(run.path).whole, verify_run(run.path).said()
        metrics = run.metrics(monitor_steps=None)
        assert {"loss", "lr", "grad_norm", "stall_rate", "flip_rate", "overflow_rate", "tokens_per_s"} <= set(
            metrics.columns
        )
        assert {record["step"] for record in metrics.monitor} == {1, 3, 5}
        assert (name == "accelerate") == (len(metrics.validation) == 0)
    for column in ("loss", "grad_norm"):  # Trainer shuffles
        first = {name: float(run.metrics().columns[column].values[0]) for name, run in found.items()}
        assert first["lightning"] == pytest.approx(first["accelerate"], rel=1e-6)
        assert min(first.values()) > 0
    assert json.loads((found["trainer"].path / "env.json").read_text())["format"]["recipe"] == RECIPES["grid"].text


def test_the_report_command_reads_the_runs_of_frameworks_and_of_their_fp32_twins(tmp_path):
    from typer.testing import CliRunner

    from altgrad.cli import app

    for name, recipe in (("e3m4", RECIPES["grid"]), ("fp32", None)):
        (tmp_path / name).mkdir()
        with_trainer(tmp_path / name, recipe)
    runs = [str(tmp_path / name / "run") for name in ("e3m4", "fp32")]
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", *runs, "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert "E3M4" in page.read_text()
    assert CliRunner().invoke(app, ["verify", *runs]).exit_code == 0


@pytest.mark.parametrize("overflowing", ["loss", "gradient"])
def test_a_step_that_fp16s_scaler_skips_is_recorded_and_leaves_the_clock(tmp_path, overflowing):
    """The scaler of torch runs on the CPU, too; accelerate only hands it on."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    quantize_model(model, uniform("E3M4", rounding="stochastic", scaling="delayed"))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    run, clocks, saved = track(accelerator, model, optimizer, tmp_path / "run", monitor=1), [], []
    for i in range(3 * ACCUMULATE):
        with accelerator.accumulate(model):
            loss = model(torch.ones(3, 4)).square().mean()
            if i == ACCUMULATE:
                factor = torch.tensor(torch.inf if overflowing == "loss" else 3e38)
                loss = (
                    loss * factor
                    if overflowing == "loss"
                    else loss + 0 * loss + (factor * loss - (factor * loss).detach())
                )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        clocks.append(quant_state(model)["clocks"][0]["step"])
        if i == 2 * ACCUMULATE - 1:
            saved = run.state_dict()["quantization"]["clocks"]
    assert clocks == [0, 1, 1, 1, 1, 2]
    assert saved == [{"seed": 0, "step": 1, "micro_batch": 0}]
    assert int(model[0].quantization.uses.count[0]) == 0
    accelerator.end_training()
    metrics = read_run(tmp_path / "run").metrics()
    assert metrics.columns["loss"].steps.tolist() == [1, 2, 3]
    assert [(event["step"], event["event"]) for event in metrics.events] == [(2, "skip_nonfinite")]
    assert metrics.columns["loss"].values[2] == pytest.approx(metrics.columns["loss"].values[0], rel=0.3)
    assert verify_run(tmp_path / "run").whole


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_collapse_is_recorded_reported_and_ends_the_loop_if_asked(tmp_path, framework):
    limits = {"divergence_window": 2, "divergence_smoothing": 1}
    FRAMEWORKS[framework](tmp_path, RECIPES["nearest"], lr=3.0, stop=True, verdict=limits)
    run = read_run(tmp_path / "run")
    assert run.status == "collapsed"
    assert run.verdict["kind"] == "divergence"
    assert [page.name.partition("-")[0] for page in run.failure_reports] == ["step"]
    assert any(event["event"] == "verdict" for event in run.metrics().events)
    assert verify_run(run.path).whole


def test_a_fresh_start_never_overwrites_a_run_unasked(tmp_path):
    with_accelerate(tmp_path, RECIPES["nearest"])
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(CheckpointError, match=r"has the records of a run.*overwrite=True"):
        with_accelerate(tmp_path, RECIPES["nearest"])
    with_accelerate(tmp_path, RECIPES["nearest"], overwrite=True)
    assert len(losses(tmp_path)) == STEPS


def test_two_processes_never_write_to_one_folder_and_a_broken_off_training_leaves_it_free(tmp_path):
    model = language_model(RECIPES["nearest"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    facts = {"framework": torch.float32, "batch": torch.ones(2).numpy(), "name": "\x1b[31m"}
    with RunLock.acquire(tmp_path), pytest.raises(RunBusyError, match="give another run_dir"):
        RecordedRun(run_dir=tmp_path, monitor=None).attach(model, optimizer)
    for _ in range(2):  # the first one ends without a word
        run = RecordedRun(run_dir=tmp_path, monitor=None, overwrite=True)
        run.attach(model, optimizer, facts=facts)
    assert read_run(tmp_path).config["framework"] == "torch.float32"
    assert is_locked(tmp_path)
    for bad in ({"step": "x"}, {"step": 1, "tally": [], "judge": {}}, {"quantization": 3}, {"step": {"tensor": "load", "values": [], "shape": []}}):  # fmt: skip
        with pytest.raises((CheckpointError, RecipeError)):
            run.load_state(bad)
    run.finish()
    assert not is_locked(tmp_path)


def test_a_run_alone_keeps_the_clock_of_any_loop():
    """No folder: no records, no hooks on the layers, only the state."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    quantize_model(model, RECIPES["stochastic"])
    run, optimizer = RecordedRun(), torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(model, optimizer)
    outputs = []
    for _ in range(2):
        outputs.append(model(torch.ones(4, 8)))
        F.mse_loss(outputs[-1], torch.zeros(4, 2)).backward()
        run.next_micro_batch()
    assert not torch.equal(*outputs)
    optimizer.step()
    run.end_step()
    state = run.state()
    assert state["step"] == 1
    assert state["quantization"]["clocks"] == [{"seed": 0, "step": 1, "micro_batch": 0}]
    json.dumps(state)


def test_what_an_optimizer_did_in_an_earlier_step_is_not_counted_again(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    quantize_model(model, uniform("E4M3", storage="grid"))
    both = [torch.optim.SGD(model[0].parameters(), lr=1.0), torch.optim.SGD(model[1].parameters(), lr=1e-6)]
    run = RecordedRun(tmp_path / "run", monitor=None)
    run.attach(model, both, max_steps=3)
    for stepping in (both, both[:1], both[1:]):  # as a GAN's two take turns
        loss = model[1](model[0](torch.ones(4, 8))).square().mean()
        loss.backward()
        run.see_loss(loss)
        for optimizer in stepping:
            optimizer.step()
        run.end_step()
    run.finish()
    rates = read_run(tmp_path / "run").metrics().columns["stall_rate"].values
    assert rates[1] < 0.1 < rates[0]
    assert rates[2] == 1


def test_the_gradients_of_a_closure_are_recorded(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 1)), torch.ones(4, 8)
    quantize_model(model, "E4M3")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    run = RecordedRun(tmp_path / "run", monitor=None)
    run.attach(model, optimizer, max_steps=1)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 7).square().mean()
        loss.backward()
        run.see_loss(loss)
        return loss

    optimizer.step(closure)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    run.end_step()
    run.finish()
    assert read_run(tmp_path / "run").metrics().columns["grad_norm"].values.tolist() == [pytest.approx(norm)]


def test_a_missing_package_is_named(monkeypatch):
    import sys

    import altgrad.integrations as integrations

    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "altgrad.integrations.with_lightning", raising=False)
    with pytest.raises(OptionError, match="needs the package lightning, which is not installed: pip install lightning"):
        integrations.LightningCallback  # noqa: B018


# -- peft and averages -----------------------------------------------------------------------------------------------------


def adapted(model):
    import peft

    torch.manual_seed(1)
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=DATA[:2]).logits


@pytest.mark.parametrize("kind", ["nearest", "stochastic", "grid"])
def test_lora_adapts_a_quantized_model_and_is_trained_saved_and_merged(tmp_path, kind):
    """Only adapters are in the optimizer: the clock follows it, the quantized base stays, its outputs are those of Q(w)."""
    import peft

    model = adapted(language_model(RECIPES[kind]))
    base = model.base_model.model.transformer.h[0].attn.c_attn.base_layer
    before = base.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=DATA[:2], labels=DATA[:2]).loss.backward()
        optimizer.step()
    assert torch.equal(base.weight, before)
    assert quant_state(model)["clocks"][0]["step"] == (0 if kind == "nearest" else 2)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(language_model(RECIPES[kind]), tmp_path)
    load_quant_state(loaded, quant_state(model))
    wanted = logits(model)
    assert torch.equal(logits(loaded), wanted)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "QuantizedConv1D"
    assert (logits(merged) - wanted).abs().max() < 0.2 * wanted.abs().max()  # Q(w + ba) for Q(w) + ba
    assert not torch.equal(merged.transformer.h[0].attn.c_attn.weight, before)


def test_a_model_with_adapters_is_quantized_with_or_without_them():
    with_adapters = quantize_model(adapted(language_model(None)), uniform("E4M3"), exclude=["*lm_head", "*wte"])
    without = quantize_model(
        adapted(language_model(None)), uniform("E4M3", keep="adapters"), exclude=["*lm_head", "*wte"]
    )
    added = set(with_adapters.swapped) - set(without.swapped)
    assert added == {name for name in with_adapters.swapped if "lora_" in name} != set()
    assert any(name.endswith("c_attn.base_layer") for name in without.swapped)


def test_averages_of_quantized_models_are_models_of_the_average():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = language_model(RECIPES["grid"])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=DATA[:2], labels=DATA[:2]).loss.backward()
        optimizer.step()
        average.update_parameters(model)
    fresh = language_model(RECIPES["grid"])
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(logits(average), logits(fresh))
    assert not torch.equal(logits(average), logits(model))
