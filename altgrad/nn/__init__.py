"""Quantized layers for any PyTorch model: recipes, `quantize_model`, grid storage, and quantized products."""

from altgrad.nn.layer.registry import register_layer
from altgrad.nn.model.change import change_format
from altgrad.nn.model.convert import quantize_model, restore_model
from altgrad.nn.model.manifest import Manifest
from altgrad.nn.model.optimizer_hook import attach_optimizer
from altgrad.nn.model.spots import places
from altgrad.nn.model.state import load_quant_state, quant_state
from altgrad.nn.oscillation import Oscillation
from altgrad.nn.recipe.cells import Cell, Finder
from altgrad.nn.recipe.layer_recipe import LayerRecipe, layer_recipe
from altgrad.nn.recipe.named import NAMED, NamedRecipe, recipe
from altgrad.nn.recipe.recipe import Override, Recipe, keep, uniform
from altgrad.nn.recipe.spec import GemmRecipe, OperandSpec, StorageSpec
from altgrad.nn.session import (
    cached_weights,
    full_precision,
    set_amax_reduction,
    set_observer,
    set_rank,
    set_seed,
    set_step,
    uncoded_uses,
)
from altgrad.nn.update_counts import UpdateCounts

Finder.find = staticmethod(places)  # recipes, which know no layers, are told how a model's are found

__all__ = [
    "NAMED",
    "Cell",
    "GemmRecipe",
    "LayerRecipe",
    "Manifest",
    "NamedRecipe",
    "OperandSpec",
    "Oscillation",
    "Override",
    "Recipe",
    "StorageSpec",
    "UpdateCounts",
    "attach_optimizer",
    "cached_weights",
    "change_format",
    "full_precision",
    "keep",
    "layer_recipe",
    "load_quant_state",
    "quant_state",
    "quantize_model",
    "recipe",
    "register_layer",
    "restore_model",
    "set_amax_reduction",
    "set_observer",
    "set_rank",
    "set_seed",
    "set_step",
    "uncoded_uses",
    "uniform",
]
