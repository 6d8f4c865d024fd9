"""The rows of claims that a small GPT's training decides, in the order of their numbers; what they measure is in `training`."""

from __future__ import annotations

from altgrad.reproduce.claim import Claim, Criterion, Protocol
from altgrad.reproduce.noise import knee, progress_under_gradient_noise
from altgrad.reproduce.training import (
    COARSE,
    NARROWED,
    RATES,
    STORED,
    WIDE_RATES,
    closed,
    compensated,
    compensation,
    damage_of_subsets,
    differences,
    falling,
    final_loss,
    freezing,
    gradient_formats,
    oscillating,
    outcome_of_subsets,
    predicted_freeze,
    rounded_after,
    stable,
    stored,
    tolerance,
    unchanged_copies,
)

_TUNED = [1e-3, 3e-3, 1e-2]
_FACTORS = [0.003, 0.01, 0.03, 0.1, 0.3]
_MXFP6 = {"formats": "x:MXFP6 w:MXFP6 dy:FP32"}
_LMD = {"optimizer.name": "lmd"}
_MADAM = {"optimizer.options": {"format": None, "off_grid_lr": 1e-3, "rounding": None}, "optimizer.name": "madam"}

TRAINING: tuple[Claim, ...] = (
    Claim(
        "freezing_is_predictable",
        "1",
        "2607.09800 v1",
        "Freezing of stored weights under nearest rounding follows from a float32 trace alone: a weight stays where its update is "
        "below half a grid step. Stochastic rounding removes it.",
        (
            Criterion("error", "mean error of predicted stall over layers and steps, worst format", high=0.02),
            Criterion(
                "date", "error of the step from which fewer than 1% move, as a share of it, worst format", high=0.05
            ),
            Criterion(
                "moved_stochastic", "share of weights that move where E8M3 nearest is frozen, E8M3 stochastic", low=0.01
            ),
            Criterion("moved_nearest", "the same, E8M3 nearest"),
            *(Criterion(f"error_{fmt}", f"mean error of predicted stall, {fmt}") for fmt in STORED),
            *(Criterion(f"froze_{fmt}", f"step from which {fmt} is frozen; 301: never") for fmt in STORED),
            *(Criterion(f"foretold_{fmt}", f"the same as predicted, {fmt}") for fmt in STORED),
        ),
        3,
        Protocol(
            "0.13M, 300 steps at 1e-3 with cosine decay to 0, weights of the linear layers stored to nearest in E8M7, E8M5, E8M4, E8M3 and E4M3, "
            "operands in float32; a float32 run from the same start on the same batches predicts, coordinate by coordinate.",
            predicted_freeze,
            quantities=freezing,
            seeds=3,
        ),
        watch="Frozen means that fewer than 1% of the coordinates move from there to the end. The paper's 124M model is not tried.",
    ),
    Claim(
        "bf16_copies_stay",
        "2",
        "2602.03839",
        "About 99% of the bf16 weights are bit for bit the same after a step at a rate of 3e-6.",
        (
            Criterion("same_3e-06", "share of weights with the same bf16 copy, rate 3e-6", low=0.98),
            Criterion("falls", "least fall of the share from 3e-6 to 3e-5 and on to 3e-4", low=0.0),
            Criterion("same_3e-05", "the same share, rate 3e-5"),
            Criterion("same_0.0003", "the same share, rate 3e-4"),
            Criterion("median", "median |w| (0.019 in the paper)"),
            Criterion("above", "share of weights with |w| / 256 above 3e-6"),
        ),
        1,
        Protocol(
            "0.85M trained for 300 float32 steps at 1e-3, then 5 steps at each small rate from there; float32 masters, the bf16 "
            "copies are compared.",
            unchanged_copies,
            quantities=falling,
            seeds=3,
        ),
        secondary=True,
    ),
    Claim(
        "nearest_fails_kahan_fixes",
        "3",
        "2010.06192",
        "With bf16-like weights nearest updates fail, stochastic rounding and Kahan compensation fix them; rounding of activations "
        "explains little.",
        (
            Criterion("nearest_stochastic", "loss, nearest minus stochastic, E8M3", low=0.0),
            Criterion("stochastic_kahan", "loss, stochastic minus Kahan, E8M3", low=0.0),
            Criterion("kahan_float32", "loss, Kahan minus float32, E8M3", -0.02, 0.02),
            Criterion("activations", "share of nearest's gap that E8M3 activations alone have", high=0.1),
            Criterion("stochastic_kahan_e8m2", "loss, stochastic minus Kahan, E8M2"),
            Criterion("gap", "loss, nearest minus float32, E8M3"),
        ),
        4,
        Protocol(
            "0.13M, 300 steps at 3e-3, weights stored in E8M3 (and E8M2) with nearest, stochastic and Kahan-compensated updates; "
            "float32; float32 weights with E8M3 activations.",
            final_loss,
            {
                "float32": {},
                "nearest": {"config": stored(COARSE, "nearest_even")},
                "stochastic": {"config": stored(COARSE, "stochastic")},
                "kahan": {"config": compensated("kahan_adamw", COARSE)},
                "stochastic E8M2": {"config": stored("E8M2_IEEE", "stochastic")},
                "kahan E8M2": {"config": compensated("kahan_adamw", "E8M2_IEEE")},
                "activations": {"config": {"formats": f"x:{COARSE} w:FP32 dy:FP32"}},
            },
            compensation,
            seeds=13,
        ),
        watch="On coarse grids our own study has Kahan worse than stochastic rounding (docs/findings/manifold.md).",
    ),
    Claim(
        "bf16_stochastic_takes_higher_rates",
        "4",
        "2502.20566",
        "BF16 weights with stochastic rounding take 2 to 4 times the learning rate of mixed precision.",
        (
            Criterion("ratio", "best rate, stochastic over master, in octaves", low=1.0),
            Criterion("gap", "best loss, stochastic minus master"),
            Criterion("at_most", "loss at the largest rate, stochastic minus master"),
        ),
        2,
        Protocol(
            "0.13M, 300 steps at six rates from 1e-3 to 3.2e-2, an octave apart: bf16 weights stored stochastically, and float32 "
            "masters used in bf16; each seed's best rate by a parabola.",
            final_loss,
            {
                f"{kind} at {rate:g}": {"config": config, "lr": rate}
                for kind, config in (
                    ("stochastic", stored("E8M7", "stochastic")),
                    ("master", {"formats": "x:FP32 w:E8M7 dy:FP32"}),
                )
                for rate in RATES
            },
            tolerance,
            seeds=3,
        ),
        watch="The paper's gap in perplexity (0.06) cannot be resolved at this size.",
    ),
    Claim(
        "eco_in_fp8",
        "5b",
        "2601.22101",
        "With the rounding error fed into the momentum (ECO), training on FP8 weights without masters is near lossless.",
        (
            Criterion("nearest_eco", "loss, nearest without ECO minus ECO", low=0.0),
            Criterion("eco_master", "loss, ECO minus float32 masters", high=0.05),
            Criterion("stochastic_eco", "loss, stochastic rounding minus ECO"),
        ),
        2,
        Protocol(
            "0.13M, 300 steps, weights in E4M3; every arm at the best of three rates.",
            final_loss,
            {
                "nearest": {"config": stored("E4M3", "nearest_even"), "rates": _TUNED},
                "stochastic": {"config": stored("E4M3", "stochastic"), "rates": _TUNED},
                "eco": {"config": compensated("eco", "E4M3"), "rates": _TUNED},
                "master": {"config": {"formats": "x:FP32 w:E4M3 dy:FP32"}, "rates": _TUNED},
            },
            differences(nearest_eco="nearest - eco", eco_master="eco - master", stochastic_eco="stochastic - eco"),
            tuned_by="loss",
        ),
    ),
    Claim(
        "best_layouts",
        "7",
        "2501.02423",
        "The best layouts for 4, 8 and 16 bits are E2M1, E4M3 and E8M7.",
        (
            Criterion("E7M0 - E6M1", "loss, E7M0 minus E6M1", low=0.0),
            Criterion("E6M1 - E4M3", "loss, E6M1 minus E4M3", low=0.0),
            Criterion("E1M2 - E2M1", "loss, E1M2 minus E2M1", low=0.0),
            Criterion("E3M0 - E2M1", "loss, E3M0 minus E2M1", low=0.0),
            Criterion("E5M2 - E4M3", "loss, E5M2 minus E4M3"),
            Criterion("E2M5 - E4M3", "loss, E2M5 minus E4M3"),
        ),
        2.5,
        Protocol(
            "0.13M, 300 steps at 3e-3, float32 masters; the format on weights, inputs and output gradients of every linear layer "
            "under current amax scaling per tensor.",
            final_loss,
            {
                fmt: {"config": {"formats": fmt}}
                for fmt in ("E7M0", "E6M1", "E5M2", "E4M3", "E2M5", "E3M0", "E2M1", "E1M2")
            },
            differences("E7M0 - E6M1", "E6M1 - E4M3", "E1M2 - E2M1", "E3M0 - E2M1", "E5M2 - E4M3", "E2M5 - E4M3"),
        ),
        secondary=True,
        watch="E4M3 against E5M2 is unresolved by design. By signal to noise on normal numbers the best of eight bits is E2M5. "
        "16 bits are not tried: these seeds could not tell them apart.",
    ),
    Claim(
        "exponent_bits_matter_more",
        "8",
        "2405.18710",
        "Fewer exponent bits destabilise training more than fewer mantissa bits.",
        (
            Criterion("exponents", "octaves of stable rates lost from E8M7 to E3M7", low=0.0),
            Criterion("more_than_mantissa", "octaves of stable rates, E8M1 more than E3M7", low=0.0),
            Criterion("loss_exponents", "best loss, E3M7 minus E8M7"),
            Criterion("loss_mantissa", "best loss, E8M1 minus E8M7"),
        ),
        5,
        Protocol(
            "0.13M, 300 steps at four rates from 1e-3 to 6.4e-2; the format on all operands of every linear layer, unscaled; a rate "
            "is stable if its loss is within 0.3 nats of the arm's best.",
            final_loss,
            {
                f"{fmt} at {rate:g}": {"config": {"fp8_format": fmt, "scaling": "none"}, "lr": rate}
                for fmt in NARROWED
                for rate in WIDE_RATES
            },
            stable,
            seeds=3,
        ),
        secondary=True,
        watch="That 10% of runs diverge in BF16 cannot be tried here.",
    ),
    Claim(
        "noise_knee_of_a_model",
        "11b",
        "2505.19115",
        "On a model, too, progress has a knee where the gradient's norm meets the quantization noise.",
        (
            Criterion("knee", "ratio of norm to noise at the knee", 0.5, 5.0),
            Criterion("kink", "squared error of two lines that meet there over that of one line", high=0.5),
            Criterion("share_high", "progress at a ratio of 8, as a share of that without noise"),
            Criterion("share_sqrt3", "the same at sqrt(3)"),
            Criterion("share_low", "the same at 0.35"),
            Criterion("plain", "progress without noise, nats"),
        ),
        3,
        Protocol(
            "0.13M, 100 float32 steps at 3e-3, from there 60 steps at the best of three rates with normal noise on every "
            "parameter's gradient, its norm the gradient's over a ratio of 8, 5.7, 4, ... 0.35, or none; the fall of the "
            "validation loss, as a share of that without noise, by two lines over log2 of the ratio, the upper one level.",
            progress_under_gradient_noise,
            quantities=knee,
            seeds=8,
        ),
        watch="Noise of a set size stands for that of quantization. Adam averages over steps, a quadratic's single step does not; "
        "a knee is claimed, not where it is.",
    ),
    Claim(
        "mxfp4_needs_more_tokens",
        "12",
        "2509.25149",
        "MXFP4 needs 36% more tokens than NVFP4 to reach the same loss, at 8B parameters.",
        (Criterion("tokens", "tokens that MXFP4 needs over those that NVFP4 does", 1.18, 1.54),),
        0,
        None,
        secondary=True,
        needs="Two runs of 8B parameters on 10^12 tokens, 5 x 10^22 operations each: some 4,000 years of two cores. No smaller protocol "
        "stands for it: a share of tokens is read off two loss curves that are all but level, and what four bits cost here over "
        "100 steps (0.01 nats, docs/findings/recipes.md) is of the size that seeds differ by.",
    ),
    Claim(
        "mxfp4_weights_oscillate",
        "13",
        "2502.20853",
        "MXFP4 weights oscillate as the learning rate decays; an average that decides between the two neighbouring grid values "
        "(Q-EMA) halves it.",
        (
            Criterion("rises", "R over the last 30 steps, over R of the 30 steps behind the warmup", low=1.0),
            Criterion("halved", "R over the last 30 steps, with Q-EMA over without", high=0.5),
            Criterion("first", "R behind the warmup"),
            Criterion("last", "R over the last 30 steps"),
            Criterion("flips", "share of quantized weights that change in a step of the last 30, Q-EMA over without"),
        ),
        1,
        Protocol(
            "0.13M, 300 steps at 3e-3 with cosine decay to a tenth, recipes tetrajet and tetrajet_q_ema; R = sum |dW_Q| / "
            "sum |dW| over 30 steps, all quantized weights together.",
            oscillating,
            {"plain": {"formats": "tetrajet"}, "q_ema": {"formats": "tetrajet_q_ema"}},
            lambda arms: {
                **arms["plain"],
                "rises": arms["plain"]["last"] / arms["plain"]["first"],
                "halved": arms["q_ema"]["last"] / arms["plain"]["last"],
                "flips": arms["q_ema"]["flips"] / arms["plain"]["flips"],
            },
            seeds=3,
        ),
        watch="The average's decay is 0.9983, that of the paper's smallest model over many more steps than 300.",
    ),
    Claim(
        "flips_by_bits",
        "14",
        "2412.04787",
        "Under stochastic rounding about 0.04% of ternary weights flip in a step, and up to 8% of 8-bit ones.",
        (
            Criterion("ratio", "flips of 8-bit weights over flips of ternary ones", low=50.0),
            Criterion("ternary", "share of ternary weights that flip in a step"),
            Criterion("eight", "share of 8-bit weights that flip in a step"),
            Criterion("loss_ternary", "validation loss, ternary (chance is 5.545)"),
            Criterion("loss_eight", "validation loss, 8 bits"),
        ),
        0.6,
        Protocol(
            "0.13M, 150 steps at 3e-3, weights stored stochastically as -1/32, 0, 1/32 (E0M1, a fixed scale) and in 8 bits (E0M7, "
            "a power-of-two amax scale), operands in float32; mean over steps.",
            final_loss,
            {
                "ternary": {"config": {"max_steps": 150, **stored("E0M1", "stochastic,scale=0.0625")}},
                "eight": {"config": {"max_steps": 150, **stored("E0M7", "stochastic")}},
            },
            lambda arms: {
                "ternary": arms["ternary"]["flips"],
                "eight": arms["eight"]["flips"],
                "ratio": arms["eight"]["flips"] / arms["ternary"]["flips"],
                **{f"loss_{name}": values["loss"] for name, values in arms.items()},
            },
            seeds=8,
        ),
        secondary=True,
    ),
    Claim(
        "powers_of_two_by_training",
        "15",
        "2506.00315",
        "Training with powers of two as weights closes most of the gap that rounding to them after training has.",
        (
            Criterion("left", "gap to float32, trained with E7M0 over rounded to it after training", high=1 / 3),
            Criterion("gap_after", "loss above float32, rounded after training"),
            Criterion("gap_from_start", "loss above float32, trained with it"),
        ),
        1,
        Protocol(
            "0.13M, 300 steps at 3e-3; weights of every linear layer in E7M0, float32 masters, other operands in float32.",
            rounded_after,
            {"E7M0": {"formats": "x:FP32 w:E7M0 dy:FP32"}},
            closed,
        ),
        watch="The paper's figures on image models are out of reach.",
    ),
    Claim(
        "multiplicative_updates",
        "17a",
        "2106.13914",
        "Multiplicative updates train in low precision: LNS-Madam in 8 bits is as good as float32.",
        (Criterion("madam - adamw", "loss, Madam minus AdamW, weights in E4M3", high=0.05),),
        1,
        Protocol(
            "0.13M, 300 steps, weights stored stochastically in E4M3, operands in float32: Madam and AdamW, each at the best of "
            "three rates.",
            final_loss,
            {
                "madam": {"config": {**stored("E4M3", "stochastic"), **_MADAM}, "rates": [0.03, 0.1, 0.3]},
                "adamw": {"config": stored("E4M3", "stochastic"), "rates": _TUNED},
            },
            differences("madam - adamw"),
            tuned_by="loss",
        ),
        watch="E4M3 has 8 steps an octave like the paper's format, evenly spaced in each instead of by factors. For LMD see row 17b.",
    ),
    Claim(
        "lmd_beats_madam",
        "17b",
        "2506.17768",
        "Log-normal multiplicative dynamics (LMD) train better than Madam where the forward is in MXFP6.",
        (
            Criterion("madam - lmd", "loss, Madam minus LMD", low=0.0),
            Criterion("madam - quiet", "loss, Madam minus LMD without noise"),
            Criterion("lmd - adamw", "loss, LMD minus AdamW"),
        ),
        3,
        Protocol(
            "0.13M, 300 steps; weights and inputs of every linear layer in MXFP6 in the forward and where weight gradients "
            "are made, output gradients in float32, float32 masters; LMD with noise of 0.05 and with none, Madam and AdamW, "
            "each at the best of its rates.",
            final_loss,
            {
                "lmd": {"config": {**_MXFP6, **_LMD, "optimizer.options": {"noise": 0.05}}, "rates": _FACTORS},
                "quiet": {"config": {**_MXFP6, **_LMD}, "rates": _FACTORS},
                "madam": {"config": {**_MXFP6, "optimizer.name": "madam"}, "rates": _FACTORS},
                "adamw": {"config": _MXFP6, "rates": _TUNED},
            },
            differences("madam - lmd", "madam - quiet", "lmd - adamw"),
            tuned_by="loss",
        ),
        secondary=True,
        watch="LMD's listing and constants were not at hand: betas, noise, decay and start are this project's "
        "(`altgrad.optim.LMD`).",
    ),
    Claim(
        "damage_adds_up",
        "21a",
        "2607.12266",
        "Damage by quantized layers is 85 to 93% first-order: a sum over single layers.",
        (
            Criterion(
                "explained", "variance of the damage over all 256 subsets that one number per layer explains", low=0.85
            ),
            Criterion("all_low", "damage with all layers low, nats"),
            Criterion("sum_alone", "sum of the damage of each layer alone"),
        ),
        0.9,
        Protocol(
            "0.13M after 300 float32 steps; the weights of its 8 inner linear layers rounded to MXFP4 or not, all 256 subsets, "
            "validation loss on 4 batches.",
            damage_of_subsets,
            {"MXFP4": {"format": "MXFP4"}},
            seeds=3,
        ),
        watch="Rounding after training, as in the paper. For the outcome of training see row 21b.",
    ),
    Claim(
        "damage_of_training_adds_up",
        "21b",
        "2607.12266",
        "Damage by layers that are low during training, too, is 85% or more a sum over single layers.",
        (
            Criterion(
                "explained",
                "variance of the damage over subsets that a number for each layer explains, adjusted",
                low=0.85,
            ),
            Criterion("mean", "mean damage over the subsets, nats"),
            Criterion("largest", "largest damage, nats"),
            Criterion("sum", "sum of the layers' numbers, nats"),
            Criterion("rest", "standard deviation of what they leave, nats"),
        ),
        3,
        Protocol(
            "0.13M, 100 steps at 3e-3 from one start on the same batches: float32, and all operands of a subset of the 8 inner "
            "linear layers in MXFP4; 32 subsets, a fraction of resolution IV of all 256, so that layers do not mix with pairs.",
            outcome_of_subsets,
            {"MXFP4": {"format": "MXFP4", "steps": 100}},
        ),
        watch="The paper's claim is of rounding after training; that it holds for the outcome of training is our question. What "
        "is left holds pairs of layers and the chance of a run, which the plan cannot tell apart.",
    ),
    Claim(
        "e5m2_gradients_lose",
        "22",
        "Megatron-Bridge pull request 638",
        "Under MXFP8, gradients in E5M2 diverge at 8B where E4M3 does not.",
        (
            Criterion("loss", "loss, gradients in E5M2 minus E4M3", low=0.0),
            Criterion("sqnr", "signal to noise of gradients, E4M3 minus E5M2, dB", low=0.0),
        ),
        6,
        Protocol(
            "0.85M, 200 steps at 1e-3, MXFP8 operands, gradients in E4M3 or E5M2 elements.",
            gradient_formats,
            {
                "E4M3": {"formats": "x:MXFP8 w:MXFP8 dy:MXFP8"},
                "E5M2": {"formats": "x:MXFP8 w:MXFP8 dy:MXFP8_E5M2"},
            },
            lambda arms: {
                "loss": arms["E5M2"]["loss"] - arms["E4M3"]["loss"],
                "sqnr": arms["E4M3"]["sqnr"] - arms["E5M2"]["sqnr"],
            },
        ),
        watch="Divergence at 8B cannot be seen here: what is tried is the order.",
    ),
)
