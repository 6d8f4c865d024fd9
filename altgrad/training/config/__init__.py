"""What an experiment is, and how it is read."""
