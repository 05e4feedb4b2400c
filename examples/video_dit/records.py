"""What the scripts measure and write down about clips."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB of each clip `[N, C, T, H, W]` in [0, 1]; at most 99, which stands for equal."""
    error = (video.double() - reference.double()).square().flatten(1).mean(dim=1)
    return (-10 * torch.log10(error.clamp_min(10**-9.9))).float()


def relative_l2(video: Tensor, reference: Tensor) -> float:
    """|video - reference| / |reference|."""
    return float((video - reference).norm() / reference.norm())


def contact_sheet(video: Tensor, path: Path, frames: int = 8, scale: int = 2) -> None:
    """Write clips `[N, 3, T, H, W]` in [-1, 1] as a PNG: one row for each clip, time to the right."""
    picked = video[:, :, torch.linspace(0, video.shape[2] - 1, frames).round().long()]
    n, c, t, h, w = picked.shape
    sheet = picked.permute(0, 3, 2, 4, 1).reshape(n * h, t * w, c)
    pixels = ((sheet + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
    Image.fromarray(pixels).resize((t * w * scale, n * h * scale), Image.Resampling.BICUBIC).save(path)
