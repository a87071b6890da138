"""From images to L2-normalised features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from personvit.data.sources import read_image
from personvit.errors import DataError
from personvit.models.cameras import check_cameras
from personvit.runtime.distributed import Ranks, all_reduce_sum, any_rank

UNKNOWN = -1
"""Label of images whose identity or camera nobody told."""

_PROGRESS_FROM = 512  # images; shorter work needs no progress bar
_GATHERED = 16_384  # features that ranks exchange at once: 48 MiB of ViT-B, in the memory where a training runs


class Backbone(Protocol):
    """What turns a batch of images into features.

    An attribute `num_cameras` above 1 says that it needs to know the camera of every image.
    """

    training: bool

    def embed(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] float32, normalised, and cameras [B] int64 for a model that needs them -> [B, D]."""

    def train(self, mode: bool = True) -> object:
        """Set training or evaluation mode."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters; the first one says on which device to compute."""


def device_of(model: Backbone) -> torch.device:
    """Where a model computes: the device of its first parameter, the CPU if it has none."""
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


@dataclass(frozen=True)
class FeatureSet:
    """Features of images, with their labels.

    Attributes:
        features: [N, D] float32 on the CPU, rows of length 1.
        pids: [N] int64 identities; UNKNOWN (-1) where nobody told.
        camids: [N] int64 cameras; likewise.
        paths: N file names; empty strings for images that came from memory.
    """

    features: Tensor
    pids: npt.NDArray[np.int64]
    camids: npt.NDArray[np.int64]
    paths: list[str]

    def __len__(self) -> int:
        return len(self.features)


class RawPixels(nn.Module):
    """Baseline without a model: the pixels of an image, standardised so that brightness and contrast drop out."""

    def embed(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, 3 H W], each row with mean 0 and variance 1, whatever the camera."""
        pixels = images.flatten(1)
        return (pixels - pixels.mean(dim=1, keepdim=True)) / (pixels.std(dim=1, correction=0, keepdim=True) + 1e-6)


def to_input(image: Image.Image, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Test transform of the published evaluation: bilinear PIL resize, [0, 1], normalise.

    Args:
        image: RGB.
        image_size: height, width.
        mean: of the three channels.
        std: of the three channels.

    Returns:
        [3, H, W] float32.
    """
    height, width = image_size
    pixels: Tensor = TF.pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def extract_features(
    model: Backbone,
    images: Sequence[str] | Sequence[Image.Image],
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    *,
    pids: npt.ArrayLike | None = None,
    camids: npt.ArrayLike | None = None,
    flip: bool = False,
    num_workers: int = 0,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> FeatureSet:
    """Features of a list of images, in float32 and in the order given.

    The model is evaluated on its own device, in eval mode, and left in the mode it was in. The global random
    generators are not moved, so that a probe in mid-training does not change the training.

    Args:
        model: a backbone with `embed`.
        images: file names, or RGB images.
        image_size: height, width that the images are resized to.
        mean: of the training images.
        std: of the training images.
        batch_size: images per forward pass.
        pids: [N] identities, kept in the result.
        camids: [N] cameras, likewise; a model with camera vectors takes them from here.
        flip: average the feature with that of the mirrored image (not part of the published protocol).
        num_workers: reader processes; 0 reads in this one.
        progress: show a bar if there is a terminal and the list is long.
        ranks: let all ranks compute a share each; every rank must call this with the same arguments and the same
            weights and buffers in its model, and gets all features, those of a single rank to the bit. None: this
            process computes all.

    Raises:
        DataError: an image cannot be read, or its feature is not finite (nothing is dropped silently); a model with
            camera vectors was not told the cameras. Where one rank fails, all raise.
    """
    labels, cameras = _labels(pids, len(images), "pids"), _labels(camids, len(images), "camids")
    own = _share(len(images), batch_size, ranks)
    dataset = _Images(images[own], image_size, mean, std)
    hide_bar = not progress or len(images) < _PROGRESS_FROM or (ranks is not None and not ranks.is_main)
    features, failure = torch.zeros(0, 0), None
    try:
        features = _extract(model, dataset, _cameras_for(model, cameras)[own], batch_size, flip, num_workers, hide_bar)
    except DataError as error:
        failure = error
    if ranks is not None and ranks.world_size > 1:
        if any_rank(failure is not None, ranks.device) and failure is None:
            failure = DataError("Another rank could not compute its share of the features; its own message says why.")
        if failure is None:
            features = _gather(features, own, len(images), ranks)
    if failure is not None:
        raise failure
    if not torch.isfinite(features).all():
        raise DataError(
            "The features hold NaN or infinity: the weights come from a diverged training. Take an earlier checkpoint."
        )
    paths = [image if isinstance(image, str) else "" for image in images]
    return FeatureSet(features, labels, cameras, paths)


def _share(count: int, batch_size: int, ranks: Ranks | None) -> slice:
    """The images of this rank. Whole batches: another cut would change the last bits of what a batch computes."""
    if ranks is None:
        return slice(0, count)
    batches = -(-count // batch_size)
    first, last = (-(-batches * rank // ranks.world_size) for rank in (ranks.rank, ranks.rank + 1))
    return slice(min(count, first * batch_size), min(count, last * batch_size))


def _cameras_for(model: Backbone, camids: npt.NDArray[np.int64]) -> Tensor:
    """Cameras [N] int64 as the model wants to be told them; checked here, where they are on the CPU."""
    cameras = torch.from_numpy(camids)
    num_cameras = int(getattr(model, "num_cameras", 0))
    if num_cameras > 1:
        if len(camids) and (camids == UNKNOWN).all():
            raise DataError(
                f"The model has learned a vector for each of {num_cameras} cameras, and the cameras of these images "
                "are unknown: give camids (from 0, numbered as in its training), or use weights trained with "
                "model.camera_embed=false."
            )
        check_cameras(cameras, num_cameras)
    return cameras


def _extract(
    model: Backbone,
    dataset: _Images,
    camids: Tensor,
    batch_size: int,
    flip: bool,
    num_workers: int,
    hide_bar: bool,
) -> Tensor:
    """Features [N, D] of the images of `dataset`, on the CPU; [0, 0] if there are none."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=min(num_workers, -(-len(dataset) // batch_size)),
        collate_fn=_collate,
        generator=torch.Generator(),  # else each pass would draw from the global one
    )
    device = device_of(model)
    training = model.training
    model.train(False)
    parts: list[Tensor] = []
    try:
        # None: hidden unless on a terminal
        with torch.no_grad(), tqdm(total=len(dataset), desc="features", unit="img", disable=hide_bar or None) as bar:
            for number, (batch, error) in enumerate(loader):
                if error is not None:
                    raise DataError(f"{error}. Every image of an evaluation counts: repair or remove this file.")
                cameras = camids[number * batch_size :][: len(batch)]
                parts.append(_embed(model, batch.to(device), cameras, flip).cpu())
                bar.update(len(batch))
    finally:
        model.train(training)
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def _gather(part: Tensor, own: slice, count: int, ranks: Ranks) -> Tensor:
    """Features [count, D] of all ranks, from the rows `own` that this one has; adding zeros changes no value."""
    width = all_reduce_sum(torch.tensor(part.shape[1] if ranks.is_main else 0, device=ranks.device))
    features = torch.zeros(count, int(width))
    if len(part):
        features[own] = part
    for block in torch.split(features, _GATHERED):
        block.copy_(all_reduce_sum(block.to(ranks.device)))
    return features


def _embed(model: Backbone, batch: Tensor, camids: Tensor, flip: bool) -> Tensor:
    arguments = (camids.to(batch.device),) if getattr(model, "num_cameras", 0) > 1 else ()
    with torch.autocast(batch.device.type, enabled=False):
        features = model.embed(batch, *arguments).float()
        if flip:
            features = features + model.embed(batch.flip(3), *arguments).float()
        return F.normalize(features, dim=1)


def _labels(values: npt.ArrayLike | None, count: int, name: str) -> npt.NDArray[np.int64]:
    labels = np.full(count, UNKNOWN, dtype=np.int64) if values is None else np.asarray(values, dtype=np.int64)
    if labels.shape != (count,):
        raise ValueError(f"{name} has shape {labels.shape}, expected ({count},)")
    return labels


class _Images(Dataset[tuple[Tensor | None, str | None]]):
    def __init__(
        self,
        images: Sequence[str] | Sequence[Image.Image],
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.images = images
        self.image_size = image_size
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str | None]:
        """Input and None, or None and what is wrong: an exception would cross from a worker with its traceback."""
        image = self.images[index]
        try:
            picture = read_image(image) if isinstance(image, str) else image.convert("RGB")
        except DataError as error:
            return None, str(error)
        return to_input(picture, self.image_size, self.mean, self.std), None


def _collate(items: list[tuple[Tensor | None, str | None]]) -> tuple[Tensor, str | None]:
    error = next((error for _, error in items if error is not None), None)
    return torch.stack([image for image, _ in items if image is not None] or [torch.zeros(0)]), error
