"""PersonViT in timm: `timm.create_model("personvit_small_patch16_256x128")` after `import personvit`.

The networks are timm's own VisionTransformer, so that features_only, forward_intermediates, gradient checkpointing and
the rest work as ever; names and shapes of the tensors are those of `personvit.models.VisionTransformer`, and so are the
outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn

from personvit.config import IMAGENET_MEAN, IMAGENET_STD
from personvit.errors import CheckpointError
from personvit.models.vit import ARCHITECTURES
from personvit.models.weights import first_misfit, load_backbone

_CFG: dict[str, Any] = {
    "num_classes": 0,
    "input_size": (3, 256, 128),
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "paper_name": "PersonViT: Large-scale Self-supervised Vision Transformer for Person Re-Identification",
    "paper_ids": "arXiv:2408.05398",
    # Every source of weights goes through PersonViT.load_pretrained; "hf" is what timm wants for files on the Hub.
    "custom_load": "hf",
}

default_cfgs = generate_default_cfgs(
    {f"personvit_{size}_patch16_256x128": dict(_CFG) for size in ("tiny", "small", "base")}
)


class PersonViT(TimmVisionTransformer):
    """timm's VisionTransformer that reads weight files of every layout that `personvit weights inspect` knows."""

    def load_pretrained(self, checkpoint_path: str | Path, prefix: str = "") -> None:
        """Load a backbone; positions are resampled to the model's grid, `pretrained_cfg` gets the file's mean and std.

        Args:
            checkpoint_path: file of any layout, or `hf://` reference.
            prefix: for timm's signature; prefixes are recognised.

        Raises:
            CheckpointError: unreadable, unsafe, trained with camera vectors, or of another shape.
        """
        height, width = self.patch_embed.img_size
        state, info = load_backbone(checkpoint_path, (int(height), int(width)))
        if info.num_cameras:
            raise CheckpointError(
                f"{checkpoint_path} was trained with camera vectors, which timm's ViT does not have. Use "
                "personvit.load, or leave them out on purpose: personvit weights convert FILE --to timm --backbone-only"
            )
        head = ("head.", "fc_norm.")  # of a model made with num_classes: stays as it is
        own = {name: value for name, value in self.state_dict().items() if not name.startswith(head)}
        state.pop("masked_embed", None)
        if different := first_misfit(state, own):
            raise CheckpointError(
                f"{checkpoint_path} does not fit this model: it is {info.arch} (width {info.embed_dim}, {info.depth} "
                f"blocks, patches of {info.patch_size}; first difference: {different}). Create the model of that size."
            )
        self.load_state_dict(state, strict=False)
        if isinstance(cfg := getattr(self, "pretrained_cfg", None), dict):
            cfg.update(mean=info.mean, std=info.std)


def _create(variant: str, arch: str, pretrained: bool, **kwargs: Any) -> PersonViT:
    cfg = resolve_pretrained_cfg(
        variant,
        pretrained_cfg=kwargs.get("pretrained_cfg"),
        pretrained_cfg_overlay=kwargs.get("pretrained_cfg_overlay"),
    )
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise CheckpointError(
            f"{variant}: no weights are published under this name. Name a file of yours, of any layout: timm."
            f"create_model({variant!r}, pretrained=True, pretrained_cfg_overlay={{'file': FILE}}). Or make one that "
            "timm reads by itself: personvit weights convert FILE --to timm --out weights.safetensors"
        )
    if isinstance(overlay := kwargs.get("pretrained_cfg_overlay"), dict):  # timm forgets custom_load with a new source
        kwargs["pretrained_cfg_overlay"] = {"custom_load": _CFG["custom_load"], **overlay}
    embed_dim, depth, num_heads = ARCHITECTURES[arch]
    shape = {"patch_size": 16, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    out_indices = kwargs.pop("out_indices", 3)
    model: PersonViT = build_model_with_cfg(
        PersonViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # for what timm itself has exported
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**shape, **kwargs},
    )
    return model


@register_model
def personvit_tiny_patch16_256x128(pretrained: bool = False, **kwargs: Any) -> PersonViT:
    """Width 192, 12 blocks, 3 heads."""
    return _create("personvit_tiny_patch16_256x128", "vit_tiny", pretrained, **kwargs)


@register_model
def personvit_small_patch16_256x128(pretrained: bool = False, **kwargs: Any) -> PersonViT:
    """Width 384, 12 blocks, 6 heads: PersonViT-S."""
    return _create("personvit_small_patch16_256x128", "vit_small", pretrained, **kwargs)


@register_model
def personvit_base_patch16_256x128(pretrained: bool = False, **kwargs: Any) -> PersonViT:
    """Width 768, 12 blocks, 12 heads: PersonViT-B."""
    return _create("personvit_base_patch16_256x128", "vit_base", pretrained, **kwargs)
