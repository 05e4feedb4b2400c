"""Endless clips of handwritten digits moving over panning photographs, made on the device that trains.

Both sources ship inside wheels, so nothing is downloaded: the digits are scikit-learn's 8 x 8 handwritten ones
(1,797 of them), the photographs scikit-learn's and scikit-image's bundled sample images. Each clip shows one digit
that crosses the picture and bounces off its edges, over a photograph that pans, zooms and turns a little. Crop,
scale, angle, flip, speed and colours are drawn anew for each clip. The class is the digit.
"""

from __future__ import annotations

import math
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SKIMAGE_PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKLEARN_PHOTOS = ("china.jpg", "flower.jpg")
PHOTO_SIDE = 160  # pixels; a 64-pixel window then shows a third to a half of a photograph
DIGIT_CELLS = 12  # an 8 x 8 digit with two empty cells around it
CLIP_PARAMETERS = 24  # random numbers that describe one clip


def load_photos() -> Tensor:
    """The photographs as squares, fp32 `[N, 3, PHOTO_SIDE, PHOTO_SIDE]` in [0, 1]; wide ones give two squares."""
    squares: list[np.ndarray] = []
    sources = [(files("skimage.data"), name) for name in SKIMAGE_PHOTOS]
    sources += [(files("sklearn.datasets.images"), name) for name in SKLEARN_PHOTOS]
    for folder, name in sources:
        with (folder / name).open("rb") as file:
            image = Image.open(file).convert("RGB")
        width, height = image.size
        side = min(width, height)
        far = (width - side, height - side)
        corners = [(0, 0), far] if max(width, height) > 1.2 * side else [(far[0] // 2, far[1] // 2)]
        for left, top in corners:
            square = image.crop((left, top, left + side, top + side))
            squares.append(np.asarray(square.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255


def load_digit_images() -> tuple[Tensor, Tensor]:
    """Smooth digit height maps fp32 `[1797, 1, 48, 48]` in [0, 1] and their classes int64 `[1797]`."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # slow to import, only training needs it

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    border = (DIGIT_CELLS - 8) // 2
    padded = F.pad(small, (border, border, border, border))
    smooth = F.interpolate(padded, size=(48, 48), mode="bicubic", align_corners=False).clamp(0, 1)
    return smooth, torch.from_numpy(digits.target).long()


def _smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    y = ((x - low) / (high - low)).clamp(0, 1)
    return y * y * (3 - 2 * y)


def _bounce(position: Tensor, low: float, high: float) -> Tensor:
    """Fold a straight path into [low, high], as a ball between two walls."""
    span = high - low
    return low + span - ((position - low) % (2 * span) - span).abs()


def _hue(hue: Tensor) -> Tensor:
    """Bright colours `[B, 3]` from hues `[B]` in [0, 1)."""
    offsets = torch.tensor([0.0, 1 / 3, 2 / 3], device=hue.device)
    return 0.62 + 0.38 * torch.cos(2 * math.pi * (hue[:, None] - offsets))


class MovingDigits:
    """Makes batches of clips on `device`; the same seed gives the same clips on every device up to rounding."""

    def __init__(self, device: torch.device | str = "cpu", size: int = 64, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.photos = load_photos().to(self.device)
        digit_images, digit_labels = load_digit_images()
        self.digit_images = digit_images.to(self.device)
        self.digit_labels = digit_labels.to(self.device)

    def batch(self, count: int, frames: int, stride: int = 1) -> tuple[Tensor, Tensor]:
        """Clips fp32 `[count, 3, frames, size, size]` in [-1, 1] and their classes int64 `[count]`.

        stride is the number of time steps between frames: more means faster motion.
        """
        u = torch.rand(count, CLIP_PARAMETERS, generator=self.generator).to(self.device, non_blocking=True)
        time = (torch.arange(frames, device=self.device) * stride).float()
        background = self._background(u[:, :12], time)
        which = (u[:, 12] * len(self.digit_images)).long()
        video = self._add_digit(background, self.digit_images[which], u[:, 13:], time)
        return video * 2 - 1, self.digit_labels[which]

    def _pixel_grid(self) -> tuple[Tensor, Tensor]:
        """Pixel coordinates from the picture's centre, each `[size, size]`."""
        axis = torch.arange(self.size, device=self.device) - (self.size - 1) / 2
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return y, x

    def _sample(self, image: Tensor, x: Tensor, y: Tensor, padding: str) -> Tensor:
        """Read `image` `[B, C, N, N]` at its pixel positions x, y `[B, T, H, W]` -> `[B, C, T, H, W]`."""
        side = image.shape[-1]
        b, t, h, w = x.shape
        grid = torch.stack((x, y), dim=-1) * (2 / (side - 1)) - 1
        out = F.grid_sample(image, grid.view(b, t * h, w, 2), mode="bilinear", padding_mode=padding, align_corners=True)
        return out.view(b, -1, t, h, w)

    def _background(self, u: Tensor, time: Tensor) -> Tensor:
        photo = self.photos[(u[:, 0] * len(self.photos)).long()]
        centred = time - time.mean()
        zoom = 0.012 * (2 * u[:, 2, None] - 1)  # within 1.2% a frame
        scale = (0.6 + 0.5 * u[:, 1, None]) * torch.exp(zoom * centred)
        angle = 0.5 * (2 * u[:, 3, None] - 1) + 0.008 * (2 * u[:, 4, None] - 1) * centred
        heading = 2 * math.pi * u[:, 5, None]
        speed = 1.6 * u[:, 6, None]  # pixels a frame
        room = PHOTO_SIDE - 1 - 2 * 40
        centre_x = 40 + room * u[:, 7, None] + speed * heading.cos() * centred
        centre_y = 40 + room * u[:, 8, None] + speed * heading.sin() * centred
        y, x = self._pixel_grid()
        flip = torch.where(u[:, 9, None, None, None] < 0.5, -1.0, 1.0)
        cos, sin = ((scale * f(angle))[:, :, None, None] for f in (torch.cos, torch.sin))
        source_x = centre_x[:, :, None, None] + flip * (cos * x - sin * y)
        source_y = centre_y[:, :, None, None] + sin * x + cos * y
        video = self._sample(photo, source_x, source_y, "reflection")
        tint = 1 + 0.25 * (_hue(u[:, 10]) - 0.62)
        light = 0.7 + 0.3 * u[:, 11, None]
        return video * (tint * light)[:, :, None, None, None]

    def _add_digit(self, video: Tensor, digit: Tensor, u: Tensor, time: Tensor) -> Tensor:
        half = (self.size - 1) / 2
        reach = half - 12  # keeps most of the digit inside the picture
        heading = 2 * math.pi * u[:, 0, None]
        speed = 0.7 + 1.5 * u[:, 1, None]  # pixels a frame
        path_x = _bounce((2 * u[:, 2, None] - 1) * reach + speed * heading.cos() * time, -reach, reach)
        path_y = _bounce((2 * u[:, 3, None] - 1) * reach + speed * heading.sin() * time, -reach, reach)
        side = 40 + 8 * u[:, 4, None, None, None]  # pixels that the padded digit covers
        angle = 0.2 * (2 * u[:, 5, None, None, None] - 1)
        y, x = self._pixel_grid()
        away_x, away_y = x - path_x[:, :, None, None], y - path_y[:, :, None, None]
        pixels = digit.shape[-1]
        source_x = (angle.cos() * away_x - angle.sin() * away_y) * (pixels / side) + (pixels - 1) / 2
        source_y = (angle.sin() * away_x + angle.cos() * away_y) * (pixels / side) + (pixels - 1) / 2
        height = self._sample(digit, source_x, source_y, "zeros")
        ink = _smoothstep(height, 0.45, 0.68)
        shadow = 0.75 * _smoothstep(height, 0.08, 0.45)
        colour = _hue(u[:, 6])[:, :, None, None, None]
        return video * (1 - shadow) * (1 - ink) + colour * ink
