"""What one experiment is: every setting and every threshold, with its default explained where it is declared.

`formats` says which number formats a run has; the short keys (`fp8_format`, `weight_storage`, ...) are aliases for parts
of it (`altgrad.training.config.formats`).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from altgrad.errors import AltGradError, ConfigError
from altgrad.formats.catalog import get_format
from altgrad.monitor.limits import VerdictLimits
from altgrad.records.machine import MOST_THREADS
from altgrad.report.text import shortened
from altgrad.training.config.formats import recipe_of, refuse_two_spellings

Positive = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=1 << 24)]  # of a model
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$"
"""What may become part of a path: 200 characters leave room for seed and hash in a folder's name of 255."""


def checked_name(name: Any, what: str) -> str:
    """The name, if it may become part of a path: no separator, no dot in front, nothing that a shell or a page reads.

    Raises:
        ConfigError: it may not.
    """
    if isinstance(name, str) and re.match(NAME, name) and not name.endswith("\n"):
        return name
    raise ConfigError(
        f"{what} {shortened(repr(name))} is no name: write 1 to 200 letters, digits, '_', '-' and '.', the first of them a "
        "letter or digit"
    )


def _usable_path(path: Any) -> Any:
    """A path as it is, unless no system could open it."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in path):
        raise ValueError(f"path {shortened(repr(path))} holds a control character; write it without")
    return path


UsablePath = Annotated[str, AfterValidator(_usable_path)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class ModelSection(_Section):
    """The model that is trained: a GPT, or what `factory` makes. `style` sets the five choices below it, or each by itself."""

    n_layer: Annotated[int, Field(gt=0, le=4096)] = 4
    n_head: Size = 4
    n_embd: Size = 128
    block_size: Size = 64
    """Context length in tokens; also the length of the training sequences."""
    vocab_size: Size | None = None
    """None: as many tokens as the data has (256 for bytes)."""
    style: Literal["modern", "gpt2"] = "modern"
    norm: Literal["rmsnorm", "layernorm"] | None = None
    position: Literal["rotary", "learned"] | None = None
    activation: Literal["relu_squared", "gelu", "swiglu"] | None = None
    bias: bool | None = None
    tie_weights: bool | None = None
    factory: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", max_length=200)] | None = (
        None
    )
    """package.module:function that makes the model in the GPT's place (`altgrad.training.factory`): its package must be
    allowed by ALTGRAD_FACTORIES. Of this section it is given vocab_size and `options`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSection:
        if self.n_embd % self.n_head:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_head))
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}; use n_head {nearest}")
        return self


class OptimizerSection(_Section):
    """The update rule and its learning rate schedule."""

    name: str = "adamw"
    """A row of `altgrad.optim.OPTIMIZERS`."""
    lr: NonNegativeFloat = 1e-3
    """Peak learning rate, in the optimizer's own unit. 1e-3 suits AdamW on models of about a million parameters."""
    weight_decay: NonNegativeFloat = 0.1
    """Acts on matrices and embeddings only, as in GPT-3."""
    betas: tuple[Fraction, Fraction] | None = (0.9, 0.95)
    """Of optimizers that have them; 0.95 as in GPT-3. None: the optimizer's own, as for `eps` and `momentum`."""
    eps: PositiveFloat | None = None
    momentum: Fraction | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of this optimizer alone."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Linear from lr/warmup_steps; 4% of a 500-step run."""
    decay: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: Fraction = 0.1
    """The cosine ends at this fraction of lr (Hoffmann et al. 2022 use 0.1)."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest L2 norm of all gradients together; 0 switches clipping off."""
    reset_every: Annotated[int, Field(ge=0)] = 0
    """Steps after which moments begin anew at zero, as averages kept in few bits need to (arXiv:2603.16731); 0 never."""
    reset_moments: Literal["both", "first", "second"] = "both"
    """Which: averages of gradients, of their squares, or all that the optimizer has."""


class DataSection(_Section):
    """Where the tokens come from, and how many a step takes."""

    source: Literal["stdlib", "text", "tokens", "huggingface"] = "stdlib"
    """stdlib: the running Python's own library sources as bytes. text: files as bytes. tokens: nanoGPT's train.bin and
    val.bin (uint16). huggingface: a dataset by name, or a folder written by its `save_to_disk`."""
    path: UsablePath | list[UsablePath] | None = None
    """text: files or folders (their *.txt); tokens: the folder with the two .bin files."""
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """tokens: how the two .bin files are written, least significant byte first."""
    name: UsablePath | None = None
    """huggingface: the dataset's name or folder."""
    config_name: str | None = None
    split: str = "train"
    text_column: str = "text"
    max_bytes: Positive = 4_000_000
    """Size cap of stdlib, text and huggingface corpora. 4 MB is more than 500 steps of 8192 tokens can see."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """The tail of the corpus that is held out (tokens brings its own val.bin)."""
    batch_size: Size = 12
    """Sequences per step, all micro-batches together."""
    grad_accumulation: Positive = 1
    """Micro-batches per step; divides batch_size."""

    @model_validator(mode="after")
    def _source_has_its_input(self) -> DataSection:
        if self.source in ("text", "tokens") and not self.path:
            raise ValueError(f"source {self.source!r} needs data.path; set data.path=...")
        if self.source == "huggingface" and not self.name:
            raise ValueError("source 'huggingface' needs data.name; set data.name=...")
        if self.source in ("stdlib", "huggingface") and self.path:
            given = self.path if isinstance(self.path, str) else ", ".join(self.path)
            raise ValueError(
                f"path {given} is not read by source {self.source!r}; set data.source=text (files or folders of *.txt) or tokens"
            )
        if self.source == "stdlib" and self.name:
            raise ValueError(f"name {self.name} is not read by source 'stdlib'; set data.source=huggingface")
        if self.batch_size % self.grad_accumulation:
            multiple = max(1, self.batch_size // self.grad_accumulation) * self.grad_accumulation
            raise ValueError(
                f"grad_accumulation {self.grad_accumulation} does not divide batch_size {self.batch_size}; "
                f"use batch_size {multiple}"
            )
        return self


class EvaluationSection(_Section):
    """Loss on held-out text, under the same recipe as training."""

    interval: Positive = 50
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    batches: Size = 8
    """Batches of data.batch_size sequences, spread evenly over the validation text: the same ones each time."""


class ClippingSection(_Section):
    """Partition-relative gradient clipping, when `enable_partition_clipping` is set."""

    base_clip: PositiveFloat = 1.0
    """Clip norm of a format that reaches 57344 (E5M2); others get it in proportion to their max."""
    overflow_threshold: Fraction = 0.01
    """Clip when a layer's measured overflow rate reaches 1%: rarer overflow is what saturation is for. 0: any overflow."""


class ShiftSection(_Section):
    """Emergency shift to a more robust format, when `enable_emergency_shift` is set."""

    nan_patience: Positive = 3
    """Consecutive non-finite steps before the shift."""
    stall_threshold: Fraction = 0.5
    """Shift when more than half of the attempted updates are lost to rounding..."""
    stall_patience: Positive = 10
    """...in this many consecutive steps after warmup: one step's rate follows the learning rate, ten show a state."""
    chain: dict[str, str | None] = Field(default_factory=dict)
    """Further links of the fallback chain, such as {E2M5: E3M4}; None ends it."""
    snapshot_interval: Positive = 10
    """Steps between in-memory copies of the last finite state, to which a shift rewinds non-finite weights."""


class MonitorSection(_Section):
    """Diagnostics per layer and role (altgrad.monitor), appended to metrics.jsonl."""

    enabled: bool = False
    interval: Positive = 10
    """Steps between records, for every group of statistics that `schedule` does not name (rank: 250, reference: none)."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Per group of statistics, or `default`: steps, or {every: n, window: [first, last], layers: pattern}."""
    near_zero: PositiveFloat = 1e-8
    """Gradients below it count as near zero: the customary eps of Adam, under which its update fades."""
    rank_fraction: Fraction = 0.5
    """A layer's rank collapsed when its effective rank is below this fraction of the first: half of its directions."""
    rank_fraction_projections: Fraction = 0.7
    """The same for heads and output projections: later layers cannot make up for directions that these lose."""


class TrackersSection(_Section):
    """Mirrors of metrics.jsonl elsewhere; not part of a run's identity."""

    wandb: bool = False
    tensorboard: bool = False


class ExperimentConfig(_Section):
    """One experiment."""

    name: Annotated[str, Field(pattern=NAME)] = "experiment"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    max_steps: Positive = 500
    formats: str | dict[str, Any] | None = None
    """The number formats of every layer: a name (E4M3, MXFP8), a recipe's text (`x:E4M3 w:E4M3 dy:E5M2`), its short form
    ({uniform: E4M3, grad: E5M2}) or a whole recipe. None: as the short keys say, which are aliases for its parts."""
    fp8_format: str = "FP32"
    """Number format of weights, activations and gradients in every linear layer; FP32 leaves the model as it is."""
    weight_storage: Literal["master", "grid"] = "master"
    """master: float32 weights, quantized at use. grid: weights hold only the format's values."""
    rounding: Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "odd", "stochastic"] = "nearest_even"
    storage_rounding: (
        Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "odd", "stochastic"] | None
    ) = None
    """grid: of the write back after the optimizer's step; None: as `rounding`."""
    scaling: str | dict[str, Any] = "amax"
    """A scaling policy by name (amax: current, per tensor; none; delayed; ...) or as {policy: name, ...arguments}."""
    overflow: Literal["native", "saturate", "saturate_finite", "inf", "nan"] = "saturate_finite"
    """What operands beyond the format's max become. `saturate_finite` lets an inf pass, `saturate` makes the format's
    max of it; `native` is IEEE 754's overflow to inf where the format has inf."""
    gradient_format: str | None = None
    """Format of the gradient operands where it differs from fp8_format; None: the same."""
    storage_refresh_interval: Annotated[int, Field(ge=0)] = 10
    """grid with amax scaling: steps between renewals of the grid's power-of-two scale, so that growing weights do not
    end at its edge; 0 keeps the first."""
    recipe: dict[str, Any] | None = None
    """`formats` under its old name: a full recipe in place of the short keys."""
    include: list[str] | None = None
    """Name patterns of the layers to quantize; None: all linear layers."""
    exclude: list[str] = Field(default_factory=list)
    enable_partition_clipping: bool = False
    enable_emergency_shift: bool = False
    runs_dir: UsablePath = "runs"
    checkpoint_dir: UsablePath | None = None
    """None: the run folder's checkpoints/."""
    checkpoint_interval: Positive = 100
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """At least two: the previous one stands in for a damaged newest one."""
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = None
    """CPU threads; None: as torch decides, recorded at the start and restored by a resume."""
    compile: bool = False
    """torch.compile the model."""
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share the model; used under torchrun alone."""
    model: ModelSection = Field(default_factory=ModelSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    data: DataSection = Field(default_factory=DataSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    verdict: VerdictLimits = Field(default_factory=VerdictLimits)
    clipping: ClippingSection = Field(default_factory=ClippingSection)
    shift: ShiftSection = Field(default_factory=ShiftSection)
    monitor: MonitorSection = Field(default_factory=MonitorSection)
    trackers: TrackersSection = Field(default_factory=TrackersSection)

    @field_validator("fp8_format", "gradient_format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return str(get_format(value))
        except AltGradError as error:
            raise ValueError(str(error)) from None

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        kind, _, index = value.partition(":")
        if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
            raise ValueError(f"device {value!r} is not one of cpu, cuda, cuda:N, mps")
        return value

    @model_validator(mode="after")
    def _formats_make_a_recipe(self) -> ExperimentConfig:
        refuse_two_spellings(vars(self))
        try:
            recipe_of(self)
        except AltGradError as error:
            spelled = next((key for key in ("formats", "recipe") if getattr(self, key) is not None), None)
            raise ValueError(f"{spelled}: {error}" if spelled else str(error)) from None
        return self

    @property
    def quantized(self) -> bool:
        """Whether anything is quantized at all."""
        return recipe_of(self) is not None
