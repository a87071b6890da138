"""Projection head of DINO and iBOT: MLP trunk, L2 normalisation, weight-normalised prototypes.

Formulas and state-dict names: bytedance/ibot models/head.py. The names `weight_g` and `weight_v` are those of the
older torch weight_norm, which every published checkpoint of this family carries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personvit.errors import ConfigError


class Prototypes(nn.Module):
    """Weight-normalised matrix: row k is weight_g[k] * weight_v[k] / ||weight_v[k]||.

    Args:
        dim: width of the bottleneck.
        count: number of prototypes K.
        norm_last_layer: keep every row at norm 1 by freezing `weight_g`.
    """

    def __init__(self, dim: int, count: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())

    def matrix(self) -> Tensor:
        """[K, dim], made anew at each call: call it once per step and share the result."""
        norm = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        matrix: Tensor = self.weight_v * (self.weight_g / norm)
        return matrix


class ProjectionHead(nn.Module):
    """MLP trunk common to CLS and patch tokens, then prototypes for either.

    Args:
        in_dim: width of the backbone's tokens.
        prototypes: K, for CLS tokens.
        patch_prototypes: K', for patch tokens.
        shared: one matrix serves both; `last_layer2` then is `last_layer`, and both names stay in the state dict.
        hidden_dim: width of the trunk.
        bottleneck_dim: width of the normalised vectors that the prototypes are compared with.
        norm_last_layer: freeze the norm of the prototypes at 1.

    Raises:
        ConfigError: a shared matrix with two different numbers of prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int = 8192,
        patch_prototypes: int = 8192,
        shared: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = False,
    ) -> None:
        super().__init__()
        if shared and prototypes != patch_prototypes:
            raise ConfigError(
                f"head.shared=true needs one matrix, got head.prototypes={prototypes} and "
                f"head.patch_prototypes={patch_prototypes}. Make them equal, or set head.shared=false."
            )
        self.shared = shared
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, prototypes, norm_last_layer)
        self.last_layer2 = self.last_layer if shared else Prototypes(bottleneck_dim, patch_prototypes, norm_last_layer)

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """Tokens [..., in_dim] -> unit vectors [..., bottleneck_dim] float32 (float64 stays)."""
        hidden: Tensor = self.mlp(tokens)
        return F.normalize(hidden if hidden.dtype == torch.float64 else hidden.float(), dim=-1)

    def prototype_matrices(self) -> tuple[Tensor, Tensor]:
        """Matrices for CLS [K, bottleneck_dim] and patches [K', bottleneck_dim]; the same tensor when shared."""
        matrix = self.last_layer.matrix()
        return matrix, matrix if self.shared else self.last_layer2.matrix()

    def forward(self, cls_token: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of CLS and patch tokens; the trunk sees both as one matrix.

        Args:
            cls_token: [A, in_dim].
            patch_tokens: [M, in_dim], M may be 0.

        Returns:
            [A, K] and [M, K'] in the compute dtype.
        """
        vectors = self.bottleneck(torch.cat([cls_token, patch_tokens]))
        cls_matrix, patch_matrix = self.prototype_matrices()
        count = len(cls_token)
        return F.linear(vectors[:count], cls_matrix), F.linear(vectors[count:], patch_matrix)
