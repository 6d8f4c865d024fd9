"""Matrix files: what they expand to, what they call it, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from altgrad.errors import AltGradError, ConfigError, SweepError
from altgrad.sweep.matrix import Matrix, matrix_from_mapping, read_matrix

BASE = {"name": "study", "seed": 42, "max_steps": 100, "weight_storage": "grid", "optimizer": {"lr": 1e-3}}


def matrix(**sections) -> Matrix:
    return matrix_from_mapping({"base": BASE, **sections})


def shown(m: Matrix) -> list[tuple]:
    return [(v.config.name, v.config.seed) for v in m.expand()]


def test_a_grid_is_every_combination_whole_variants_of_a_seed_first() -> None:
    m = matrix(matrix={"fp8_format": ["E3M4", "E5M2"], "optimizer.lr": [1e-3, 3e-3]}, seeds=[7, 8])
    variants = m.expand()
    facts = [(v.config.seed, v.config.fp8_format, v.config.optimizer.lr) for v in variants]
    assert facts == [
        (s, f, lr) for s in (7, 8) for f in ("E3M4", "E5M2") for lr in (1e-3, 3e-3)
    ]  # fmt: skip
    assert {v.config.weight_storage for v in variants} == {"grid"}
    assert {v.config.checkpoint_dir for v in variants} == {None}
    assert {v.config.runs_dir for v in m.expand(runs_dir="elsewhere")} == {"elsewhere"}


def test_names_say_where_a_run_differs_from_the_base() -> None:
    m = matrix(
        name="f",
        matrix={"fp8_format": ["E3M4"], "optimizer.lr": [1e-3, 0.003], "weight_storage": ["grid", "master"]},
        overrides={"max_steps": 50},
    )
    assert [n for n, _ in shown(m)] == ["f-e3m4", "f-e3m4-master", "f-e3m4-lr0.003", "f-e3m4-lr0.003-master"]


def test_adding_an_axis_or_values_or_seeds_keeps_the_runs_that_were_there() -> None:
    small = matrix(matrix={"fp8_format": ["E3M4"]}, seeds=2)
    large = matrix(matrix={"fp8_format": ["E5M2", "E3M4"], "weight_storage": ["master", "grid"]}, seeds=4)
    content = {v.config.model_dump_json() for v in small.expand()}
    assert content < {v.config.model_dump_json() for v in large.expand()}


def test_sections_move_keys_together_and_nested_axes_are_dotted_ones() -> None:
    m = matrix(matrix={"optimizer": [{"name": "adamw"}, {"name": "sgd", "lr": 0.1}], "model": {"n_layer": [2]}})
    assert [(v.config.optimizer.name, v.config.optimizer.lr, v.config.model.n_layer) for v in m.expand()] == [
        ("adamw", 1e-3, 2), ("sgd", 0.1, 2),
    ]  # fmt: skip
    assert [n for n, _ in shown(m)] == ["study-n_layer2", "study-sgd-lr0.1-n_layer2"]


def test_include_adds_small_grids_and_exclude_takes_combinations_out() -> None:
    m = matrix(
        matrix={"fp8_format": ["E3M4", "E5M2"], "optimizer": [{"name": "adamw"}, {"name": "sgd"}]},
        include=[{"fp8_format": "FP32", "weight_storage": "master"}, {"fp8_format": ["E1M6", "E0M7"], "seed": 3}],
        exclude=[{"fp8_format": "E5M2", "optimizer.name": ["sgd", "lion"]}, {"seed": 2, "fp8_format": "E3M4"}],
        seeds=[1, 2],
    )
    assert shown(m) == [
        ("study-e3m4", 1), ("study-e3m4-sgd", 1), ("study-e5m2", 1), ("study-master", 1),
        ("study-e5m2", 2), ("study-master", 2), ("study-e1m6", 3), ("study-e0m7", 3),
    ]  # fmt: skip


def test_an_explicit_list_needs_no_axes() -> None:
    assert shown(matrix(include=[{"fp8_format": "E3M4"}])) == [("study-e3m4", 42)]


def test_open_mappings_are_one_value_and_accept_any_key_below_them() -> None:
    m = matrix(matrix={"monitor.schedule": [{"stall": {"every": 5}}, {}], "optimizer.options.foo": [1, 2]})
    schedules = [v.config.monitor.schedule for v in m.expand()]
    assert schedules == [{"stall": {"every": 5}}] * 2 + [{}] * 2
    assert [v.config.optimizer.options for v in m.expand()] == [{"foo": 1}, {"foo": 2}] * 2


def test_overrides_from_the_command_line_replace_axes_seeds_or_settings() -> None:
    m = matrix(matrix={"fp8_format": ["E3M4", "E5M2"]}, seeds=[1, 2, 3])
    n = m.with_overrides(["fp8_format=[E1M6,E7M0]", "seeds=[5]", "max_steps=9", "optimizer.lr=2e-3"])
    assert [(v.config.fp8_format, v.config.seed, v.config.max_steps, v.config.optimizer.lr) for v in n.expand()] == [
        ("E1M6", 5, 9, 2e-3), ("E7M0", 5, 9, 2e-3),
    ]  # fmt: skip
    assert [v.config.seed for v in m.with_overrides(["fp8_format=E1M6", "seeds=2"]).expand()] == [42, 43]


def test_a_base_file_is_found_beside_the_matrix(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: from_file\nmax_steps: 3\n")
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "formats.yaml"
    file.write_text("base: ../base.yaml\nmatrix:\n  optimizer.lr: [1e-3, 3e-4]\n")
    assert [(v.config.name, v.config.max_steps, v.config.optimizer.lr) for v in read_matrix(file).expand()] == [
        ("from_file", 3, 1e-3), ("from_file-lr0.0003", 3, 3e-4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "empty matrix, there is no axis"),
        ({"matrix": {"fp8_format": []}}, "axis 'fp8_format' has no values"),
        ({"matrix": {"optimizer.learning_rate": [1]}}, "'optimizer.learning_rate' names no config key; did you mean 'optimizer"),
        ({"matrix": {"fp8_formt": ["E3M4"]}}, "'fp8_formt' names no config key; did you mean 'fp8_format'"),
        ({"matrix": {"lr": [1]}}, "'lr' names no config key; did you mean 'optimizer.lr'"),
        ({"include": [{"sed": 1}]}, "'sed' names no config key; did you mean 'seed'"),
        ({"overrides": {"max_step": 1}, "matrix": {"seed": [1]}}, "'max_step' names no config key; did you mean 'max_steps'"),
        ({"matrix": {"runs_dir": ["a", "b"]}}, "'runs_dir' is set by the sweep; choose the folder with --out"),
        ({"matrix": {"fp8_format": ["E3M4", "e3m4"]}}, r"same run twice: \(fp8_format=E3M4, seed=42\) and \(fp8_format=e3m4"),
        ({"matrix": {"fp8_format": ["E3M4"]}, "include": [{"fp8_format": "E3M4"}]}, "same run twice"),
        ({"matrix": {"fp8_format": ["E3M4"]}, "seeds": [1, 1]}, "same run twice"),
        ({"matrix": {"fp8_format": ["E3M4", "E9M9"]}}, r"\{fp8_format: E9M9, seed: 42\}.*E9M9"),
        ({"matrix": {"model.n_head": [3]}}, "n_head 3 does not divide n_embd 128; use n_head 2"),
        ({"matrix": {"fp8_format": ["E3M4"]}, "exclude": [{"fp8_format": "E3M4"}]}, "every combination is excluded"),
        ({"matrix": {"fp8_format": ["E3M4"]}, "exclude": [{"fp8_format": "E5M2"}]}, "matches no combination"),
        ({"matrix": {"fp8_format": ["E3M4"]}, "exclude": [{}]}, "entry of exclude is empty"),
        ({"matrix": {"fp8_format": ["E3M4"]}, "seeds": 0}, "0 seeds; use at least 1"),
        ({"matrix": {"fp8_format": ["E3M4"]}, "seeds": ["a"]}, "neither a list of integers nor how many"),
        ({"matrix": {"fp8_format": ["E3M4"], "seed": [1]}, "seeds": [2]}, "both set the seeds"),
        ({"matirx": {"fp8_format": ["E3M4"]}}, "unknown section 'matirx'; did you mean 'matrix'"),
        ({"matrix": ["E3M4"]}, "matrix holds .*, not keys with values"),
        ({"include": {"seed": 1}}, "include holds .*, not a list"),
        ({"base": None, "matrix": {"seed": [1]}}, "has no base"),
        ({"base": "nowhere.yaml", "matrix": {"seed": [1]}}, "nowhere.yaml does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_value_and_remedy(sections: dict, message: str) -> None:
    with pytest.raises(AltGradError, match=message):
        matrix(**sections).expand()


def test_bad_files_and_overrides_are_refused(tmp_path: Path) -> None:
    (tmp_path / "formats.yaml").write_text("base: [")
    with pytest.raises(SweepError, match=re.escape("format.yaml does not exist; did you mean")):
        read_matrix(tmp_path / "format.yaml")
    with pytest.raises(SweepError, match="not valid YAML"):
        read_matrix(tmp_path / "formats.yaml")
    (tmp_path / "formats.yaml").write_text("- a\n")
    with pytest.raises(SweepError, match="holds no mapping"):
        read_matrix(tmp_path / "formats.yaml")
    m = matrix(matrix={"fp8_format": ["E3M4"]})
    with pytest.raises(SweepError, match="has no key and value"):
        m.with_overrides(["max_steps"])
    with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
        m.with_overrides(["max_stps=3"])


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "experiments" / "matrix").glob("*.yaml")), ids=str)
def test_the_project_s_own_matrices_expand(file: Path) -> None:
    variants = read_matrix(file).expand()
    assert len({variant.config.name for variant in variants}) > 1
    assert any(not variant.config.quantized for variant in variants), (
        "without a baseline there is nothing to compare with"
    )


def test_the_formats_matrix_is_what_its_first_lines_say() -> None:
    variants = read_matrix(Path(__file__).parents[2] / "experiments" / "matrix" / "formats.yaml").expand()
    assert len(variants) == 51
    names = [variant.config.name for variant in variants[:17]]
    assert names[0:2] == ["formats-e0m7", "formats-e0m7-grid"]
    assert names[-1] == "formats"
    assert {variant.config.seed for variant in variants} == {42, 43, 44}
