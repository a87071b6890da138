"""Weight files taken apart: which published layout it is, which tensors are the backbone's, and what else is known.

The order of descent is that of the published reader (hustvl/PersonViT transreid_pytorch, load_param): first into
`model`, `state_dict`, `module`, then into the teacher, else MSN's `target_encoder`, else the student.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from personvit.config.finetune import NECK_FEATURES
from personvit.errors import CheckpointError
from personvit.models.weight_files import read_weight_file

PLAIN, DINOV2, TRAINING, FINE_TUNED = "plain", "dinov2", "training", "fine-tuned"
LAYOUTS = {
    PLAIN: "plain ViT (timm / TransReID-SSL)",
    DINOV2: "DINOv2 ViT with LayerScale",
    TRAINING: "training checkpoint (iBOT / DINO / PersonViT)",
    FINE_TUNED: "fine-tuned model (TransReID / PersonViT)",
}
"""Layouts that are told apart, and how they are called in messages."""

_WRAPPERS = ("model", "state_dict", "module")
_NETWORKS = ("teacher", "target_encoder", "student")
_PREFIXES = {FINE_TUNED: "base.", TRAINING: "backbone."}
_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.")
_LAYER_SCALE = re.compile(r"blocks\.\d+\.ls[12]\.gamma")
# What LayerScale multiplies: the output of the attention and of the MLP.
_SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
# Names that belong to a backbone's computation: one of them that we cannot place means another architecture.
_COMPUTING = ("blocks.", "norm.", "norm_pre.", "patch_embed.", "pos_embed", "cls_", "dist_token", "reg", "part", "sie_")
_LOCAL_BRANCHES = ("b1.", "b2.")


@dataclass(frozen=True)
class BackboneShape:
    """What the tensors themselves say about their ViT."""

    embed_dim: int
    depth: int
    mlp_ratio: float
    patch_size: int
    cells: int
    """Positions without that of the CLS token."""
    num_cameras: int

    @staticmethod
    def of(state: Mapping[str, Tensor], path: str) -> BackboneShape:
        """Read the shape off a complete backbone.

        Raises:
            CheckpointError: tensors that do not belong to one ViT, patches that are not square or not RGB.
        """
        patches = state["patch_embed.proj.weight"]
        if patches.ndim != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
            raise CheckpointError(
                f"{path}: patch_embed.proj.weight has shape {list(patches.shape)}, expected [width, 3, side, side]: "
                "only square RGB patches can be represented. Give weights of such a model."
            )
        width, hidden = int(patches.shape[0]), len(state["blocks.0.mlp.fc1.bias"].flatten())
        if not (width and hidden):
            raise CheckpointError(f"{path}: its tensors are empty. Copy or download it again.")
        depth = 1 + max(int(found.group(1)) for name in state if (found := _BLOCK_NAME.match(name)))
        cameras = int(state["sie_embed"].shape[0]) if "sie_embed" in state else 0
        cells = int(state["pos_embed"].shape[1]) - 1 if state["pos_embed"].ndim == 3 else 0
        shape = BackboneShape(width, depth, hidden / width, int(patches.shape[2]), cells, cameras)
        for name, tensor in state.items():
            wanted = shape._expected(name, hidden)
            if tuple(tensor.shape) != wanted:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(tensor.shape)}, but with a width of {width} it should be "
                    f"{list(wanted)}. The file is damaged, or of another architecture."
                )
        return shape

    def _expected(self, name: str, hidden: int) -> tuple[int, ...]:
        width = self.embed_dim
        whole: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, width),
            "pos_embed": (1, 1 + self.cells, width),
            "masked_embed": (1, width),
            "sie_embed": (self.num_cameras, 1, width),
            "patch_embed.proj.weight": (width, 3, self.patch_size, self.patch_size),
        }
        rows = {"qkv": 3 * width, "fc1": hidden}
        columns = {"qkv": (width,), "proj": (width,), "fc1": (width,), "fc2": (hidden,)}
        layer, kind = name.split(".")[-2:] if "." in name else ("", "")
        weight = columns.get(layer, ()) if kind == "weight" else ()
        return whole.get(name, (rows.get(layer, width), *weight))


@dataclass(frozen=True)
class WeightParts:
    """A weight file by its parts; tensors as they are stored, without wrappers' prefixes."""

    path: str
    layout: str
    """A key of `LAYOUTS`."""
    network: str | None
    """Which of a training checkpoint's networks was taken."""
    backbone: dict[str, Tensor]
    """Under timm's names, in model order; with LayerScale, mask token and camera vectors where the file has them."""
    others: dict[str, Tensor]
    """Heads, neck, classifier: whatever the backbone does not use, under the file's own names."""
    facts: dict[str, Any]
    """What metadata or arguments say about input, neck and camera vectors."""
    training: dict[str, Any]
    """epoch, step and args of the training, as far as they are known."""
    metadata: dict[str, Any]
    """What the exporter wrote about itself; empty for foreign files."""

    @property
    def folded(self) -> tuple[str, ...]:
        """Names that `canonical` multiplies into others."""
        return tuple(name for name in self.backbone if _LAYER_SCALE.fullmatch(name))

    @property
    def has_neck(self) -> bool:
        """Is it a whole fine-tuned model: neck and classifier?"""
        return self.layout == FINE_TUNED and {"bottleneck.weight", "classifier.weight"} <= self.others.keys()

    def canonical(self) -> dict[str, Tensor]:
        """The backbone in float32 as copies, LayerScale multiplied into the layer before it.

        gamma * (W x + b) = (diag(gamma) W) x + gamma * b: no output changes beyond rounding.
        """
        folded = self.folded
        state = {name: value.detach().float().clone() for name, value in self.backbone.items() if name not in folded}
        for name in folded:
            block, scale, _ = name.rsplit(".", 2)
            gamma = self.backbone[name].detach().float()
            state[f"{block}.{_SCALED[scale]}.weight"] *= gamma[:, None]
            state[f"{block}.{_SCALED[scale]}.bias"] *= gamma
        return state

    def grid(self, shape: BackboneShape) -> tuple[int, int]:
        """Rows and columns of the position table: as stated, or the only one of the shapes 1:1, 2:1, 3:1 that fits.

        Raises:
            CheckpointError: nothing fits.
        """
        size = self.facts.get("image_size")
        if size is not None:
            grid = (size[0] // shape.patch_size, size[1] // shape.patch_size)
            if grid[0] * grid[1] == shape.cells:
                return grid
        for ratio in (1, 2, 3):
            columns = math.isqrt(shape.cells // ratio)
            if columns and ratio * columns * columns == shape.cells:
                return ratio * columns, columns
        raise CheckpointError(
            f"{self.path}: {shape.cells} positions are no grid of height to width 1:1, 2:1 or 3:1, and the file does "
            "not say its image size. Overlapping patches are not supported; give weights of a model with whole patches."
        )


def read_parts(path: str | Path, network: str | None = None) -> WeightParts:
    """Read a weight file and take it apart.

    Args:
        path: file or `hf://` reference.
        network: teacher or student of a training checkpoint. None: the teacher, or what there is.

    Raises:
        CheckpointError: unreadable, unsafe, without that network, no complete backbone, or one that this architecture
            cannot represent.
    """
    content, metadata = read_weight_file(path)
    where = str(path)
    arguments = _plain(content.get("args"))
    training = {name: content[name] for name in ("epoch", "step") if isinstance(content.get(name), int)}
    training |= {"args": arguments} if isinstance(arguments, dict) else {}
    inner, found = _descend(content, network, metadata, where)
    named = {
        str(name).replace("_orig_mod.", "").removeprefix("module."): value
        for name, value in inner.items()
        if isinstance(value, Tensor)
    }
    if not named:
        raise CheckpointError(
            f"{where} holds no tensors (found: {', '.join(map(str, content))[:200] or 'nothing'}). "
            "Give a file with a model's state dict."
        )
    layout = next((key for key, pre in _PREFIXES.items() if any(n.startswith(pre + "blocks.") for n in named)), PLAIN)
    backbone, others = _split(named, _PREFIXES.get(layout, ""), where)
    if layout != FINE_TUNED and found is not None:
        layout = TRAINING
    elif layout == PLAIN and any(_LAYER_SCALE.fullmatch(name) for name in backbone):
        layout = DINOV2
    stated = metadata.get("training")
    return WeightParts(
        path=where,
        layout=layout,
        network=found,
        backbone=backbone,
        others=others,
        facts={**_facts(arguments), **_checked(metadata, where)},
        training=stated if isinstance(stated, dict) else training,
        metadata=metadata,
    )


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


def _descend(
    content: Mapping[str, Any], network: str | None, metadata: Mapping[str, Any], path: str
) -> tuple[Mapping[str, Any], str | None]:
    """The dict that holds the tensors, and whose they are."""
    for name in _WRAPPERS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
    there = [name for name in _NETWORKS if isinstance(content.get(name), Mapping)]
    if not there:  # an export of one network says which
        written = metadata.get("network") if metadata.get("network") in _NETWORKS else None
        if network is not None and network != written:
            raise CheckpointError(
                f"{path} holds {f'the {written}' if written else 'a single network'}, no {network}. Leave the choice "
                "of the network out, or give the training checkpoint."
            )
        return content, written
    chosen = there[0] if network is None else network
    if chosen not in there:
        raise CheckpointError(
            f"{path} has no {network}; it holds: {', '.join(there)}. Take one of these, or leave the choice out."
        )
    return content[chosen], chosen


def _split(named: dict[str, Tensor], prefix: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the backbone in model order without their prefix, and all others by their full names."""
    inside = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    depth = 1 + max((int(found.group(1)) for name in inside if (found := _BLOCK_NAME.match(name))), default=-1)
    used = _needed(depth)
    scales = [f"blocks.{i}.{scale}.gamma" for i in range(depth) for scale in _SCALED]
    if any(name in inside for name in scales):
        used += scales
    cameras = inside.get("sie_embed")
    optional = ["masked_embed"] if "masked_embed" in inside else []
    optional += ["sie_embed"] if cameras is not None and cameras.ndim == 3 and len(cameras) > 1 else []
    known = {*used, *optional}
    foreign = [name for name in inside if name not in known and name.startswith(_COMPUTING)]
    foreign += [name for name in named if prefix and name.startswith(_LOCAL_BRANCHES)]
    if foreign and depth:
        raise CheckpointError(
            f"{path} is of another architecture: {', '.join(foreign[:4])} take part in its computation and have no "
            "place in this ViT (it has no registers, distillation or part tokens, other stems, gated MLPs or local "
            "branches). Give weights of a plain ViT."
        )
    absent = [name for name in used if name not in inside]
    if absent or not depth:
        raise CheckpointError(
            f"{path} holds no complete ViT backbone: {len(absent)} of {len(used)} tensors are missing "
            f"({', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}). Found: {', '.join(list(named)[:4])}, ... "
            "Give a ViT checkpoint with timm's names (cls_token, pos_embed, blocks.0.norm1.weight, ...)."
        )
    backbone = {name: inside[name] for name in [*used, *optional]}
    taken = {prefix + name for name in backbone}
    return backbone, {name: value for name, value in named.items() if name not in taken}


def _needed(depth: int) -> list[str]:
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    names += [f"blocks.{i}.{part}.{kind}" for i in range(depth) for part in _BLOCK_PARTS for kind in ("weight", "bias")]
    return [*names, "norm.weight", "norm.bias"]


def _plain(value: Any) -> Any:
    """Arguments as JSON can hold them: a Namespace becomes a dict, anything else that is no plain value its text."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _facts(arguments: Any) -> dict[str, Any]:
    """What our own arguments say about the input, the neck and the camera vectors; foreign ones say nothing."""
    sections = arguments if isinstance(arguments, dict) else {}
    crops, pixels, model = (
        entry if isinstance(entry := sections.get(name), dict) else {} for name in ("crops", "input", "model")
    )
    found = {
        "image_size": crops.get("global_size") or pixels.get("size"),
        "mean": crops.get("mean") or pixels.get("mean"),
        "std": crops.get("std") or pixels.get("std"),
        "neck_feat": model.get("neck_feat"),
        "sie_coefficient": model.get("sie_coefficient"),
    }
    return {name: value for name, value in found.items() if name in _FACTS and _FACTS[name](value)}


def _numbers(value: Any, count: int, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(x, kinds) for x in value)


_FACTS: dict[str, Callable[[Any], bool]] = {
    "image_size": lambda value: _numbers(value, 2, (int,)),
    "mean": lambda value: _numbers(value, 3, (int, float)),
    "std": lambda value: _numbers(value, 3, (int, float)) and min(value) > 0,
    "num_heads": lambda value: isinstance(value, int) and value >= 1,
    "neck_feat": lambda value: value in NECK_FEATURES,
    "sie_coefficient": lambda value: isinstance(value, (int, float)),
}


def _checked(metadata: dict[str, Any], path: str) -> dict[str, Any]:
    """Metadata whose values, where we use them, are of the kind that we wrote."""
    for name, fits in _FACTS.items():
        if name in metadata and not fits(metadata[name]):
            raise CheckpointError(
                f"{path}: its header says {name}={str(metadata[name])[:80]!r}, which is no such value. Export it again."
            )
    return metadata
