"""What an optimizer's step did to weights that live on a grid, measured in one fused pass."""
