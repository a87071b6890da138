"""PersonViT: self-supervised pre-training, fine-tuning and evaluation of ViTs on person crops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from personvit import timm_hook

if TYPE_CHECKING:
    from personvit.embedder import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

# The Triton kernels live in the top-level folder `kernels/` and are imported as `personvit.kernels`. An installed
# wheel holds them inside this package (setup.py maps the folder); in a checkout they are our sibling.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))


def __getattr__(name: str) -> Any:
    """`load` comes with torch; importing the package alone stays light."""
    if name == "load":
        from personvit.embedder import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


timm_hook.install()
