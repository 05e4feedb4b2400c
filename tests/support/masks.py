"""Masks for the tests: windows of heads, lengths of KV tiles."""

import torch
from torch import Tensor

from lite_attention import tile_shape
from lite_attention.ops import CausalAlignment
from support.inputs import Case

ALIGNMENTS: tuple[CausalAlignment, ...] = ("top-left", "bottom-right")


def windows_of(heads: int, device: torch.device | str, *windows: tuple[int, int]) -> Tensor:
    """A table of so many heads, from these windows over and over."""
    return torch.tensor([windows[head % len(windows)] for head in range(heads)], dtype=torch.int32, device=device)


def tile_lens(
    case: Case, tile_n: int | None, device: torch.device | str, batch: int | None = None, seed: int = 0
) -> Tensor:
    """Whole tiles, tiles without a key, and every length between."""
    _, kv_tiles = case.tiles(tile_n=tile_n)
    keys = tile_n or tile_shape(case.head_dim, torch.bfloat16)[1]
    random = torch.Generator(device).manual_seed(seed)
    size = (kv_tiles,) if batch is None else (batch, kv_tiles)
    lens = torch.randint(0, keys + 1, size, generator=random, device=device)
    kind = torch.randint(0, 3, size, generator=random, device=device)
    return torch.where(kind == 0, lens, torch.where(kind == 1, 0, keys)).to(torch.int32)
