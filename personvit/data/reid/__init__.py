"""Readers of the labelled layouts, one file each; `personvit.data.reid_sets` opens them by name."""
