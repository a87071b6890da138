"""Ranks and launch, seeds, run folder and metric rows, progress, signals. Knows nothing of models or data."""
