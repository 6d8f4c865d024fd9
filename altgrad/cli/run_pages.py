"""What `run`, `compare`, `demo` and `report` do and print: live progress, tables, where the report is, exit codes."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from altgrad.analysis import write_report
from altgrad.errors import ConfigError, os_error_text
from altgrad.records.folders import page_path
from altgrad.records.schema import ExperimentResult, StepRecord
from altgrad.report.console import Terminal, ruled_table
from altgrad.report.verdicts import ending
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.identity import is_twin
from altgrad.training.config.loading import dump_config, load_config
from altgrad.training.format_runner import FormatExperimentRunner, RunListener
from altgrad.training.run.folder import RunPlan

INTERRUPTED = 128  # plus the signal's number, as shells have it


class LiveProgress(RunListener):
    """One bar for the present run and, for several runs, one for all; plain lines where there is no terminal."""

    def __init__(self, console: Console, configs: Sequence[ExperimentConfig]) -> None:
        self.console, self.configs = console, list(configs)
        self.total_steps = sum(config.max_steps for config in configs)
        self.done_before = 0  # steps of the runs that are over
        self.val_loss = math.nan
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=60,
        )
        several = len(self.configs) > 1
        self.all: TaskID | None = self.bars.add_task("all runs", total=self.total_steps, shown="") if several else None
        self.one: TaskID | None = None

    def said(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def started(self, plan: RunPlan, step: int) -> None:
        if self.one is not None:
            self.bars.remove_task(self.one)
        self.max_steps, self.begun_at, self.val_loss = plan.config.max_steps, step, math.nan
        self.one = self.bars.add_task(plan.config.name, total=self.max_steps, completed=step, shown="")
        if not self.console.is_terminal:
            self.said(f"{plan.run_id}: {plan.config.max_steps} steps on {plan.corpus.description}")

    def stepped(self, record: StepRecord, tokens_per_s: float) -> None:
        assert self.one is not None
        shown = f"loss {record.loss:.3f}  val {self.val_loss:.3f}  {tokens_per_s / 1000:.1f}k tok/s"
        self.bars.update(self.one, completed=record.step, shown=shown)
        if self.all is not None:
            self.bars.update(self.all, completed=self.done_before + record.step)
        for event in record.events:
            if event["event"] == "shift":
                self.said(
                    f"step {record.step}: shift {event['from_format']} > {event['to_format']} ({event['reason']})"
                )
        self.last = record

    def evaluated(self, step: int, val_loss: float) -> None:
        self.val_loss = val_loss
        if not self.console.is_terminal:
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
    config: Path, overrides: list[str], device: str | None, *, dry_run: bool, print_config: bool
) -> ExperimentResult | None:
    """`altgrad run`: one experiment, its result and its report; None if nothing was to run."""
    console = _console()
    loaded = load_config(config, [*overrides, *([f"device={device}"] if device else [])])
    if print_config:
        console.print(dump_config(loaded), end="", highlight=False, markup=False, soft_wrap=True)
        return None
    if dry_run:
        _print_plan(console, loaded)
        return None
    result = _run_all(console, [loaded], commands=[shlex.join(["altgrad", "run", str(config), *overrides])])[0]
    _print_result(console, result)
    return result


def compare(arguments: Sequence[str], device: str | None) -> list[ExperimentResult]:
    """`altgrad compare`: run (or look up) several experiments and set them side by side."""
    console = _console()
    files = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a] + ([f"device={device}"] if device else [])
    if len(files) < 2:
        raise ConfigError(f"compare needs at least two configs, {len(files)} given; use: altgrad compare A.yaml B.yaml")
    configs = [load_config(file, overrides) for file in files]
    results = _run_all(console, configs, [shlex.join(["altgrad", "run", f, *overrides]) for f in files])
    _print_comparison(console, results, Path(configs[0].runs_dir) / "comparison.html")
    return results


def demo(runs_dir: str, steps: int | None, device: str) -> list[ExperimentResult]:
    """`altgrad demo`: the baseline and five formats, the table, and the report."""
    from altgrad.training.run.demo import demo_configs

    console = _console()
    configs = demo_configs(runs_dir, steps, device)
    results = _run_all(console, configs, [None] * len(configs))
    _print_comparison(console, results, Path(runs_dir) / "report.html")
    return results


def report(runs: Sequence[Path], out: Path | None, force: bool) -> None:
    """`altgrad report`: one HTML file over existing run folders."""
    from altgrad.analysis import find_runs, is_study, write_study

    console = _console()
    folders = [found for run in runs for found in find_runs(run)]
    if not folders:
        raise ConfigError(f"no run folders in {', '.join(map(str, runs))}; give folders that hold a config.yaml")
    target = out or page_path(folders[0] if len(folders) == 1 else folders[0].parent, "report.html")
    write = write_study if is_study(folders) else write_report
    console.print(f"report: {write(folders, target, force=force)}", highlight=False, soft_wrap=True)


def watch(runs: Sequence[Path], port: int) -> None:
    """`altgrad watch`: serve the runs' report until Ctrl-C."""
    from altgrad.analysis.live import LOOPBACK, LivePage, live_server

    page = LivePage(runs)
    server = live_server(page, port)
    _console().print(f"http://{LOOPBACK}:{server.server_port}/ (Ctrl-C ends it)", highlight=False, soft_wrap=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()


def exit_code(results: Sequence[ExperimentResult | None], *, fail_on_collapse: bool) -> int:
    """0 done, 1 a run collapsed and that was asked to count, 128 + signal interrupted."""
    for result in results:
        if result is not None and result.status == "interrupted":
            return INTERRUPTED + int(result.details.get("signal", 2))
    collapsed = any(result is not None and result.status == "collapsed" for result in results)
    return 1 if collapsed and fail_on_collapse else 0


def _console() -> Console:
    """Standard output; of several processes under torchrun only the first talks and writes reports."""
    return Terminal(quiet=os.environ.get("RANK", "0") != "0")


def _run_all(
    console: Console, configs: Sequence[ExperimentConfig], commands: Sequence[str | None]
) -> list[ExperimentResult]:
    results: list[ExperimentResult] = []
    progress = LiveProgress(console, configs)
    with progress.bars:
        for config, command in zip(configs, commands, strict=True):
            twin = next((r.run_dir for r, c in zip(results, configs, strict=False) if is_twin(c, config)), None)
            result = FormatExperimentRunner(config, listener=progress, command=command, twin=twin).run()
            if result.already_finished:
                progress.over(result)
            results.append(result)
            if not result.finished:
                break
    return results


def _print_plan(console: Console, config: ExperimentConfig) -> None:
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
    console.print(str(trainer.formats.manifest or "FP32: nothing is quantized"), highlight=False, markup=False)


def _print_result(console: Console, result: ExperimentResult) -> None:
    if console.quiet:
        return
    if result.already_finished:
        console.print(f"{result.run_id} was finished before; this is its result", highlight=False)
    _print_table(console, [result])
    if result.finished:
        _write_report(console, [result], result.run_dir / "report.html")


def _print_comparison(console: Console, results: list[ExperimentResult], target: Path) -> None:
    if console.quiet:
        return
    _print_table(console, results)
    if all(result.finished for result in results):
        _write_report(console, results, target)


def _write_report(console: Console, results: Sequence[ExperimentResult], target: Path) -> None:
    """Write the report; runs that were only looked up are told also where nothing can be written."""
    try:
        written = write_report([result.run_dir for result in results], target)
    except OSError as error:
        if not all(result.already_finished for result in results):
            raise
        console.print(f"no report was written: {os_error_text(error)}", highlight=False, soft_wrap=True)
    else:
        console.print(f"report: {written}", highlight=False, soft_wrap=True)


def _print_table(console: Console, results: Sequence[ExperimentResult]) -> None:
    """One row per run; losses are validation losses in nats per token."""
    baseline = next((r.final_val_loss for r in results if r.format == "FP32"), None)
    table = ruled_table()
    for heading in ("format", "final", "best", "vs FP32", "steps", "verdict", "stall", "time"):
        table.add_column(
            heading, justify="left" if heading in ("format", "verdict") else "right", no_wrap=heading != "verdict"
        )
    for r in results:
        against = "" if baseline is None or r.format == "FP32" else f"{r.final_val_loss - baseline:+.3f}"
        stall = "" if r.stall_rate is None else f"{r.stall_rate:.1%}"
        cells = [r.format, f"{r.final_val_loss:.3f}", f"{r.best_val_loss:.3f}", against, f"{r.steps}/{r.max_steps}"]
        how = ending("collapsed" if r.verdict else r.status, r.verdict, r.remarks)
        table.add_row(*cells, how, stall, f"{r.wall_s:.0f} s")
    console.print(table)
    console.print(
        "validation losses, nats per token; verdict with its first step; stall: updates lost to rounding", style="dim"
    )
    for r in results:
        for said in (r.verdict, *r.remarks):
            if said:
                console.print(f"{r.format}: {said['reason']}", highlight=False, soft_wrap=True)
        if "failure_report" in r.details:
            console.print(f"  failure report: {r.details['failure_report']}", highlight=False, soft_wrap=True)
    if any(r.status == "interrupted" for r in results):
        console.print("interrupted; the same command continues", highlight=False)
