"""Training runs: config, data, model, the step as a transaction, checkpoints, verdicts and run folders.

>>> from altgrad.training import run_format_experiment
>>> result = run_format_experiment("experiments/configs/e3m4_uniform.yaml", "cpu")  # doctest: +SKIP
"""

from altgrad.monitor.judge import Judge
from altgrad.records.schema import ExperimentResult, StepRecord, Verdict
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.loading import load_config
from altgrad.training.data import Corpus, load_corpus
from altgrad.training.format_runner import FormatExperimentRunner, RunListener, run_format_experiment
from altgrad.training.model import GPT, GPTConfig
from altgrad.training.trainer import Trainer

__all__ = [
    "GPT",
    "Corpus",
    "ExperimentConfig",
    "ExperimentResult",
    "FormatExperimentRunner",
    "GPTConfig",
    "Judge",
    "RunListener",
    "StepRecord",
    "Trainer",
    "Verdict",
    "load_config",
    "load_corpus",
    "run_format_experiment",
]
