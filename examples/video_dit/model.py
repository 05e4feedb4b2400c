"""A compact rectified-flow video diffusion transformer whose attention is injected.

Tokens are (1, 4, 4) pixel patches, listed in (4, 4, 4) blocks of (frame, row, column): 64 consecutive tokens are a
small spatio-temporal cube and 128 are two neighbouring ones, so that the query and KV tiles of `lite_attention`
(64 x 128) are compact pieces of video. Positions enter through 3-D rotary embeddings and a learned input embedding,
the noise level and the class through adaLN.

Every block owns one attention module, called as `attn(q, k, v)` with `[B, S, H, D]` tensors. `SdpaAttention` is the
dense default used in training; `lite_attention.LiteAttention` fits the same call. The state dict does not depend on
which one is plugged in.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

AttentionFactory = Callable[[], nn.Module]
BLOCK = 4  # tokens per side of the cube that 64 consecutive tokens fill


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of the model; frames, height and width are in pixels and set the longest clip it can take."""

    frames: int = 16
    height: int = 64
    width: int = 64
    channels: int = 3
    patch: int = 4
    dim: int = 256
    depth: int = 8
    heads: int = 4
    mlp_ratio: int = 4
    classes: int = 10
    rope_theta: float = 32.0  # the slowest rotation still turns visibly over 16 positions
    qk_gain: float = 1.5  # logits reach head_dim ** 0.5 * qk_gain ** 2 nats at the start of training
    qk_bias: float = 1.5  # a constant part of q and k: through the rotary embedding it prefers nearby tokens

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def null_class(self) -> int:
        """The label that means 'no class', for classifier-free guidance."""
        return self.classes

    def grid(self, frames: int | None = None) -> tuple[int, int, int]:
        """Tokens along (time, height, width) for a clip of `frames` frames."""
        return (frames or self.frames, self.height // self.patch, self.width // self.patch)


class SdpaAttention(nn.Module):
    """Dense attention on `[B, S, H, D]` tensors through torch's scaled_dot_product_attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return out.transpose(1, 2)


@functools.lru_cache(maxsize=16)
def block_order(grid: tuple[int, int, int], device: torch.device | None = None, block: int = BLOCK) -> Tensor:
    """Raster index of every token in block order: int64 `[T * H * W]` on `device`, cached.

    `tokens_raster[block_order(grid)]` lists the tokens cube by cube, the cubes themselves in raster order.
    Raises ValueError when a side is no multiple of `block`.
    """
    if any(side % block for side in grid):
        raise ValueError(f"block_order: grid {grid} has a side that is no multiple of {block}")
    t, h, w = grid
    index = torch.arange(t * h * w).view(t // block, block, h // block, block, w // block, block)
    return index.permute(0, 2, 4, 1, 3, 5).reshape(-1).to(device)


def patchify(video: Tensor, patch: int) -> Tensor:
    """`[B, C, T, H, W]` -> tokens in block order `[B, T * H/p * W/p, C * p * p]`."""
    b, c, t, h, w = video.shape
    grid = (t, h // patch, w // patch)
    tokens = video.view(b, c, t, grid[1], patch, grid[2], patch).permute(0, 2, 3, 5, 1, 4, 6)
    tokens = tokens.reshape(b, t * grid[1] * grid[2], c * patch * patch)
    return tokens[:, block_order(grid, video.device)]


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: int, channels: int = 3) -> Tensor:
    """The inverse of `patchify`."""
    t, h, w = grid
    raster = torch.empty_like(tokens)
    raster[:, block_order(grid, tokens.device)] = tokens
    video = raster.view(-1, t, h, w, channels, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
    return video.reshape(-1, channels, t, h * patch, w * patch)


def rope_angles(grid: tuple[int, int, int], head_dim: int, theta: float) -> Tensor:
    """Rotation angles fp32 `[S, head_dim // 2]` in block order.

    The first quarter of the pairs turns with time, the rest in equal parts with y and x.
    """
    pairs = head_dim // 2
    time_pairs = pairs // 4
    y_pairs = (pairs - time_pairs) // 2
    counts = (time_pairs, y_pairs, pairs - time_pairs - y_pairs)
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    angles = [
        axis.reshape(-1, 1) * theta ** (-torch.arange(n, dtype=torch.float32) / n)
        for axis, n in zip(axes, counts, strict=True)
    ]
    return torch.cat(angles, dim=1)[block_order(grid)]


@functools.lru_cache(maxsize=16)
def rope_tables(grid: tuple[int, int, int], head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cos and sin of `rope_angles`, fp32 `[S, 1, head_dim // 2]` on `device`, cached."""
    angles = rope_angles(grid, head_dim, theta).to(device)[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, S, H, D]` by angles given as cos and sin `[S, 1, D / 2]`; component i pairs with i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class QKNorm(nn.Module):
    """RMS norm over the head dimension with a learned gain and offset for each head.

    With gains near 1 the logits of a 64-wide head stay within 8 nats and attention stays diffuse, so the gain starts
    higher. The offset is a part of q (or k) that does not depend on the content: after the rotary embedding
    its product with the other side's offset depends on the distance alone, and starts as a preference for near tokens.
    """

    def __init__(self, heads: int, head_dim: int, gain: float, bias: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((heads, head_dim), gain))
        self.bias = nn.Parameter(torch.full((heads, head_dim), bias))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.bias, normed, self.gain)


class Block(nn.Module):
    """One transformer block: adaLN-modulated attention and MLP, gated residuals."""

    def __init__(self, config: VideoDiTConfig, attention: AttentionFactory) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = QKNorm(config.heads, config.head_dim, config.qk_gain, config.qk_bias)
        self.k_norm = QKNorm(config.heads, config.head_dim, config.qk_gain, config.qk_bias)
        self.proj = nn.Linear(dim, dim)
        self.mlp_in = nn.Linear(dim, config.mlp_ratio * dim)
        self.mlp_out = nn.Linear(config.mlp_ratio * dim, dim)
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        self.attn = attention()

    def forward(self, x: Tensor, shared: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X `[B, S, dim]`, shared modulation `[B, 6, dim]` -> x, and the q and k `[B, S, H, D]` that attention saw."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (shared + self.modulation).unsqueeze(2).unbind(1)
        b, s, dim = x.shape
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        q, k, v = self.qkv(h).view(b, s, 3, self.heads, dim // self.heads).unbind(2)
        q = apply_rope(self.q_norm(q), cos, sin).to(v.dtype)
        k = apply_rope(self.k_norm(k), cos, sin).to(v.dtype)
        x = torch.addcmul(x, gate1, self.proj(self.attn(q, k, v).reshape(b, s, dim)))
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        x = torch.addcmul(x, gate2, self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh")))
        return x, q, k


class VideoDiT(nn.Module):
    """Predicts the rectified-flow velocity `noise - video` of a noisy clip.

    Args:
        config: sizes.
        attention: called once for every block, returns the module that computes `attn(q, k, v)`.
    """

    def __init__(self, config: VideoDiTConfig, attention: AttentionFactory = SdpaAttention) -> None:
        super().__init__()
        self.config = config
        dim, patch_dim = config.dim, config.channels * config.patch**2
        self.patch_in = nn.Linear(patch_dim, dim)
        grid = config.grid()
        self.position = nn.ParameterList([nn.Parameter(torch.randn(side, dim) * 0.02) for side in grid])
        self.class_embedding = nn.Embedding(config.classes + 1, dim)
        self.time_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList([Block(config, attention) for _ in range(config.depth)])
        self.final_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.patch_out = nn.Linear(dim, patch_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        # adaLN-zero: every block starts as the identity and the output as 0
        for layer in (self.modulation, self.final_modulation, self.patch_out):
            nn.init.zeros_(layer.weight)

    def use_attention(self, modules: Sequence[nn.Module]) -> None:
        """Plug in one attention module for each block, in order."""
        for block, module in zip(self.blocks, modules, strict=True):
            block.attn = module

    def _time_embedding(self, time: Tensor) -> Tensor:
        half = self.config.dim // 2
        rate = torch.exp(-math.log(10000.0) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
        angle = 1000.0 * time.float()[:, None] * rate
        return torch.cat((angle.cos(), angle.sin()), dim=1).to(self.patch_in.weight.dtype)

    def forward(
        self, video: Tensor, time: Tensor, label: Tensor, collect_qk: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Velocity for a noisy clip.

        Args:
            video: `[B, 3, T, H, W]`, T a multiple of 4 and at most `config.frames`.
            time: `[B]` noise level in [0, 1], 1 is pure noise.
            label: int64 `[B]`, `config.null_class` for no class.
            collect_qk: when a list is given, every block's (q, k) is appended to it.

        Returns:
            `[B, 3, T, H, W]`, in the model's dtype.
        """
        config = self.config
        grid = config.grid(video.shape[2])
        cos, sin = rope_tables(grid, config.head_dim, config.rope_theta, video.device)
        along_t, along_y, along_x = (table[:side] for table, side in zip(self.position, grid, strict=True))
        position = along_t[:, None, None] + along_y[None, :, None] + along_x[None, None, :]
        patches = patchify(video.to(self.patch_in.weight.dtype), config.patch)
        x = self.patch_in(patches) + position.flatten(0, 2)[block_order(grid, video.device)]
        condition = F.silu(self.time_mlp(self._time_embedding(time)) + self.class_embedding(label))
        shared = self.modulation(condition).view(-1, 6, config.dim)
        for block in self.blocks:
            x, q, k = block(x, shared, cos, sin)
            if collect_qk is not None:
                collect_qk.append((q, k))
        shift, scale = self.final_modulation(condition).unsqueeze(1).chunk(2, dim=2)
        x = self.patch_out(torch.addcmul(shift, self.final_norm(x), 1 + scale))
        return unpatchify(x, grid, config.patch, config.channels)


def save_weights(path: Path | str, state: dict[str, Tensor], config: VideoDiTConfig, **facts: str) -> None:
    """Write a state dict as fp16 safetensors with the config and any facts in the header."""
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in state.items()}
    save_file(tensors, str(path), metadata={"config": json.dumps(asdict(config)), **facts})


def load_weights(path: Path | str, attention: AttentionFactory = SdpaAttention) -> VideoDiT:
    """Build the model that a safetensors file describes, in fp32 on the CPU, in eval mode."""
    with safe_open(str(path), framework="pt") as file:
        config = VideoDiTConfig(**json.loads(file.metadata()["config"]))
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    model = VideoDiT(config, attention)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
