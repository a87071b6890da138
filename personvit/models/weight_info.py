"""Description of a weight file, and its backbone made ready for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from personvit.config import IMAGENET_MEAN, IMAGENET_STD
from personvit.errors import CheckpointError
from personvit.models.vit import ARCHITECTURES
from personvit.models.weight_layouts import FINE_TUNED, LAYOUTS, BackboneShape, WeightParts, resize_positions

FINE_TUNED_MEAN = FINE_TUNED_STD = (0.5, 0.5, 0.5)
"""Pixel statistics of TransReID's fine-tuning configurations."""

CLASSIFIER = "classifier.weight"
Triple = tuple[float, float, float]

_CUSTOM = "custom"
_SIE_COEFFICIENT = 3.0  # TransReID's default; its files do not say theirs


@dataclass(frozen=True)
class WeightsInfo:
    """What a weight file held and what became of it."""

    path: str
    layout: str
    """Which published layout was recognised, in words."""
    arch: str
    """vit_micro ... vit_base if width and depth match one of them, otherwise custom."""
    embed_dim: int
    depth: int
    num_heads: int
    """From metadata if there are any, otherwise by architecture, otherwise heads of width 64."""
    mlp_ratio: float
    patch_size: int
    image_size: tuple[int, int]
    """Height, width in pixels that the returned position table is made for."""
    mean: Triple
    std: Triple
    loaded: tuple[str, ...]
    """Names taken as they are."""
    resized: tuple[str, ...]
    """Names taken after resampling."""
    dropped: tuple[str, ...]
    """Names in the file that were not used (heads, classifiers ...)."""
    missing: tuple[str, ...]
    """Optional names that the file lacks (the mask token; teachers have none)."""
    metadata: dict[str, Any]
    """What the exporter wrote about itself; empty for foreign files."""
    folded: tuple[str, ...] = ()
    """Names that were multiplied into others (DINOv2's LayerScale)."""
    num_ids: int = 0
    """Identities of the file's classifier; 0: it has none."""
    num_cameras: int = 0
    """Cameras that the file has vectors for; 0: none."""
    neck_feat: str = "before"
    """Feature that a fine-tuned model gives: before or after its batch norm."""
    training: dict[str, Any] = field(default_factory=dict)
    """epoch, step and args of the training, as far as they are known."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def description(self) -> str:
        """Readable: file, layout, architecture, input, neck."""
        rows = [
            ("file", self.path),
            ("layout", self.layout),
            ("architecture", f"{self.arch}: width {self.embed_dim}, {self.depth} blocks, {self.num_heads} heads"),
            (
                "input",
                f"{self.image_size[0]}x{self.image_size[1]}, patches of {self.patch_size}: {self.grid} positions",
            ),
            ("pixels", f"mean {self.mean}, std {self.std}"),
        ]
        if self.num_ids:
            rows.append(("neck", f"{self.num_ids} identities, feature {self.neck_feat} the batch norm"))
        if self.num_cameras:
            rows.append(("cameras", f"vectors for {self.num_cameras}"))
        return "\n".join(f"{title:<13} {value}" for title, value in rows)

    def table(self) -> str:
        """The description, and what was loaded, resized, folded, dropped and missing."""
        rows = []
        for title in ("loaded", "resized", "folded", "dropped", "missing"):
            names: tuple[str, ...] = getattr(self, title)
            if names or title != "folded":
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                rows.append((title, f"{len(names)}  {shown}".rstrip()))
        return "\n".join([self.description(), *(f"{title:<13} {value}" for title, value in rows)])


def prepare(parts: WeightParts, image_size: tuple[int, int] | None = None) -> tuple[dict[str, Tensor], WeightsInfo]:
    """What `load_backbone` returns, of a file that was taken apart already.

    Raises:
        CheckpointError: as `load_backbone`.
    """
    state = parts.canonical()
    shape = BackboneShape.of(state, parts.path)
    grid = parts.grid(shape)
    target = grid if image_size is None else target_grid(parts.path, shape.patch_size, image_size)
    state["pos_embed"] = resize_positions(state["pos_embed"], grid, target)
    resized = ("pos_embed",) if target != grid else ()
    facts, fine_tuned = parts.facts, parts.layout == FINE_TUNED
    arch = str(parts.metadata.get("arch") or guess_arch(shape.embed_dim, shape.depth))
    classifier = parts.others.get(CLASSIFIER) if fine_tuned else None
    return state, WeightsInfo(
        path=parts.path,
        layout=LAYOUTS[parts.layout] + (f", {parts.network}" if parts.network else ""),
        arch=arch,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=_heads_of_file(shape.embed_dim, arch, parts.metadata, parts.path),
        mlp_ratio=shape.mlp_ratio,
        patch_size=shape.patch_size,
        image_size=(target[0] * shape.patch_size, target[1] * shape.patch_size),
        mean=_triple(facts.get("mean", FINE_TUNED_MEAN if fine_tuned else IMAGENET_MEAN)),
        std=_triple(facts.get("std", FINE_TUNED_STD if fine_tuned else IMAGENET_STD)),
        loaded=tuple(name for name in state if name not in resized),
        resized=resized,
        dropped=tuple(parts.others),
        missing=() if "masked_embed" in state else ("masked_embed",),
        metadata=parts.metadata,
        folded=parts.folded,
        num_ids=len(classifier) if classifier is not None and classifier.ndim == 2 else 0,
        num_cameras=shape.num_cameras,
        neck_feat=facts.get("neck_feat", "before"),
        training=parts.training,
    )


def target_grid(path: str, patch_size: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of height, width pixels.

    Raises:
        CheckpointError: patches do not divide it; names the nearest size that they do.
    """
    height, width = image_size
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        fit = [max(1, round(side / patch_size)) * patch_size for side in image_size]
        raise CheckpointError(
            f"{path} has patches of {patch_size} pixels, which do not divide an image of {height}x{width}. Choose a "
            f"size that is a multiple of {patch_size}; the nearest is {fit[0]}x{fit[1]}."
        )
    return height // patch_size, width // patch_size


def sie_coefficient(parts: WeightParts) -> float:
    """Factor of the camera vectors: as stated, otherwise that of TransReID."""
    return float(parts.facts.get("sie_coefficient", _SIE_COEFFICIENT))


def _heads_of_file(embed_dim: int, arch: str, metadata: Mapping[str, Any], path: str) -> int:
    by_name = ARCHITECTURES[arch][2] if arch in ARCHITECTURES else embed_dim // 64
    heads = int(metadata.get("num_heads") or by_name)
    if heads < 1 or embed_dim % heads:
        raise CheckpointError(f"{path}: width {embed_dim} cannot be split into {heads} heads. Export it with metadata.")
    return heads


def _triple(value: Sequence[float]) -> Triple:
    return float(value[0]), float(value[1]), float(value[2])


def guess_arch(embed_dim: int, depth: int, num_heads: int | None = None) -> str:
    """The named architecture of this width and depth (and number of heads, if known), otherwise custom."""
    for name, (width, blocks, heads) in ARCHITECTURES.items():
        if (width, blocks) == (embed_dim, depth) and num_heads in (None, heads):
            return name
    return _CUSTOM
