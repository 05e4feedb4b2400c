"""A small diffusion transformer built on the attention layers: video tokens, text beside them, a gate for VSA.

And what the tests of the layers share: attention by its definition, and a backend as others would bring it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lite_attention import LiteAttention
from lite_attention.layers import (
    AttentionBackend,
    AttentionBackendEnum,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    DistributedAttention,
    DistributedAttention_VSA,
    LocalAttention,
)
from lite_attention.layers.registry import BackendName, find_backend

HEADS, HEAD_SIZE = 4, 32
WIDTH = HEADS * HEAD_SIZE
GRID = (5, 7, 9)
"""No tile of the backends divides it, and two or four ranks do not divide its 315 tokens."""
TOKENS = math.prod(GRID)
TEXT = 20
STEPS = 4

# Drops something. Only LITE_ATTN looks at it.
THRESHOLD = -0.3


def rotary_embedding(tokens: int, head_size: int = HEAD_SIZE) -> tuple[Tensor, Tensor]:
    frequencies = 10.0 ** -torch.linspace(0, 3, head_size // 2)
    angle = torch.arange(tokens).unsqueeze(-1) * frequencies
    return angle.cos(), angle.sin()


class Block(nn.Module):
    def __init__(self, index: int, backend: BackendName, mesh: DeviceMesh | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.has_gate = backend is AttentionBackendEnum.VIDEO_SPARSE_ATTN
        self.qkvg, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.text_qkv, self.text_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.cross = LocalAttention(
            HEADS, HEAD_SIZE, supported_attention_backends=(AttentionBackendEnum.TORCH_SDPA,), dtype=dtype
        )
        layer_class = DistributedAttention_VSA if self.has_gate else DistributedAttention
        self.attn = layer_class(
            HEADS,
            HEAD_SIZE,
            supported_attention_backends=(backend,),
            prefix=f"blocks.{index}.attn",
            mesh=mesh,
            dtype=dtype,
            threshold=THRESHOLD,
        )

    def forward(self, x: Tensor, text: Tensor, tokens: int, freqs_cis: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, gate = self.qkvg(x).unflatten(-1, (4, HEADS, HEAD_SIZE)).unbind(2)
        text_q, text_k, text_v = self.text_qkv(text).unflatten(-1, (3, HEADS, HEAD_SIZE)).unbind(2)
        q, k = 3 * q, 3 * k  # sharp enough that something can be skipped
        if self.has_gate:
            out, _ = self.attn(q, k, v, tokens, gate_compress=gate, freqs_cis=freqs_cis)
            text = text + self.text_out(text_v.flatten(-2))
        else:
            out, text_out = self.attn(q, k, v, tokens, text_q, text_k, text_v, freqs_cis=freqs_cis)
            text = text + self.text_out(text_out.flatten(-2))
        x = x + self.out(out.flatten(-2))
        return x + self.cross(q, text_k, text_v).flatten(-2), text


class DiT(nn.Module):
    """Takes this rank's shard of the tokens, ``[B, S_local, WIDTH]``, and all of the text."""

    def __init__(
        self,
        backend: BackendName,
        mesh: DeviceMesh | None = None,
        blocks: int = 3,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(index, backend, mesh, dtype) for index in range(blocks))
        cos, sin = rotary_embedding(TOKENS)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(x, text, TOKENS, (self.cos, self.sin))
        return x

    def lite_layers(self) -> Iterator[LiteAttention]:
        return (module for module in self.modules() if isinstance(module, LiteAttention))


def windows(steps: int = STEPS, layers: int = 3) -> list[list[list[tuple[int, int, int]]]]:
    """``STA_param``: other windows for each step, layer and head."""
    options = [(1, 1, 1), (1, 3, 1), (3, 1, 3), (3, 3, 3)]
    return [
        [[options[(step + layer + head) % len(options)] for head in range(HEADS)] for layer in range(layers)]
        for step in range(steps)
    ]


class Metadata:
    """The metadata of each step, from the builder of a backend."""

    def __init__(self, backend: BackendName, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.builder = find_backend(backend).get_builder_cls()()
        self.builder.prepare()
        self.arguments: dict[str, object] = {}
        if backend is AttentionBackendEnum.VIDEO_SPARSE_ATTN:
            frames, rows, columns = GRID
            self.arguments = {
                "raw_latent_shape": (frames, 2 * rows, 2 * columns),
                "patch_size": (1, 2, 2),
                "VSA_sparsity": 0.5,
                "device": device,
            }
        elif backend is AttentionBackendEnum.SLIDING_TILE_ATTN:
            self.arguments = {
                "STA_param": windows(),
                "canvas": GRID,
                "tile": (2, 3, 4),
                "head_size": HEAD_SIZE,
                "dtype": dtype,
                "text_tokens": TEXT,
                "text_length": TEXT - 3,
                "device": device,
            }

    def of_step(self, step: int) -> AttentionMetadata:
        return self.builder.build(current_timestep=step, **self.arguments)


def video(step: int, batch: int = 1, tokens: int = TOKENS) -> Tensor:
    """Noise that changes a little from step to step."""
    first = torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(0)).cumsum(1)
    first = first / first.std()
    return first + 0.1 * torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(1 + step))


def text(batch: int = 1) -> Tensor:
    return torch.randn(batch, TEXT, WIDTH, generator=torch.Generator().manual_seed(99))


def qkv(
    tokens: int = TOKENS, batch: int = 1, kv_heads: int = HEADS, kv_tokens: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, HEADS, HEAD_SIZE, generator=random)
    k, v = torch.randn(2, batch, kv_tokens or tokens, kv_heads, HEAD_SIZE, generator=random)
    return q, k, v


def layer(layer_class: Callable[..., Any], backend: object, *, prefix: str = "blocks.1.attn", **arguments: Any) -> Any:
    return layer_class(HEADS, HEAD_SIZE, supported_attention_backends=(backend,), prefix=prefix, **arguments)


def turned(x: Tensor, freqs_cis: tuple[Tensor, Tensor]) -> Tensor:
    """The rotary embedding, with complex numbers."""
    cos, sin = freqs_cis
    angle = torch.complex(cos.double(), sin.double())[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angle).flatten(-2)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """Attention by its definition in fp64, ``[B, S, H, D]``."""
    query, key, value = (x.double().transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@dataclass
class LinearMetadata(AttentionMetadata):
    strength: Tensor


class LinearMetadataBuilder(AttentionMetadataBuilder[LinearMetadata]):
    def __init__(self) -> None: ...

    def prepare(self) -> None: ...

    def build(self, *, current_timestep: int, strength: float) -> LinearMetadata:
        return LinearMetadata(current_timestep, torch.tensor(strength))


class LinearImpl(nn.Module, AttentionImpl[LinearMetadata]):
    """Softmax-free attention with weights of its own, tokens reversed on the way, causal or not."""

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False, num_kv_heads: int | None = None,
        prefix: str = "", gain: float = 1.0, **extra: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.given = num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, gain
        self.weight = nn.Parameter(torch.full((head_size,), gain))

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: LinearMetadata) -> Tensor:
        return qkv.flip(1)

    def postprocess_output(self, output: Tensor, attn_metadata: LinearMetadata) -> Tensor:
        return output.flip(1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: LinearMetadata) -> Tensor:
        first = value[:, :1] * self.weight  # the last video token, as all tokens of the video are reversed
        return attn_metadata.strength * torch.einsum("bqhd,bkhd,bkhe->bqhe", query, key, value) + first


class LinearBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "LINEAR_TEST_ATTN"

    @staticmethod
    def get_impl_cls() -> type[LinearImpl]:
        return LinearImpl

    @staticmethod
    def get_metadata_cls() -> type[LinearMetadata]:
        return LinearMetadata

    @staticmethod
    def get_builder_cls() -> type[LinearMetadataBuilder]:
        return LinearMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return [HEAD_SIZE]
