"""Light-DuoAttention's calls: attention of streaming heads, and weights reordered by kind of head."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from lite_attention.families import duo, streaming
from lite_attention.families.duo.weights import HeadTable
from lite_attention.maps.tiles import UNLIMITED
from lite_attention.ops.checks import checked_bool, checked_int, checked_number

__all__ = ["DuoAttentionConfig", "reorder_weights_for_duo_attn", "streaming_sparse_attn_func"]

# The original's other keywords, and the value that asks for nothing.
_NOT_SUPPORTED: dict[str, object] = {
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
    "seqused_q": None,
    "page_table": None,
    "learnable_sink": None,
    "softcap": 0.0,
    "pack_gqa": None,
    "groupwise": False,
    "position_ids": None,
    "m_block_size": 128,
    "n_block_size": 128,
}


def streaming_sparse_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_size: int | None = None,
    enable_streaming: bool = True,
    *,
    seqused_k: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """:func:`lite_attention.streaming_attention` by Light-DuoAttention's call, with Light-DuoAttention's mask.

    Row i sees key j if ``j <= i and (j < sink_size or j >= i - window_size[0])``: the window's left side does not count
    the row's own key. Row i is at position i, however many keys there are. The original applies this mask whatever
    ``causal``, ``enable_streaming`` and the window's right side say; here values that say otherwise are refused.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k, v: ``[B, Sk, Hkv, D]``.
        softmax_scale: ``1/sqrt(D)`` if None.
        causal: True.
        window_size: (left, right). Left: so many keys before the row's own, None for all. Right: 0 or None.
        sink_size: first keys that are always seen, None for 0.
        enable_streaming: True. Heads that see all keys up to their row have no window.
        seqused_k: int32 ``[B]``; keys at and past it do not exist.
        others: the original's other keywords, at the values that ask for nothing.

    Returns:
        out ``[B, Sq, Hq, D]`` and lse, fp32 ``[B, Hq, Sq]``, which the original returns only for training.

    Raises:
        TypeError, ValueError: an argument does not fit, or asks for what is not supported; the text names it.
        RuntimeError, NotImplementedError: as :func:`lite_attention.attention`.
    """
    function = "streaming_sparse_attn_func"
    for name, value in others.items():
        if name not in _NOT_SUPPORTED:
            raise TypeError(f"{function}: {name} is not one of its keywords")
        nothing = _NOT_SUPPORTED[name]
        if hasattr(value, "tolist") or value != nothing:  # tensors and arrays are compared entry by entry
            raise ValueError(
                f"{function}: {name} is given, expected {nothing}: it is not supported here"
                + (". streaming_attention places the queries at the last keys" if name == "position_ids" else "")
            )
    if softmax_scale is not None:
        checked_number(f"{function}: softmax_scale", softmax_scale, "a number or None")
    if not checked_bool(f"{function}: causal", causal):
        raise ValueError(f"{function}: causal is {causal}, expected True: no row sees keys after its own")
    if not checked_bool(f"{function}: enable_streaming", enable_streaming):
        raise ValueError(
            f"{function}: enable_streaming is {enable_streaming}, expected True: heads that see everything have "
            "window_size (None, None)"
        )
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"{function}: window_size is {window_size!r}, expected a pair: (left, right)")
    left, right = window_size
    if left is not None and checked_int(f"{function}: window_size[0]", left) < 0:
        raise ValueError(f"{function}: window_size[0] is {left}, expected 0 or more keys, or None")
    if right is not None and checked_int(f"{function}: window_size[1]", right) != 0:
        raise ValueError(f"{function}: window_size[1] is {right}, expected 0 or None: no row sees keys after its own")
    return streaming.attention(
        q,
        k,
        v,
        0 if sink_size is None else sink_size,
        UNLIMITED if left is None else left + 1,
        causal="top-left",
        kv_lens=seqused_k,
        scale=softmax_scale,
    )


class DuoAttentionConfig(TypedDict):
    """Where the heads are after the weights were reordered."""

    retrieval_idx: list[slice]
    """Query heads of each layer that see everything."""
    streaming_idx: list[slice]
    """Query heads of each layer that see the first and last tokens."""
    sink_size: int
    recent_size: int
    enable_duo_attention: bool


def reorder_weights_for_duo_attn(
    model: nn.Module,
    full_attention_heads: HeadTable,
    sink_size: int,
    recent_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    hidden_size: int,
    device: torch.device | str | None = None,
) -> DuoAttentionConfig:
    """:func:`lite_attention.families.duo.reorder_weights` by Light-DuoAttention's call.

    Args:
        model, full_attention_heads, num_attention_heads, num_key_value_heads, hidden_size, device: as there.
        sink_size, recent_size: what streaming heads see, in tokens; handed on in the result.

    Returns:
        For each layer the query heads that are full and those that stream, and the two sizes.

    Raises:
        TypeError, ValueError, RuntimeError: as there; the model is then unchanged.
    """
    function = "reorder_weights_for_duo_attn"
    checked_int(f"{function}: sink_size", sink_size, lowest=0)
    checked_int(f"{function}: recent_size", recent_size, lowest=0)
    full = duo.reorder_weights(
        model,
        full_attention_heads,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        hidden_size=hidden_size,
        device=device,
    )
    return DuoAttentionConfig(
        retrieval_idx=[slice(0, heads) for heads in full],
        streaming_idx=[slice(heads, num_attention_heads) for heads in full],
        sink_size=sink_size,
        recent_size=recent_size,
        enable_duo_attention=True,
    )
