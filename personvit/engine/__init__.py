"""The training loop, checkpoints and resuming, health and the retrieval probe."""
