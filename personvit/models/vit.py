"""Vision transformer for person crops: rectangular position grid, packed token stream, optional mask token.

Architecture and state-dict names follow bytedance/ibot models/vision_transformer.py (which are also timm's); the
position table of H/16 x W/16 cells is row-major, as in damo-cv/TransReID-SSL dino/vision_transformer.py.

All crops of a step travel as one stream of tokens [T, D]: norms, linear layers and MLPs see one large matrix, only
attention is launched once per sequence length. `forward` is the same code with a single group.

A branch (attention or MLP) is added to the stream by the norm that reads the sum: the two are one pass over memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personvit.errors import ConfigError
from personvit.models.cameras import add_camera_vectors
from personvit.ops import add_layer_norm, assemble_tokens, gather_rows, packed_attention

Groups = Sequence[tuple[int, int]]
"""(number of sequences, tokens per sequence) for each resolution, in stream order."""


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each to a token."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D], N row-major over the patch grid."""
        batch, channels, height, width = images.shape
        size = self.patch_size
        # The convolution as the matrix product that it is: its result then lies token by token in memory.
        cells = images.reshape(batch, channels, height // size, size, width // size, size)
        patches = cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention inside each sequence of a packed stream."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split(self, tokens: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(tokens)
        return qkv.view(len(tokens), 3, self.num_heads, -1)  # [T, 3, H, Dh]

    def forward(self, tokens: Tensor, groups: Groups, rows: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], or with `rows` [R] only these of it, [R, D]."""
        attended = packed_attention(self._split(tokens), groups).flatten(1)  # [T, D]
        projected: Tensor = self.proj(attended if rows is None else gather_rows(attended, rows))
        return projected

    def weights(self, tokens: Tensor, batch: int) -> Tensor:
        """Softmaxed attention [B, H, N, N] of B equally long sequences given as one stream [B*N, D]."""
        qkv = self._split(tokens)
        query, key, _ = qkv.view(batch, -1, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)  # 3 x [B, H, N, Dh]
        scores = query.float() @ key.float().transpose(-2, -1)
        weights: Tensor = (scores / math.sqrt(query.shape[-1])).softmax(dim=-1)
        return weights


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        output: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return output


class Stream(NamedTuple):
    """Residual stream with the branch that is still to be added to it."""

    tokens: Tensor
    """[T, D]."""
    branch: Tensor | None = None
    """[T, D]; None: nothing to add."""
    scale: Tensor | None = None
    """[T] float32 drop path factor of the branch (0 or 1/keep); None: 1."""

    def norm(self, norm: nn.LayerNorm, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The stream [T, D] with its branch added, and that normalised (in `dtype`; None: what autocast asks for)."""
        return add_layer_norm(self.tokens, self.branch, self.scale, None, norm.weight, norm.bias, norm.eps, dtype)


class Block(nn.Module):
    """Pre-norm transformer block on a packed stream."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, stream: Stream, groups: Groups, scales: Tensor | None = None, rows: Tensor | None = None
    ) -> Stream:
        """One block.

        Args:
            stream: what the block before gave.
            groups: sequences of the stream.
            scales: [2, T] float32 drop path factors of the attention and the MLP branch (0 or 1/keep); None: 1.
            rows: [R] int64, distinct: after the attention, which all tokens take part in, only these are of use.

        Returns:
            The stream, or those rows of it; its branch is that of the MLP.
        """
        tokens, normed = stream.norm(self.norm1)
        attended = self.attn(normed, groups, rows)
        if rows is not None:
            tokens = gather_rows(tokens, rows)
            scales = None if scales is None else scales.index_select(1, rows)
        attention_scale, mlp_scale = (None, None) if scales is None else scales.unbind()
        tokens, normed = Stream(tokens, attended, attention_scale).norm(self.norm2)
        return Stream(tokens, self.mlp(normed), mlp_scale)


@functools.lru_cache(maxsize=32)
def position_resize_matrix(old: tuple[int, int], new: tuple[int, int], device: torch.device) -> Tensor:
    """Bicubic resampling of a position grid as a matrix.

    The published code (bytedance/ibot, DINO) resamples by the factor (new + 0.1) / old, which guards its floor() and
    also moves the sampling points a little; we keep that choice, so that our positions equal theirs. The map is
    linear: applied as a matrix it is deterministic on CUDA too, where the backward of bicubic upsampling is not.

    Args:
        old: rows, columns of the table.
        new: rows, columns wanted.
        device: where the matrix lives.

    Returns:
        [new rows * new columns, old rows * old columns] float64.
    """
    with torch.inference_mode(False), torch.no_grad():
        basis = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
        factor = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        resized = F.interpolate(basis, scale_factor=factor, mode="bicubic", align_corners=False)  # [old cells, 1, h, w]
        return resized.flatten(1).t().contiguous().to(device)


class VisionTransformer(nn.Module):
    """ViT whose output is the CLS token and all patch tokens after the final norm.

    Args:
        img_size: height, width in pixels that the position table is made for.
        patch_size: side of a patch in pixels.
        embed_dim: token width D.
        depth: number of blocks.
        num_heads: attention heads; divides `embed_dim`.
        mlp_ratio: hidden width of the MLP over D.
        drop_path_rate: stochastic depth of the last block, linear from 0 at the first; in training mode only.
        masked_embed: own a mask token (students only; the published teachers have none).
        num_cameras: with 2 or more, own a learned vector for each camera (`sie_embed`, the side information embedding
            of TransReID, arXiv 2102.04378), which is added to all tokens of an image; `camids` are needed then.
        sie_coefficient: factor of that vector.

    Raises:
        ConfigError: sizes that do not divide.
    """

    _keep: Tensor

    def __init__(
        self,
        img_size: tuple[int, int] = (256, 128),
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        masked_embed: bool = False,
        num_cameras: int = 0,
        sie_coefficient: float = 3.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}. Change one of them.")
        self.img_size = (int(img_size[0]), int(img_size[1]))
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.num_cameras = num_cameras
        self.sie_coefficient = sie_coefficient
        self.drop_path_rates = [drop_path_rate * index / max(1, depth - 1) for index in range(depth)]
        self.grid = self._grid_of(*self.img_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim)) if masked_embed else None
        self.sie_embed = nn.Parameter(torch.zeros(num_cameras, 1, embed_dim)) if num_cameras > 1 else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        keep = 1 - torch.tensor(self.drop_path_rates, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("_keep", keep, persistent=False)  # [depth, 1, 1]; on the device, so that no step copies it
        self._init_weights()

    def _init_weights(self) -> None:
        # The patch convolution keeps torch's default, as published.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.sie_embed is not None:
            nn.init.trunc_normal_(self.sie_embed, std=0.02)

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        patch = self.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            fit = [max(1, round(side / patch)) * patch for side in (height, width)]
            raise ConfigError(
                f"An image of {height}x{width} (height x width) cannot be cut into whole patches of {patch} pixels. "
                f"Nearest size that fits: {fit[0]}x{fit[1]}."
            )
        return height // patch, width // patch

    def patches_of(self, images: Tensor) -> int:
        """Patches N of each image of [B, 3, H, W]."""
        return math.prod(self._grid_of(images.shape[2], images.shape[3]))

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """Positions [1, 1 + h*w, D] for a patch grid of h rows and w columns; the CLS position is never resized."""
        if grid == self.grid:
            return self.pos_embed
        # Autocast would round positions to bfloat16; the product is tiny.
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            matrix = position_resize_matrix(self.grid, grid, self.pos_embed.device).to(self.pos_embed.dtype)
            return torch.cat([self.pos_embed[:, :1], matrix @ self.pos_embed[:, 1:]], dim=1)

    def _drop_path_scales(self, groups: Groups, device: torch.device) -> list[Tensor | None]:
        """Per block [2, T] factors: each sequence is dropped or kept as a whole, attention and MLP separately."""
        if not self.training or not any(self.drop_path_rates):
            return [None] * self.depth
        sequences = sum(count for count, _ in groups)
        lengths = torch.cat([torch.full((count,), length, device=device) for count, length in groups])
        tokens = sum(count * length for count, length in groups)
        sequence_of = torch.arange(sequences, device=device).repeat_interleave(lengths, output_size=tokens)  # [T]
        kept = torch.rand(self.depth, 2, sequences, device=device) < self._keep
        scales = (kept / self._keep).index_select(2, sequence_of)  # [depth, 2, T]
        return [scale if rate else None for scale, rate in zip(scales, self.drop_path_rates, strict=True)]

    def _assemble(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], camids: Tensor | None = None
    ) -> tuple[Stream, Groups]:
        """Crops of several resolutions -> the stream before the first block, and its groups."""
        if self.masked_embed is None and any(mask is not None for mask in masks):
            raise ConfigError("Masks were given to a backbone without a mask token: build it with masked_embed=True.")
        grids = [self._grid_of(images.shape[2], images.shape[3]) for images in crops]
        tokens = assemble_tokens(
            [self.patch_embed(images) for images in crops],
            masks,
            None if self.masked_embed is None else self.masked_embed[0],
            self.cls_token[0, 0],
            [self.position_table(grid)[0] for grid in grids],
        )
        groups = [(len(images), 1 + h * w) for images, (h, w) in zip(crops, grids, strict=True)]
        if self.sie_embed is not None:
            tokens = add_camera_vectors(tokens, groups, camids, self.sie_embed, self.sie_coefficient)
        return Stream(tokens), groups

    def _run(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        rows: Tensor | None = None,
        camids: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Groups]:
        """Crops of several resolutions through the backbone: the normalised stream (or rows of it), and its groups."""
        stream, groups = self._assemble(crops, masks, camids)
        for number, scales in enumerate(self._drop_path_scales(groups, stream.tokens.device), start=1):
            stream = self.blocks[number - 1](stream, groups, scales, rows if number == self.depth else None)
        return stream.norm(self.norm, dtype)[1], groups

    def forward_packed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """Crops of several resolutions through the blocks as one token stream.

        Args:
            crops: [B_i, 3, H_i, W_i] per resolution.
            masks: [B_i, N_i] bool per resolution (True: the patch is replaced by the mask token before positions are
                added), or None.

        Returns:
            Tokens [B_i, 1 + N_i, D] per resolution after the final norm, equal to separate forwards.
        """
        tokens, groups = self._run(crops, masks)
        parts = torch.split(tokens, [count * length for count, length in groups])
        return [part.view(count, length, -1) for part, (count, length) in zip(parts, groups, strict=True)]

    def forward_rows(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], rows: Tensor) -> Tensor:
        """Some tokens of the packed stream.

        In the last block the other tokens serve as keys and values only: its projection, its MLP and the final norm are
        computed for the chosen ones alone. The values are the same.

        Args:
            crops: as in `forward_packed`.
            masks: as in `forward_packed`.
            rows: [R] int64, distinct positions in the stream (`cls_rows` and `patch_rows` count them).

        Returns:
            [R, D] after the final norm, in the order of `rows`.
        """
        return self._run(crops, masks, rows)[0]

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W], optional masks [B, N] bool -> tokens [B, 1 + N, D] after the final norm, CLS first."""
        return self.forward_packed([images], [masks])[0]

    def embed(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """CLS token after the final norm.

        Args:
            images: [B, 3, H, W].
            camids: [B] int64, cameras from 0; ignored by a backbone without camera vectors.

        Returns:
            [B, D] in the dtype of the parameters, float32 under autocast too: distances are taken of it.

        Raises:
            DataError: the backbone has camera vectors, and camids are missing or (on the CPU) out of its range.
        """
        rows = cls_rows([(len(images), 1 + self.patches_of(images))], images.device)
        return self._run([images], [None], rows, camids, self.pos_embed.dtype)[0]

    def intermediate(self, images: Tensor, n: int = 1, camids: Tensor | None = None) -> list[Tensor]:
        """Tokens [B, 1 + N, D] after the final norm of each of the last `n` blocks, in block order."""
        if not 1 <= n <= self.depth:
            raise ConfigError(f"n={n} blocks were asked for; this model has {self.depth}. Choose 1 to {self.depth}.")
        stream, groups = self._assemble([images], [None], camids)
        outputs = []
        for index, block in enumerate(self.blocks):
            stream = block(stream, groups)
            if index >= self.depth - n:
                outputs.append(stream.norm(self.norm)[1].view(*groups[0], -1))
        return outputs

    def last_attention(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """Softmaxed attention of the last block [B, heads, 1 + N, 1 + N] float32, rows are queries."""
        stream, groups = self._assemble([images], [None], camids)
        for block in self.blocks[:-1]:
            stream = block(stream, groups)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.weights(stream.norm(last.norm1)[1], len(images))


def cls_rows(groups: Groups, device: torch.device) -> Tensor:
    """Positions [S] int64 of the CLS tokens of all sequences in a packed stream, in stream order."""
    starts, rows = 0, []
    for count, length in groups:
        rows.append(torch.arange(starts, starts + count * length, length, device=device))
        starts += count * length
    return torch.cat(rows)


def patch_rows(indices: Tensor, patches: int) -> Tensor:
    """Positions in a packed stream of patches of its first group.

    Args:
        indices: [M] int64, flat over crops * patches.
        patches: N, patches of a crop.

    Returns:
        [M] int64: the CLS token of every crop is skipped.
    """
    return indices + torch.div(indices, patches, rounding_mode="floor") + 1


ARCHITECTURES: dict[str, tuple[int, int, int]] = {
    "vit_micro": (128, 4, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}
"""Name -> embed_dim, depth, num_heads."""


def build_vit(arch: str, **overrides: Any) -> VisionTransformer:
    """A backbone by name; `overrides` are arguments of `VisionTransformer`.

    Raises:
        ConfigError: no such architecture.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"model.arch={arch} is unknown. Choose one of {', '.join(ARCHITECTURES)}.")
    embed_dim, depth, num_heads = ARCHITECTURES[arch]
    return VisionTransformer(**{"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, **overrides})


def vit_micro(**overrides: Any) -> VisionTransformer:
    """D=128, 4 blocks, 4 heads: small enough to pre-train on a laptop's CPU."""
    return build_vit("vit_micro", **overrides)


def vit_tiny(**overrides: Any) -> VisionTransformer:
    """D=192, 12 blocks, 3 heads."""
    return build_vit("vit_tiny", **overrides)


def vit_small(**overrides: Any) -> VisionTransformer:
    """D=384, 12 blocks, 6 heads: PersonViT-S, 21,639,552 parameters at 256x128."""
    return build_vit("vit_small", **overrides)


def vit_base(**overrides: Any) -> VisionTransformer:
    """D=768, 12 blocks, 12 heads: PersonViT-B, 85,746,432 parameters at 256x128."""
    return build_vit("vit_base", **overrides)
