"""Training runs: config, data, model, the step as a transaction, checkpoints, verdicts and run folders."""
