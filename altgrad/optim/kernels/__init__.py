"""Fused optimizer steps for the CPU, and the rule of which parameters take them."""
