"""What the families ask of q, k and v before they count blocks and heads; the operators check the rest."""

from __future__ import annotations

from torch import Tensor

from lite_attention.ops.autocast import autocast_dtype
from lite_attention.ops.backends import DTYPES
from lite_attention.ops.call import check_tensors


def check_qkv(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """That these are ``[B, Sq, Hq, D]`` and two of ``[B, Sk, Hkv, D]``, with ``Hq % Hkv == 0``, and of one dtype.

    Raises:
        TypeError, ValueError: they are not; the text begins with ``function``.
    """
    check_dtypes(function, q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{function}: {name} has {x.dim()} dimensions, expected 4, [B, S, H, D]")
    batch, _, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, kv_len, kv_heads, head_dim):
            expected = f"[{batch}, kv_len, kv_heads, {head_dim}] like q" if x is k else f"{list(k.shape)} like k"
            raise ValueError(f"{function}: {name} has shape {list(x.shape)}, expected {expected}, as [B, S, H, D]")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"{function}: q has {heads} heads, expected a multiple of the {kv_heads} of k")


def check_dtypes(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """That these are tensors of one dtype that there are kernels for, or will be once autocast has given them its own.

    Raises:
        TypeError: they are not; the text begins with ``function``.
    """
    check_tensors(function, q=q, k=k, v=v)
    dtype = autocast_dtype(q.dtype, q.device)
    if dtype not in DTYPES:
        raise TypeError(f"{function}: q has dtype {q.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if autocast_dtype(x.dtype, x.device) != dtype:
            raise TypeError(f"{function}: {name} has dtype {x.dtype}, expected {q.dtype} like q")
