"""Attention layers alone as a model on the GPU, and the inputs of its denoising steps."""

import torch
from torch import Tensor, nn

from lite_attention import LiteAttention
from lite_attention.skipping.dense_steps import GenerationClock
from support.inputs import GPU

HEADS, HEAD_DIM, LENGTH = 4, 64, 1000
THRESHOLD = -6.0


class Stack(nn.Module):
    """Attention alone, with arithmetic that fusing cannot change: sums rounded once, and a power of two."""

    must_do: Tensor

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LiteAttention(threshold=THRESHOLD) for _ in range(layers))
        self.clock = GenerationClock()
        self.register_buffer("must_do", torch.zeros(1, 2, dtype=torch.int64))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.clock.tick(timestep)
        x = hidden_states
        for layer in self.layers:
            time = {"start_full": self.clock.start_full, "generation": self.clock.generation}
            x = x + layer(2 * x, x, x, must_do_list=self.must_do, **time)
        return x


def time(generation: int, step: int) -> Tensor:
    """Two generations that differ; the second is noticed by its first timestep."""
    return torch.full((1,), 1000.0 - 40 * step - generation, device=GPU)


def stack_latents(generation: int, step: int, length: int = LENGTH) -> Tensor:
    random = torch.Generator().manual_seed(generation)
    start, change = torch.randn(2, 1, length, HEADS, HEAD_DIM, generator=random).unbind()
    return (start + 0.1 * step * change).to(GPU, torch.bfloat16)
