"""The command line: parses, calls, prints; every command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer

from altgrad.cli.process import carried_out
from altgrad.errors import OptionError

_IS_WIDE = sys.stdout is not None and sys.stdout.isatty() and get_terminal_size().columns >= 80
"""Whether help has boxes: in a pipe they say nothing, and in a narrow terminal they leave its sentences no room."""

app = typer.Typer(
    help="AltGrad: the wind tunnel and flight recorder for low-precision training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if _IS_WIDE else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from altgrad import __version__

        print(f"altgrad {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Put any number format on any tensor of a model, train it, and see when, where and why it breaks."""


@app.command()
def formats(
    name: Annotated[str | None, typer.Argument(help="A format's name, such as E3M4 or MXFP4.")] = None,
    equivalent: Annotated[bool, typer.Option("--equivalent", help="Groups that are one grid under scaling.")] = False,
) -> None:
    """Show the catalog of number formats, or one format's facts."""
    from altgrad.cli import format_pages

    if equivalent and name is not None:
        raise OptionError(f"--equivalent compares all formats; leave out {name}")
    if equivalent:
        format_pages.print_equivalent()
    elif name is None:
        format_pages.print_catalog()
    else:
        format_pages.print_format(name)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A recipe's name, such as nvfp4_te, or nvfp4_te without hadamard (quoted).")
    ] = None,
    error: Annotated[
        bool, typer.Option("--error", help="What it, or any recipe's text, does to one layer's products.")
    ] = False,
    sizes: Annotated[str | None, typer.Option("--sizes", help="With --error: tokens x in x out, 512x1024x256.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="With --error: write a page with a figure, error over length of sums."),
    ] = None,
) -> None:
    """Show the recipes that people know, or what one of them says of each operand, with its source and gaps."""
    from altgrad.cli import recipe_pages

    if error and name is None:
        raise OptionError("--error needs a recipe: a name, or its text")
    for option, value in (("--sizes", sizes), ("--figure", figure)):
        if value is not None and not error:
            raise OptionError(f"{option} {value} needs --error")
    if error and name is not None:
        recipe_pages.print_errors(name, sizes, figure)
    elif name is None:
        recipe_pages.print_recipes()
    else:
        recipe_pages.print_recipe(name)


@app.command()
def init(
    file: Annotated[Path | None, typer.Argument(help="The file to write; else experiment.yaml or matrix.yaml.")] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="A study of many runs instead of one experiment.")] = False,
) -> None:
    """Write a commented config, or a matrix, of your own to begin with."""
    from altgrad.cli import study_pages

    study_pages.write_first_file(file, matrix=matrix)


def _load_torch() -> None:
    """Before the modules of a command that computes: seconds, which a terminal shows."""
    from altgrad.report.console import waiting

    with waiting("loading PyTorch"):
        import torch  # noqa: F401


_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings such as optimizer.lr=3e-4 seed=7.")
]
_Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")]
_FailOnCollapse = Annotated[bool, typer.Option("--fail-on-collapse", help="Exit with 1 if a run collapsed.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="An experiment's YAML file, or a shipped one's name: e3m4_uniform.")],
    overrides: _Overrides = None,
    device: _Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and stop.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved config, and stop.")] = False,
    fail_on_collapse: _FailOnCollapse = False,
    twin: Annotated[
        Path | None, typer.Option("--twin", help="Folder of the same run in FP32, which the loss is held against.")
    ] = None,
) -> None:
    """Run one experiment; a finished one is looked up, an interrupted one continued."""
    _load_torch()
    from altgrad.cli import run_pages

    result = run_pages.train(config, overrides or [], device, dry_run=dry_run, print_config=print_config, twin=twin)
    raise typer.Exit(run_pages.exit_code([result], fail_on_collapse=fail_on_collapse))


@app.command()
def compare(
    configs: Annotated[
        list[str],
        typer.Argument(help="YAML files or shipped names; one with --formats. Then settings for all of them."),
    ],
    formats: Annotated[
        str | None, typer.Option("--formats", help="Formats or recipes of one config, such as FP32,E3M4,MXFP8.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="With --formats: seeds of each; else 3.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="With --formats: runs at a time.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --formats: how many runs, and how long.")] = False,
    device: _Device = None,
    fail_on_collapse: _FailOnCollapse = False,
) -> None:
    """Set several experiments, or several formats of one with error bars, side by side in one report."""
    _load_torch()
    from altgrad.cli import run_pages, study_pages

    if formats is None:
        run_pages.refuse_for_configs({"--seeds": seeds, "--jobs": jobs, "--dry-run": dry_run or None})
        raise typer.Exit(run_pages.exit_code(run_pages.compare(configs, device), fail_on_collapse=fail_on_collapse))
    options = {"jobs": jobs, "dry_run": dry_run, "fail_on_collapse": fail_on_collapse}
    raise typer.Exit(study_pages.compare_formats(configs, formats, 3 if seeds is None else seeds, device, **options))


@app.command()
def demo(
    runs_dir: Annotated[str, typer.Option("--runs-dir", help="Where the run folders go.")] = "runs/demo",
    steps: Annotated[int | None, typer.Option("--steps", help="Fewer or more training steps.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
    minutes: Annotated[float, typer.Option("--minutes", help="Autopsies are made while so many last.")] = 3.0,
) -> None:
    """Train the FP32 baseline and five 8-bit formats on real text, save the worst, and say why: three minutes."""
    _load_torch()
    from altgrad.cli import demo_pages, run_pages

    results = demo_pages.demo(runs_dir, steps, device, minutes)
    raise typer.Exit(run_pages.exit_code(results, fail_on_collapse=False))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, folders that hold run folders, or packs.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file to write.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compare runs of different data or versions, marked so.")
    ] = False,
) -> None:
    """Write one self-contained HTML report on existing runs."""
    from altgrad.cli import record_pages

    record_pages.report(runs, out, force)


@app.command()
def watch(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold run folders.")],
    port: Annotated[int, typer.Option("--port", help="Port of this machine; 0 takes a free one.")] = 0,
) -> None:
    """Show the report of runs while they go on, on a page of this machine alone; Ctrl-C ends it."""
    from altgrad.cli import record_pages

    record_pages.watch(runs, port)


_Run = Annotated[Path, typer.Argument(help="A run's folder, such as runs/e7m0-s42-1a2b3c4d.")]


@app.command()
def autopsy(
    run: _Run,
    budget: Annotated[int, typer.Option("--budget", help="Forks that may be run.")] = 120,
    twin: Annotated[
        Path | None, typer.Option("--twin", help="Folder of its float32 twin, to hold the replayed one against.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Forks at a time; one, where nothing is said.")
    ] = None,
    executor: Annotated[str, typer.Option("--executor", help="local or ray: where forks run.")] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="Address of a Ray cluster; auto finds the local one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
) -> None:
    """Find out by replay why a run went wrong: which cells, since when, by what mechanism, what would have saved it."""
    _load_torch()
    from altgrad.cli import autopsy_pages

    places = autopsy_pages.Places(jobs, executor, address)
    raise typer.Exit(autopsy_pages.autopsy(run, budget, twin, places, dry_run=dry_run))


@app.command()
def replay(
    run: _Run,
    step: Annotated[int, typer.Option("--step", help="Captured step to fork from; an earlier one is found.")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Steps to take.")] = 40,
    rescue: Annotated[
        list[str] | None,
        typer.Option("--rescue", metavar="CELL", help="Cells to put in float32, by name or pattern such as head.*"),
    ] = None,
) -> None:
    """Fork a run at a step with some cells in float32, and set its losses beside the run's own."""
    _load_torch()
    from altgrad.cli import autopsy_pages

    autopsy_pages.replay(run, step, steps, rescue or [])


@app.command()
def advise(
    source: Annotated[
        Path, typer.Argument(help="A config's YAML or name, a .safetensors or .pth file, or a Hugging Face folder.")
    ],
    overrides: _Overrides = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the float32 trace of a config.")] = 60,
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Average bits a value that the recipe may take; 0: no limit; else 8.5."),
    ] = None,
    high_layers: Annotated[
        int | None, typer.Option("--high-layers", help="How many layers may stay high; else as many as the bits allow.")
    ] = None,
    formats: Annotated[str | None, typer.Option("--formats", help="Formats that may be used, E4M3,E5M2.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", help="Instead, the formats of any8, any6, hopper, blackwell, mi300 or mx."),
    ] = None,
    high: Annotated[str, typer.Option("--high", help="The format of what stays high.")] = "BF16",
    storage: Annotated[
        str, typer.Option("--storage", help="master, or grid: weights stored in their format.")
    ] = "master",
    verify: Annotated[
        int, typer.Option("--verify", help="Check the recipe by paired forks of so many steps, and correct it.")
    ] = 0,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity/--no-sensitivity", help="Ask which operands matter (one backward each).")
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of page and recipe; else advice-NAME.")
    ] = None,
    device: _Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how long it takes, and stop.")] = False,
) -> None:
    """Say which format each tensor of a model should have, from a short float32 trace or from weights alone."""
    _load_torch()
    from altgrad.cli import advise_pages

    budget = advise_pages.make_budget(bits, high_layers, formats, hardware, high, storage)
    advise_pages.advise(
        source,
        overrides or [],
        budget,
        out,
        steps=steps,
        verify=verify,
        sensitivity=sensitivity,
        device=device,
        dry_run=dry_run,
    )


@app.command("reproduce")
def reproduce_claim(
    name: Annotated[
        str | None, typer.Argument(help="A claim's name, or all; without it the claims are listed.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="How many seeds; else as many as the protocol says.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Trials at a time.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small part of every trial, to see that it runs; it proves nothing.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the records.")] = Path("runs/claims"),
) -> None:
    """Try a published claim on this machine: a verdict with intervals, by criteria from before the run."""
    from altgrad.cli import claim_pages

    if name is None:
        if seeds is not None or quick:
            raise OptionError("--seeds and --quick need a claim's name, or all")
        claim_pages.print_claims(out)
    else:
        claim_pages.try_claims(name, out, seeds=seeds, jobs=jobs, quick=quick)


@app.command()
def pack(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, folders that hold run folders, or packs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The pack to write, such as study.tar.xz.")],
) -> None:
    """Put the records of runs into one file that reads like a folder, with a table of the runs beside it."""
    from altgrad.cli import record_pages

    record_pages.pack(runs, out)


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(metavar="PACK", help="A pack, such as study.tar.xz.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the runs.")],
) -> None:
    """Make a pack a folder of runs again."""
    from altgrad.cli import record_pages

    record_pages.unpack_into(packed, out)


@app.command()
def verify(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, folders that hold run folders, or packs.")],
) -> None:
    """Say for each run folder whether its records are whole; exit with 0 if all are, 1 if one is damaged."""
    from altgrad.cli import record_pages

    raise typer.Exit(record_pages.verify(runs))


@app.command()
def sweep(
    matrix: Annotated[Path, typer.Argument(help="A matrix file, or a shipped one's name: formats.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings such as max_steps=300 seeds=[1,2,3]; one of an axis replaces it."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the runs; else runs/<matrix name>.")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Runs at a time.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="How many runs, and how long; starts none of them.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="With --dry-run: say how long, from a few steps of a run.")
    ] = True,
    executor: Annotated[str, typer.Option("--executor", help="local or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="Address of a Ray cluster; auto finds the local one.")
    ] = None,
    devices: Annotated[str | None, typer.Option("--devices", help="GPUs to use, such as 0,1; else all.")] = None,
    fail_on_collapse: _FailOnCollapse = False,
) -> None:
    """Run every experiment of a matrix that is not done yet, in parallel processes or on a cluster."""
    _load_torch()
    from altgrad.cli import study_pages

    raise typer.Exit(
        study_pages.sweep(
            matrix,
            overrides or [],
            out,
            jobs=jobs,
            dry_run=dry_run,
            estimate=estimate,
            executor=executor,
            address=address,
            devices=devices,
            fail_on_collapse=fail_on_collapse,
        )
    )


_GROUPS = {  # as help shows them
    "To begin": ("demo", "init"),
    "Experiments": ("run", "compare", "sweep", "watch", "report"),
    "Why, and what instead": ("autopsy", "replay", "advise"),
    "Formats, recipes, claims": ("formats", "recipes", "reproduce"),
    "Records": ("verify", "pack", "unpack"),
}
_ORDER = [name for names in _GROUPS.values() for name in names]
for _command in app.registered_commands:
    _command.name = _command.name or getattr(_command.callback, "__name__", "")
    _command.short_help = getattr(_command.callback, "__doc__", None)  # click would cut it
    _command.rich_help_panel = next(group for group, names in _GROUPS.items() if _command.name in names)
app.registered_commands.sort(key=lambda command: _ORDER.index(str(command.name)))


def main() -> None:
    """Entry point of the command `altgrad`."""
    carried_out(app)
