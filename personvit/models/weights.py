"""Models from weight files of every published layout, and self-describing safetensors from models.

Layouts read: training checkpoints of this project, iBOT, DINO and PersonViT (the teacher unless the student is asked
for), plain state dicts of timm and TransReID-SSL, DINOv2, `{"state_dict": ...}`, `{"model": ...}`, fine-tuned
TransReID / PersonViT models (`base.*`), and safetensors; as files or as `hf://` references.
`weight_layouts` tells them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from personvit import __version__
from personvit.config import IMAGENET_MEAN, IMAGENET_STD
from personvit.errors import CheckpointError
from personvit.models.reid import ReIDModel
from personvit.models.vit import VisionTransformer
from personvit.models.weight_files import write_safetensors
from personvit.models.weight_info import (
    CLASSIFIER,
    FINE_TUNED_MEAN,
    FINE_TUNED_STD,
    WeightsInfo,
    guess_arch,
    prepare,
    sie_coefficient,
)
from personvit.models.weight_layouts import FINE_TUNED, WeightParts, read_parts

Network: TypeAlias = "VisionTransformer | ReIDModel"

_NECK = ("bottleneck.weight", "bottleneck.bias", "bottleneck.running_mean", "bottleneck.running_var")
_BATCHES = "bottleneck.num_batches_tracked"
_OWN_NAMES = ("masked_embed", "sie_embed")  # a model may have what its file lacks


def load_backbone(
    path: str | Path, image_size: tuple[int, int] | None = None, *, network: str | None = None
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Backbone tensors of a weight file, under timm's names.

    Args:
        path: weight file of any layout listed above, or `hf://owner/name/file`.
        image_size: height, width in pixels; positions are resampled to its grid. None: as in the file.
        network: teacher or student of a training checkpoint. None: the teacher, or what there is.

    Returns:
        float32 state dict (mask token and camera vectors only if the file has them) and a description. LayerScale is
        multiplied into the layer before it.

    Raises:
        CheckpointError: unreadable, unsafe, no complete backbone, or one that this architecture cannot represent.
    """
    return prepare(read_parts(path, network), image_size)


def load_into(model: VisionTransformer, path: str | Path, *, network: str | None = None) -> WeightsInfo:
    """Load a weight file into a backbone of the same width, depth and patch size; positions are resampled if needed.

    Camera vectors are taken if the file has as many, scaled alike; otherwise the model keeps its own.

    Args:
        model: filled in place.
        path: as `load_backbone`.
        network: as `load_backbone`.

    Raises:
        CheckpointError: as `load_backbone`, or shapes that do not fit. The model is unchanged then.
    """
    parts = read_parts(path, network)
    patch_size = parts.backbone["patch_embed.proj.weight"].shape[-1]
    # Positions are resampled for the model's own patches only; with others the comparison below finds the difference.
    state, info = prepare(parts, model.img_size if patch_size == model.patch_size else None)
    wanted = model.state_dict()
    if different := first_misfit(state, wanted):
        raise CheckpointError(
            f"{path} does not fit the model: it is {info.arch} (width {info.embed_dim}, {info.depth} blocks, "
            f"patches of {info.patch_size}), the model has width {model.embed_dim}, {model.depth} blocks, patches "
            f"of {model.patch_size} (first difference: {different}). Set model.arch and model.patch_size to match."
        )
    same_cameras = sie_coefficient(parts) == model.sie_coefficient and info.num_cameras == model.num_cameras
    unused = [name for name in state if name not in wanted or (name == "sie_embed" and not same_cameras)]
    model.load_state_dict({**wanted, **{name: value for name, value in state.items() if name not in unused}})
    absent = [name for name in _OWN_NAMES if name in wanted and (name not in state or name in unused)]
    return dataclasses.replace(
        info,
        loaded=tuple(name for name in info.loaded if name not in unused),
        dropped=(*unused, *info.dropped),
        missing=tuple(dict.fromkeys([*info.missing, *absent])),
    )


def first_misfit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """First name that is missing from one of two backbones or has another shape in it; None: they fit.

    Mask token and camera vectors may differ: a model may have them where its file has none, and the other way round.
    """
    for name in dict.fromkeys([*wanted, *state]):
        if name in _OWN_NAMES:
            continue
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape:
            return name
    return None


def load_model(
    path: str | Path, image_size: tuple[int, int] | None = None, *, network: str | None = None
) -> VisionTransformer:
    """A backbone with the weights of a file, on the CPU, in evaluation mode.

    Args:
        path: as `load_backbone`.
        image_size: height, width in pixels. None: that of the file.
        network: as `load_backbone`.

    Raises:
        CheckpointError: as `load_backbone`.
    """
    parts = read_parts(path, network)
    return _build(parts, *prepare(parts, image_size)).eval()


def load_reid(
    path: str | Path, image_size: tuple[int, int] | None = None, *, num_ids: int | None = None
) -> tuple[ReIDModel, WeightsInfo]:
    """A fine-tuned model with its neck and classifier, on the CPU, in evaluation mode.

    Args:
        path: file of a fine-tuned model: `transformer_120.pth`, `exported/best.safetensors`, a checkpoint.
        image_size: height, width in pixels. None: that of the file.
        num_ids: identities that the classifier must have. None: any number.

    Returns:
        The model, with `neck_feat` as the file says (before if it does not), and a description.

    Raises:
        CheckpointError: as `load_backbone`, no complete neck, or a classifier of another size.
    """
    parts = read_parts(path)
    state, info = prepare(parts, image_size)
    if num_ids is not None and num_ids != info.num_ids:
        raise CheckpointError(
            f"{path} has a classifier of {info.num_ids} identities, {num_ids} were asked for: it was trained on "
            f"another set. To start from its backbone alone: model.weights={path}"
        )
    return _build_reid(parts, state, info)


def load_network(path: str | Path, image_size: tuple[int, int] | None = None) -> tuple[Network, WeightsInfo]:
    """Whatever gives the features of a file: the fine-tuned model if it has a neck, else the backbone.

    Args:
        path: as `load_backbone`.
        image_size: height, width in pixels. None: that of the file.

    Returns:
        The network on the CPU, in evaluation mode, and a description.

    Raises:
        CheckpointError: as `load_reid` and `load_backbone`.
    """
    return build_network(read_parts(path), image_size)


def build_network(parts: WeightParts, image_size: tuple[int, int] | None = None) -> tuple[Network, WeightsInfo]:
    """What `load_network` returns, of a file that was taken apart already.

    Raises:
        CheckpointError: as `load_network`.
    """
    state, info = prepare(parts, image_size)
    if parts.has_neck:
        return _build_reid(parts, state, info)
    return _build(parts, state, info).eval(), info


def save_backbone(model: VisionTransformer, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a backbone as safetensors that describe themselves; the mask token is left out.

    Args:
        model: the backbone.
        path: where to.
        metadata: plain values added to what the model knows: `mean` and `std` of the pixels (ImageNet if absent),
            `recipe`, `protocol`, `licence`, and anything else worth keeping. What describes the architecture cannot be
            overridden.

    Raises:
        CheckpointError: not writable.
    """
    described = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), **(metadata or {}), **_describe(model)}
    write_safetensors(path, {n: value for n, value in model.state_dict().items() if n != "masked_embed"}, described)


def save_reid(model: ReIDModel, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a fine-tuned model as safetensors that describe themselves, with neck and classifier.

    Args:
        model: the model.
        path: where to.
        metadata: as `save_backbone`; `mean` and `std` are 0.5 if absent.

    Raises:
        CheckpointError: not writable.
    """
    described = {
        "mean": list(FINE_TUNED_MEAN),
        "std": list(FINE_TUNED_STD),
        **(metadata or {}),
        **_describe(model.base),
        "neck_feat": model.neck_feat,
        "num_ids": model.num_ids,
    }
    tensors = {name: value for name, value in model.state_dict().items() if name != "base.masked_embed"}
    write_safetensors(path, tensors, described)


def _describe(model: VisionTransformer) -> dict[str, Any]:
    return {
        "arch": guess_arch(model.embed_dim, model.depth, model.num_heads),
        "image_size": list(model.img_size),
        "patch_size": model.patch_size,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
        "num_cameras": model.num_cameras,
        "sie_coefficient": model.sie_coefficient,
        "personvit_version": __version__,
    }


def _build(parts: WeightParts, state: Mapping[str, Tensor], info: WeightsInfo) -> VisionTransformer:
    model = VisionTransformer(
        img_size=info.image_size,
        patch_size=info.patch_size,
        embed_dim=info.embed_dim,
        depth=info.depth,
        num_heads=info.num_heads,
        mlp_ratio=info.mlp_ratio,
        masked_embed="masked_embed" in state,
        num_cameras=info.num_cameras,
        sie_coefficient=sie_coefficient(parts),
    )
    model.load_state_dict(state)
    return model


def _build_reid(parts: WeightParts, state: Mapping[str, Tensor], info: WeightsInfo) -> tuple[ReIDModel, WeightsInfo]:
    neck = _neck(parts, info)
    model = ReIDModel(_build(parts, state, info), info.num_ids, neck_feat=info.neck_feat)
    model.load_state_dict({**{f"base.{name}": value for name, value in state.items()}, **neck})
    return model.eval(), dataclasses.replace(
        info,
        loaded=(*(f"base.{name}" for name in info.loaded), *neck),
        resized=tuple(f"base.{name}" for name in info.resized),
        dropped=tuple(name for name in info.dropped if name not in neck),
    )


def _neck(parts: WeightParts, info: WeightsInfo) -> dict[str, Tensor]:
    """Batch norm and classifier of a fine-tuned file, in float32."""
    wanted = (*_NECK, CLASSIFIER)
    absent = [name for name in wanted if name not in parts.others]
    if parts.layout != FINE_TUNED or absent:
        raise CheckpointError(
            f"{parts.path} is no complete fine-tuned model but a {info.layout}; missing: {', '.join(absent[:5])}. "
            f"Train one: personvit finetune model.weights={parts.path}"
        )
    neck = {name: parts.others[name].detach().float().clone() for name in wanted}
    neck[_BATCHES] = parts.others.get(_BATCHES, torch.tensor(0)).detach().clone()
    for name, value in neck.items():
        shape = {CLASSIFIER: (info.num_ids, info.embed_dim), _BATCHES: ()}.get(name, (info.embed_dim,))
        if tuple(value.shape) != shape or not value.numel():
            raise CheckpointError(
                f"{parts.path}: {name} has shape {list(value.shape)}, but its backbone has a width of "
                f"{info.embed_dim}. The file is damaged or put together from two models. To use its backbone alone: "
                f"model.weights={parts.path}"
            )
    return neck
