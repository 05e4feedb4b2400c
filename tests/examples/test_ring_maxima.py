"""The study of running maxima under a ring decides as the package does, where the package has the same rule."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lite_attention import SeqParallelLiteAttention

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "video_dit"))
pytest.importorskip("safetensors")

from emulated import LOG2_E, TILE_M, TILE_N
from ring_maxima import Variant

TOKENS, HEADS, HEAD_DIM, THRESHOLD = 768, 2, 16, -3.0


def _passes() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    k = torch.randn(1, TOKENS, HEADS, HEAD_DIM).cumsum(1)
    k = k / k.std(1, keepdim=True)
    return [((1 + step) * k + 0.3 * torch.randn_like(k), k) for step in range(3)]


def _tile_max(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (HEAD_DIM**-0.5 * LOG2_E)
    return scores.view(1, HEADS, TOKENS // TILE_M, TILE_M, TOKENS // TILE_N, TILE_N).amax(-1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_maxima_decide_as_the_package(ranks: int) -> None:
    variant = Variant(ranks, "own", THRESHOLD)
    block = TOKENS // ranks
    layers = [SeqParallelLiteAttention(ranks, threshold=THRESHOLD) for _ in range(ranks)]
    for q, k in _passes():
        variant.decide(_tile_max(q, k))
        for layer, rows in zip(layers, q.split(block, 1), strict=True):
            for split, keys in enumerate(k.split(block, 1)):
                layer(rows, keys, keys, split)
    maps = [torch.cat([layer.keep_map(split) for split in range(ranks)], -1) for layer in layers]
    assert variant.keep is not None
    assert torch.equal(variant.keep, torch.cat(maps, 2))
    assert 0.2 < float(variant.keep.float().mean()) < 0.9


def test_a_carried_maximum_keeps_less() -> None:
    own, carried = Variant(2, "own", THRESHOLD), Variant(2, "carried", THRESHOLD)
    for q, k in _passes():
        own.decide(_tile_max(q, k))
        carried.decide(_tile_max(q, k))
    assert own.keep is not None
    assert carried.keep is not None
    assert bool((own.keep | ~carried.keep).all())
    assert carried.keep.sum() < own.keep.sum()
