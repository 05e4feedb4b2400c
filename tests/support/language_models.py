"""Small decoders of transformers with random weights, of each kind that DuoAttention must fit. Nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS = 64, 64, 2, 8, 4
# Full and streaming heads in every layer, and not the same ones.
MIXED = ((0, 1, 0, 1), (1, 0, 0, 0))
ALL_FULL = ((1, 1, 1, 1),) * LAYERS

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, attention_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),  # biases of q, k and v
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16)),  # wider than hidden_size / heads; norms
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_SIZES)),  # norms over all heads together
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES)),  # fused qkv_proj
}


def make_model(name: str = "llama") -> Any:
    """The model in eval mode, every parameter random: biases and norms are not left at 0 and 1."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Sharp enough that it matters which keys are seen.
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.15))
    return model


def make_tokens(batch: int = 2, length: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
