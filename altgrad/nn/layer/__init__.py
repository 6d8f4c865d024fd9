"""The arithmetic of quantized layers."""
