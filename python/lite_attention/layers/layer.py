"""Attention layers with FastVideo's calls: what they share, and the one that stays on its rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lite_attention.layers.abstract import AttentionMetadata
from lite_attention.layers.forward_context import check_not_recorded, current_metadata
from lite_attention.layers.registry import AttentionBackendEnum, BackendName, known_name, own_arguments
from lite_attention.layers.rotary import FreqsCis, check_freqs_cis, with_rotary_embedding
from lite_attention.layers.selector import get_attn_backend
from lite_attention.ops.autocast import autocast, autocast_dtype
from lite_attention.ops.checks import checked_bool, checked_int, checked_number

__all__ = ["AttentionLayer", "LocalAttention"]


class AttentionLayer(nn.Module):
    """What the layers share: a backend's attention, and the checks on what it is given."""

    travels_beside: ClassVar[tuple[str, ...]] = ()
    """What the layer takes beside q, k and v, by name: its backend is one that takes the same."""

    default_backend: ClassVar[BackendName] = AttentionBackendEnum.TORCH_SDPA
    """The backend where neither the layer nor anyone else names one."""

    fixed: ClassVar[tuple[str, ...]] = ("num_heads", "head_size", "num_kv_heads", "softmax_scale", "backend")
    """Attributes that the backend has a copy of: they are read, and not assigned after the layer is made."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None,
        softmax_scale: float | None,
        causal: bool,
        supported_attention_backends: Sequence[BackendName] | None,
        prefix: str,
        dtype: torch.dtype | None,
        extra_impl_args: dict[str, Any],
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_heads = num_heads = checked_int(f"{name}: num_heads", num_heads, lowest=1)
        self.head_size = head_size = checked_int(f"{name}: head_size", head_size, lowest=1)
        self.num_kv_heads = (
            num_heads if num_kv_heads is None else checked_int(f"{name}: num_kv_heads", num_kv_heads, lowest=1)
        )
        if num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"{name}: num_heads is {num_heads}, expected a multiple of num_kv_heads, {self.num_kv_heads}"
            )
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"{name}: dtype is {self.dtype!r}, expected a floating-point torch.dtype")
        checked_bool(f"{name}: causal", causal)
        if not isinstance(prefix, str):
            raise TypeError(f"{name}: prefix has type {type(prefix).__name__}, expected str")
        self.softmax_scale = (
            head_size**-0.5 if softmax_scale is None else checked_number(f"{name}: softmax_scale", softmax_scale)
        )
        backend = get_attn_backend(
            head_size, self.dtype, supported_attention_backends, default_backend=self.default_backend
        )
        self.backend = known_name(backend.get_name(), type(self).__name__)
        impl_class = backend.get_impl_cls()
        if impl_class.travels_beside != self.travels_beside:
            raise ValueError(
                f"{type(self).__name__}: the backend is {backend.get_name()}, "
                + (
                    f"expected one that takes {', '.join(self.travels_beside)}, as VIDEO_SPARSE_ATTN does"
                    if self.travels_beside
                    else f"expected one without {', '.join(impl_class.travels_beside)}: DistributedAttention_VSA is "
                    "its layer"
                )
            )
        self.attn_impl = impl_class(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=self.softmax_scale,
            causal=causal,
            num_kv_heads=self.num_kv_heads,
            prefix=f"{prefix}.impl" if prefix else "",
            **own_arguments(impl_class, extra_impl_args, type(self).__name__),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.fixed and name in vars(self):
            raise AttributeError(
                f"{type(self).__name__}: {name} is assigned {value!r}, expected a new layer: the backend was made with "
                f"{vars(self)[name]!r}"
            )
        super().__setattr__(name, value)

    def _checked_qkv(self, q: Tensor, k: Tensor, v: Tensor, prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """The three, if they are ``[B, S, heads, D]`` of this layer, k and v of one shape, q of their batch size."""
        q = self._checked_tensor(prefix + "q", q, self.num_heads)
        k = self._checked_tensor(prefix + "k", k, self.num_kv_heads)
        v = self._checked_tensor(prefix + "v", v, self.num_kv_heads)
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: {prefix}k has batch size {k.shape[0]}, expected {q.shape[0]} like {prefix}q"
            )
        if v.shape != k.shape:
            raise ValueError(
                f"{type(self).__name__}: {prefix}v has shape {list(v.shape)}, expected {list(k.shape)} like {prefix}k"
            )
        return q, k, v

    def _checked_tensor(self, name: str, x: Tensor, heads: int) -> Tensor:
        """The tensor, if it is ``[B, S, heads, D]`` of this layer's dtype; in autocast's where it is on."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: {name} has type {type(x).__name__}, expected a tensor")
        if x.dim() != 4 or x.shape[2] != heads or x.shape[3] != self.head_size:
            raise ValueError(
                f"{type(self).__name__}: {name} has shape {list(x.shape)}, expected [B, S, {heads}, {self.head_size}]"
            )
        (x,) = autocast(x)
        expected = autocast_dtype(self.dtype, x.device)
        if x.dtype != expected:
            raise TypeError(f"{type(self).__name__}: {name} has dtype {x.dtype}, expected {expected}")
        return x

    def _check_out(self, who: str, out: Tensor, expected: torch.Size) -> None:
        """That the backend returned the shape of its query, and of the tokens that the layer gave it."""
        if out.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: {who} {self._name()} returned the shape {list(out.shape)}, expected "
                f"{list(expected)} like its query"
            )

    def _metadata(self) -> AttentionMetadata | None:
        """Those of the forward context, where nobody records them as if they held for every step."""
        metadata = current_metadata()
        if metadata is not None and self.attn_impl.reads_metadata:
            check_not_recorded(type(self).__name__)
        return metadata

    def _name(self) -> str:
        return self.backend.name if isinstance(self.backend, AttentionBackendEnum) else self.backend

    def extra_repr(self) -> str:
        return (
            f"{self._name()}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_size={self.head_size}"
        )


class LocalAttention(AttentionLayer):
    """Attention between the tokens that this rank holds, also between those of two sequences.

    Args:
        num_heads: heads of q.
        head_size: D.
        num_kv_heads: heads of k and v, which divide num_heads; num_heads if None.
        softmax_scale: factor on q.k before the softmax, ``1/sqrt(D)`` if None.
        causal: a query sees the keys up to its position.
        supported_attention_backends: which backends the layer may be given, best first: enum members or names. None
            for any, TORCH_SDPA unless another is asked for.
        prefix: name of the layer in the model, ``"blocks.3.attn1"``.
        dtype: of q, k and v; torch's default dtype if None.
        extra_impl_args: for the backend; those of other backends are for those.

    Raises:
        NotImplementedError, TypeError, ValueError: an argument does not fit; the text names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        supported_attention_backends: Sequence[BackendName] | None = None,
        *,
        prefix: str = "",
        dtype: torch.dtype | None = None,
        **extra_impl_args: Any,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            num_kv_heads,
            softmax_scale,
            causal,
            supported_attention_backends,
            prefix,
            dtype,
            extra_impl_args,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, freqs_cis: FreqsCis | None = None) -> Tensor:
        """Attention of q to k and v.

        Args:
            q: ``[B, Sq, H, D]`` of the layer's dtype.
            k, v: ``[B, Sk, Hkv, D]``.
            freqs_cis: (cos, sin) of the rotary embedding of q and k, each ``[S, D / 2]``; then Sq and Sk are S.

        Returns:
            ``[B, Sq, H, D]``, of autocast's dtype where it is on.

        Raises:
            RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        """
        q, k, v = self._checked_qkv(q, k, v)
        metadata: Any = self._metadata()
        if freqs_cis is not None:
            for x in (q, k):
                check_freqs_cis(freqs_cis, x.shape[1], self.head_size, type(self).__name__)
            q, k = (with_rotary_embedding(x, freqs_cis) for x in (q, k))
        given = q.shape
        q, k, v = (self.attn_impl.preprocess_qkv(x, metadata) for x in (q, k, v))
        out = self.attn_impl.forward(q, k, v, metadata)
        self._check_out("forward of the backend", out, q.shape)
        out = self.attn_impl.postprocess_output(out, metadata)
        self._check_out("postprocess_output of the backend", out, given)
        return out
