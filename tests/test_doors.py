"""The names and paths that people and other projects use: they stay where they are, whatever moves behind them."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.run_folders import make_run

ROOT = Path(__file__).parent.parent

FACES = {
    "altgrad.quantization": """
        BF16 BLOCK_FORMATS E0M7 E1M6 E2M5 E3M4 E4M3 E5M2 E6M1 E7M0 FORMAT_REGISTRY FP16 FP32 NUMERICS_VERSION TF32
        BlockFormat CurrentScaling DelayedScaling EmergencyMantissaShift FP8Format FloatFormat NoScaling Observer Overflow
        PartitionRelativeClipper QuantStats QuantizedTensor Rounding ScaleRule Specials StaticScaling amax amax_scale
        block_format block_scales code_index compute_stiffness_field compute_ulp_distance decode encode
        encode_with_stats fake_quantize from_code_index get_format gradient_stiffness_correlation grid_alignment_error
        grid_alignment_statistics grid_index grid_spacing quantize quantize_with_stats scale_from_amax ulp_statistics
    """,
    "altgrad.quantization.ops": """
        decode encode encode_with_stats fake_quantize quantize quantize_and_encode quantize_and_encode_with_stats
        quantize_with_stats
    """,
    "altgrad.quantization.advanced_diagnostics": """
        compute_stiffness_field compute_ulp_distance gradient_stiffness_correlation grid_alignment_error
        grid_alignment_statistics grid_index grid_spacing ulp_statistics
    """,
    "altgrad.quantization.stability": "EmergencyMantissaShift PartitionRelativeClipper",
    "altgrad.nn": """
        GemmRecipe LayerRecipe Manifest OperandSpec Override Recipe StorageSpec UpdateCounts attach_optimizer
        change_format full_precision layer_recipe load_quant_state quant_state quantize_model register_layer
        restore_model set_amax_reduction set_observer set_rank set_seed set_step uniform
    """,
    "altgrad.optim": """
        COUNT_NAMES ECO GridOptim GridOptimizer KahanAdamW LMD LNSMadam Lion Madam ManifoldAdamW Movement OPTIMIZERS
        OptimizerRow SRAdamW SignSGD find_optimizer make_optimizer position reset_moments spacing state_bytes value_at
    """,
    "altgrad.monitor": """
        GROUPS Monitor RankLimits Schedule StepTensors When add_metric effective_rank make_schedule remove_metric
        singular_values stable_rank
    """,
    "altgrad.training": """
        Corpus ExperimentConfig ExperimentResult FormatExperimentRunner GPT GPTConfig Judge RunListener
        StepRecord Trainer Verdict load_config load_corpus run_format_experiment
    """,
    "altgrad.sweep": """
        Job LocalExecutor Matrix Outcome Plan PlannedRun State SweepOptions SweepResult Variant describe_plan
        describe_result make_plan matrix_from_mapping plan_sweep read_matrix run_sweep
    """,
    "altgrad.analysis": """
        Curve Metrics Run comparison_table find_runs is_study read_run write_report write_study
    """,
    "altgrad": """
        __version__ analysis errors monitor nn optim quantization report sweep training
    """,
    "altgrad.training.trainer": "Trainer StepRecord",
    "altgrad.training.format_runner": "FormatExperimentRunner run_format_experiment",
}

PATHS = (
    "altgrad/quantization/ops.py",
    "altgrad/quantization/advanced_diagnostics.py",
    "altgrad/quantization/stability.py",
    "altgrad/training/trainer.py",
    "altgrad/training/format_runner.py",
    "experiments/configs/e3m4_uniform.yaml",
    "tests/test_advanced_diagnostics.py",
    "tests/test_stability.py",
)


@pytest.mark.parametrize("module", FACES)
def test_every_public_name_is_still_there(module):
    found = import_module(module)
    assert [name for name in FACES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", [m for m in FACES if hasattr(import_module(m), "__all__")])
def test_the_public_list_names_what_exists_once(module):
    names = import_module(module).__all__
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(import_module(module), name)] == []


@pytest.mark.parametrize("path", PATHS)
def test_files_that_people_open_keep_their_paths(path):
    assert (ROOT / path).is_file()


def test_fp8_format_is_an_alias_and_answers_to_max_representable_value():
    from altgrad.quantization import E4M3, FloatFormat, FP8Format

    assert FP8Format is FloatFormat
    assert E4M3.max_representable_value == E4M3.max == 448


@pytest.mark.parametrize("package", ["formats", "records", "analysis", "report", "randomness"])
def test_naming_a_format_a_stream_or_reading_a_run_loads_no_torch(package):
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module("altgrad.{package}")
for module in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
    importlib.import_module(module.name)
print(sorted(name for name in ("torch", "numba") if name in sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"


PROGRAM = """
import sys
from altgrad.analysis import write_report
import altgrad.report.pages.failure
write_report([sys.argv[1]], sys.argv[2])
bad = ("torch", "numba", "scipy", "pandas", "pyarrow", "altgrad.cli", "altgrad.sweep", "altgrad.training", "altgrad.monitor", "altgrad.nn",
       "altgrad.optim", "altgrad.quantization")
loaded = sorted(name for name in sys.modules if name in bad)
assert not loaded, loaded
"""


def test_importing_layers_and_the_trainer_loads_neither_numba_nor_the_compiler():
    """Both take longer to import than all of the package; what needs them asks when it is used."""
    code = (
        "import sys, altgrad.nn, altgrad.training; "
        "print([name for name in ('numba', 'torch._dynamo', 'sympy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout.strip() == "[]"


def test_a_report_is_written_without_torch(tmp_path):
    run = make_run(tmp_path, "E3M4", steps=20)
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), str(tmp_path / "r.html")], capture_output=True, text=True, timeout=60
    )
    assert program.returncode == 0, program.stderr
