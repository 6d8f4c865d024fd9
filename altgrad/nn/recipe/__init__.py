"""Recipes as values: which format, rounding and scaling each operand of each GEMM has."""
