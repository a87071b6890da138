"""Backbone weights of every published layout in, self-describing safetensors out.

Layouts read: training checkpoints of this project, iBOT, DINO and PersonViT (the teacher; the student if there is no
teacher), plain state dicts, `{"state_dict": ...}`, `{"model": ...}`, fine-tuned TransReID / PersonViT models
(`base.*`), and safetensors. The order of descent is that of hustvl/PersonViT transreid_pytorch (load_param).
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from personvit import __version__
from personvit.config import IMAGENET_MEAN, IMAGENET_STD
from personvit.errors import CheckpointError
from personvit.models.vit import ARCHITECTURES, VisionTransformer
from personvit.models.weight_files import read_weight_file, write_safetensors

FINE_TUNED_MEAN = FINE_TUNED_STD = (0.5, 0.5, 0.5)
"""Pixel statistics of TransReID's fine-tuning configurations."""

Triple = tuple[float, float, float]

_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.")
# Names that belong to a backbone's computation: one of them that we cannot place means another architecture.
_COMPUTING = ("blocks.", "norm.", "norm_pre.", "patch_embed.", "pos_embed", "cls_token", "dist_token", "reg")
_CUSTOM = "custom"


@dataclass(frozen=True)
class WeightsInfo:
    """What a weight file held and what became of it."""

    path: str
    layout: str
    """Which published layout was recognised."""
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
    """Names in the file that a backbone does not use (heads, classifiers ...)."""
    missing: tuple[str, ...]
    """Optional names that the file lacks (the mask token; teachers have none)."""
    metadata: dict[str, Any]
    """What the exporter wrote about itself; empty for foreign files."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def table(self) -> str:
        """Readable summary: file, layout, architecture, and what was loaded, resized, dropped and missing."""
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
        for title in ("loaded", "resized", "dropped", "missing"):
            names: tuple[str, ...] = getattr(self, title)
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            rows.append((title, f"{len(names)}  {shown}".rstrip()))
        return "\n".join(f"{title:<13} {value}" for title, value in rows)


def load_backbone(path: str | Path, image_size: tuple[int, int] | None = None) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Backbone tensors of a weight file, under timm's names.

    Args:
        path: weight file of any layout listed above.
        image_size: height, width in pixels; positions are resampled to its grid. None: as in the file.

    Returns:
        float32 state dict (without mask token unless the file has one) and a description.

    Raises:
        CheckpointError: unreadable, unsafe, no complete backbone, or one that this architecture cannot represent.
    """
    content, metadata = read_weight_file(path)
    arguments = _plain_arguments(content.get("args"))
    named, layout = _find_backbone(content, str(path))
    state, dropped = _select(named, str(path))
    shape = _Shape.of(state, str(path))
    grid = _grid_of_file(state["pos_embed"].shape[1] - 1, shape.patch_size, {**arguments, **metadata}, str(path))
    target = grid
    if image_size is not None:
        if image_size[0] % shape.patch_size or image_size[1] % shape.patch_size:
            raise CheckpointError(
                f"{path} has patches of {shape.patch_size} pixels, which do not divide an image of "
                f"{image_size[0]}x{image_size[1]}. Choose a size that is a multiple of {shape.patch_size}."
            )
        target = (image_size[0] // shape.patch_size, image_size[1] // shape.patch_size)
        state["pos_embed"] = resize_positions(state["pos_embed"], grid, target)
    resized = ("pos_embed",) if target != grid else ()
    arch = str(metadata.get("arch") or _guess_arch(shape.embed_dim, shape.depth))
    fine_tuned = layout.startswith("fine-tuned")
    return state, WeightsInfo(
        path=str(path),
        layout=layout,
        arch=arch,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=_heads_of_file(shape.embed_dim, arch, metadata, str(path)),
        mlp_ratio=shape.mlp_ratio,
        patch_size=shape.patch_size,
        image_size=(target[0] * shape.patch_size, target[1] * shape.patch_size),
        mean=_triple(metadata.get("mean") or arguments.get("mean"), FINE_TUNED_MEAN if fine_tuned else IMAGENET_MEAN),
        std=_triple(metadata.get("std") or arguments.get("std"), FINE_TUNED_STD if fine_tuned else IMAGENET_STD),
        loaded=tuple(name for name in state if name not in resized),
        resized=resized,
        dropped=dropped,
        missing=() if "masked_embed" in state else ("masked_embed",),
        metadata=metadata,
    )


def load_into(model: VisionTransformer, path: str | Path) -> WeightsInfo:
    """Load a weight file into a backbone of the same width, depth and patch size; positions are resampled if needed.

    Raises:
        CheckpointError: as `load_backbone`, or shapes that do not fit. The model is unchanged then.
    """
    state, info = load_backbone(path, model.img_size)
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name != "masked_embed" and (name not in state or state[name].shape != value.shape):
            raise CheckpointError(
                f"{path} does not fit the model: it is {info.arch} (width {info.embed_dim}, {info.depth} blocks, "
                f"patches of {info.patch_size}), the model has width {model.embed_dim}, {model.depth} blocks, patches "
                f"of {model.patch_size} (first difference: {name}). Set model.arch and model.patch_size to match."
            )
    model.load_state_dict({**wanted, **{name: value for name, value in state.items() if name in wanted}})
    return info


def load_model(path: str | Path, image_size: tuple[int, int] | None = None) -> VisionTransformer:
    """A backbone with the weights of a file, on the CPU, in evaluation mode.

    Args:
        path: weight file of any layout listed above.
        image_size: height, width in pixels. None: that of the file.

    Raises:
        CheckpointError: as `load_backbone`.
    """
    state, info = load_backbone(path, image_size)
    model = VisionTransformer(
        img_size=info.image_size,
        patch_size=info.patch_size,
        embed_dim=info.embed_dim,
        depth=info.depth,
        num_heads=info.num_heads,
        mlp_ratio=info.mlp_ratio,
        masked_embed="masked_embed" in state,
    )
    model.load_state_dict(state)
    return model.eval()


def save_backbone(model: VisionTransformer, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a backbone as safetensors that describe themselves; the mask token is left out.

    Args:
        model: the backbone.
        path: where to.
        metadata: plain values added to what the model knows: `mean` and `std` of the pixels (ImageNet if absent),
            `recipe`, and anything else worth keeping. What describes the architecture cannot be overridden.

    Raises:
        CheckpointError: not writable.
    """
    described = {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        **(metadata or {}),
        "arch": _guess_arch(model.embed_dim, model.depth, model.num_heads),
        "image_size": list(model.img_size),
        "patch_size": model.patch_size,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
        "personvit_version": __version__,
    }
    tensors = {name: value for name, value in model.state_dict().items() if name != "masked_embed"}
    write_safetensors(path, tensors, described)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a position table once, at loading.

    Bilinear, as the published reader does (hustvl/PersonViT, resize_pos_embed). Inside a network, where the grid
    changes from crop to crop, positions are resampled bicubically instead (`position_resize_matrix`).

    Args:
        table: [1, 1 + h*w, D], CLS first.
        old: rows, columns of the table.
        new: rows, columns wanted.

    Returns:
        [1, 1 + h'*w', D]; the same tensor if the grids agree.
    """
    if old == new:
        return table
    cells = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    cells = F.interpolate(cells, size=new, mode="bilinear", align_corners=False)
    return torch.cat([table[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)


@dataclass(frozen=True)
class _Shape:
    embed_dim: int
    depth: int
    mlp_ratio: float
    patch_size: int

    @staticmethod
    def of(state: Mapping[str, Tensor], path: str) -> _Shape:
        width = state["cls_token"].shape[-1]
        depth = 1 + max(int(found.group(1)) for name in state if (found := _BLOCK_NAME.match(name)))
        _, channels, rows, columns = state["patch_embed.proj.weight"].shape
        if channels != 3 or rows != columns:
            raise CheckpointError(
                f"{path}: patches of {rows}x{columns} with {channels} channels; only square RGB ones."
            )
        return _Shape(width, depth, state["blocks.0.mlp.fc1.weight"].shape[0] / width, rows)


def _find_backbone(content: dict[str, Any], path: str) -> tuple[dict[str, Tensor], str]:
    """Descend to the dict that holds the backbone; names without prefixes, and what the layout was."""
    layout = "state dict"
    for name in ("model", "state_dict", "module"):
        if isinstance(content.get(name), Mapping):
            content, layout = dict(content[name]), f"state dict under {name!r}"
    for network in ("teacher", "target_encoder", "student"):
        if isinstance(content.get(network), Mapping):
            content, layout = dict(content[network]), f"training checkpoint, {network}"
            break
    named = {
        str(name).replace("_orig_mod.", "").removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not named:
        raise CheckpointError(
            f"{path} holds no tensors (found: {', '.join(map(str, content))[:200] or 'nothing'}). "
            "Give a file with a model's state dict."
        )
    for prefix, note in (("backbone.", layout), ("base.", "fine-tuned model (TransReID / PersonViT)")):
        if any(name.startswith(prefix + "blocks.") for name in named):
            # Names outside the prefix keep it, so that a head is never mistaken for a part of the backbone.
            outside = {f"~{name}": value for name, value in named.items() if not name.startswith(prefix)}
            inside = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
            return {**inside, **outside}, note
    return named, layout


def _select(named: dict[str, Tensor], path: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The backbone's tensors in model order, and the names that were left out."""
    depth = 1 + max((int(found.group(1)) for name in named if (found := _BLOCK_NAME.match(name))), default=-1)
    needed = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    needed += [
        f"blocks.{i}.{part}.{kind}" for i in range(depth) for part in _BLOCK_PARTS for kind in ("weight", "bias")
    ]
    needed += ["norm.weight", "norm.bias"]
    absent = [name for name in needed if name not in named]
    if absent or not depth:
        raise CheckpointError(
            f"{path} holds no complete ViT backbone: {len(absent)} of {len(needed)} tensors are missing "
            f"({', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}). Found: {', '.join(list(named)[:4])}, ... "
            "Give a ViT checkpoint with timm's names (cls_token, pos_embed, blocks.0.norm1.weight, ...)."
        )
    used = [*needed, *(["masked_embed"] if "masked_embed" in named else [])]
    rest = [name for name in named if name not in set(used)]
    foreign = [name for name in rest if name.startswith(_COMPUTING)]
    if foreign:
        raise CheckpointError(
            f"{path} is of another architecture: {', '.join(foreign[:4])} take part in its computation and have no "
            "place in this ViT (it has no LayerScale, registers or distillation token). Give weights of a plain ViT."
        )
    state = {name: named[name].detach().float().clone() for name in used}
    return state, tuple(name.removeprefix("~") for name in rest)


def _plain_arguments(raw: Any) -> dict[str, Any]:
    """What a checkpoint's `args` say about the input: image size and pixel statistics, if they do."""
    if isinstance(raw, argparse.Namespace):
        raw = vars(raw)
    crops = raw.get("crops") if isinstance(raw, Mapping) else None
    if not isinstance(crops, Mapping):
        return {}
    found = {"image_size": crops.get("global_size"), "mean": crops.get("mean"), "std": crops.get("std")}
    return {name: value for name, value in found.items() if value is not None}


def _grid_of_file(cells: int, patch_size: int, facts: Mapping[str, Any], path: str) -> tuple[int, int]:
    """Rows and columns of a position table: as stated, or the only one of the shapes 1:1, 2:1, 3:1 that fits."""
    size = facts.get("image_size")
    if isinstance(size, (list, tuple)) and len(size) == 2:
        grid = (int(size[0]) // patch_size, int(size[1]) // patch_size)
        if grid[0] * grid[1] == cells:
            return grid
    for ratio in (1, 2, 3):
        columns = math.isqrt(cells // ratio)
        if columns and ratio * columns * columns == cells:
            return ratio * columns, columns
    raise CheckpointError(
        f"{path}: {cells} positions are no grid of height to width 1:1, 2:1 or 3:1, and the file does not say its "
        "image size. Overlapping patches are not supported; give weights of a model with whole patches."
    )


def _heads_of_file(embed_dim: int, arch: str, metadata: Mapping[str, Any], path: str) -> int:
    by_name = ARCHITECTURES[arch][2] if arch in ARCHITECTURES else embed_dim // 64
    heads = int(metadata.get("num_heads") or by_name)
    if heads < 1 or embed_dim % heads:
        raise CheckpointError(f"{path}: width {embed_dim} cannot be split into {heads} heads. Export it with metadata.")
    return heads


def _triple(value: Any, default: Triple) -> Triple:
    if isinstance(value, (list, tuple)) and len(value) == 3:
        return float(value[0]), float(value[1]), float(value[2])
    return default


def _guess_arch(embed_dim: int, depth: int, num_heads: int | None = None) -> str:
    """The named architecture of this width and depth (and number of heads, if known), otherwise custom."""
    for name, (width, blocks, heads) in ARCHITECTURES.items():
        if (width, blocks) == (embed_dim, depth) and num_heads in (None, heads):
            return name
    return _CUSTOM
