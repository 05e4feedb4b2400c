"""Euler sampling of a rectified flow with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
StepHook = Callable[[int], None]


def timesteps(steps: int, shift: float) -> Tensor:
    """Noise levels from 1 down to 0, fp32 `[steps + 1]`; shift > 1 spends more of them near the noise."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"timesteps: steps must be at least 1 and shift positive, got {steps} and {shift}")
    time = torch.linspace(1.0, 0.0, steps + 1)
    return shift * time / (1 + (shift - 1) * time)


def initial_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """One clip of unit noise for each seed, drawn on the CPU so that it is the same on every device: `[N, *shape]`."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    model: Velocity,
    noise: Tensor,
    labels: Tensor,
    *,
    null_class: int,
    steps: int,
    guidance: float,
    shift: float,
    before_step: StepHook | None = None,
) -> Tensor:
    """Denoise `noise` `[N, C, T, H, W]` to clips in [-1, 1].

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
        before_step: called with the step's index before each step.
    """
    levels = timesteps(steps, shift)
    guided = guidance != 1.0
    all_labels = torch.cat((labels, torch.full_like(labels, null_class))) if guided else labels
    x = noise
    for step in range(steps):
        if before_step is not None:
            before_step(step)
        video = torch.cat((x, x)) if guided else x
        time = levels[step].to(x.device).expand(video.shape[0])
        velocity = model(video, time, all_labels).to(x.dtype)
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
        x = x + (levels[step + 1] - levels[step]).item() * velocity
    return x.clamp(-1, 1)
