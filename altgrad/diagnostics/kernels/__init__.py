"""Compiled passes behind `altgrad.diagnostics`."""
