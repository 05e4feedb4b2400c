"""``merge_attention``: exact merge of attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lite_attention.ops.call import call, check_tensors
from lite_attention.ops.define import check_fake_inputs, define

__all__ = ["merge_attention"]

SCHEMA = "merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)"


def _fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not outs or len(outs) != len(lses):
        raise RuntimeError(f"merge_attention: {len(outs)} outs and {len(lses)} lses, expected as many, at least one")
    tensors = {f"outs[{part}]": out for part, out in enumerate(outs)}
    tensors |= {f"lses[{part}]": lse for part, lse in enumerate(lses)}
    check_fake_inputs("merge_attention", **tensors)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


_OPERATOR = define(SCHEMA, fake=_fake)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact merge of attention results over disjoint sets of keys.

    Args:
        outs: at least one ``[B, Sq, H, D]``, all of one shape and dtype.
        lses: as many fp32 ``[B, H, Sq]``, natural log, as the other operators return them.

    Returns:
        out and lse of attention over all the keys. Rows without any key give out 0 and lse -inf.

    Raises:
        RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
    """
    outs, lses = list(outs), list(lses)
    if not outs:
        raise ValueError("merge_attention: outs is empty, expected at least one partial result")
    check_tensors("merge_attention", **{f"outs[{part}]": out for part, out in enumerate(outs)})
    check_tensors("merge_attention", **{f"lses[{part}]": lse for part, lse in enumerate(lses)})
    result: tuple[Tensor, Tensor] = call(_OPERATOR, outs, lses)
    return result
