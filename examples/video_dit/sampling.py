"""Euler sampling of a rectified flow with classifier-free guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def timesteps(steps: int, shift: float) -> Tensor:
    """Noise levels from 1 down to 0, fp32 `[steps + 1]`; shift > 1 spends more of them near the noise."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"timesteps: steps must be at least 1 and shift positive, got {steps} and {shift}")
    time = torch.linspace(1.0, 0.0, steps + 1)
    return shift * time / (1 + (shift - 1) * time)


def initial_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """One clip of unit noise for each seed, drawn on the CPU so that it is the same on every device: `[N, *shape]`."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def denoise(
    model: Velocity,
    noise: Tensor,
    labels: Tensor,
    *,
    null_class: int,
    steps: int,
    guidance: float,
    shift: float,
) -> Iterator[Tensor]:
    """Denoise `noise` `[N, C, T, H, W]`, yielding the clips after every step; the last ones are the result.

    Guidance is batched: the model sees the conditional clips and then the unconditional ones in one call of batch 2N,
    so that LiteAttention keeps one state for each branch. guidance 1 needs no second branch and runs none.

    Args:
        model: `(video, time, label) -> velocity`.
        noise: unit Gaussian noise, the start at time 1.
        labels: int64 `[N]`.
        null_class: the label of the unconditional branch.
        steps: Euler steps.
        guidance: 1 follows the class alone, more exaggerates it.
        shift: see `timesteps`.
    """
    levels = timesteps(steps, shift)
    guided = guidance != 1.0
    all_labels = torch.cat((labels, torch.full_like(labels, null_class))) if guided else labels
    x = noise
    for now, after in itertools.pairwise(levels.tolist()):
        video = torch.cat((x, x)) if guided else x
        time = torch.full((video.shape[0],), now, device=x.device)
        with torch.no_grad():
            velocity = model(video, time, all_labels).to(x.dtype)
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
        x = x + (after - now) * velocity
        yield x


def sample(model: Velocity, noise: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The clips that `denoise` ends with, clamped to [-1, 1]."""
    x = noise
    for x in denoise(model, noise, labels, **options):  # noqa: B007 (the last one is wanted)
        pass
    return x.clamp(-1, 1)
