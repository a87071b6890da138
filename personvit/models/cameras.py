"""Camera vectors of a backbone: side information embedding, SIE (TransReID, He et al. 2021, arXiv 2102.04378)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from personvit.errors import DataError


def add_camera_vectors(
    tokens: Tensor, groups: Sequence[tuple[int, int]], camids: Tensor | None, table: Tensor, coefficient: float
) -> Tensor:
    """Add to every token of an image, CLS token included, coefficient times the vector of the image's camera.

    Args:
        tokens: [T, D] packed stream.
        groups: (number of images, tokens per image) for each resolution, in stream order.
        camids: [images] int64 from 0, in stream order.
        table: [cameras, 1, D].
        coefficient: published: 3.

    Returns:
        [T, D] in the dtype of `tokens`. Differentiable.

    Raises:
        DataError: no camids, or (on the CPU) one outside the table; on CUDA the host would have to wait to look.
        ValueError: another number of them.
    """
    images = sum(count for count, _ in groups)
    if camids is None:
        raise DataError(
            f"This backbone adds a learned vector for each of its {len(table)} cameras, and was not told the cameras "
            "of the images: give camids, or use weights trained with model.camera_embed=false."
        )
    if camids.shape != (images,):
        raise ValueError(f"camids has shape {list(camids.shape)}, expected [{images}]: one for each image")
    if not camids.is_cuda:
        check_cameras(camids, len(table))
    vectors = F.embedding(camids.to(tokens.device), table[:, 0]) * coefficient  # [images, D]
    parts = []
    for (count, length), own in zip(groups, torch.split(vectors, [count for count, _ in groups]), strict=True):
        part, tokens = tokens[: count * length], tokens[count * length :]
        parts.append((part.view(count, length, -1) + own[:, None].to(part.dtype)).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_cameras(camids: Tensor, num_cameras: int) -> None:
    """Refuse cameras that a backbone has no vector for.

    Raises:
        DataError: a value below 0 or above num_cameras - 1.
    """
    beyond = camids[(camids < 0) | (camids >= num_cameras)]
    if len(beyond):
        raise DataError(
            f"Camera {int(beyond[0])} (counted from 0) is unknown to this backbone, which learned the {num_cameras} "
            f"cameras 0 to {num_cameras - 1}. Camera vectors serve the cameras of the training set only: evaluate on "
            "that set with its camids, or use weights trained with model.camera_embed=false."
        )
