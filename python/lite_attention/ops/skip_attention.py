"""``skip_attention``: attention over the kept tiles that also says which of them the next pass should keep."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.ops.call import call, check_optional_tensors, check_tensors, in_fp32_range, softmax_scale
from lite_attention.ops.define import check_fake_inputs, define, dense_flops, fake_out_and_lse

__all__ = ["skip_attention"]

SCHEMA = (
    "skip_attention(Tensor q, Tensor k, Tensor v, Tensor keep, Tensor? must_keep, Tensor? kv_lens, Tensor threshold, "
    "float scale) -> (Tensor out, Tensor lse, Tensor next_keep)"
)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    must_keep: Tensor | None,
    kv_lens: Tensor | None,
    threshold: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_fake_inputs(
        "skip_attention", q=q, k=k, v=v, keep=keep, must_keep=must_keep, kv_lens=kv_lens, threshold=threshold
    )
    return *fake_out_and_lse(q), keep.new_empty(keep.shape)


_OPERATOR = define(SCHEMA, fake=_fake, autocasts=("q", "k", "v"), flops=dense_flops)


def skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    threshold: float | Tensor,
    *,
    must_keep: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the kept tiles that also returns the map to use in the next pass.

    Args:
        q, k, v, kv_lens, scale: as for :func:`attention`.
        keep: keep map, int32 ``[B, Hq, query_tiles, words]``; it is not written.
        threshold: in powers of two. A tile stays in the map if it raises the best score of any of its rows by more
            than this: -inf keeps everything, 0 keeps what raises a row's maximum. NaN never drops: from a
            score of NaN on, a row keeps what it visits. A float, or an fp32 tensor on q's device, 0-d or one value per
            query head. Under torch.compile prefer a tensor: every new float recompiles.
        must_keep: keep map of tiles that are computed and stay kept whatever ``keep`` says; its first three sizes may
            each be 1.

    Returns:
        out and lse as :func:`attention`, and next_keep, a keep map of ``keep``'s shape.

    Raises:
        RuntimeError, TypeError: an argument does not fit; the text names it.
        NotImplementedError: the device has no kernel in this build.
    """
    check_tensors("skip_attention", q=q, k=k, v=v, keep=keep)
    check_optional_tensors("skip_attention", must_keep=must_keep, kv_lens=kv_lens)
    if not isinstance(threshold, Tensor):
        if not isinstance(threshold, (int, float, torch.SymFloat)):
            raise TypeError(
                f"skip_attention: threshold has type {type(threshold).__name__}, expected a number or tensor"
            )
        threshold = torch.full((), in_fp32_range(threshold), dtype=torch.float32, device=q.device)
    result: tuple[Tensor, Tensor, Tensor] = call(
        _OPERATOR, q, k, v, keep, must_keep, kv_lens, threshold, softmax_scale(q, scale)
    )
    return result
