"""What stands on a terminal while a run goes on: it fits, it ends with the last figures, and dumb terminals get lines."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from altgrad.cli.run_pages import LiveProgress
from altgrad.training.config.experiment import ExperimentConfig


def shown(name: str, width: int = 80, **terminal) -> list[str]:
    """The lines after a run of two steps whose last evaluation follows its last step."""
    config = ExperimentConfig(name=name, max_steps=2)
    stream = io.StringIO()
    progress = LiveProgress(Console(file=stream, width=width, color_system=None, **terminal), [config, config])
    plan = SimpleNamespace(config=config, run_id="id", corpus=SimpleNamespace(description="a text"))
    with progress.bars:
        progress.started(plan, 0)  # type: ignore[arg-type]
        progress.evaluated(0, 5.5)
        for step in (1, 2):
            progress.stepped(SimpleNamespace(step=step, loss=4.0 + step, events=[]), 12_345.0)  # type: ignore[arg-type]
        progress.evaluated(2, 3.25)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("name", ["e3m4", "a_name_that_leaves_no_room_for_anything_beside_it_on_a_terminal"])
def test_the_bar_of_a_run_fits_and_ends_with_its_last_evaluation(name):
    line = [line for line in shown(name, force_terminal=True, force_interactive=True) if "val" in line][-1]
    assert "2/2 loss 6.000  val 3.250  12.3k tok/s" in line
    assert line.rstrip().endswith(" s")
    assert "━━━━━" in line
    assert name[-8:] in line


def test_a_dumb_terminal_gets_the_lines_of_a_log():
    lines = shown("e3m4", force_terminal=True, _environ={"TERM": "dumb"})
    assert lines[0] == "id: 2 steps on a text"
    assert "validation loss 3.2500" in lines[-1]
    assert not any("━" in line for line in lines)
