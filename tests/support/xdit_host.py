"""As much of xDiT (xfuser) and yunchang as an attention function meets.

Follows xfuser 0.7 (core/distributed/attention_backend.py, model_executor/layers/usp.py) and yunchang 0.6
(hybrid/attn_layer.py, ring/ring_flash_attn.py) on one rank.
"""

import enum
import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class AttentionBackendType(enum.Enum):
    SDPA = "SDPA"
    FLASH_3 = "Flash Attention V3"


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, None]:
    mask = attention_kwargs.get("attn_mask") if attention_kwargs else None
    return scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal), None


ATTENTION_FUNCTION_REGISTRY: dict[AttentionBackendType, Callable[..., Any]] = {}
PROCESS_GROUP = SimpleNamespace(RING_PG=None, ULYSSES_PG=None)
parallel = SimpleNamespace(ring=1)


def install() -> None:
    """Put the stand-ins where xfuser and yunchang would be."""
    parallel.ring = 1
    ATTENTION_FUNCTION_REGISTRY.clear()
    ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA] = _sdpa
    contents = {
        "xfuser": {},
        "xfuser.core": {},
        "xfuser.core.distributed": {"get_ring_parallel_world_size": lambda: parallel.ring},
        "xfuser.core.distributed.attention_backend": {
            "AttentionBackendType": AttentionBackendType,
            "ATTENTION_FUNCTION_REGISTRY": ATTENTION_FUNCTION_REGISTRY,
        },
        "yunchang": {"LongContextAttention": LongContextAttention},
        "yunchang.globals": {"PROCESS_GROUP": PROCESS_GROUP},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


def uninstall() -> None:
    """Take the stand-ins out again."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("xfuser", "yunchang")]:
        del sys.modules[name]


def usp(query: Tensor, key: Tensor, value: Tensor, attention_kwargs: dict[str, Any] | None = None) -> Tensor:
    """What a layer calls, tensors ``[batch, heads, length, head_dim]``: the function of the chosen backend."""
    function = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    valid = (attention_kwargs or {}).get("valid_kv_len")
    key, value = key[:, :, :valid], value[:, :, :valid]
    out, _ = call(query, key, value, dropout_p=0.0, is_causal=False, attention_kwargs=attention_kwargs)
    return out


class WanTransformer(nn.Module):
    """Blocks whose attention layers have processors that pass their ``attention_kwargs`` on."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(blocks))
        for block in self.blocks:
            block.attn1, block.attn2 = nn.Module(), nn.Module()
            block.attn1.processor = SimpleNamespace(attention_kwargs=None)
            block.attn2.processor = SimpleNamespace(attention_kwargs=None)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + usp(4 * x, x, x, block.attn1.processor.attention_kwargs)
            x = x + usp(x, context, context, block.attn2.processor.attention_kwargs)
        return x


class LongContextAttention(nn.Module):
    """Hands calls to ``attn_processor`` where ``attn_type`` is none of its own."""

    def __init__(self, attn_type: object = None, attn_processor: nn.Module | None = None) -> None:
        super().__init__()
        self.attn_type, self.attn_processor = attn_type, attn_processor

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool = False, **options: Any) -> Tensor:
        assert self.attn_processor is not None
        defaults = {"dropout_p": 0.0, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None}
        out, lse = self.attn_processor(
            query,
            key.contiguous(),
            value.contiguous(),
            softmax_scale=query.shape[-1] ** -0.5,
            causal=causal,
            return_softmax=False,
            **{**defaults, **options},
        )
        # By these shapes yunchang merges chunks.
        assert lse.shape == out.shape[:1] + out.shape[2:0:-1]
        return out
