"""The rotary embedding of the attention layers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FreqsCis", "check_freqs_cis", "with_rotary_embedding"]

FreqsCis = tuple[Tensor, Tensor]
"""(cos, sin) of each token's angles, ``[tokens, D / 2]`` each."""


def check_freqs_cis(freqs_cis: FreqsCis, tokens: int, head_size: int, name: str) -> None:
    """That they are (cos, sin), each ``[tokens, head_size / 2]``. Errors begin with ``name``."""
    if not isinstance(freqs_cis, (tuple, list)) or len(freqs_cis) != 2:
        raise TypeError(f"{name}: freqs_cis is no pair of tensors, expected (cos, sin)")
    if head_size % 2 != 0:
        raise ValueError(f"{name}: freqs_cis is given and head_size is {head_size}, expected an even one")
    expected = [tokens, head_size // 2]
    for what, part in zip(("cos", "sin"), freqs_cis, strict=True):
        if not isinstance(part, Tensor) or part.is_complex():
            raise TypeError(f"{name}: {what} of freqs_cis is no real tensor, expected one of shape {expected}")
        if list(part.shape) != expected:
            raise ValueError(
                f"{name}: {what} of freqs_cis has shape {list(part.shape)}, expected {expected}, one row a token"
            )


def with_rotary_embedding(x: Tensor, freqs_cis: FreqsCis) -> Tensor:
    """Each pair of neighbouring entries turned by its token's angle, computed in fp32 at least.

    ``x`` is ``[B, S, heads, D]``; cos and sin are ``[S, D / 2]``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(dtype).unsqueeze(1) for part in freqs_cis)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
