"""A small transformer with LiteAttention in every block, for the tests of compilation and export."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lite_attention import LiteAttention

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn = LiteAttention(threshold=-0.5)

    def forward(self, x: Tensor, must_do: object = None, must_skip: object = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        # Sharp enough that the threshold drops something.
        return x + self.out(self.attn(3 * q, 3 * k, v, None, False, must_do, must_skip).flatten(-2))


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, must_do: object = None, must_skip: object = None) -> Tensor:
        for block in self.blocks:
            x = block(x, must_do, must_skip)
        return x

    def layers(self) -> Iterator[LiteAttention]:
        return (block.attn for block in self.blocks)


def noise(step: int, length: int = 520, batch: int = 1) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(step))


def same_state(one: Model, other: Model, branches: range = range(1)) -> bool:
    return all(
        torch.equal(a.keep_map(branch), b.keep_map(branch))
        for a, b in zip(one.layers(), other.layers(), strict=True)
        for branch in branches
    )
