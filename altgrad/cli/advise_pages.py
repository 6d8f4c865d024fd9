"""What `altgrad advise` prints and writes: how long it takes, progress, a table, the recipe, and where the page is."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from altgrad.advise import Advice, Budget, advise_loop, advise_weights
from altgrad.advise.sensitivity import BATCHES
from altgrad.advise.trace import layers_of
from altgrad.cli.usage import at_least
from altgrad.errors import ConfigError
from altgrad.records.files import write_json, write_text
from altgrad.report.console import Bars, Terminal, ruled_table, waiting
from altgrad.report.numbers import duration, percent, plural
from altgrad.report.pages.advice import headline, own_errors, render_advice, sentence, whole_line
from altgrad.report.text import SYMBOLS
from altgrad.training.config.shipped import shipped_file

if TYPE_CHECKING:
    from altgrad.training.step.replay import TrainerLoop

_SHOWN = 40  # rows of the table on a terminal


def make_budget(
    bits: float | None, high_layers: int | None, formats: str | None, hardware: str | None, high: str, storage: str
) -> Budget:
    """A budget from the command line's words; bits 0 means no limit."""
    names = tuple(name.strip() for name in (formats or "").split(",") if name.strip())
    if formats is not None and not names:
        raise ConfigError("--formats names no format; write --formats E4M3,E5M2")
    limit = None if bits == 0 else bits
    if limit is None and bits is None:
        limit = Budget.bits
    return Budget(limit, high_layers, names, hardware, high, storage)


def advise(
    source: Path,
    overrides: list[str],
    budget: Budget,
    out: Path | None,
    *,
    steps: int,
    verify: int,
    sensitivity: bool,
    device: str | None,
    dry_run: bool,
) -> None:
    """`altgrad advise`: from a config by a trace, from anything else by its weights."""
    at_least("--steps", steps, 1)
    at_least("--verify", verify, 0)
    folder = out or Path(f"advice-{source.stem or 'model'}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a folder for the advice with --out")
    console = Terminal()
    command = shlex.join(["altgrad", "advise", str(source), *overrides])
    by_name = not source.exists() and shipped_file(source, "configs") is not None
    if by_name or source.suffix.lower() in (".yaml", ".yml"):
        found, config = _from_config(console, source, overrides, budget, steps, verify, sensitivity, device, dry_run)
        if found is None:
            return
    else:
        if overrides:
            raise ConfigError(f"{overrides[0]!r} is a setting, and {source} is no config; settings go with a .yaml")
        if verify:
            raise ConfigError("--verify trains, and a checkpoint alone has no data; give a config")
        if dry_run:
            console.say(f"weights of {source} are read once, tensor by tensor")
            return
        with Bars(console) as told:
            found, config = advise_weights(source, budget, tell=told), None
    _write(console, folder, found, config, source.name, command)


def _from_config(
    console: Terminal,
    path: Path,
    overrides: list[str],
    budget: Budget,
    steps: int,
    verify: int,
    sensitivity: bool,
    device: str | None,
    dry_run: bool,
) -> tuple[Advice | None, dict[str, Any] | None]:
    from altgrad.training.config.loading import dump_config, load_config
    from altgrad.training.step.stepping import lr_at

    config = load_config(path, overrides)
    if device:
        config = config.model_copy(update={"device": device})
    steps = min(steps, config.max_steps)
    with waiting("timing two steps"):
        loop = float32_loop(config)
        begun = time.perf_counter()
        state = loop.capture()
        loop.advance()
        loop.advance()
        second = (time.perf_counter() - begun) / 2
        loop.restore(state)
    operands = sum(len(one.roles) for one in layers_of(loop.model)[0].values())
    passes = len(budget.formats) * (operands + BATCHES) + BATCHES if sensitivity else 0
    forks = 3 * 5 * verify
    console.say(
        plural(steps, "float32 step")
        + (f", then one forward and backward for each of {passes} tries" if passes else "")
        + (f", then {plural(forks, 'step')} of forks" if forks else "")
        + f": about {duration(second * (1.3 * steps + passes + 1.5 * forks))}"
    )
    if dry_run:
        return None, None
    with Bars(console) as told:
        schedule = [lr_at(step, config.max_steps, config.optimizer) for step in range(1, config.max_steps + 1)]
        asked = {"steps": steps, "sensitivity": sensitivity, "verify": verify, "schedule": schedule}
        advice = advise_loop(loop, budget, **asked, tell=told)
    given = yaml.safe_load(dump_config(config))
    return advice, given


def float32_loop(config: Any) -> TrainerLoop:
    """The loop of a config's run, in float32 whatever the config's formats are.

    Raises:
        ConfigError: a run spread over ranks.
    """
    from altgrad.training.config.formats import SHORT_DEFAULTS, WHOLE
    from altgrad.training.step.replay import TrainerLoop
    from altgrad.training.trainer import Trainer

    plain = {**SHORT_DEFAULTS, **dict.fromkeys(WHOLE), "include": None, "exclude": []}
    plain |= {"enable_emergency_shift": False, "enable_partition_clipping": False, "compile": False}
    plain["monitor"] = config.monitor.model_copy(update={"enabled": False})
    return TrainerLoop(Trainer(config.model_copy(update=plain)))


def _write(
    console: Terminal, folder: Path, advice: Advice, config: dict[str, Any] | None, name: str, command: str
) -> None:
    from altgrad.training.config.formats import SHORT_DEFAULTS

    data = {**advice.as_dict(), "name": name, "command": command}
    _print(console, data)
    folder.mkdir(parents=True, exist_ok=True)
    written = {"advice.html": render_advice(data), "recipe.yaml": advice.recipe.to_yaml()}
    if config is not None:
        kept = {key: value for key, value in config.items() if key not in (*SHORT_DEFAULTS, "recipe", "formats")}
        kept["formats"] = advice.recipe.to_dict()
        written["config.yaml"] = yaml.safe_dump(kept, sort_keys=False)
    for file, text in written.items():
        write_text(folder / file, text)
    write_json(folder / "advice.json", data)
    console.print(f"page: {folder / 'advice.html'}", highlight=False, soft_wrap=True)
    console.print(
        f"recipe: {folder / 'recipe.yaml'}, for quantize_model(model, Recipe.from_yaml(...))",
        highlight=False,
        soft_wrap=True,
    )
    if config is not None:
        console.print(f"altgrad run {folder / 'config.yaml'}", highlight=False, soft_wrap=True)


def _print(console: Terminal, data: dict[str, Any]) -> None:
    """The table: one row for each operand, its format, what that does there, and ties."""
    console.say(headline(data), "bold")
    console.say(sentence(data))
    table = ruled_table()
    for head in ("layer", "", "format", "SQNR dB", "becomes 0", "limited by", "as good"):
        table.add_column(head, justify="right" if head in ("SQNR dB", "becomes 0") else "left", no_wrap=head == "layer")
    ties: dict[tuple[str, str], list[str]] = {}
    for row in data["rows"]:
        if row["tie"]:
            ties.setdefault((row["layer"], row["role"]), []).append(row["format"])
    chosen = [row for row in data["rows"] if row["chosen"]]
    for row in chosen[:_SHOWN]:
        sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        alike = ", ".join(ties.get((row["layer"], row["role"]), []))
        table.add_row(
            row["layer"], SYMBOLS[row["role"]], row["format"], sqnr, percent(row["underflow"]), row["limit"], alike
        )
    console.print(table)
    if len(chosen) > _SHOWN:
        console.say(f"and {len(chosen) - _SHOWN} more; the page has all of them")
    if line := whole_line(data):
        console.say(line)
    worst = [one for one in data["stalls"] if one["freezes_at"] is not None and one["storage"] == "nearest"]
    for one in worst:
        console.say(
            f"Stored in {one['format']} and rounded to nearest, 95% of the updates are lost from step {one['freezes_at']}."
        )
    for line in own_errors(data):
        console.say(line)
    for line in data["unknown"]:
        console.say(f"Not known: {line}.")
    if data["verified"]:
        kept = data["verified"]["corrected_to"]
        console.say(
            f"Forks of {data['verified']['steps']} steps: "
            + (f"corrected to {kept!r}." if kept else "no neighbour was better.")
        )
