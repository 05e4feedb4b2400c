"""DuoAttention in the decoders of Hugging Face transformers: full and streaming heads of a layer in one launch.

:func:`enable_duo_attention` registers an attention function and a mask function with transformers and switches a model
over to them. Prefill, chunks that continue a KV cache and single tokens are the same call, causal from the last key.
The cache is transformers' own and keeps every key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from lite_attention.families.duo.weights import HEAD_ORDER, HEAD_WINDOWS, HeadTable, attention_layers, head_table
from lite_attention.families.streaming import head_windows
from lite_attention.ops import attention
from lite_attention.ops.checks import equals_any
from lite_attention.ops.modes import ordinary_tensors

__all__ = ["DuoAttentionHandle", "enable_duo_attention"]

IMPLEMENTATION = "lite_attention_duo"

# Arguments of attention functions that change the result and that the kernel has nothing for.
_NOT_SUPPORTED = (
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
    "indices",
    "block_indices",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "seq_idx",
    "cache",
)


class DuoAttentionHandle:
    """What :func:`enable_duo_attention` returns, to go back.

    A copy of the model works as the model does. ``copy.deepcopy((model, handle))`` copies it with a handle of its own.
    """

    def __init__(self, model: PreTrainedModel, implementation: str, layers: Iterable[nn.Module]) -> None:
        self._model: PreTrainedModel | None = model
        self._implementation = implementation
        self._layers = list(layers)

    def disable(self) -> None:
        """Give the model its own attention back. The handle is of no use afterwards."""
        if self._model is None:
            return
        _switch(self._model, self._implementation)
        for layer in self._layers:
            vars(layer).pop(HEAD_WINDOWS, None)
        self._model = None


def enable_duo_attention(
    model: nn.Module, full_attention_heads: HeadTable, sink_size: int, recent_size: int
) -> DuoAttentionHandle:
    """Let chosen heads of a decoder see only the first and the last tokens.

    Args:
        model: a causal language model of transformers whose layers are ``model.model.layers`` or ``model.layers`` and
            whose attention goes through transformers' ``AttentionInterface`` (Llama, Mistral, Qwen2, Qwen3, ...). May
            be compiled.
        full_attention_heads: ``[layers, KV heads]``, 1 or True for KV heads whose query heads see every token up to
            their own, 0 or False for those that stream; of the heads as they are in the model now. Layers that are one
            module have one row.
        sink_size: first tokens that streaming heads see.
        recent_size: last tokens that they see, the row's own included; at least 1.

    Returns:
        A handle to go back.

    Raises:
        TypeError: not such a model, or sizes that are no integers.
        ValueError: an argument does not fit the model, or DuoAttention is enabled in it already.
        RuntimeError: the model cannot change its attention.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"enable_duo_attention: model is a {type(model).__name__}, expected one of transformers")
    layers = attention_layers("enable_duo_attention", model)
    is_enabled = any(hasattr(layer, HEAD_WINDOWS) for layer in layers.values())
    if model.config._attn_implementation == IMPLEMENTATION and not is_enabled:
        raise ValueError(
            f"enable_duo_attention: model has the config of another {type(model).__name__}, in which DuoAttention is "
            "enabled, expected a config of its own: copy.deepcopy makes one before the model is built"
        )
    config = model.config.get_text_config()
    table = head_table("enable_duo_attention", full_attention_heads, len(layers), config.num_key_value_heads)
    windows: dict[nn.Module, Tensor] = {}
    rows: dict[nn.Module, tuple[str, Tensor]] = {}
    for (name, layer), row in zip(layers.items(), table, strict=True):
        first, its_row = rows.setdefault(layer, (name, row))
        if not torch.equal(row, its_row):
            raise ValueError(
                f"enable_duo_attention: full_attention_heads of {name} is {row.int().tolist()}, expected "
                f"{its_row.int().tolist()} as for {first}: they are one module"
            )
        if hasattr(layer, HEAD_WINDOWS):
            raise ValueError(
                f"enable_duo_attention: {name} has DuoAttention already, expected none: disable it first. A copy of a "
                "model is disabled by the handle copied with it, copy.deepcopy((model, handle))"
            )
        if hasattr(layer, HEAD_ORDER) and not torch.equal(row, row.sort(descending=True).values):
            raise ValueError(
                f"enable_duo_attention: full_attention_heads of {name} is {row.int().tolist()}, expected full heads "
                "first: duo.reorder_weights has moved them there"
            )
        full_heads = row.repeat_interleave(config.num_attention_heads // config.num_key_value_heads)
        with ordinary_tensors():
            windows[layer] = head_windows(full_heads, sink_size, recent_size).to(_home(layer))
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _visible)
    handle = DuoAttentionHandle(model, model.config._attn_implementation, windows)
    _switch(model, IMPLEMENTATION)
    for layer, layer_windows in windows.items():
        setattr(layer, HEAD_WINDOWS, layer_windows)
    return handle


def _home(layer: nn.Module) -> torch.device:
    """Where the layer's table is made. Weights that are offloaded tell nothing: :func:`_windows` moves it then."""
    return next((weight.device for weight in layer.parameters() if not weight.is_meta), torch.device("cpu"))


def _windows(layer: nn.Module, device: torch.device) -> Tensor:
    """The layer's table where its queries are. It moves once, with the first call after the model has moved."""
    windows: Tensor = getattr(layer, HEAD_WINDOWS)
    if windows.device != device:
        with ordinary_tensors():
            windows = windows.to(device)
        setattr(layer, HEAD_WINDOWS, windows)
    return windows


def _switch(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:  # of this, transformers only warns
        raise RuntimeError(
            f"enable_duo_attention: {type(model).__name__} cannot change its attention, expected a model that calls "
            "transformers' AttentionInterface"
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer calls. Tensors ``[B, H, S, D]``, ``attention_mask`` from :func:`_visible`; out ``[B, S, H, D]``."""
    _refuse_unsupported(module, dropout, is_causal, others)
    kv_lens = orders = None
    if attention_mask is not None:
        kv_lens, orders = _read_visible(attention_mask, query, key)
    if orders is not None:
        query = query.take_along_dim(orders[0], 2)
        key, value = key.take_along_dim(orders[1], 2), value.take_along_dim(orders[1], 2)
    out, _ = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        kv_lens=kv_lens,
        scale=scaling,
        causal="bottom-right",
        head_windows=_windows(module, query.device),
    )
    if orders is not None:
        out = torch.empty_like(out).scatter_(1, orders[0].transpose(1, 2).expand_as(out), out)
    return out, None


def _refuse_unsupported(module: nn.Module, dropout: float, is_causal: bool | None, others: dict[str, Any]) -> None:
    where = type(module).__name__
    if not hasattr(module, HEAD_WINDOWS):
        raise ValueError(
            f"{where}: attention without a head table, expected a layer that enable_duo_attention found. Models that "
            "were built with one config share its attention: give each a copy.deepcopy of it"
        )
    if dropout != 0.0:
        raise ValueError(f"{where}: attention with dropout {dropout}, expected 0: there is no backward")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{where}: attention with is_causal False, expected causal attention")
    if others.get("output_attentions"):
        raise ValueError(f"{where}: output_attentions is True, expected False: weights are never in memory")
    for name in _NOT_SUPPORTED:
        if others.get(name) is not None:
            raise ValueError(f"{where}: attention with {name}, expected none: it is not supported")


def _visible(
    batch_size: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> Tensor | None:
    """What transformers calls once a forward, for all layers: which tokens exist.

    None where all keys do. Otherwise int64 ``[B, 1, 1, 1]``, the number of existing keys, which come first; or, with
    padding, ``[B, 1, 1, 1 + Sq + Sk]``: that number, an order of the queries in which the existing ones come last, and
    an order of the keys in which the existing ones come first. Then queries and keys that exist are causal from the
    last key, wherever the padding was. Of four dimensions since transformers hands such masks on as they are.
    """
    if cache_position is not None:  # transformers 4 has it in place of the query's length and offset
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    if mask_function is not causal_mask_function or kv_offset != 0:
        raise ValueError(
            "DuoAttention: the model asks for a mask that is not causal alone (a sliding window, packed sequences, "
            "bidirectional tokens), expected a causal one. Without a cache and an attention_mask, transformers may "
            "ask for packed sequences: pass use_cache=True"
        )
    end = q_offset + q_length  # keys at and past it are a static cache's free room
    if attention_mask is None or _hides_nothing(attention_mask, end):
        if isinstance(end, int) and end == kv_length:
            return None
        return torch.ones(batch_size, 1, 1, 1, dtype=torch.int64, device=device) * end
    if attention_mask.dim() != 2 or attention_mask.shape[-1] > kv_length:
        raise ValueError(
            f"DuoAttention: attention_mask has shape {list(attention_mask.shape)}, expected [{batch_size}, up to "
            f"{kv_length}]: one number for each key"
        )
    key_exists = F.pad(attention_mask, (0, kv_length - attention_mask.shape[-1]))
    key_exists = key_exists & (torch.arange(kv_length, device=key_exists.device) < end)
    query_exists = key_exists[:, torch.arange(q_length, device=key_exists.device) + q_offset]
    orders = query_exists.int().argsort(stable=True), key_exists.int().argsort(descending=True, stable=True)
    return torch.cat([key_exists.sum(-1, keepdim=True), *orders], -1)[:, None, None]


def _hides_nothing(attention_mask: Tensor, end: int | Tensor) -> bool:
    """Whether every key is there. It waits for the device, once a forward; where it must not, a mask counts as padding.

    transformers' own mask functions look likewise. The other way would be to sort keys for every call of generate.
    """
    if torch.compiler.is_compiling() or (attention_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return bool(attention_mask.all() & (end <= attention_mask.shape[-1]))


def _read_visible(visible: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """What :func:`_visible` returned, as kv_lens, int32 ``[B]``, and the two orders, ``[B, 1, length, 1]`` each."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if (
        not isinstance(visible, Tensor)
        or visible.dtype != torch.int64
        or not equals_any(visible.shape, (batch, 1, 1, 1), (batch, 1, 1, 1 + queries + keys))
    ):
        raise ValueError(
            "DuoAttention: attention_mask is a mask of its own over queries and keys, expected none or a mask "
            "[batch, keys] of the tokens that are no padding"
        )
    kv_lens = visible[:, 0, 0, 0].int()
    if visible.shape[-1] == 1:
        return kv_lens, None
    query_order, key_order = visible[..., 1:].transpose(2, 3).split([queries, keys], 2)
    return kv_lens, (query_order, key_order)
