"""Attention layers with FastVideo's calls, on one rank or many, eager or compiled.

On many ranks (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509) each rank holds a shard of the tokens. For attention
the ranks exchange: each gets all tokens of its share of the heads, attends, and sends the tokens back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lite_attention.layers.forward_context import current_metadata
from lite_attention.layers.registry import AttentionBackendEnum, BackendName, known_name, own_arguments
from lite_attention.layers.selector import get_attn_backend
from lite_attention.parallel.collectives import HeadExchange, all_gather, even_spans, gather_heads
from lite_attention.parallel.mesh import get_sequence_parallel_mesh, ulysses_group

__all__ = ["DistributedAttention", "DistributedAttention_VSA", "LocalAttention"]

FreqsCis = tuple[Tensor, Tensor]


class _AttentionLayer(nn.Module):
    """What the layers share: a backend's attention, and the checks on what it is given."""

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
        default_backend: BackendName,
        takes_gate: bool,
        extra_impl_args: dict[str, Any],
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        for what, number in (("num_heads", num_heads), ("head_size", head_size)):
            if number < 1:
                raise ValueError(f"{type(self).__name__}: {what} is {number}, expected at least 1")
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"{type(self).__name__}: num_heads is {num_heads}, expected a multiple of num_kv_heads, "
                f"{self.num_kv_heads}"
            )
        self.softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
        backend = get_attn_backend(head_size, self.dtype, supported_attention_backends, default_backend=default_backend)
        self.backend = known_name(backend.get_name(), type(self).__name__)
        impl_class = backend.get_impl_cls()
        if impl_class.takes_gate != takes_gate:
            raise ValueError(
                f"{type(self).__name__}: the backend is {backend.get_name()}, "
                + (
                    "expected one that takes gate_compress, as VIDEO_SPARSE_ATTN does"
                    if takes_gate
                    else "expected one without gate_compress: DistributedAttention_VSA is its layer"
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

    def _check_qkv(self, q: Tensor, k: Tensor, v: Tensor, prefix: str = "") -> None:
        """That they are ``[B, S, heads, D]`` of this layer, k and v of one shape, q of their batch size."""
        for name, x, heads in (("q", q, self.num_heads), ("k", k, self.num_kv_heads), ("v", v, self.num_kv_heads)):
            self._check_tensor(prefix + name, x, heads)
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: {prefix}k has batch size {k.shape[0]}, expected {q.shape[0]} like {prefix}q"
            )
        if v.shape != k.shape:
            raise ValueError(
                f"{type(self).__name__}: {prefix}v has shape {list(v.shape)}, expected {list(k.shape)} like {prefix}k"
            )

    def _check_tensor(self, name: str, x: Tensor, heads: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: {name} has type {type(x).__name__}, expected a tensor")
        if x.dim() != 4 or x.shape[2] != heads or x.shape[3] != self.head_size:
            raise ValueError(
                f"{type(self).__name__}: {name} has shape {list(x.shape)}, expected [B, S, {heads}, {self.head_size}]"
            )
        if x.dtype != self.dtype:
            raise TypeError(f"{type(self).__name__}: {name} has dtype {x.dtype}, expected {self.dtype}")

    def _checked_out(self, out: Tensor, query: Tensor) -> Tensor:
        """What the backend returned, if it has the shape that its query had."""
        if out.shape != query.shape:
            raise ValueError(
                f"{type(self).__name__}: the backend {self._name()} returned the shape {list(out.shape)}, expected "
                f"{list(query.shape)} like its query"
            )
        return out

    def _name(self) -> str:
        return self.backend.name if isinstance(self.backend, AttentionBackendEnum) else self.backend

    def extra_repr(self) -> str:
        return (
            f"{self._name()}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_size={self.head_size}"
        )


class LocalAttention(_AttentionLayer):
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
            AttentionBackendEnum.TORCH_SDPA,
            False,
            extra_impl_args,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, freqs_cis: FreqsCis | None = None) -> Tensor:
        """Attention of q to k and v.

        Args:
            q: ``[B, Sq, H, D]`` of the layer's dtype.
            k, v: ``[B, Sk, Hkv, D]``.
            freqs_cis: (cos, sin) of the rotary embedding of q and k, each ``[S, D / 2]``; then Sq and Sk are S.

        Returns:
            ``[B, Sq, H, D]``.

        Raises:
            RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        """
        self._check_qkv(q, k, v)
        metadata: Any = current_metadata()
        if freqs_cis is not None:
            for x in (q, k):
                _check_freqs_cis(freqs_cis, x.shape[1], self.head_size, type(self).__name__)
            q, k = (_with_rotary_embedding(x, freqs_cis) for x in (q, k))
        q, k, v = (self.attn_impl.preprocess_qkv(x, metadata) for x in (q, k, v))
        out = self._checked_out(self.attn_impl.forward(q, k, v, metadata), q)
        return self.attn_impl.postprocess_output(out, metadata)


class DistributedAttention(_AttentionLayer):
    """Self-attention of a sequence whose tokens are spread over ranks, and of text that every rank has.

    Args:
        num_heads, head_size, num_kv_heads, softmax_scale, causal, supported_attention_backends, prefix, dtype: as for
            :class:`LocalAttention`.
        mesh: of the ranks, with a dimension named "ulysses" whose size divides num_heads and num_kv_heads. None for the
            one of :func:`set_sequence_parallel_mesh`, or, if that is None too, this rank alone.
        extra_impl_args: for the backend; those of other backends are for those.

    Raises:
        NotImplementedError, TypeError, ValueError: an argument does not fit; the text names it.
    """

    _default_backend = AttentionBackendEnum.TORCH_SDPA
    _takes_gate = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        supported_attention_backends: Sequence[BackendName] | None = None,
        prefix: str = "",
        *,
        mesh: DeviceMesh | None = None,
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
            self._default_backend,
            self._takes_gate,
            extra_impl_args,
        )
        name = type(self).__name__
        self._group = ulysses_group(get_sequence_parallel_mesh() if mesh is None else mesh, name)
        for what, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads)):
            if heads % self._group.size != 0:
                raise ValueError(
                    f"{name}: {what} is {heads}, expected a multiple of the {self._group.size} ranks that share the "
                    "heads"
                )
        if self._group.size > 1:
            share = self.num_heads // self._group.size
            self.attn_impl.set_local_heads(self._group.rank * share, share)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        original_seq_len: int | None = None,
        replicated_q: Tensor | None = None,
        replicated_k: Tensor | None = None,
        replicated_v: Tensor | None = None,
        freqs_cis: FreqsCis | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention between all tokens of all ranks, and the replicated ones after them.

        Args:
            q: this rank's shard ``[B, S_local, H, D]`` of the layer's dtype; as long on every rank.
            k, v: ``[B, S_local, Hkv, D]``.
            original_seq_len: tokens of all ranks that are no padding, the first ones; None for all.
            replicated_q: ``[B, S_text, H, D]``, the same on every rank: text, say, that is attended to and attends. All
                three are given, or none.
            replicated_k, replicated_v: ``[B, S_text, Hkv, D]``.
            freqs_cis: (cos, sin) of the rotary embedding of q and k, each ``[original_seq_len, D / 2]``.

        Returns:
            out, ``[B, S_local, H, D]``, 0 where there is padding; and the replicated tokens' out, ``[B, S_text, H, D]``
            on every rank, None if there are none.

        Raises:
            RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        """
        self._check_qkv(q, k, v)
        text = self._checked_text(replicated_q, replicated_k, replicated_v, q.shape[0])
        metadata: Any = current_metadata()
        (q, k, v), padding = self._receive([q, k, v], original_seq_len, freqs_cis, metadata)
        if not text:
            out = self._checked_out(self.attn_impl.forward(q, k, v, metadata), q)
            return self._send_back(out, padding, metadata), None
        video_tokens, text_tokens = q.shape[1], text[0].shape[1]
        q, k, v = (torch.cat([x, self._own_heads(y)], 1) for x, y in zip((q, k, v), text, strict=True))
        out = self._checked_out(self.attn_impl.forward_with_text(q, k, v, metadata, text_tokens), q)
        text_out = all_gather(out[:, video_tokens:], self._group, 2)
        return self._send_back(out[:, :video_tokens], padding, metadata), text_out

    def _checked_text(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, batch: int) -> list[Tensor]:
        if q is None and k is None and v is None:
            return []
        if q is None or k is None or v is None:
            lacking = [f"replicated_{name}" for name, x in (("q", q), ("k", k), ("v", v)) if x is None]
            raise ValueError(
                f"{type(self).__name__}: {' and '.join(lacking)} is None, expected all of replicated_q, replicated_k "
                "and replicated_v, or none"
            )
        self._check_qkv(q, k, v, "replicated_")
        if q.shape[0] != batch:
            raise ValueError(
                f"{type(self).__name__}: replicated_q has batch size {q.shape[0]}, expected {batch} like q"
            )
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{type(self).__name__}: replicated_q has {q.shape[1]} tokens, expected {k.shape[1]} like replicated_k"
            )
        return [q, k, v]

    def _receive(
        self, shards: list[Tensor], original_seq_len: int | None, freqs_cis: FreqsCis | None, metadata: Any
    ) -> tuple[list[Tensor], int]:
        """The heads of this rank, all tokens, of q, k, v and maybe the gate; and how many tokens were cut off."""
        local = shards[0].shape[1]
        if shards[1].shape[1] != local:
            raise ValueError(
                f"{type(self).__name__}: k has {shards[1].shape[1]} tokens, expected {local} like q: self-attention"
            )
        tokens = local * self._group.size
        if original_seq_len is None:
            original_seq_len = tokens
        if isinstance(original_seq_len, bool) or not isinstance(original_seq_len, (int, torch.SymInt)):
            raise TypeError(
                f"{type(self).__name__}: original_seq_len has type {type(original_seq_len).__name__}, expected an int"
            )
        if not 0 < original_seq_len <= tokens:
            raise ValueError(
                f"{type(self).__name__}: original_seq_len is {original_seq_len}, expected 1 to {tokens}, the tokens of "
                f"{self._group.size} ranks"
            )
        if freqs_cis is not None:  # before other ranks begin to wait for this one
            _check_freqs_cis(freqs_cis, original_seq_len, self.head_size, type(self).__name__)
        exchange = HeadExchange(self._group, tuple(even_spans(x.shape[2], self._group.size) for x in shards))
        received = exchange.finish_scatter(exchange.start_scatter(*shards), *shards)
        whole = [x[:, :original_seq_len] for x in received]
        if freqs_cis is not None:
            whole[:2] = [_with_rotary_embedding(x, freqs_cis) for x in whole[:2]]
        return [self.attn_impl.preprocess_qkv(x, metadata) for x in whole], tokens - original_seq_len

    def _send_back(self, out: Tensor, padding: int, metadata: Any) -> Tensor:
        out = self.attn_impl.postprocess_output(out, metadata)
        if padding > 0:
            out = F.pad(out, (0, 0, 0, 0, 0, padding))
        return gather_heads(out, self._group)

    def _own_heads(self, x: Tensor) -> Tensor:
        return x[:, :, slice(*even_spans(x.shape[2], self._group.size)[self._group.rank])]


class DistributedAttention_VSA(DistributedAttention):  # noqa: N801 - FastVideo's name
    """Distributed attention for backends with a gated coarse stage, such as Video Sparse Attention.

    Args: as for :class:`DistributedAttention`; the backend is VIDEO_SPARSE_ATTN unless another is asked for.
    """

    _default_backend = AttentionBackendEnum.VIDEO_SPARSE_ATTN
    _takes_gate = True

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        original_seq_len: int | None = None,
        replicated_q: Tensor | None = None,
        replicated_k: Tensor | None = None,
        replicated_v: Tensor | None = None,
        gate_compress: Tensor | None = None,
        freqs_cis: FreqsCis | None = None,
    ) -> tuple[Tensor, None]:
        """Attention between all tokens of all ranks.

        Args:
            q, k, v, original_seq_len, freqs_cis: as for :class:`DistributedAttention`.
            replicated_q, replicated_k, replicated_v: None; there is no text beside the video.
            gate_compress: of q's shape, factor on the coarse stage's result; None for 1.

        Returns:
            out, ``[B, S_local, H, D]``, 0 where there is padding; and None.

        Raises:
            RuntimeError, TypeError, ValueError: an argument does not fit; the text names it.
        """
        for name, x in (("replicated_q", replicated_q), ("replicated_k", replicated_k), ("replicated_v", replicated_v)):
            if x is not None:
                raise ValueError(
                    f"{type(self).__name__}: {name} has shape {list(x.shape)}, expected None: there is no text beside "
                    "the video"
                )
        gates = []
        if gate_compress is not None:
            self._check_tensor("gate_compress", gate_compress, self.num_heads)
            if gate_compress.shape != q.shape:
                raise ValueError(
                    f"{type(self).__name__}: gate_compress has shape {list(gate_compress.shape)}, expected "
                    f"{list(q.shape)} like q"
                )
            gates = [gate_compress]
        metadata: Any = current_metadata()
        (q, k, v, *gates), padding = self._receive([q, k, v, *gates], original_seq_len, freqs_cis, metadata)
        impl: Any = self.attn_impl
        out = self._checked_out(impl.forward(q, k, v, gates[0] if gates else None, metadata), q)
        return self._send_back(out, padding, metadata), None


def _check_freqs_cis(freqs_cis: FreqsCis, tokens: int, head_size: int, name: str) -> None:
    if not isinstance(freqs_cis, (tuple, list)) or len(freqs_cis) != 2:
        raise TypeError(f"{name}: freqs_cis is no pair of tensors, expected (cos, sin)")
    if head_size % 2 != 0:
        raise ValueError(f"{name}: freqs_cis is given and head_size is {head_size}, expected an even one")
    expected = [tokens, head_size // 2]
    for what, part in zip(("cos", "sin"), freqs_cis, strict=True):
        if not isinstance(part, Tensor) or part.is_complex():
            raise TypeError(f"{name}: {what} of freqs_cis is no real tensor, expected one of shape {expected}")
        if list(part.shape) != expected:
            raise ValueError(
                f"{name}: {what} of freqs_cis has shape {list(part.shape)}, expected {expected}, one row a token"
            )


def _with_rotary_embedding(x: Tensor, freqs_cis: FreqsCis) -> Tensor:
    """Each pair of neighbouring entries turned by its token's angle, computed in fp32 at least.

    ``x`` is ``[B, S, heads, D]``; cos and sin are ``[S, D / 2]``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(dtype).unsqueeze(1) for part in freqs_cis)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
