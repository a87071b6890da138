"""Multi-head self-attention over uniform short sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from personvit.ops import backend, reference


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


def _sdpa_packed(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    _, _, heads, features = qkv.shape
    if len(groups) == 1:
        return _sdpa_group(qkv, *groups[0])
    outputs = [qkv.new_empty((0, heads, features))]
    start = 0
    for sequences, length in groups:
        stop = start + sequences * length
        outputs.append(_sdpa_group(qkv[start:stop], sequences, length))
        start = stop
    return torch.cat(outputs)


def _sdpa_group(qkv: Tensor, sequences: int, length: int) -> Tensor:
    _, _, heads, features = qkv.shape
    q, k, v = qkv.view(sequences, length, 3, heads, features).permute(2, 0, 3, 1, 4)  # each [S, H, N, Dh]
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(sequences * length, heads, features)


_SDPA = "torch scaled_dot_product_attention"
backend.register(
    backend.Operator(
        "packed_attention",
        backend.Implementation(
            "reference", reference.packed_attention, ("cpu", "cuda"), "plain torch, a sequence at a time"
        ),
        (backend.Implementation("sdpa", _sdpa_packed, ("cpu", "cuda"), f"{_SDPA}, one call per sequence length"),),
    )
)
