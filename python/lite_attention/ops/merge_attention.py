"""``merge_attention``: exact merge of attention over disjoint sets of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lite_attention.ops.call import call, check_tensors
from lite_attention.ops.define import check_fake_inputs, define, fake_out_and_lse

__all__ = ["merge_attention"]

SCHEMA = "merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)"


def _fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not outs:
        raise RuntimeError("merge_attention: outs is empty, expected at least one partial result")
    tensors = {f"outs[{part}]": out for part, out in enumerate(outs)}
    tensors |= {f"lses[{part}]": lse for part, lse in enumerate(lses)}
    check_fake_inputs("merge_attention", **tensors)
    return fake_out_and_lse(outs[0])


def _remember(ctx: Any, inputs: tuple[list[Tensor], list[Tensor]], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.save_for_backward(*outs, *lses)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """dout_i = w_i dout and dlse_i = w_i (dlse + dout.(out_i - out)), where w_i is part i's share, exp(lse_i - lse).

    In torch's operators and fp32: bound by memory as the merge itself, and a compiled graph fuses them. The results are
    not remembered: the shares are a softmax, and dout.out is the mean of the dout.out_i, without the rounding of out.
    """
    saved = ctx.saved_tensors
    outs, all_lses = saved[: len(saved) // 2], torch.stack(saved[len(saved) // 2 :])
    no_keys = (all_lses == -math.inf).all(0)
    shares = all_lses.masked_fill(no_keys, 0.0).softmax(0).masked_fill(no_keys, 0.0)
    if dout is None:
        return None, None if dlse is None else list(shares * dlse)
    wide = dout.float()
    douts = [(share.mT.unsqueeze(-1) * wide).to(out.dtype) for share, out in zip(shares, outs, strict=True)]
    dots = torch.stack([(wide * out).sum(-1).mT for out in outs])
    dots = dots.masked_fill(shares == 0, 0.0)  # whatever the rows of an empty part hold
    towards = dots - (shares * dots).sum(0)
    return douts, list(shares * (towards if dlse is None else towards + dlse))


def _over_samples(
    info: Any, in_dims: tuple[list[int | None], list[int | None]], outs: list[Tensor], lses: list[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Samples become further batch entries, of which a merge takes each by itself."""

    def as_entries(tensors: list[Tensor], dims: list[int | None]) -> list[Tensor]:
        stacked = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, dims, strict=True)
        )
        return [x.flatten(0, 1) for x in stacked]

    out, lse = _OPERATOR(as_entries(outs, in_dims[0]), as_entries(lses, in_dims[1]))
    sizes = info.batch_size, out.shape[0] // info.batch_size
    return (out.unflatten(0, sizes), lse.unflatten(0, sizes)), (0, 0)


_OPERATOR = define(SCHEMA, fake=_fake, backward=_backward, setup_context=_remember, over_samples=_over_samples)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact merge of attention results over disjoint sets of keys. Differentiable in every out and lse.

    Args:
        outs: at least one ``[B, Sq, H, D]``, all of one shape and dtype.
        lses: as many fp32 ``[B, H, Sq]``, natural log, as the other operators return them.

    Returns:
        out and lse of attention over all the keys. Rows without any key give out 0 and lse -inf, and
        no gradient to any part.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"merge_attention: {name} has type {type(parts).__name__}, expected a list of tensors")
    outs, lses = list(outs), list(lses)
    if not outs:
        raise ValueError("merge_attention: outs is empty, expected at least one partial result")
    check_tensors("merge_attention", **{f"outs[{part}]": out for part, out in enumerate(outs)})
    check_tensors("merge_attention", **{f"lses[{part}]": lse for part, lse in enumerate(lses)})
    result: tuple[Tensor, Tensor] = call(_OPERATOR, outs, lses)
    return result
