"""Recipes that people know, by name: `recipe("te_mxfp8")`. Each row is the recipe's text and what is known about it.

Facts were read in the public code at the commits named (November 2026); `certainty` says how far they carry:

    code        every number of the arithmetic was read in code
    one gap     all but what `gaps` names
    report      after a paper or report, whose code is not public

What a recipe says of optimizer states, gradients in communication, or layers that a library leaves out by their sizes is
not in the layers' arithmetic: `beyond` names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

from altgrad.errors import RecipeError
from altgrad.nn.recipe.recipe import Names, Recipe

_OTHERS = ("Embedding", "EmbeddingBag", "Conv1d", "Conv2d", "Conv3d", *(f"ConvTranspose{n}d" for n in (1, 2, 3)))
_LINEAR_ONLY = "".join(f"; type='{kind}': FP32" for kind in _OTHERS)
_PLAIN_HEAD = r"; name='re:(.*\\.)?(lm_head|head|output|embed_out)': FP32"
_HOPPER = "sum:hopper_fp8|hopper_fp8_promoted|hopper_fp8_promoted"
_CURRENT = "amax(arithmetic='multiply')"
_AO = "amax(arithmetic='multiply',floor=1e-12)"
_AO_ROWS, _AO_COLUMNS = (
    f"E4M3(amax(axis={axis},power_of_two=True,arithmetic='multiply',floor=1e-12))" for axis in (0, 1)
)
_TWO_LEVELS = "block(arithmetic='multiply')"
_MIXED = "hadamard(size=16,signs='fixed',bfloat16=True)"
_MSAMP = "delayed(history=16,power_of_two=True,warm_up=16)"
_NVFP4 = (
    f"x:NVFP4({_TWO_LEVELS})|NVFP4({_TWO_LEVELS},{_MIXED}) w:E2M1/16x16:E4M3:tensor({_TWO_LEVELS}) "
    f"dy:NVFP4(stochastic,{_TWO_LEVELS})|NVFP4(stochastic,{_TWO_LEVELS},{_MIXED}) sum:blackwell_fp4"
)
_REQUANTIZED = "MXFP4:ceil(stochastic,requantized)"
_TETRAJET = f"MXFP4:ceil(nearest_away)|{_REQUANTIZED}"
_OUTER, _DRAWN = "block(arithmetic='multiply',outer=128)", "hadamard(size=16,signs='random')"
_QUEST = "MXFP4(block(deviation=0.48707976),masked,hadamard(size=32))"  # 2.92247856 / 6
_UNBIASED = "MXFP4(stochastic,block(gain=0.75),hadamard(size=32))"
_TE = "NVIDIA/TransformerEngine d0067d0d (2026-08-22)"
_TORCHAO = "pytorch/ao 36027d82 (2026-08-21)"
_TENSORWISE = f"x:E4M3({_AO}) w:E4M3({_AO}) dy:E5M2({_AO}) {_HOPPER}"


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe with what is known about it.

    text: as `Recipe.from_dict` reads it. beyond: what the recipe says of things that layers do not compute. gaps: what
    could not be read, or is not emulated.
    """

    name: str
    title: str
    text: str
    source: str
    certainty: str
    beyond: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The recipe itself."""
        return _parsed(self.text)


@cache
def _parsed(text: str) -> Recipe:
    return Recipe.from_dict(text)


_ACTIVATION_DTYPE = "outputs and gradients come in the activations' dtype: train under bf16 autocast for bf16 ones"
_ROWS = [
    NamedRecipe(
        "te_delayed",
        "Transformer Engine, DelayedScaling (HYBRID, history 1024, max, margin 0)",
        f"x:E4M3(regions) w:E4M3(regions) dy:E5M2(regions) {_HOPPER}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TE,
        "code",
        (
            _ACTIVATION_DTYPE,
            "amaxes are reduced by maximum over the amax group: `set_amax_reduction` does not reach them",
        ),
        (
            "regions end with each layer's forward and backward: a layer used twice in one forward moves its scale twice",
            "the cached cast of a weight over micro-batches (is_first_microbatch) is not emulated",
        ),
    ),
    NamedRecipe(
        "te_current",
        "Transformer Engine, Float8CurrentScaling (HYBRID)",
        f"x:E4M3({_CURRENT}) w:E4M3({_CURRENT}) dy:E5M2({_CURRENT}) {_HOPPER}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TE,
        "code",
        (_ACTIVATION_DTYPE,),
    ),
    NamedRecipe(
        "te_mxfp8",
        "Transformer Engine, MXFP8BlockScaling (E4M3, blocks of 32)",
        f"x:MXFP8:ceil w:MXFP8:ceil dy:MXFP8:ceil sum:blackwell_fp8{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TE,
        "code",
        (_ACTIVATION_DTYPE,),
    ),
    NamedRecipe(
        "te_block",
        "Transformer Engine, Float8BlockScaling (1x128, weights 128x128, powers of two)",
        "x:E4M3/128:E8M0:ceil w:E4M3/128x128:E8M0:ceil dy:E4M3/128:E8M0:ceil "
        f"sum:hopper_fp8_blocks{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TE,
        "code",
        (_ACTIVATION_DTYPE,),
    ),
    NamedRecipe(
        "nvfp4_te",
        "Transformer Engine, NVFP4BlockScaling (arXiv 2509.25149)",
        f"{_NVFP4}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TE,
        "one gap",
        ("the paper keeps about 16 % of the linear layers in BF16, first and last blocks: `with_(high=...)`",),
        (
            "which random bits serve which value of the hardware's stochastic cast is not published: expectations agree",
            "a group whose products cancel counts as a zero in the FP4 accumulator",
        ),
    ),
    NamedRecipe(
        "deepseek_v3",
        "DeepSeek-V3, after the report (arXiv 2412.19437)",
        "x:E4M3/128:FP32|E4M3/128:FP32(requantized) w:E4M3/128x128:FP32 dy:E4M3/128:FP32 "
        f"sum:deepgemm{_PLAIN_HEAD}{_LINEAR_ONLY}",
        "DeepSeek-V3 report 3.3 and 3.5.2; deepseek-ai/DeepGEMM 54e22612 for the promotion; no training code is public",
        "report",
        (
            "master weights and accumulated gradients FP32, AdamW's moments BF16, MoE dispatch FP8, combine BF16",
            "embedding, head, gating, norms and attention operators in BF16 or FP32",
        ),
        (
            "whether the 128x1 blocks of dy are made of dy itself or of its 1x128 codes is not said (dy itself here)",
            "inputs of the linear layer after attention (E5M6 cache, power-of-two scales) and dispatched activations are "
            "scaled as all others here",
            "the floor of an amax in training is not said (none here)",
        ),
    ),
    NamedRecipe(
        "ao_tensorwise",
        "torchao float8, tensorwise",
        f"{_TENSORWISE}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TORCHAO,
        "code",
        (_ACTIVATION_DTYPE, "which layers are converted is the caller's filter"),
    ),
    NamedRecipe(
        "ao_rowwise",
        "torchao float8, rowwise (E4M3, powers of two)",
        f"x:{_AO_ROWS}|{_AO_COLUMNS} w:{_AO_ROWS}|{_AO_COLUMNS} dy:{_AO_ROWS}|{_AO_COLUMNS} "
        f"{_HOPPER}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TORCHAO,
        "code",
        (_ACTIVATION_DTYPE,),
        ("CUDA's float32 log2 next to powers of two can differ from the correct one that is used here",),
    ),
    NamedRecipe(
        "ao_rowwise_gw_hp",
        "torchao float8, rowwise_with_gw_hp (the weight gradient in high precision)",
        f"x:{_AO_ROWS}|FP32 w:{_AO_ROWS}|E4M3(amax(power_of_two=True,arithmetic='multiply',floor=1e-12)) "
        f"dy:{_AO_ROWS}|FP32 sum:hopper_fp8|hopper_fp8_promoted|float32{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TORCHAO,
        "code",
        (_ACTIVATION_DTYPE,),
        ("CUDA's float32 log2 next to powers of two can differ from the correct one that is used here",),
    ),
    NamedRecipe(
        "ao_mxfp8",
        "torchao mxfp8_rceil",
        f"x:MXFP8:ceil w:MXFP8:ceil dy:MXFP8:ceil sum:blackwell_fp8{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TORCHAO,
        "code",
        ("outputs are BF16",),
    ),
    NamedRecipe(
        "ao_mxfp8_wgrad_hp",
        "torchao mxfp8_rceil_wgrad_with_hp (the weight gradient in high precision)",
        "x:MXFP8:ceil|FP32 w:MXFP8:ceil dy:MXFP8:ceil|FP32 "
        f"sum:blackwell_fp8|blackwell_fp8|float32{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TORCHAO,
        "code",
        ("outputs are BF16",),
    ),
    NamedRecipe(
        "ao_nvfp4",
        "torchao NVFP4 training (sign vector as Transformer Engine's)",
        f"{_NVFP4}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        _TORCHAO,
        "one gap",
        ("sizes must be multiples of 128 there",),
        ("the bits of stochastic rounding are torchao's own; torchtitan draws a sign vector for each layer",),
    ),
    NamedRecipe(
        "nanochat",
        "nanochat fp8.py (torchao's tensorwise; evaluation in high precision; the head is quantized)",
        f"{_TENSORWISE} eval:FP32{_LINEAR_ONLY}",
        "karpathy/nanochat 92d63d4e (2026-07-03)",
        "code",
        ("only layers whose sizes are multiples of 16 and at least 128 are converted there; dx and dw in dy's dtype",),
    ),
    NamedRecipe(
        "tetrajet",
        "TetraJet, MXFP4 (arXiv 2502.20853)",
        f"x:{_TETRAJET} w:{_TETRAJET} dy:MXFP4:ceil(stochastic){_PLAIN_HEAD}{_LINEAR_ONLY}",
        "thu-ml/TetraJet-MXFP4Training bbe9bd67 (2025-03-22)",
        "code",
        ("Q-EMA is the row tetrajet_q_ema; Q-Ramping is none",),
        ("scales and the noise of stochastic rounding are computed in BF16 there under amp, in float32 here",),
    ),
    NamedRecipe(
        "tetrajet_q_ema",
        "TetraJet with Q-EMA (decay 0.9983 as for DeiT-tiny, from step 10)",
        f"x:{_TETRAJET} w:MXFP4:ceil(nearest_away,ema(decay=0.9983,start=10))|{_REQUANTIZED} "
        f"dy:MXFP4:ceil(stochastic){_PLAIN_HEAD}{_LINEAR_ONLY}",
        "thu-ml/TetraJet-MXFP4Training bbe9bd67 (2025-03-22)",
        "one gap",
        (
            "decays there: 0.9983 (tiny), 0.9972 (small), 0.999 (base): "
            "write another one into the text that `altgrad recipes tetrajet_q_ema` prints",
            "Q-Ramping, the other method of the paper, is none: how long it calibrates and its largest period were not read",
        ),
        (
            "what is chosen for a weight that lies on the grid exactly was not read (it stays here)",
            "scales and the noise of stochastic rounding are computed in BF16 there under amp, in float32 here",
        ),
    ),
    NamedRecipe(
        "tetrajet_v2",
        "TetraJet-v2, NVFP4 under scales of 128 (arXiv 2510.27527)",
        f"x:NVFP4({_OUTER})|NVFP4(stochastic,{_OUTER},{_DRAWN},requantized) "
        f"w:NVFP4({_OUTER})|NVFP4(stochastic,{_OUTER},{_DRAWN},requantized) "
        f"dy:NVFP4(stochastic,{_OUTER},{_DRAWN}){_PLAIN_HEAD}{_LINEAR_ONLY}",
        "thu-ml/TetraJet-v2-NVFP4Training ca5953f6 (2026-05-05)",
        "one gap",
        (
            "OutControl (from step 501 a tenth of the input channels in MXFP8) and OsciReset (oscillating master weights set to "
            "their quantized values late in training) are schedules of a trainer, read in part and not emulated",
        ),
        (
            "the bits of its generators are not reproduced: signs and stochastic rounding agree in expectation",
            "how its GEMM adds up under scales of 128 elements was not read: sums are float32's here",
        ),
    ),
    NamedRecipe(
        "quartet",
        "Quartet, MXFP4 (arXiv 2505.14669), after its emulation",
        f"x:{_QUEST}|{_UNBIASED[:-1]},requantized) w:{_QUEST}|{_UNBIASED[:-1]},requantized) "
        f"dy:{_UNBIASED}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        "IST-DASLab/Quartet 00ccd38e (2026-03-18), the Triton emulation",
        "one gap",
        (
            "the random signs of its backward stand behind the transform, where they cancel in every product: none here",
            "sizes are multiples of 32 there",
        ),
        (
            "the bits of stochastic rounding are not reproduced: expectations agree",
            "logarithms next to powers of two are the GPU's there and correct here",
            "the QuTLASS kernels were not read",
        ),
    ),
    NamedRecipe(
        "msamp_o1",
        "MS-AMP O1 (FP8-LM, arXiv 2310.18313)",
        f"x:E4M3({_MSAMP}) w:E4M3(amax(power_of_two=True)) dy:E5M2({_MSAMP}) grid(FP16,nearest_even,every=1) "
        f"{_HOPPER}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        "Azure/MS-AMP 9746ea85 (2025-12-01)",
        "one gap",
        ("weight gradients are rounded to E4M3 and all-reduced so; Adam's moments are float32",),
        (
            "the rounding of weight gradients to E4M3 is not emulated",
            "a non-finite amax restarts the warm-up there; here amaxes are of finite elements",
        ),
    ),
    NamedRecipe(
        "msamp_o2",
        "MS-AMP O2: O1 with 8-bit optimizer states",
        f"x:E4M3({_MSAMP}) w:E4M3(amax(power_of_two=True)) dy:E5M2({_MSAMP}) grid(FP16,nearest_even,every=1) "
        f"{_HOPPER}{_PLAIN_HEAD}{_LINEAR_ONLY}",
        "Azure/MS-AMP 9746ea85 (2025-12-01)",
        "one gap",
        (
            "Adam's first moment is E4M3 and the second FP16, with scales per tensor: optimizer.name=sr_adamw with options "
            "moment_format=[E4M3, FP16], rounding=null",
        ),
        (
            "the rounding of weight gradients to E4M3 is not emulated",
            "a non-finite amax restarts the warm-up there; here amaxes are of finite elements",
        ),
    ),
]
NAMED: dict[str, NamedRecipe] = {row.name: row for row in _ROWS}


def _variants() -> Iterator[tuple[str, Recipe]]:
    """Every named recipe, it without one ingredient, and without its accumulator and one more: the least said first."""
    for row in _ROWS:
        yield row.name, row.recipe
    for row in _ROWS:
        for name in row.recipe.ingredients:
            yield f"{row.name} without {name}", row.recipe.without(name)
    for row in _ROWS:
        if "accumulator" in row.recipe.ingredients:
            plain = row.recipe.without("accumulator")
            for name in plain.ingredients:
                yield f"{row.name} without accumulator, {name}", plain.without(name)


@cache
def _by_default() -> dict[object, list[tuple[str, Recipe]]]:
    found: dict[object, list[tuple[str, Recipe]]] = {}
    for name, made in _variants():
        found.setdefault(made.default, []).append((name, made))
    return found


@cache
def _name_of(made: Recipe) -> str | None:
    """The text `te_mxfp8 without accumulator; name='head': FP32` of a recipe that people know; None of any other."""
    for name, known in _by_default().get(made.default, []) if made.default is not None else []:
        count = len(known.overrides)
        if made.overrides[:count] == known.overrides and all(o.recipe is None for o in made.overrides[count:]):
            return name + "".join(f"; {o.condition}: FP32" for o in made.overrides[count:])
    return None


Names.texts = {row.name: row.text for row in _ROWS}
Names.name_of = staticmethod(_name_of)


def named(name: str) -> NamedRecipe:
    """The row of that name.

    Raises:
        RecipeError: there is none, with the closest names.
    """
    key = str(name).strip().lower().replace("-", "_")
    if key not in NAMED:
        close = get_close_matches(key, NAMED, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(NAMED)}"
        raise RecipeError(f"no recipe is called {name!r}; {hint}")
    return NAMED[key]


def recipe(name: str) -> Recipe:
    """The recipe of that name, such as te_mxfp8 or deepseek_v3; `altgrad recipes` lists them with their sources.

    >>> recipe("te_mxfp8").default.forward.accumulator.products
    32

    Raises:
        RecipeError: there is none, with the closest names.
    """
    return named(name).recipe
