"""PersonViT: self-supervised pre-training and evaluation of ViTs on person crops."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# The Triton kernels live in the top-level folder `kernels/` and are imported as `personvit.kernels`. An installed
# wheel holds them inside this package (setup.py maps the folder); in a checkout they are our sibling.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
