"""Scores for the tests of top_k_map: with ties, NaN, infinities and numbers of all sizes."""

import math

import torch
from torch import Tensor

KINDS = ("distinct", "many ties", "all equal", "special values", "all NaN", "wide range", "increasing")


def make_scores(kind: str, *sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(sizes, generator=random)
    match kind:
        case "distinct":
            scores = normal
        case "many ties":
            scores = (2 * normal).round()
        case "all equal":
            scores = torch.full(sizes, -0.25)
        case "special values":
            values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, -1e-7, 1.0, 1e-40, -1e-40, 65504.0])
            scores = values[torch.randint(len(values), sizes, generator=random)]
        case "all NaN":
            scores = torch.full(sizes, math.nan)
        case "wide range":
            scores = normal * torch.exp(20 * torch.randn(sizes, generator=random))
        case "increasing":
            scores = torch.arange(sizes[-1]).expand(sizes).float()
        case _:
            raise ValueError(kind)
    return scores.to(dtype).contiguous()
