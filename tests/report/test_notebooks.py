"""What notebooks show: short representations, tables as well-formed HTML with foreign text escaped, charts with data in them."""

import json
from xml.etree import ElementTree

import matplotlib
import pytest
import torch

from altgrad.advise.advice import Advice
from altgrad.advise.choose import Budget, Choice
from altgrad.analysis import plots
from altgrad.errors import FormatError, OptionError, ReportError
from altgrad.formats.catalog import BLOCK_FORMATS
from altgrad.formats.scalar_rows import FORMAT_REGISTRY
from altgrad.monitor import Monitor
from altgrad.nn import quantize_model, uniform
from altgrad.nn import recipe as named_recipe
from altgrad.quantization import quantize_with_stats
from altgrad.records.run import read_run
from altgrad.report.notebook import notebook_table
from altgrad.training.format_runner import FormatExperimentRunner
from tests.training.tiny import TINY

matplotlib.use("agg")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    runs = str(tmp_path_factory.mktemp("runs"))
    return FormatExperimentRunner({**TINY, "fp8_format": "E3M4", "max_steps": 12, "runs_dir": runs}).run()


def shown(thing) -> str:
    html = thing._repr_html_()
    ElementTree.fromstring(html)  # well formed, or it raises
    return html


@pytest.mark.parametrize("fmt", [*FORMAT_REGISTRY.values(), *BLOCK_FORMATS.values()], ids=str)
def test_formats_show_their_facts_and_have_a_short_repr(fmt):
    assert fmt.name in shown(fmt)
    assert "source" in shown(fmt)
    assert len(repr(fmt)) < 120
    assert fmt.name in repr(fmt)


def test_recipes_manifests_statistics_monitors_and_results_show_themselves(result):
    recipe = uniform("E4M3", grad="E5M2")
    assert repr(recipe) == "Recipe(x:E4M3 w:E4M3 dy:E5M2)"
    assert repr(named_recipe("nvfp4_te")) == "Recipe(nvfp4_te)"
    budget = Budget()
    advice = Advice(
        recipe,
        Choice({("head", "input"): "E4M3"}, {("head", "input"): ["E3M4"]}, 8.0),
        [],
        budget,
        gradient_snr_db=21.0,
    )
    assert repr(advice) == "Advice(1 operand, 8 bits a value, gradients at 21.0 dB)"
    assert "E3M4" in shown(advice)
    assert "dy:E5M2" in shown(recipe)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    manifest = quantize_model(model, recipe)
    assert "1 layer quantized" in shown(manifest)
    assert repr(manifest) == "Manifest(1 layer quantized, 0 skipped)"
    stats = quantize_with_stats(torch.tensor([1.0, 1e-9, 500.0]), "E4M3", 1.0)[1]
    assert repr(stats) == "QuantStats(amax=500, overflow=33.33%, underflow=33.33%, sqnr=19.7 dB)"
    assert "33.33%" in shown(stats)
    monitor = Monitor(model, torch.optim.SGD(model.parameters()))
    assert "nothing measured yet" in shown(monitor)
    assert repr(monitor) == "Monitor(nothing measured yet)"
    monitor.close()
    assert "validation loss" in repr(result)
    assert result.run_id in shown(result)


def test_foreign_text_is_escaped_and_long_tables_are_counted():
    table = notebook_table("<script>", [(f"<b>{i}", "&") for i in range(500)], ("a",))
    assert "<script>" not in table
    assert "and 300 more" in table
    ElementTree.fromstring(table)


def test_formats_and_errors_are_drawn_in_the_reports_colours():
    ax = plots.plot_formats(["E0M7", "E4M3"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["E0M7", "E4M3"]
    assert [len(marks.get_segments()) for marks in ax.collections] == [127, 126]
    ax = plots.plot_error("E4M3", scale=2.0)
    (line,) = ax.lines
    error = dict(zip(line.get_xdata() - 1.5, line.get_ydata()))  # by floor(log2(x / scale))
    assert error[0.0] == pytest.approx(1 / 17, rel=0.02)  # half a step of 1/8, from 1 + 1/16 on
    assert error[-11.0] == 1.0  # underflow
    matplotlib.pyplot.close("all")


def test_runs_are_drawn_with_their_collapse(result, tmp_path):
    ax = plots.plot_run(result.run_dir)
    assert len(ax.lines[0].get_xdata()) == 12
    run = read_run(result.run_dir)
    assert len(plots.plot_run([run, run]).lines) == 4
    matplotlib.pyplot.close("all")
    (tmp_path / "config.yaml").write_text(json.dumps(TINY))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="holds no step"):
        plots.plot_run(tmp_path)


def test_what_cannot_be_drawn_is_said(monkeypatch):
    with pytest.raises(FormatError, match="MXFP8 is a block format; plot its element E4M3"):
        plots.plot_format("MXFP8")
    with pytest.raises(OptionError, match=r"scale -1 is not positive"):
        plots.plot_error("E4M3", scale=-1)
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install altgrad\[plot\]"):
        plots.plot_format("E4M3")
