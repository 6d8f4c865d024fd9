"""The study: settings found from the configs, statistics over seeds, every part of the report, and its data files."""

import csv
import json
import math
import re
import time
from html import unescape

import numpy as np
import pytest

from altgrad.analysis import is_study, write_study
from altgrad.analysis.comparison_report import write_report
from altgrad.analysis.layers import BUCKETS, layer_history, layer_type, mean_history, nan_mean, worst_loss
from altgrad.analysis.study import bucket_means, load_study
from altgrad.analysis.study_figures import aligned_validation, band_figure, ranking_figure, seeds_short, seeds_text
from altgrad.analysis.study_report import rank_study, study_headline
from altgrad.analysis.study_tables import optimizer_table, runs_table, sweet_spot_table
from altgrad.errors import ReportError
from altgrad.records.run import Curve
from tests.run_folders import EXCESS, make_run

SEEDS = range(4)


def make_study(
    root, formats=("FP32", "E3M4", "E1M6", "E7M0"), optimizers=("adamw", "manifold_adamw"), seeds=SEEDS, **options
):
    for optimizer in optimizers:
        for fmt in formats:
            for seed in seeds:
                frozen = fmt == "E7M0" and optimizer == "adamw"
                make_run(
                    root,
                    fmt,
                    seed=seed,
                    steps=100,
                    optimizer=optimizer,
                    collapse="freeze" if frozen else None,
                    onset=30 + seed,
                    excess=EXCESS[fmt] * (1.0 if optimizer == "adamw" else 0.4),
                    **options,
                )
    return root


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"), monitor_interval=25)


@pytest.fixture(scope="module")
def study(folder):
    return load_study(folder)


@pytest.fixture(scope="module")
def page(folder):
    return write_study(folder, folder / "out" / "study.html")


def test_every_run_is_graded_beside_fp32_of_its_seed(study):
    rows = [
        [cell if isinstance(cell, str) else cell.text for cell in row] for row in runs_table(study, study.folder).rows
    ]
    assert {row[6] for row in rows if row[1].startswith("FP32")} == {"completed"}
    assert {row[6] for row in rows if row[1].startswith("E3M4")} <= {"on par", "behind"}
    assert all(row[6].startswith("froze, step") for row in rows if "collapsed" in row[6] or "froze" in row[6])
    alone = study.quantized[0].runs[0]
    assert alone.verdict_beside(None) == alone.row["verdict"]


def test_settings_are_what_differs_besides_the_seed(study):
    assert study.axes == ["fp8_format", "optimizer.name"]
    assert len(study.settings) == 8
    assert {len(s.runs) for s in study.settings} == {4}
    assert "E3M4 manifold adamw" in [s.label for s in study.settings]


def test_an_axis_that_follows_from_another_is_no_axis(tmp_path):
    for optimizer, lr in (("adamw", 1e-3), ("madam", 0.01)):
        for seed in (1, 2):
            make_run(
                tmp_path,
                "E3M4",
                seed=seed,
                steps=10,
                optimizer=optimizer,
                config={"optimizer": {"name": optimizer, "lr": lr}},
            )
    assert load_study(tmp_path).axes == ["fp8_format", "optimizer.name"]


def test_any_other_key_can_be_an_axis(tmp_path):
    for lr in (1e-3, 3e-4):
        make_run(tmp_path, "E3M4", steps=10, name=f"lr{lr}", config={"optimizer": {"name": "adamw", "lr": lr}})
    study = load_study(tmp_path)
    assert study.axes == ["fp8_format", "optimizer.lr"]
    assert sorted(s.label for s in study.settings) == ["E3M4 lr 0.0003", "E3M4 lr 0.001"]


def test_a_switch_that_differs_is_named_on_or_off(tmp_path):
    for on in (True, False):
        make_run(tmp_path, "E7M0", steps=5, name=f"shift-{on}", config={"enable_emergency_shift": on})
    assert sorted(s.label for s in load_study(tmp_path).settings) == [
        "E7M0 emergency shift off",
        "E7M0 emergency shift on",
    ]


def test_what_nearly_all_settings_have_is_said_once_and_not_in_each_name(tmp_path):
    for fmt, on in (("E7M0", False), ("E5M2", False), ("E3M4", False), ("E3M4", True)):
        make_run(tmp_path, fmt, steps=5, name=f"shift-{on}", config={"enable_emergency_shift": on})
    found = load_study(tmp_path)
    assert sorted(s.label for s in found.settings) == ["E3M4", "E3M4 emergency shift on", "E5M2", "E7M0"]
    text = write_study(tmp_path, tmp_path / "study.html").read_text()
    assert "Where a name does not say: emergency shift off." in text


def test_a_setting_without_what_nearly_all_have_says_so(tmp_path):
    for fmt, clip in (("E5M2", 1.0), ("E3M4", 1.0), ("E4M3", 1.0), ("E5M2", None)):
        make_run(tmp_path, fmt, steps=5, name=f"{fmt}-{clip}", config={"optimizer": {"grad_clip": clip}})
    found = load_study(tmp_path)
    assert sorted(s.label for s in found.settings) == ["E3M4", "E4M3", "E5M2", "E5M2 grad clip none"]


def test_each_setting_has_the_baseline_of_its_optimizer(study):
    for setting in study.quantized:
        baseline = study.baseline_of(setting)
        assert baseline.is_baseline
        assert baseline.values["optimizer.name"] == setting.values["optimizer.name"]


def test_the_ranking_pairs_by_seed_and_leaves_out_the_collapsed(study):
    ranked = {r.name: r for r in rank_study(study)}
    e3m4 = ranked["E3M4 adamw"].against_baseline.difference
    runs = {s.label: {r.seed: r for r in s.runs} for s in study.settings}
    by_hand = [runs["E3M4 adamw"][s].row["final_val_loss"] - runs["FP32 adamw"][s].row["final_val_loss"] for s in SEEDS]
    assert e3m4.mean == pytest.approx(np.mean(by_hand))
    assert e3m4.seeds == tuple(SEEDS)
    assert ranked["E7M0 adamw"].place == "collapsed in 4 of 4"
    assert ranked["E1M6 adamw"].best > ranked["E3M4 adamw"].best


def test_the_headline_says_what_the_seeds_can_tell(study, tmp_path):
    said = study_headline(study, rank_study(study))
    assert "E3M4" in said
    assert "E7M0 adamw froze in 4 of 4 runs" in said
    one = load_study(make_study(tmp_path, ("FP32", "E3M4", "E1M6"), ("adamw",), [1]))
    assert "one seed, which ranks nothing" in study_headline(one, rank_study(one))


def test_a_collapsed_run_that_trained_on_keeps_its_final_loss_and_is_not_ranked(tmp_path):
    for seed in SEEDS:
        make_run(tmp_path, "FP32", seed=seed, steps=100)
        make_run(tmp_path, "E3M4", seed=seed, steps=100, collapse="freeze", onset=60)  # detected at the last step
        make_run(tmp_path, "E5M2", seed=seed, steps=100, collapse="freeze", onset=30)  # ended there
    ranked = {r.name: r for r in rank_study(load_study(tmp_path))}
    assert ranked["E3M4"].best is None
    assert ranked["E3M4"].against_baseline.difference.n == 4
    assert ranked["E5M2"].estimate is None


def test_grid_aware_optimizers_are_compared_with_standard_ones_all_else_equal(study):
    table = optimizer_table(study)
    rows = {row[0]: row for row in table.rows}
    assert set(rows) == {"E3M4 manifold adamw", "E1M6 manifold adamw"}  # E7M0 adamw has no completed run
    assert rows["E1M6 manifold adamw"][1] == "E1M6 adamw"
    assert rows["E1M6 manifold adamw"][6] == "grid-aware lower"


def test_the_page_has_every_part(page):
    html = page.read_text()
    for anchor in ("ranking", "curves", "map", "failures", "optimizers", "layers", "runs"):
        assert f'id="{anchor}"' in html
    assert html.count('class="chart intervals timeline"') == 1
    assert html.count('class="heat-table"') == 1
    assert html.count('class="layer-section"') == 6
    assert 'class="chart strips"' in html
    assert "froze 4/4" in html
    assert html.count("failure report</a>") == 4
    assert html.count('">e3m4_uniform-s0-') == 2  # one link for each optimizer
    assert len(html) < 8e6
    assert "Infinity" not in html.split("<body>")[1].replace("−∞", "")


def test_every_figure_says_n_and_its_seeds(page):
    html = page.read_text()
    for caption in html.split("<figcaption>")[1:]:
        assert "n = " in caption.split("</figcaption>")[0], caption[:200]
    for section in html.split('class="layer-section"')[1:]:
        assert "n = 4, seeds 0 to 3" in section[:300]


def test_markdown_and_data_files_hold_the_same(page, study):
    markdown = page.with_suffix(".md").read_text()
    assert "E7M0 adamw froze in 4 of 4 runs" in markdown
    rows = read_csv(page.parent / "study-runs.csv")
    assert len(rows) == 32
    row = next(r for r in rows if r["setting"] == "E3M4 adamw" and r["seed"] == "2")
    base = next(r for r in rows if r["setting"] == "FP32 adamw" and r["seed"] == "2")
    assert float(row["against_baseline"]) == pytest.approx(float(row["final_val_loss"]) - float(base["final_val_loss"]))
    settings = {r["setting"]: r for r in read_csv(page.parent / "study-settings.csv")}
    found = settings["E3M4 adamw"]
    assert float(found["low"]) <= float(found["difference"]) <= float(found["high"])
    assert float(found["bootstrap_high"]) - float(found["bootstrap_low"]) < float(found["high"]) - float(found["low"])
    assert settings["E7M0 adamw"]["collapsed"] == "4"


def test_parquet_is_the_same_table(page):
    from pyarrow import parquet

    table = parquet.read_table(page.parent / "study-runs.parquet").to_pylist()
    rows = read_csv(page.parent / "study-runs.csv")
    assert len(table) == len(rows)
    assert [r["final_loss"] for r in table] == [float(r["final_loss"]) for r in rows]
    assert not list(page.parent.glob(".*"))


def test_runs_of_different_corpora_are_refused_or_marked(tmp_path):
    make_run(tmp_path, "E3M4", steps=10)
    make_run(tmp_path, "E5M2", steps=10, data_fingerprint="another")
    with pytest.raises(ReportError, match="corpus differs"):
        write_study(tmp_path)
    assert "compared by force" in write_study(tmp_path, force=True).read_text()


def test_unfinished_failed_and_torn_runs_are_told_and_left_out(tmp_path):
    make_study(tmp_path, ("FP32", "E3M4"), ("adamw",))
    make_run(tmp_path, "E3M4", seed=99, steps=100, finished=False)
    dead = make_run(tmp_path, "E3M4", seed=98, steps=100, finished=False)
    (dead / "crashes.json").write_text(json.dumps({"state": "failed"}))
    torn = make_run(tmp_path, "E3M4", seed=97, steps=100)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    study = load_study(tmp_path)
    assert any("1 line of metrics.jsonl in 1 run could not be used" in w for w in study.remarks)
    assert any("1 run is unfinished" in w for w in study.remarks)
    assert any("1 run is failed" in w for w in study.remarks)
    (setting,) = study.quantized
    assert set(setting.contender.losses) == {*SEEDS, 97}


def test_a_study_of_one_run_and_of_no_baseline(tmp_path):
    make_run(tmp_path, "E5M2", steps=20, collapse="nonfinite", onset=5)
    html = write_study(tmp_path).read_text()
    assert "E5M2 went non-finite in 1 of 1 run" in html
    assert "noise floor is not known" in html


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ReportError, match="no run folders"):
        write_study(tmp_path)
    make_run(tmp_path, steps=5)
    with pytest.raises(ReportError, match="html"):
        write_study(tmp_path, tmp_path / "study.pdf")
    assert write_study(tmp_path, tmp_path / "out").name == "study.html"


def test_what_is_a_study(tmp_path):
    runs = [make_run(tmp_path, fmt, seed=seed, steps=5) for fmt in ("FP32", "E3M4") for seed in (1, 2)]
    assert is_study(runs)
    assert not is_study([runs[0], runs[2]])
    assert not is_study(runs[:1])
    page = write_study(runs, tmp_path / "out" / "report.html").read_text()
    assert "4 runs" in page


def test_bucket_means():
    curve = Curve.of([(step, float(step)) for step in range(1, 101)])
    means = bucket_means(curve, 100, 10)
    assert means.tolist() == [5.5 + 10 * i for i in range(10)]
    holes = Curve.of([(1, math.nan), (2, 2.0), (95, math.inf)])
    assert bucket_means(holes, 100, 10)[0] == 2.0
    assert np.isnan(bucket_means(holes, 100, 10)[1:]).all()


def test_records_of_every_tenth_step_are_one_line():
    every_tenth = Curve.of([(step, float(step)) for step in range(10, 101, 10)])
    means = bucket_means(every_tenth, 100, 100)
    assert np.isnan(means[:9]).all()
    assert means[9:].tolist() == list(range(10, 101))
    lost = Curve.of([(10, 1.0), (20, math.nan), (30, 3.0)])
    assert np.isnan(bucket_means(lost, 100, 100)[10:29]).all()


def test_a_setting_has_one_colour_in_all_figures_of_a_page(tmp_path, monkeypatch):
    excess = {"FP32": 0.0, "NVFP4": 0.3, "MXFP4": 0.2, "MXFP8": 0.1}
    monkeypatch.setitem(globals(), "EXCESS", excess)
    study = load_study(make_study(tmp_path, tuple(excess), ("adamw",), (1, 2)))
    ranked = rank_study(study)
    figures = ranking_figure(study, ranked, None), band_figure(study, ranked)
    colours = [
        dict(re.findall(r'class="(?:interval-row|end-label) (s\d)"[^>]*data-group="(.*?)"', str(f))) for f in figures
    ]
    assert len(colours[0]) == 3
    assert colours[0] == colours[1]


def test_layer_history_holds_between_measurements_and_not_beyond():
    records = [
        {"step": s, "layer": "a", "role": "weight", "stall": v, "sqnr_db": "inf"} for s, v in ((1, 0.1), (50, 0.5))
    ]
    history = layer_history(records, 100)
    assert set(history) == {("stall", "weight", "a")}
    values = history["stall", "weight", "a"]
    half = 49 * BUCKETS // 100
    assert np.allclose(values[:half], 0.1)
    assert values[half] == pytest.approx(0.5)
    assert np.isnan(values[half + 1 :]).all()


def test_layers_are_averaged_over_the_runs_that_measured_them():
    a = layer_history([{"step": 1, "layer": "a", "role": "weight", "stall": 0.2}], 10)
    b = layer_history(
        [
            {"step": 1, "layer": "a", "role": "weight", "stall": 0.4},
            {"step": 1, "layer": "b", "role": "weight", "stall": 1.0},
        ],
        10,
    )
    mean = mean_history([a, b])
    assert mean["stall", "weight", "a"][0] == pytest.approx(0.3)
    assert mean["stall", "weight", "b"][0] == pytest.approx(1.0)
    assert worst_loss(mean, "update") == (pytest.approx(1.0), "stall", "weight", "b")
    assert worst_loss(mean, "forward") is None


def test_nan_mean_of_nothing_is_nan_without_a_warning():
    assert np.isnan(nan_mean(np.full((3, 2), np.nan))).all()


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("blocks.3.attn.qkv", "blocks.*.attn.qkv"),
        ("h.11.mlp.0", "h.*.mlp.*"),
        ("lm_head", "lm_head"),
        ("conv2.w1", "conv2.w1"),
    ],
)
def test_layer_types(layer, kind):
    assert layer_type(layer) == kind


def test_the_sweet_spot_is_the_format_of_the_highest_sqnr(tmp_path):
    for fmt, better in (("E3M4", 6.0), ("E5M2", 0.0)):
        for seed in range(3):
            run = make_run(tmp_path, fmt, seed=seed, steps=20)
            noise = np.random.default_rng([seed, len(fmt)]).normal(0, 0.1)
            lines = [
                {
                    "kind": "monitor",
                    "step": 10,
                    "layer": f"blocks.{i}.mlp",
                    "role": role,
                    "sqnr_db": 20 + noise + (better if role == "weight" else 0),
                }
                for i in range(2)
                for role in ("weight", "input")
            ]
            with (run / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    rows = {row[1]: row for row in sweet_spot_table(load_study(tmp_path)).rows}
    assert rows["weight w"][:3] == ["blocks.*.mlp", "weight w", "E3M4"]
    assert rows["input x"][2].startswith("unresolved: ")


def test_seeds_in_words():
    assert seeds_text([3, 1, 2]) == "n = 3, seeds 1 to 3"
    assert seeds_text([7]) == "n = 1, seed 7"
    assert seeds_text([1, 5]) == "n = 2, seeds 1, 5"
    assert seeds_short([1, 2, 3]) == "3 (1 to 3)"
    assert seeds_short([7]) == "1 (7)"


def test_validation_curves_are_aligned_by_step(study):
    runs = next(s for s in study.settings if s.label == "E3M4 adamw").runs
    steps, rows = aligned_validation(runs)
    assert steps.tolist() == [50, 100]
    assert rows.shape == (4, 2)
    assert np.isfinite(rows).all()


def test_many_runs_stay_fast(tmp_path):
    """A tenth of the 2,000 runs that `python -m benchmarks.long_run study` reports on, within a tenth of their time."""
    for seed in range(20):
        for fmt in ("FP32", "E3M4", "E5M2", "E1M6", "E7M0"):
            make_run(tmp_path, fmt, seed=seed, steps=300, eval_interval=50)
    start = time.process_time()
    page = write_study(tmp_path)
    assert time.process_time() - start < 6
    assert page.stat().st_size < 8e6


def test_long_names_of_layers_are_short_on_maps_and_say_what_they_leave_out(tmp_path):
    layers = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
    for fmt in ("FP32", "E7M0"):
        make_run(
            tmp_path, fmt, steps=50, monitor_interval=10, layers=layers, collapse="freeze" if fmt == "E7M0" else None
        )
    study_page = write_study(tmp_path, tmp_path / "study.html").read_text()
    report = write_report([p for p in tmp_path.iterdir() if p.is_dir()], tmp_path / "report.html").read_text()
    for text in (study_page, report):
        assert 'stands for "model.layers."' in unescape(text)
        assert "…0.self_attn.q_proj" in text
        assert "<title>model.layers.0.self_attn.q_proj" in text
