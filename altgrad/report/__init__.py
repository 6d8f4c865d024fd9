"""Draws: tables, SVG charts and self-contained pages, from data handed in. Knows nothing of runs, tensors or torch."""
