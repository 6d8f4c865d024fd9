"""The readable oracle."""
