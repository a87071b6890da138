"""Multi-head self-attention over uniform short sequences."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from personvit.ops import backend, reference, triton_kernels

BMM_LENGTH = 256
"""Tokens up to which two batched products and a softmax beat torch's fused attention on a CPU (longer: no slower, but
scores of N x N)."""


def packed_attention(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Self-attention inside every sequence of a packed token stream, one launch for each sequence length.

    Args:
        qkv: queries, keys and values of all tokens, [T, 3, H, Dh], any floating dtype. The stream is a concatenation
            over the groups, and within a group over its sequences.
        groups: (number of sequences, tokens per sequence) of each group, in the order of the stream.

    Returns:
        [T, H, Dh], dtype of qkv. Differentiable.

    Raises:
        ValueError: a qkv of another shape, or groups that do not add up to T tokens.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"packed_attention needs qkv of shape [T, 3, H, Dh], got {list(qkv.shape)}")
    tokens = sum(sequences * length for sequences, length in groups)
    if tokens != qkv.shape[0] or any(sequences < 0 or length < 1 for sequences, length in groups):
        raise ValueError(
            f"packed_attention: groups {list(groups)} (sequences, length) hold {tokens} tokens, qkv {qkv.shape[0]}"
        )
    out: Tensor = backend.call("packed_attention", qkv.device.type, qkv, groups)
    return out


def _per_length(attend: Callable[[Tensor, int, int], Tensor]) -> Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]:
    """An implementation that computes group after group; `attend` takes [S * N, 3, H, Dh], S and N."""

    def packed(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        if len(groups) == 1:
            return attend(qkv, *groups[0])
        _, _, heads, features = qkv.shape
        # split() rather than slices, whose gradients would each fill a whole stream with zeros
        parts = torch.split(qkv, [sequences * length for sequences, length in groups]) if groups else ()
        outputs = [attend(part, *group) for part, group in zip(parts, groups, strict=True)]
        return torch.cat([qkv.new_empty((0, heads, features)), *outputs])

    return packed


def _sdpa(qkv: Tensor, sequences: int, length: int) -> Tensor:
    _, _, heads, features = qkv.shape
    q, k, v = qkv.view(sequences, length, 3, heads, features).permute(2, 0, 3, 1, 4)  # each [S, H, N, Dh]
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(sequences * length, heads, features)


def _bmm(qkv: Tensor, sequences: int, length: int) -> Tensor:
    if length > BMM_LENGTH:
        return _sdpa(qkv, sequences, length)
    _, _, heads, features = qkv.shape
    split = qkv.view(sequences, length, 3, heads, features).permute(2, 0, 3, 1, 4)
    q, k, v = split.reshape(3, sequences * heads, length, features).unbind()  # each [S * H, N, Dh], contiguous
    scores = torch.bmm(q * features**-0.5, k.transpose(1, 2))  # [S * H, N, N]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    out = torch.bmm(scores.softmax(dim=-1, dtype=wide).to(qkv.dtype), v)
    return out.view(sequences, heads, length, features).transpose(1, 2).reshape(sequences * length, heads, features)


def _xformers_packed(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    q, k, v = qkv[None].unbind(2)  # each [1, T, H, Dh]
    mask = _xformers_mask(tuple((sequences, length) for sequences, length in groups), qkv.device)
    out: Tensor = _xformers_ops().memory_efficient_attention(q, k, v, attn_bias=mask)
    return out[0]


def _xformers_ops() -> Any:
    # At import it warns on its logger when its own C++ part was built for another torch; the attention operators that
    # it takes from torch work all the same.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import xformers.ops

    return xformers.ops


@functools.lru_cache(maxsize=32)  # it copies to the device, which no step should wait for
def _xformers_mask(groups: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    """The block-diagonal mask of a stream."""
    lengths = [length for sequences, length in groups for _ in range(sequences)]
    return _xformers_ops().fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=device)


def _why_not_xformers(device: str) -> backend.Obstacle | None:
    if device != "cuda" or not torch.cuda.is_available():
        return f"there is no CUDA device ({device} was asked for)", "kernels.backend=auto"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed", 'pip install -e ".[gpu]"'
    return None


def _xformers_refuses(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> backend.Obstacle | None:
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"qkv is {qkv.dtype}, its fast kernels take float16 and bfloat16", "train.precision=bf16"
    if qkv.shape[3] % 8:
        return f"head dimension {qkv.shape[3]} is no multiple of 8", "another number of heads"
    if qkv.numel() == 0:
        return "the stream is empty", "kernels.backend=auto"
    return None


backend.register(
    backend.Operator(
        "packed_attention",
        backend.Implementation(
            "reference", reference.packed_attention, ("cpu", "cuda"), "plain torch, a sequence at a time"
        ),
        (
            backend.Implementation(
                "triton",
                lambda *args: triton_kernels.attention.packed_attention(*args),
                ("cuda",),
                "Triton, one launch per sequence length",
                triton_kernels.why_not,
                lambda *args: triton_kernels.attention.refuses(*args),
            ),
            backend.Implementation(
                "xformers",
                _xformers_packed,
                ("cuda",),
                "xformers memory_efficient_attention, one call for the stream",
                _why_not_xformers,
                _xformers_refuses,
            ),
            backend.Implementation(
                "bmm",
                _per_length(_bmm),
                ("cpu",),
                f"torch bmm and softmax up to {BMM_LENGTH} tokens, else scaled_dot_product_attention; per length",
            ),
            backend.Implementation(
                "sdpa", _per_length(_sdpa), ("cpu", "cuda"), "torch scaled_dot_product_attention, one call per length"
            ),
        ),
    )
)
