"""One language for formats: every spelling of a recipe is one experiment, and everything downstream takes any recipe."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from altgrad.analysis.study import load_study
from altgrad.errors import ConfigError
from altgrad.nn import Override, Recipe, layer_recipe, uniform
from altgrad.quantization.stability import EmergencyMantissaShift, wider_block
from altgrad.records.run import Run
from altgrad.sweep import matrix_from_mapping, read_matrix
from altgrad.sweep.estimate import Measurement, estimate_run
from altgrad.training.config.formats import format_facts, recipe_of, short_keys
from altgrad.training.config.identity import experiment_hash
from altgrad.training.config.loading import dump_config, load_config
from altgrad.training.format_runner import FormatExperimentRunner
from altgrad.training.trainer import Trainer
from tests.training.test_trainer import poisoned_at
from tests.training.tiny import TINY, losses, tiny_config, tiny_corpus, tiny_trainer, train

ROOT = Path(__file__).parents[2]
HASHES = json.loads(Path(__file__).with_name("committed_hashes.json").read_text())
MIXED = {"uniform": "E4M3", "grad": "E5M2", "overrides": [{"name": "head", "recipe": None}]}


def digest(config) -> str:
    return experiment_hash(load_config(config), "data", "1")


class TestIdentity:
    """The hashes were taken before the key `formats` was there."""

    @pytest.mark.parametrize("settings", HASHES["settings"])
    def test_settings_keep_their_hash(self, settings):
        overrides = [settings] if "{" in settings and not settings.startswith("fp8") else settings.split(" ")
        if "scaling={" in settings:
            overrides = ["fp8_format=E4M3", "scaling={policy: delayed, history: 4}", "rounding=stochastic"]
        assert experiment_hash(load_config(None, overrides), "data", "1") == HASHES["settings"][settings]

    def test_the_committed_experiments_keep_their_hashes(self):
        found = {}  # matrices that came later have no hash of before
        for path in sorted((ROOT / "experiments" / "configs").glob("*.yaml")):
            found[str(path.relative_to(ROOT))] = digest(path)
        for folder in ("custom_formats", "matrix"):
            for path in sorted((ROOT / "experiments" / folder).glob("*.yaml")):
                for variant in read_matrix(path).expand(runs_dir="x"):
                    name = f"{path.relative_to(ROOT)}: {variant.config.name} {variant.config.seed}"
                    found[name] = experiment_hash(variant.config, "data", "1")
        assert {name: found.get(name) for name in HASHES["experiments"]} == HASHES["experiments"]

    @pytest.mark.parametrize(
        ("short", "formats"),
        [
            ("fp8_format=E4M3", "E4M3"),
            ("fp8_format=E4M3", "e4m3"),
            ("fp8_format=E4M3", {"uniform": "E4M3"}),
            ("fp8_format=mxfp8", "MXFP8"),
            ("fp8_format=E4M3 gradient_format=E5M2", "x:E4M3 w:E4M3 dy:E5M2"),
            ("fp8_format=E4M3 gradient_format=E5M2", {"uniform": "E4M3", "grad": "E5M2"}),
            ("fp8_format=E4M3 gradient_format=E5M2", uniform("E4M3", grad="E5M2").to_dict()),
            ("fp8_format=E5M2 scaling=none weight_storage=grid", {"uniform": "E5M2", "scaling": "none", "storage": {"format": "E5M2", "scale": 1.0}}),
            ("fp8_format=E3M4 weight_storage=grid", "x:E3M4 w:E3M4(storage) dy:E3M4 grid(E3M4,nearest_even,every=10)"),
            ("fp8_format=E5M2 overflow=native scaling=none", {"uniform": "E5M2", "overflow": "native", "scaling": "none"}),
        ],
    )  # fmt: skip
    def test_two_spellings_are_one_experiment(self, short, formats):
        assert digest({"formats": formats}) == HASHES["settings"][short]
        assert recipe_of(load_config({"formats": formats})) == recipe_of(load_config(None, shlex.split(short)))

    def test_what_the_short_keys_cannot_say_is_one_experiment_under_both_whole_keys(self):
        whole = Recipe.from_dict(MIXED)
        spelled = [MIXED, whole.to_dict(), whole.text]
        assert len({digest({"formats": one}) for one in spelled} | {digest({"recipe": whole.to_dict()})}) == 1
        assert digest({"formats": MIXED}) != digest({"formats": {**MIXED, "grad": "E4M3"}})

    def test_short_keys_are_found_exactly_where_they_say_the_recipe(self):
        grid = uniform("E3M4", storage="grid", storage_rounding="stochastic", scaling="delayed")
        keys = short_keys(grid)
        assert keys is not None
        assert recipe_of(keys) == grid
        assert short_keys(uniform("E3M4", weight=None)) is None
        assert short_keys(uniform("E3M4", random_bits=8)) is None
        assert short_keys(Recipe.from_dict(MIXED)) is None
        assert short_keys(None)["fp8_format"] == "FP32"

    def test_gradients_alone_can_be_quantized(self):
        assert recipe_of(load_config(None, ["gradient_format=E5M2"])) == uniform("FP32", grad="E5M2")


class TestSpelling:
    def test_a_later_recipe_replaces_all_that_was_said(self):
        base = {"fp8_format": "E3M4", "weight_storage": "grid", "scaling": "delayed"}
        assert recipe_of(load_config(base, ["formats=E5M2"])) == uniform("E5M2")
        assert recipe_of(load_config({"formats": MIXED}, ["formats={uniform: E5M2}"])) == uniform("E5M2")
        assert recipe_of(load_config({"recipe": MIXED}, ["formats=E5M2"])) == uniform("E5M2")

    def test_a_later_short_key_changes_its_part(self):
        config = load_config({"formats": "E4M3"}, ["rounding=stochastic", "gradient_format=E5M2"])
        assert recipe_of(config) == uniform("E4M3", grad="E5M2", rounding="stochastic")
        with pytest.raises(ConfigError, match=r"fp8_format cannot change the recipe that formats holds.*name='head'"):
            load_config({"formats": MIXED}, ["fp8_format=E3M4"])

    def test_a_key_inside_the_recipe_can_be_set(self):
        assert recipe_of(load_config({"formats": MIXED}, ["formats.grad=E3M4"])).default == layer_recipe(
            "E4M3", grad="E3M4"
        )

    def test_one_document_says_it_once(self):
        for one in ({"formats": "E4M3", "fp8_format": "E5M2"}, {"formats": "E4M3", "recipe": MIXED}):
            with pytest.raises(ConfigError, match="both set the formats"):
                load_config(one)

    @pytest.mark.parametrize(
        "formats", ["E9M9", "x:E4M3 w:E4M3", {"uniform": "E4M3", "gard": "E5M2"}, {"a": 1}, [1], 3]
    )
    def test_what_is_no_recipe_is_said_with_the_key(self, formats):
        with pytest.raises(ConfigError, match="formats"):
            load_config({"formats": formats})

    @pytest.mark.parametrize("formats", ["E4M3", MIXED, "x:E4M3(stochastic) w:E4M3 dy:E5M2", None])
    def test_a_dumped_config_reads_back(self, formats, tmp_path):
        config = load_config({"formats": formats})
        (tmp_path / "c.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "c.yaml") == config


class TestDownstream:
    def test_facts_of_mixed_recipes(self):
        assert format_facts(load_config({"formats": MIXED})) == {
            "format": "x:E4M3 w:E4M3 dy:E5M2; name='head': FP32", "storage": "master", "rounding": "nearest_even",
        }  # fmt: skip
        both = Recipe(
            layer_recipe("E4M3", storage="grid"), (Override(layer_recipe("E4M3", rounding="up"), name="head"),)
        )
        facts = format_facts(load_config({"formats": both.text}))
        assert (facts["storage"], facts["rounding"]) == ("mixed", "mixed")

    def test_axes_over_formats_take_any_spelling(self):
        base = {"name": "study", "seed": 1, "fp8_format": "E3M4", "weight_storage": "grid"}
        axis = ["MXFP8", "x:E4M3 w:E4M3 dy:E5M2", MIXED, "FP32"]
        matrix = matrix_from_mapping({"base": base, "matrix": {"formats": axis, "optimizer.lr": [0.1]}})
        variants = matrix.expand()
        assert [recipe_of(v.config) for v in variants][:3] == [Recipe.from_dict(one) for one in axis[:3]]
        assert recipe_of(variants[3].config) is None
        assert [v.config.name for v in variants][:2] == ["study-mxfp8-lr0.1", "study-x_e4m3_w_e4m3_dy_e5m2-lr0.1"]
        twice = matrix_from_mapping({"base": base, "matrix": {"formats": ["E4M3", {"uniform": "E4M3"}]}})
        with pytest.raises(Exception, match="the same run twice"):
            twice.expand()

    def test_an_axis_of_a_short_key_over_a_recipe(self):
        matrix = matrix_from_mapping({"base": {"formats": "E4M3"}, "matrix": {"rounding": ["stochastic", "up"]}})
        assert [recipe_of(v.config) for v in matrix.expand()] == [
            uniform("E4M3", rounding=r) for r in ("stochastic", "up")
        ]
        both = {"formats": ["E4M3", "E5M2"], "rounding": ["nearest_even", "stochastic"]}
        found = matrix_from_mapping({"base": {"seed": 1}, "matrix": both}).expand()
        assert recipe_of(found[3].config) == uniform("E5M2", rounding="stochastic")

    def test_estimates_take_recipes_for_what_they_cost(self):
        facts = load_config({**TINY, "fp8_format": "E4M3"}).model_dump(mode="json")
        grid = load_config({**TINY, "fp8_format": "E4M3", "weight_storage": "grid"}).model_dump(mode="json")
        found = [
            Measurement(facts, 10, 10.0),
            Measurement(grid, 10, 90.0),
            Measurement({**facts, "formats": [3]}, 10, 50.0),
        ]
        alike = estimate_run(load_config({**TINY, "formats": {"uniform": "E3M4", "grad": "E5M2"}}), found)
        assert alike is not None
        assert (alike.seconds, alike.source) == (30.0, "1 finished run like it")

    def test_runs_report_studies_and_labels(self, tmp_path):
        for formats in (MIXED, "MXFP8", {"uniform": "MXFP8", "rounding": "stochastic"}, "FP32"):
            for seed in (1, 2):
                config = tiny_config(f"seed={seed}", f"runs_dir={tmp_path}", "max_steps=3", formats=formats)
                result = FormatExperimentRunner(config, data_dir=tiny_corpus()).run()
                assert result.status == "completed"
        folders = sorted(tmp_path.iterdir())
        assert {Run(path).format for path in folders} == {"FP32", "MXFP8", "x:E4M3 w:E4M3 dy:E5M2; name='head': FP32"}
        study = load_study(tmp_path)
        assert len(study.settings) == 4
        assert study.axes == ["fp8_format", "rounding"]
        unfinished = next(path for path in folders if Run(path).format.startswith("x:"))
        (unfinished / "result.json").unlink()
        assert Run(unfinished).format == "x:E4M3 w:E4M3 dy:E5M2; name='head': FP32"

    def test_grids_inside_a_recipe_are_refused_by_fsdp2(self):
        from altgrad.training.step.distributed import Ranks

        grid = {"uniform": "E4M3", "overrides": [{"name": "head", "recipe": {"uniform": "E3M4", "storage": "grid"}}]}
        with pytest.raises(Exception, match="grid cannot be spread by fsdp2"):
            Ranks._check_sharded(tiny_config("distributed=fsdp2", formats=grid))


class TestChain:
    def test_block_formats_widen_their_element(self):
        chain, at = [], "MXFP4"
        while at is not None:
            chain.append(at)
            at = EmergencyMantissaShift().next_format(at)
        assert chain == ["MXFP4", "MXFP6", "MXFP8", "FP16/32:E8M0:floor"]
        assert (
            wider_block(__import__("altgrad.quantization", fromlist=["x"]).get_format("NVFP4")) == "E2M3/16:E4M3:tensor"
        )
        assert EmergencyMantissaShift(chain={"MXFP8": None}).next_format("MXFP8") is None
        assert EmergencyMantissaShift(chain={"MXFP8": "E5M2"}).next_format("MXFP8") == "E5M2"
        with pytest.raises(Exception, match="returns to where it was"):
            EmergencyMantissaShift(chain={"FP16/32": "MXFP8"})

    def test_every_link_of_a_block_format_keeps_all_values(self):
        from altgrad.formats.catalog import BLOCK_FORMATS, get_format

        for row in BLOCK_FORMATS.values():
            name = wider_block(row)
            assert name is not None
            wider, own = get_format(name), row.element.values()
            assert (wider.block, wider.scale_format, wider.rule) == (row.block, row.scale_format, row.rule)
            finite = own[torch.isfinite(torch.as_tensor(own))] if hasattr(own, "dtype") else own
            from altgrad.quantization import quantize

            values = torch.as_tensor(finite, dtype=torch.float32)
            assert torch.equal(quantize(values, wider.element), values)


class TestShift:
    def test_a_run_in_mxfp8_shifts_and_goes_on(self):
        config = tiny_config("enable_emergency_shift=true", formats="MXFP8")
        trainer = Trainer(config, data_dir=tiny_corpus(), loss=poisoned_at(3, 4, 5))
        records = train(trainer, 8)
        (shift,) = [e for r in records for e in r.events if e["event"] == "shift"]
        assert (shift["from_format"], shift["to_format"], shift["reason"]) == ("MXFP8", "FP16/32:E8M0:floor", "nan")
        assert [r.finite for r in records] == [True] * 2 + [False] * 3 + [True] * 3
        assert trainer.formats.label == "FP16/32:E8M0:floor"
        assert "x:FP16/32:E8M0:floor" in str(trainer.model)
        assert not trainer.interventions.can_shift

    def test_a_mixed_recipe_shifts_each_format_along_its_own_chain(self):
        formats = {
            "uniform": "E7M0",
            "grad": "E5M2",
            "storage": "grid",
            "overrides": [{"name": "head", "recipe": "MXFP6"}],
        }
        config = tiny_config("enable_emergency_shift=true", "shift.stall_threshold=1.0", formats=formats)
        trainer = Trainer(config, data_dir=tiny_corpus(), loss=poisoned_at(3, 4, 5))
        was = trainer.formats.recipe
        records = train(trainer, 7)
        now = trainer.formats.recipe
        assert any(e["event"] == "shift" for r in records for e in r.events)
        assert (now.default.forward.input.format, now.default.storage.format) == ("E5M2", "E5M2")
        assert now.default.input_grad.grad_output == was.default.input_grad.grad_output
        assert now.overrides[0].recipe == layer_recipe("MXFP8")
        assert records[-1].finite

    def test_a_shift_of_a_recipe_survives_a_resume(self, tmp_path):
        def run(folder, **extra):
            config = tiny_config(
                "enable_emergency_shift=true", "shift.stall_patience=2", "shift.stall_threshold=0.3", "max_steps=12",
                f"runs_dir={folder}", formats={"uniform": "E7M0", "storage": "grid", "overrides": [{"name": "head", "recipe": "MXFP8"}]},
            )  # fmt: skip
            return FormatExperimentRunner(config, data_dir=tiny_corpus(), **extra).run()

        from tests.training.test_runner import StopAt

        whole = run(tmp_path / "whole")
        assert [i["kind"] for i in whole.interventions][:1] == ["shift"]
        run(tmp_path / "broken", listener=StopAt(7))
        assert losses(run(tmp_path / "broken").run_dir) == losses(whole.run_dir)

    def test_a_chain_to_formats_that_do_not_fit_is_refused_at_the_start(self):
        grid = {"uniform": "E4M3", "storage": "grid"}
        with pytest.raises(ConfigError, match=r"shift.chain leads from E4M3.*grid storage in MXFP8"):
            tiny_trainer("enable_emergency_shift=true", "shift.chain={E4M3: MXFP8}", formats=grid)

    def test_a_chain_that_does_not_fit_the_model_is_refused_at_the_start(self):
        strict = {"uniform": "E4M3/8", "whole_blocks": True}
        with pytest.raises(ConfigError, match=r"to E4M3/24.*this model cannot take.*not a multiple"):
            tiny_trainer("enable_emergency_shift=true", "shift.chain={E4M3/8: E4M3/24}", formats=strict)

    def test_a_recipe_by_position_shifts(self):
        formats = {"default": None, "overrides": [{"position": "after_norm", "recipe": "E3M4"}]}
        config = tiny_config("enable_emergency_shift=true", formats=formats)
        trainer = Trainer(config, data_dir=tiny_corpus(), loss=poisoned_at(2, 3, 4))
        records = train(trainer, 5)
        assert [e["to_format"] for r in records for e in r.events if e["event"] == "shift"] == [
            "FP32; position='after_norm': E5M2"
        ]
        assert records[-1].finite


class TestClip:
    def test_a_recipe_clips_at_its_narrowest_range(self):
        formats = {"uniform": "E5M2", "grad": "E4M3", "scaling": "none"}
        trainer = tiny_trainer("enable_partition_clipping=true", "clipping.overflow_threshold=0", formats=formats)
        assert trainer.formats.narrowest == "E4M3"
        trainer.model.norm.weight.data.mul_(1e6)
        (record,) = train(trainer, 1)
        (clip,) = [e for e in record.events if e["event"] == "clip"]
        assert clip["clip_threshold"] == 448 / 57344
        assert math.isfinite(record.loss)

    def test_block_formats_clip_by_their_elements(self):
        trainer = tiny_trainer("enable_partition_clipping=true", formats="MXFP8")
        assert trainer.formats.narrowest == "MXFP8"
        assert train(trainer, 1)[0].overflow_rate is not None
