"""A transformer of nothing but self-attention, to tell what LiteAttention in a model costs beside its operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lite_attention.integrations.diffusers import VideoModel, register_video_model


class _SdpaProcessor:
    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        heads = hidden_states.transpose(1, 2)
        return scaled_dot_product_attention(query=heads, key=heads, value=heads).transpose(1, 2)


class SelfAttention(nn.Module):
    """`[B, S, H, D]` to the same, each token its own query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Callable[..., Tensor] = _SdpaProcessor()

    def set_processor(self, processor: Callable[..., Any]) -> None:
        del self.processor  # one may be a module and the next not
        self.processor = processor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """One attention."""
        return self.processor(self, hidden_states)


class AttentionStack(nn.Module):
    """As many layers of self-attention, in a form that `enable_lite_attention` takes."""

    def __init__(self, layers: int, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention() for _ in range(layers))
        self.scale = nn.Parameter(torch.ones((), device=device), requires_grad=False)  # tells the model's device

    def compile_layers(self, **options: Any) -> None:
        """Compile the layers one by one, as `compile_repeated_blocks` of diffusers does."""
        for layer in self.layers.children():
            layer.compile(**options)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The first token of the last layer: little, because a captured step copies what it returns."""
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states[:, :1]


register_video_model("AttentionStack", VideoModel((r"layers\.\d+",)))
