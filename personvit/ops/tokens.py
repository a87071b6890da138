"""From the patches of all crops to one stream of tokens, and the choice of some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from personvit.ops import backend, triton_kernels


def assemble_tokens(
    patches: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    masked_embed: Tensor | None,
    cls_token: Tensor,
    positions: Sequence[Tensor],
) -> Tensor:
    """Put CLS token, mask token and positions to the patches of every resolution, as one packed stream.

    Row 0 of a crop is cls_token + positions[0], row 1 + n is (masked_embed where masked, else patch n) +
    positions[1 + n]: bytedance/ibot models/vision_transformer.py, `prepare_tokens`. As there, the mask token is rounded
    to the type of the patches.

    Args:
        patches: [B, N, D] for each resolution, any floating dtype, the same for all.
        masks: [B, N] bool for each resolution, True where the mask token takes the place of the patch; or None.
        masked_embed: [D]; None only if there are no masks. With a mask it takes part in the graph even if nothing is
            masked, which DistributedDataParallel needs; without any it takes none.
        cls_token: [D].
        positions: [1 + N, D] for each resolution, any floating dtype, the same for all.

    Returns:
        [T, D], T the sum of B * (1 + N), resolution after resolution, crop after crop; the promoted dtype of patches
        and positions: float32 positions keep the stream float32 under autocast. Differentiable.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, masks that are not bool or lack a mask token.
    """
    _check(patches, masks, masked_embed, cls_token, positions)
    device = patches[0].device.type
    out: Tensor = backend.call("assemble_tokens", device, patches, masks, masked_embed, cls_token, positions)
    return out


def gather_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Chosen rows of a stream of tokens.

    Args:
        tokens: [T, D], any floating dtype.
        rows: [R] int64, distinct, from 0 to T - 1; R may be 0. Their values are not checked in advance: plain torch
            raises an IndexError (an assertion of the device on CUDA), the kernel gives NaN for a row that does not
            exist. Gradients of a row named twice are undefined.

    Returns:
        [R, D], in the order of `rows`. Differentiable; the gradient of all other rows is 0.

    Raises:
        ValueError: tokens that are no matrix, or rows that are not [R] int64.
    """
    if tokens.dim() != 2 or rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"gather_rows needs tokens [T, D] and rows [R] torch.int64, got {list(tokens.shape)} and "
            f"{list(rows.shape)} {rows.dtype}"
        )
    out: Tensor = backend.call("gather_rows", tokens.device.type, tokens, rows)
    return out


def _check(
    patches: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    masked_embed: Tensor | None,
    cls_token: Tensor,
    positions: Sequence[Tensor],
) -> None:
    if not patches or len(patches) != len(masks) or len(patches) != len(positions):
        raise ValueError(
            "assemble_tokens needs patches, a mask or None, and positions for each resolution, got "
            f"{len(patches)} patches, {len(masks)} masks, {len(positions)} positions"
        )
    if masked_embed is None and any(mask is not None for mask in masks):
        raise ValueError("assemble_tokens: masks without masked_embed, the token to put in")
    width = patches[0].shape[-1]
    for name, vector in (("cls_token", cls_token), ("masked_embed", masked_embed)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"assemble_tokens: {name} has shape {list(vector.shape)}, patches are {width} wide")
    for tokens, mask, table in zip(patches, masks, positions, strict=True):
        if tokens.dim() != 3 or tokens.shape[2] != width or table.shape != (1 + tokens.shape[1], width):
            raise ValueError(
                f"assemble_tokens: patches {list(tokens.shape)} and positions {list(table.shape)}: [B, N, {width}] "
                f"and [1 + N, {width}] are needed"
            )
        if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"assemble_tokens: a mask {list(mask.shape)} {mask.dtype} for patches {list(tokens.shape)}: "
                f"{list(tokens.shape[:2])} torch.bool is needed"
            )


def _reference(
    patches: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    masked_embed: Tensor | None,
    cls_token: Tensor,
    positions: Sequence[Tensor],
) -> Tensor:
    crops = []
    for tokens, mask, table in zip(patches, masks, positions, strict=True):
        if mask is not None:
            assert masked_embed is not None
            # where() rather than indexed assignment: the mask token takes part in the graph even if nothing is masked.
            tokens = torch.where(mask.unsqueeze(-1), masked_embed.to(tokens.dtype), tokens)  # [B, N, D]
        tokens = tokens + table[1:]
        first = (cls_token + table[0]).to(tokens.dtype).expand(len(tokens), 1, -1)
        crops.append(torch.cat([first, tokens], dim=1).flatten(0, 1))
    return crops[0] if len(crops) == 1 else torch.cat(crops)


backend.register(
    backend.Operator(
        "assemble_tokens",
        backend.Implementation("reference", _reference, ("cpu", "cuda"), "plain torch: where, add, cat"),
        (
            backend.Implementation(
                "triton",
                lambda *args: triton_kernels.tokens.assemble_tokens(*args),
                ("cuda",),
                "one Triton kernel for each resolution",
                triton_kernels.why_not,
                lambda *args: triton_kernels.tokens.refuses(*args),
            ),
        ),
    )
)
backend.register(
    backend.Operator(
        "gather_rows",
        backend.Implementation(
            "reference", lambda tokens, rows: tokens.index_select(0, rows), ("cpu", "cuda"), "plain torch: index_select"
        ),
        (
            backend.Implementation(
                "triton",
                lambda *args: triton_kernels.tokens.gather_rows(*args),
                ("cuda",),
                "a copy in Triton whose gradient is stored once, without atomics",
                triton_kernels.why_not,
                lambda *args: triton_kernels.tokens.refuses_gather_rows(*args),
            ),
        ),
    )
)
