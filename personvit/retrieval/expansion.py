"""Average query expansion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from personvit import ops
from personvit.errors import ConfigError
from personvit.retrieval.checks import check_features

_BLOCK = 1024  # queries expanded at once: their neighbours are gathered as [block, top, D]


def expand_queries(query: Tensor, gallery: Tensor, top: int, alpha: float = 0.0) -> Tensor:
    """Replace each query by the mean of itself and its nearest gallery rows, of length 1.

    With alpha = 0 all weigh the same (AQE: Chum et al. 2007, "Total Recall"); else a gallery row weighs
    max(cosine, 0)^alpha and the query 1 (alpha-QE: Radenovic et al. 2018, "Fine-tuning CNN Image Retrieval with No
    Human Annotation").

    Args:
        query: [Q, D] float32, rows of length 1.
        gallery: [G, D] float32, rows of length 1, on the same device.
        top: gallery rows that join; cut to G.
        alpha: 0 or more.

    Returns:
        [Q, D] float32, rows of length 1.

    Raises:
        ConfigError: top < 1 or alpha < 0.
        DataError: features that are empty, not finite, zero, or of two widths.
    """
    if top < 1:
        raise ConfigError(f"expansion.top={top}: 1 or more gallery images must join a query. expansion.top=0: off.")
    if not alpha >= 0:
        raise ConfigError(f"expansion.alpha={alpha}: expected 0 (equal weights) or more, e.g. expansion.alpha=3")
    query, gallery = check_features(query, gallery)
    _, neighbours = ops.knn(query, gallery, min(top, len(gallery)))  # [Q, top]
    parts = []
    for rows, chosen in zip(torch.split(query, _BLOCK), torch.split(neighbours, _BLOCK), strict=True):
        joined = gallery[chosen]  # [b, top, D]
        if alpha > 0:
            cosine = torch.linalg.vecdot(joined, rows[:, None])
            joined = joined * cosine.clamp_min(0).pow(alpha)[:, :, None]
        parts.append(F.normalize(rows + joined.sum(dim=1), dim=1))
    return torch.cat(parts)
