"""Run folders as data: rows of metrics, files, readers and writers. No torch."""
