"""What `run` and `compare` do and print: live progress, tables, where the report is, exit codes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from altgrad.analysis import write_report
from altgrad.analysis.comparison import headline, table_row
from altgrad.analysis.outcome import Outcome, label_runs
from altgrad.errors import ConfigError, OptionError, os_error_text
from altgrad.records.run import read_run
from altgrad.records.schema import ExperimentResult, StepRecord
from altgrad.report.console import BAR, Terminal, TimeLeft, ruled_table, waiting
from altgrad.report.numbers import difference, loss, percent
from altgrad.report.text import without_middle
from altgrad.report.verdicts import GRADES
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.identity import identity, is_twin
from altgrad.training.config.loading import dump_config, load_config
from altgrad.training.format_runner import FormatExperimentRunner, RunListener
from altgrad.training.run.folder import RunPlan
from altgrad.training.trainer import check_setups

INTERRUPTED = 128  # plus the signal's number, as shells have it


class LiveProgress(RunListener):
    """One bar for the present run and, for several runs, one for all; plain lines where there is no terminal."""

    def __init__(self, console: Console, configs: Sequence[ExperimentConfig]) -> None:
        self.console, self.configs = console, list(configs)
        self.total_steps = sum(config.max_steps for config in configs)
        self.done_before = 0  # steps of the runs that are over
        self.figures: dict[str, str] = {}  # what stands beside the present run's bar
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24, **BAR),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeLeft(),
            console=console,
            disable=not console.is_interactive,
            speed_estimate_period=60,
        )
        several = len(self.configs) > 1
        self.all: TaskID | None = self.bars.add_task("all runs", total=self.total_steps, shown="") if several else None
        self.one: TaskID | None = None

    def said(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def started(self, plan: RunPlan, step: int) -> None:
        if self.one is not None:
            self.bars.remove_task(self.one)
        self.max_steps, self.figures = plan.config.max_steps, {"loss": "", "val": "", "speed": ""}
        name = without_middle(plan.config.name, max(16, self.console.width // 4))
        self.one = self.bars.add_task(name, total=self.max_steps, completed=step, shown="")
        if not self.console.is_interactive:
            self.said(f"{plan.run_id}: {plan.config.max_steps} steps on {plan.corpus.description}")

    def stepped(self, record: StepRecord, tokens_per_s: float) -> None:
        self._show(record.step, loss=f"loss {loss(record.loss)}", speed=f"{tokens_per_s / 1000:.1f}k tok/s")
        if self.all is not None:
            self.bars.update(self.all, completed=self.done_before + record.step)
        for event in record.events:
            if event["event"] == "shift":
                self.said(
                    f"step {record.step}: shift {event['from_format']} > {event['to_format']} ({event['reason']})"
                )

    def _show(self, step: int, **figures: str) -> None:
        assert self.one is not None
        self.figures |= figures
        self.bars.update(self.one, completed=step, shown="  ".join(filter(None, self.figures.values())))

    def evaluated(self, step: int, val_loss: float) -> None:
        self._show(step, val=f"val {loss(val_loss)}")
        if not self.console.is_interactive:
            self.said(f"  step {step:>5}/{self.max_steps}  validation loss {val_loss:.4f}")

    def ended(self, result: ExperimentResult) -> None:
        if result.finished:
            self.over(result)

    def over(self, result: ExperimentResult) -> None:
        """A run needs no more steps: the bar of all runs moves to its end."""
        self.done_before += result.max_steps
        if self.all is not None:
            self.bars.update(self.all, completed=self.done_before)


def train(
    config: Path,
    overrides: list[str],
    device: str | None,
    *,
    dry_run: bool,
    print_config: bool,
    twin: Path | None = None,
) -> ExperimentResult | None:
    """`altgrad run`: one experiment, its result and its report; None if nothing was to run.

    Raises:
        ConfigError: `twin` is another experiment than this one in FP32.
    """
    console = terminal()
    loaded = load_config(config, [*overrides, *([f"device={device}"] if device else [])])
    if print_config:
        console.print(dump_config(loaded), end="", highlight=False, markup=False, soft_wrap=True)
        return None
    if dry_run:
        _print_plan(console, loaded)
        return None
    made = []
    if twin is not None:
        of_twin = load_config(read_run(twin).config)
        if not is_twin(of_twin, loaded):
            raise ConfigError(f"--twin {twin} is not {config} in FP32; it may differ in nothing but its formats")
        made = [(of_twin, twin)]
    result = run_all(console, [loaded], commands=[shlex.join(["altgrad", "run", str(config), *overrides])], made=made)[
        0
    ]
    _print_result(console, result)
    return result


def refuse_for_configs(options: Mapping[str, object]) -> None:
    """Raise OptionError for one that is given, as several configs are run one after another, each once."""
    for option, given in options.items():
        if given is not None:
            raise OptionError(
                f"{option} goes with --formats; configs are run one after another, each with its own seed"
            )


def compare(arguments: Sequence[str], device: str | None) -> list[ExperimentResult]:
    """`altgrad compare`: run (or look up) several experiments and set them side by side."""
    console = terminal()
    files = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a] + ([f"device={device}"] if device else [])
    if len(files) < 2:
        raise ConfigError(f"compare needs at least two configs, {len(files)} given; use: altgrad compare A.yaml B.yaml")
    configs = [load_config(file, overrides) for file in files]
    _refuse_equal_rows(files, configs)
    check_setups(zip(files, configs, strict=True))
    results = run_all(console, configs, [shlex.join(["altgrad", "run", f, *overrides]) for f in files])
    print_comparison(console, results, Path(configs[0].runs_dir) / "comparison.html")
    return results


def _refuse_equal_rows(files: Sequence[str], configs: Sequence[ExperimentConfig]) -> None:
    """Raise ConfigError for two configs that say the same: they are one run, whose two rows would differ in nothing."""
    told = [identity(config) | {"name": ""} for config in configs]
    for i, own in enumerate(told):
        if own in told[:i]:
            raise ConfigError(
                f"{files[told.index(own)]} and {files[i]} are the same experiment under these settings; leave one out, or "
                "change a setting of one of them"
            )


def exit_code(results: Sequence[ExperimentResult | None], *, fail_on_collapse: bool) -> int:
    """0 done, 1 a run collapsed and that was asked to count, 128 + signal interrupted."""
    for result in results:
        if result is not None and result.status == "interrupted":
            return INTERRUPTED + int(result.details.get("signal", 2))
    collapsed = any(result is not None and result.status == "collapsed" for result in results)
    return 1 if collapsed and fail_on_collapse else 0


def terminal() -> Terminal:
    """Standard output; of several processes under torchrun only the first talks and writes reports."""
    return Terminal(quiet=os.environ.get("RANK", "0") != "0")


def run_all(
    console: Console,
    configs: Sequence[ExperimentConfig],
    commands: Sequence[str | None] | None = None,
    made: Sequence[tuple[ExperimentConfig, Path]] = (),
) -> list[ExperimentResult]:
    """Run (or look up) experiments one after another, up to the first that is interrupted.

    Args:
        commands: what repeats each, for its failure report.
        made: runs of before with their folders, among which a float32 twin may be.
    """
    results: list[ExperimentResult] = []
    progress = LiveProgress(console, configs)
    with progress.bars:
        for config, command in zip(configs, commands or [None] * len(configs), strict=True):
            known = [*made, *zip(configs, (r.run_dir for r in results), strict=False)]
            twin = next((folder for c, folder in known if is_twin(c, config)), None)
            result = FormatExperimentRunner(config, listener=progress, command=command, twin=twin).run()
            if result.already_finished:
                progress.over(result)
            results.append(result)
            if not result.finished:
                break
    return results


def _print_plan(console: Terminal, config: ExperimentConfig) -> None:
    from altgrad.training.run.folder import plan_run
    from altgrad.training.trainer import Trainer

    plan = plan_run(config)
    trainer = Trainer(config, data_dir=plan.corpus)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    tokens = config.data.batch_size * config.model.block_size
    console.print(f"run folder   {plan.path}", highlight=False, soft_wrap=True)
    console.print(f"checkpoints  {plan.wanted_checkpoint_dir}", highlight=False, soft_wrap=True)
    console.print(f"data         {plan.corpus.description}", highlight=False, soft_wrap=True)
    console.print(f"model        {parameters:,} parameters", highlight=False)
    console.print(f"training     {config.max_steps} steps of {tokens:,} tokens", highlight=False)
    console.say(str(trainer.formats.manifest or "FP32: nothing is quantized"), hang=4)


def _print_result(console: Terminal, result: ExperimentResult) -> None:
    if console.quiet:
        return
    if result.already_finished:
        console.say(f"{result.run_id} was finished before; this is its result")
    _print_table(console, [result])
    if result.finished:
        _write_report(console, [result], result.run_dir / "report.html")


def print_comparison(console: Terminal, results: list[ExperimentResult], target: Path, *, reasons: bool = True) -> None:
    """The table, what stands behind its verdicts (unless it is told otherwise), and the report of finished runs."""
    if console.quiet:
        return
    _print_table(console, results, reasons=reasons)
    if all(result.finished for result in results):
        _write_report(console, results, target)


def _write_report(console: Console, results: Sequence[ExperimentResult], target: Path) -> None:
    """Write the report; runs that were only looked up are told also where nothing can be written."""
    try:
        with waiting("writing the report"):
            written = write_report([result.run_dir for result in results], target)
    except OSError as error:
        if not all(result.already_finished for result in results):
            raise
        console.print(f"no report was written: {os_error_text(error)}", highlight=False, soft_wrap=True)
    else:
        console.print(f"report: {written}", highlight=False, soft_wrap=True)


def _print_table(console: Terminal, results: Sequence[ExperimentResult], *, reasons: bool = True) -> None:
    """One row per run, in the words of the report; losses are validation losses in nats per token."""
    outcomes = label_runs([read_run(result.run_dir) for result in results])
    table = _fitting_table(console, outcomes, results)
    if len(outcomes) > 1:
        console.say(f"\n{headline(outcomes)}", "bold")
    console.print(table)
    console.say(
        "validation losses, nats per token; verdict with its first step; stall: updates lost to rounding", "dim"
    )
    if any(outcome.grade for outcome in outcomes):
        console.say(GRADES, "dim")
    for outcome, result in zip(outcomes, results, strict=True) if reasons else ():
        for said in (result.verdict, *result.remarks):
            if said:
                console.say(f"{outcome.label}: {said['reason']}", hang=2)
        if "failure_report" in result.details:
            console.print(f"  failure report: {result.details['failure_report']}", highlight=False, soft_wrap=True)
    if any(result.status == "interrupted" for result in results):
        console.say("interrupted; the same command continues")


LABEL = 24
"""Characters of a run's label, from which on it may take several lines."""


def _fitting_table(console: Terminal, outcomes: Sequence[Outcome], results: Sequence[ExperimentResult]) -> Table:
    """The table in the fullest of its forms that fits: verdicts on a line, on two, and with fewer columns."""
    folded = max(0, *(len(outcome.label) - LABEL for outcome in outcomes))
    forms = [("; ", ()), (";\n", ()), (";\n", ("best",)), (";\n", ("best", "time"))]
    for between, without in forms:
        table = _table(outcomes, results, between, without)
        if console.measure(table, options=console.options.update(max_width=10_000)).maximum - folded <= console.width:
            return table
    return _table(outcomes, results, ";\n", ("best", "time", "steps"))


def _table(
    outcomes: Sequence[Outcome], results: Sequence[ExperimentResult], between: str, without: Sequence[str] = ()
) -> Table:
    """One row per run. between: what stands between the parts of a verdict. without: columns that are left out."""
    columns = [c for c in ("run", "final", "best", "vs FP32", "steps", "verdict", "stall", "time") if c not in without]
    table = ruled_table()
    for heading in columns:
        table.add_column(
            heading, justify="left" if heading in ("run", "verdict") else "right", no_wrap=heading != "run"
        )
    for outcome, result in zip(outcomes, results, strict=True):
        facts = table_row(outcome)
        cells = {
            "run": outcome.label,
            "final": loss(facts["final_val_loss"]),
            "best": loss(facts["best_val_loss"]),
            "vs FP32": "" if outcome.gap is None else difference(outcome.gap),
            "steps": f"{result.steps}/{result.max_steps}",
            "verdict": facts["verdict"].replace("; ", between),
            "stall": "" if result.stall_rate is None else percent(result.stall_rate),
            "time": f"{result.wall_s:.0f} s",
        }
        table.add_row(*(cells[column] for column in columns))
    return table
