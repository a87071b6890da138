"""From one layout of weight files to another, without loss where both can hold a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from personvit import __version__
from personvit.errors import CheckpointError
from personvit.models.weight_files import write_safetensors, write_torch
from personvit.models.weight_info import WeightsInfo, prepare, sie_coefficient, target_grid
from personvit.models.weight_layouts import (
    DINOV2,
    FINE_TUNED,
    PLAIN,
    TRAINING,
    BackboneShape,
    WeightParts,
    read_parts,
    resize_positions,
)

TARGETS = ("transreid", "ibot", "timm", "safetensors")
"""Layouts that can be written."""

# Whose heads, necks and classifiers a target can hold; those of other layouts would be read by nobody.
_HOLDS = {
    "transreid": (PLAIN, FINE_TUNED),
    "ibot": (TRAINING,),
    "timm": (PLAIN, DINOV2),
    "safetensors": (PLAIN, DINOV2, TRAINING, FINE_TUNED),
}
_SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    info: WeightsInfo
    """The file that was read."""
    target: str
    out: Path
    written: tuple[str, ...]
    """Names in the new file; those of an iBOT file without the name of their network."""
    left_out: tuple[str, ...]
    """Names of the file that was read which the new one does not hold."""
    folded: tuple[str, ...]
    """Names that were multiplied into others."""

    def table(self) -> str:
        """Readable: what was written and what was not."""
        rows = [("written", f"{self.out} ({self.target}): {len(self.written)} tensors")]
        for title, names in (("left out", self.left_out), ("multiplied in", self.folded)):
            if names:
                rows.append((title, f"{len(names)}  {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"))
        return "\n".join(f"{title:<13} {value}" for title, value in rows)


def convert_weights(
    path: str | Path,
    target: str,
    out: str | Path,
    *,
    network: str | None = None,
    image_size: tuple[int, int] | None = None,
    backbone_only: bool = False,
) -> Conversion:
    """Write the weights of a file in another layout.

    Tensors keep their values and types bit for bit. Three things change one, and only where they are asked for or the
    target cannot do without: another `image_size` resamples the positions; LayerScale is multiplied into the layer
    before it for targets without; `backbone_only` leaves out everything that is not a plain ViT's.

    Layouts written:

    * transreid: a flat state dict for torch.load. Of a fine-tuned model `base.*`, `bottleneck.*`, `classifier.weight`
      (as `transformer_120.pth`); otherwise the plain backbone, which the published fine-tuning starts from.
    * ibot: `{"teacher": {"backbone.*", "head.*"}}` with epoch and args where they are known; of a student also
      `{"student": {"module.*"}}`, which then stands for the teacher too. No optimizer: no run goes on from it.
    * timm: timm's names; safetensors or torch by the ending of `out`.
    * safetensors: ours, with everything that is known about the weights in the header.

    Args:
        path: file or `hf://` reference of any layout that `load_backbone` reads.
        target: one of `TARGETS`.
        out: the new file. Never written over one that exists.
        network: teacher or student of a training checkpoint. None: the teacher, or what there is.
        image_size: height, width in pixels that the positions are made for. None: as they are.
        backbone_only: drop heads, neck, classifier, mask token and camera vectors.

    Raises:
        CheckpointError: as `load_backbone`; or `out` exists, has the wrong ending, or cannot hold the model.
    """
    out = Path(out)
    _check_ending(target, out)
    if out.exists():
        raise CheckpointError(f"{out} exists and is left as it is. Choose another name, or remove it.")
    parts = read_parts(path, network)
    info = prepare(parts, image_size)[1]
    backbone, folded = _backbone_for(parts, target, image_size, backbone_only)
    keep = not backbone_only and parts.layout in _HOLDS[target]
    others = parts.others if keep else {}
    if target == "safetensors":
        written = _named(parts, backbone, others, backbone_only)
        write_safetensors(out, _cloned(written), _metadata(parts, info, backbone_only), replace=False)
    elif target == "timm" and out.suffix == _SAFETENSORS:
        written = {**backbone, **others}
        write_safetensors(out, _cloned(written), _metadata(parts, info, backbone_only), replace=False)
    elif target == "ibot":
        written = {**{f"backbone.{name}": value for name, value in backbone.items()}, **others}
        write_torch(out, _ibot(parts, written), replace=False)
    else:
        written = _named(parts, backbone, others, backbone_only) if target == "transreid" else {**backbone, **others}
        write_torch(out, _cloned(written), replace=False)
    left_out = [name for name in parts.backbone if name not in backbone and name not in folded]
    left_out += [name for name in parts.others if name not in others]
    return Conversion(info, target, out, tuple(written), tuple(left_out), folded)


def _check_ending(target: str, out: Path) -> None:
    if target not in TARGETS:
        raise CheckpointError(f"--to {target} is unknown. Choose one of {', '.join(TARGETS)}.")
    safe = out.suffix == _SAFETENSORS
    if target == "safetensors" and not safe:
        raise CheckpointError(f"--out {out}: name it {out.with_suffix(_SAFETENSORS).name}; readers go by the ending.")
    if target in ("transreid", "ibot") and safe:
        raise CheckpointError(
            f"--out {out}: the published readers of {target} files use torch.load. Name it "
            f"{out.with_suffix('.pth').name}."
        )


def _backbone_for(
    parts: WeightParts, target: str, image_size: tuple[int, int] | None, backbone_only: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors of the backbone that the target holds, in their own types, and what was multiplied into them."""
    backbone, folded = parts.backbone, parts.folded
    fold = bool(folded) and (backbone_only or target in ("transreid", "ibot"))
    if fold:
        backbone = {name: value.to(backbone[name].dtype) for name, value in parts.canonical().items()}
    if "sie_embed" in backbone and not backbone_only and target in ("timm", "ibot"):
        raise CheckpointError(
            f"{parts.path} was trained with camera vectors, which {target} files do not hold: without them it computes "
            "something else. To leave them out on purpose, add --backbone-only."
        )
    token_stays = target == "safetensors" or (target == "ibot" and parts.network == "student")
    left = {"sie_embed"} if backbone_only else set()
    left |= set() if token_stays and not backbone_only else {"masked_embed"}
    backbone = {name: value.detach() for name, value in backbone.items() if name not in left}
    if image_size is not None:
        shape = BackboneShape.of(
            {name: v for name, v in parts.backbone.items() if name not in parts.folded}, parts.path
        )
        table, new = backbone["pos_embed"], target_grid(parts.path, shape.patch_size, image_size)
        backbone["pos_embed"] = resize_positions(table.float(), parts.grid(shape), new).to(table.dtype)
    return backbone, folded if fold else ()


def _named(
    parts: WeightParts, backbone: Mapping[str, Tensor], others: Mapping[str, Tensor], backbone_only: bool
) -> dict[str, Tensor]:
    prefix = "base." if parts.layout == FINE_TUNED and not backbone_only else ""
    return {**{prefix + name: value for name, value in backbone.items()}, **others}


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of their own: tied tensors would be refused, and a view would drag its whole storage into the file."""
    return {name: value.detach().contiguous().clone() for name, value in tensors.items()}


def _ibot(parts: WeightParts, written: Mapping[str, Tensor]) -> dict[str, Any]:
    tensors = _cloned(written)
    content: dict[str, Any] = {"teacher": {name: v for name, v in tensors.items() if name != "backbone.masked_embed"}}
    if parts.network == "student":
        content["student"] = {f"module.{name}": value for name, value in tensors.items()}
    return {**content, **{name: parts.training[name] for name in ("epoch", "args") if name in parts.training}}


def _metadata(parts: WeightParts, info: WeightsInfo, backbone_only: bool) -> dict[str, Any]:
    # Of the neck and the cameras only a file may speak that holds them.
    gone = ("neck_feat", "num_ids", "num_cameras", "sie_coefficient") if backbone_only else ()
    known = {
        "mean": list(info.mean),
        "std": list(info.std),
        "converted_from": info.layout,
        **{name: value for name, value in parts.metadata.items() if name not in gone},
        "arch": info.arch,
        "image_size": list(info.image_size),
        "patch_size": info.patch_size,
        "embed_dim": info.embed_dim,
        "depth": info.depth,
        "num_heads": info.num_heads,
        "mlp_ratio": info.mlp_ratio,
        "personvit_version": __version__,
    }
    if parts.network:
        known["network"] = parts.network
    if parts.training:
        known["training"] = parts.training
    if parts.has_neck and not backbone_only:
        known |= {"neck_feat": info.neck_feat, "num_ids": info.num_ids}
    if info.num_cameras and not backbone_only:
        known |= {"num_cameras": info.num_cameras, "sie_coefficient": sie_coefficient(parts)}
    return known
