"""Quantized layers for any PyTorch model: recipes, `quantize_model`, grid storage, and quantized products."""

from altgrad.nn.change import change_format
from altgrad.nn.convert import quantize_model, restore_model
from altgrad.nn.manifest import Manifest
from altgrad.nn.optimizer_hook import attach_optimizer
from altgrad.nn.recipe import GemmRecipe, LayerRecipe, OperandSpec, Override, Recipe, StorageSpec
from altgrad.nn.registry import register_layer
from altgrad.nn.session import full_precision, set_amax_reduction, set_observer, set_rank, set_seed, set_step
from altgrad.nn.state import load_quant_state, quant_state
from altgrad.nn.storage import UpdateCounts
from altgrad.nn.uniform import layer_recipe, uniform

__all__ = [
    "GemmRecipe",
    "LayerRecipe",
    "Manifest",
    "OperandSpec",
    "Override",
    "Recipe",
    "StorageSpec",
    "UpdateCounts",
    "attach_optimizer",
    "change_format",
    "full_precision",
    "layer_recipe",
    "load_quant_state",
    "quant_state",
    "quantize_model",
    "register_layer",
    "restore_model",
    "set_amax_reduction",
    "set_observer",
    "set_rank",
    "set_seed",
    "set_step",
    "uniform",
]
