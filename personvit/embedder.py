"""`personvit.load`: a weight file becomes a model that turns images into features."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from personvit.data.sources import read_image
from personvit.models.reid import ReIDModel
from personvit.models.vit import VisionTransformer
from personvit.models.weight_info import WeightsInfo
from personvit.models.weights import load_network
from personvit.retrieval.features import FeatureSet, extract_features

OneImage: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor"
Images: TypeAlias = "OneImage | Sequence[OneImage]"


class Embedder(nn.Module):
    """A model with everything that its input needs.

    Calling it takes a normalised batch [B, 3, H, W] and gives L2-normalised features [B, D], with gradients and on the
    device of the batch; `embed` takes images of any kind.

    Args:
        network: a backbone, or a fine-tuned model, whose feature is that of its neck (`neck_feat`).
        info: where the weights came from.

    Attributes:
        network: what gives the features.
        info: where the weights came from.
        image_size: height, width that images are resized to.
        mean: of the training images, three channels.
        std: likewise.
    """

    def __init__(self, network: VisionTransformer | ReIDModel, info: WeightsInfo) -> None:
        super().__init__()
        self.network = network
        self.info = info
        self.image_size = info.image_size
        self.mean = info.mean
        self.std = info.std

    @property
    def backbone(self) -> VisionTransformer:
        """The ViT, without the neck of a fine-tuned model."""
        return self.network.base if isinstance(self.network, ReIDModel) else self.network

    def forward(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """Features of a batch.

        Args:
            images: [B, 3, H, W], normalised.
            camids: [B] int64 cameras from 0; needed only by a model that was trained with camera vectors.

        Returns:
            [B, D] float32, rows of length 1.
        """
        return F.normalize(self.network.embed(images, camids).float(), dim=1)

    def embed(
        self,
        images: Images,
        *,
        batch_size: int = 64,
        pids: npt.ArrayLike | None = None,
        camids: npt.ArrayLike | None = None,
        flip: bool = False,
        num_workers: int = 0,
        progress: bool = True,
    ) -> FeatureSet:
        """Features of images, in the order given, computed in float32 where the model is.

        Args:
            images: one image or a sequence: file names, PIL images, RGB arrays [H, W, 3] uint8 (or float in [0, 1]),
                tensors [3, H, W] of the same ranges. A batch (array [B, H, W, 3], tensor [B, 3, H, W]) is a sequence.
                All of them are resized and normalised here; do neither before.
            batch_size: images per forward pass.
            pids: [N] identities to keep with the features.
            camids: [N] cameras, likewise; a model that was trained with camera vectors cannot do without.
            flip: average with the feature of the mirrored image.
            num_workers: reader processes for file names.
            progress: show a bar if there is a terminal and the list is long.

        Raises:
            DataError: a file cannot be read, or the model needs cameras that were not given.
            ValueError: an array or tensor that is no such image.
        """
        listed = list(_each(images))
        paths = [os.fspath(item) for item in listed if isinstance(item, str | os.PathLike)]
        return extract_features(
            self.network,
            paths if len(paths) == len(listed) else [_picture(item) for item in listed],
            self.image_size,
            self.mean,
            self.std,
            batch_size,
            pids=pids,
            camids=camids,
            flip=flip,
            num_workers=num_workers,
            progress=progress,
        )


def load(
    path: str | Path, *, image_size: tuple[int, int] | None = None, device: torch.device | str | None = None
) -> Embedder:
    """Load weights of any supported layout, ready to embed.

    Args:
        path: weight file: an exported backbone.safetensors or best.safetensors, a training checkpoint, a published
            PersonViT, iBOT, TransReID-SSL, timm or DINOv2 file; or one on the Hub, `hf://owner/name/file`.
        image_size: height, width in pixels. None: that of the training.
        device: None: a CUDA device if there is one, else the CPU.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: unreadable, unsafe, or not a ViT backbone.
    """
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Embedder(*load_network(path, image_size)).to(target).eval()


def _each(images: Images) -> Iterable[OneImage]:
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, Tensor | np.ndarray):
        if images.ndim not in (3, 4):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected one image (3 axes) or a batch (4 axes)")
        return [images] if images.ndim == 3 else list(images)
    return images


def _picture(image: OneImage) -> Image.Image:
    """As 8-bit RGB, so that a file, its array and its tensor get the same feature."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image))
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"a tensor of shape {tuple(image.shape)} is no image: expected [3, H, W]")
        image = image.permute(1, 2, 0).numpy()
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an array of shape {image.shape} is no image: expected [H, W, 3]")
    if image.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(image))
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"pixels of type {image.dtype}: expected uint8, or float in [0, 1]")
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"float pixels from {image.min():.3g} to {image.max():.3g}: expected [0, 1]. Normalised tensors go to "
            f"model(batch), which only embeds."
        )
    return Image.fromarray(np.round(image * 255).astype(np.uint8))
