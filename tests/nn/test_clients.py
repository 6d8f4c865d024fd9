"""Real models, built from their configurations with random weights, unmodified but for `quantize_model`."""

import copy

import pytest
import torch
import transformers
from torch import nn

from altgrad.nn import Override, Recipe, layer_recipe, quantize_model, restore_model, uniform

WIDTH, VOCABULARY = 64, 96
TOKENS = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 4


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS, "labels": TOKENS}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS, "labels": TOKENS}


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return transformers.BertForMaskedLM(config), {"input_ids": TOKENS, "labels": TOKENS}


def vit():
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=3,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": PIXELS, "labels": LABELS}


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Conv2d(32, 64, 3, stride=2, padding="valid", groups=1)
        self.head = nn.Linear(64, 4)

    def forward(self, pixel_values, labels):
        x = torch.relu(self.body(torch.relu(self.stem(pixel_values))))
        logits = self.head(x.mean((2, 3)))
        return nn.functional.cross_entropy(logits, labels), logits


def conv():
    return ConvNet(), {"pixel_values": PIXELS, "labels": LABELS}


FP8 = uniform("E4M3", grad="E5M2")
MX = uniform("MXFP8")
# Layers whose features no block of 32 divides (3 input channels, 4 classes) stay unquantized; a ViT has 17 tokens for
# each of 32 images.
CLIENTS = {
    "GPT-2": (gpt2, []),
    "Llama": (llama, []),
    "BERT": (bert, []),
    "ViT": (vit, ["classifier", "vit.embeddings*"]),
    "ConvNet": (conv, ["stem", "head"]),
}


def loss_of(output):
    return output[0] if isinstance(output, tuple) else output.loss


@pytest.mark.parametrize("recipe", [FP8, MX], ids=["E4M3/E5M2", "MXFP8"])
@pytest.mark.parametrize(("build", "odd"), CLIENTS.values(), ids=CLIENTS.keys())
def test_twenty_steps_lower_the_loss(build, odd, recipe):
    torch.manual_seed(0)
    model, batch = build()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    manifest = quantize_model(model, recipe, exclude=odd if recipe is MX else None)
    assert list(model.state_dict()) == keys
    assert all(before[name] is p for name, p in model.named_parameters())
    assert len(manifest.swapped) >= (4 if build is not conv else 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = loss_of(model(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


def test_gpt2_conv1d_and_tied_embedding():
    torch.manual_seed(0)
    model, batch = gpt2()
    plain = float(loss_of(model(**batch)).detach())
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    manifest = quantize_model(model, uniform("E4M3", storage="grid"))
    assert manifest.swapped["transformer.h.0.attn.c_attn"].type == "Conv1D"
    assert model.lm_head.weight is model.transformer.wte.weight
    state = [m.quantization.storage for m in (model.lm_head, model.transformer.wte)]
    assert state[0] is state[1]
    assert 0 < abs(float(loss_of(model(**batch)).detach()) - plain) < 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    restore_model(model)
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    assert float(loss_of(model(**batch)).detach()) == plain
    assert not optimizer.state


def test_manifest_traces_what_layers_cannot_see_and_norm_positions():
    torch.manual_seed(0)
    model, batch = llama()
    norm_fed = Override(layer_recipe("E4M3", activation="E3M4"), position="after_norm")
    recipe = Recipe(layer_recipe("E4M3"), (norm_fed,))
    manifest = quantize_model(model, recipe, example={"input_ids": TOKENS})
    fed = {name for name, one in manifest.swapped.items() if one.recipe.forward.input.format == "E3M4"}
    expected = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"}
    expected |= {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up")} | {"lm_head"}
    assert fed == expected
    calls = {(p.module, p.call) for p in manifest.unseen}
    assert ("model.layers.0.self_attn", "scaled_dot_product_attention") in calls
    assert all(p.found_by == "traced" for p in manifest.unseen)
    assert loss_of(model(**batch)).isfinite()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_hugging_face(use_reentrant):
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config).train()
    recomputed = copy.deepcopy(plain)
    enable = getattr(recomputed, "activation_checkpointing_enable", None) or recomputed.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})  # the later name, where it is there
    recomputed.enable_input_require_grads()
    found = []
    for model in (plain, recomputed):
        quantize_model(model, uniform("E3M4", rounding="stochastic"), seed=1)
        outputs = [model(input_ids=ids, labels=ids).loss for ids in torch.arange(48).view(2, 2, 12)]
        for loss in outputs:
            loss.backward()
        found.append([*outputs, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
