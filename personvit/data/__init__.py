"""Images, crops, masks and batches. The heavy names load on first use, so that `personvit.data` itself is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from personvit.data.crops import MultiCrop
    from personvit.data.masks import BlockMaskGenerator

__all__ = ["BlockMaskGenerator", "MultiCrop"]


def __getattr__(name: str) -> Any:
    if name == "BlockMaskGenerator":
        from personvit.data.masks import BlockMaskGenerator

        return BlockMaskGenerator
    if name == "MultiCrop":
        from personvit.data.crops import MultiCrop

        return MultiCrop
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
