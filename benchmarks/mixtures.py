"""What one call of `quantize_model` quantizes in tiny mixtures of experts of transformers, as the table of
docs/guides/works-with.md.

    python -m benchmarks.mixtures            print it
    python -m benchmarks.mixtures --write    put it into the page

For each: shares of parameters and of the multiply-adds of 2 x 16 tokens; what is left; how many experts got no token in
that batch; how many routers `keep="routers"` leaves in full precision; the loss in E4M3 less that in FP32. Weights are
random.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

from altgrad.nn import Manifest, quantize_model, restore_model, uniform

PAGE = Path(__file__).parents[1] / "docs/guides/works-with.md"
BEGIN, END = "<!-- python -m benchmarks.mixtures --write -->", "<!-- end -->"
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "intermediate_size": 48,
}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS = {
    "Mixtral": {**SIZES, "num_local_experts": 4},
    "Olmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
    "Qwen3Moe": {**SIZES, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "Llama4": {**SIZES, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 16},
    "DeepseekV3": {**DEEPSEEK, "num_experts_per_tok": 2, "n_shared_experts": 1},
}
TITLES = (
    "model",
    "parameters",
    "multiply-adds",
    "unquantized products",
    "experts without tokens",
    "routers kept",
    "loss",
)


def mixture(name: str, **more) -> nn.Module:
    """A model of transformers with a tiny configuration and random weights, in training mode."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**MODELS[name], **more))
    for parameter in model.parameters():  # some are made empty or zero
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    return model.train()


def routers(manifest: Manifest) -> list[str]:
    """The routers that stayed in full precision."""
    return [name for name in manifest.skipped if name.endswith((".gate", ".router"))]


def experts(manifest: Manifest) -> list[str]:
    """The parameters of experts that were quantized, all experts of a layer in each."""
    return [name for name in manifest.swapped if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]


def row(name: str) -> dict[str, str]:
    """What one model shows, by title."""
    model = mixture(name)
    plain = copy.deepcopy(model)
    manifest = quantize_model(model, uniform("E4M3"), example={"input_ids": TOKENS})
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    idle = total = 0
    for path in experts(manifest):
        grad = model.get_parameter(path).grad
        if path.endswith("down_proj") and grad is not None:
            used = grad.flatten(1).abs().sum(1) > 0
            idle, total = idle + int((~used).sum()), total + len(used)
    kept = routers(quantize_model(mixture(name), uniform("E4M3", keep="routers")))
    wide = plain(input_ids=TOKENS, labels=TOKENS).loss
    assert restore_model(model) is model
    left = sorted({f"`{product.call}`" for product in manifest.unseen})
    cells = (
        name,
        str(manifest.parameters),
        str(manifest.multiply_adds),
        ", ".join(left),
        f"{idle} of {total}",
        str(len(kept)),
        f"{float(loss.detach() - wide.detach()):+.3f}",
    )
    return dict(zip(TITLES, cells, strict=True))


def table(rows: list[dict[str, str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    return "\n".join([*lines, *(f"| {' | '.join(one.values())} |" for one in rows)])


def rows_of_page(text: str) -> list[dict[str, str]]:
    """The rows that the page holds."""
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return [dict(zip(TITLES, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    wants = parser.parse_args()
    made = table([row(name) for name in MODELS])
    print(made)
    if wants.write:
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
