"""Figures of runs and models."""

from __future__ import annotations

from personvit.visualization.curves import plot_run

__all__ = ["plot_run"]
