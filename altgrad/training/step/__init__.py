"""The pieces of one training step."""
