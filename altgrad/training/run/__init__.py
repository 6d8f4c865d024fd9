"""One run on disk: its folder, checkpoints, trackers and reports."""
