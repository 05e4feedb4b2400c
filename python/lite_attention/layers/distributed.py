"""Attention layers with FastVideo's calls whose tokens are spread over ranks, eager or compiled.

On many ranks (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509) each rank holds a shard of the tokens. For attention
the ranks exchange: each gets all tokens of its share of the heads, attends, and sends the tokens back.
The layers differ in what travels beside q, k and v: nothing, or the gate of a coarse stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lite_attention.layers.layer import AttentionLayer
from lite_attention.layers.registry import AttentionBackendEnum, BackendName
from lite_attention.layers.rotary import FreqsCis, check_freqs_cis, with_rotary_embedding
from lite_attention.parallel.collectives import all_gather, check_sendable
from lite_attention.parallel.mesh import get_sequence_parallel_mesh, ulysses_group
from lite_attention.parallel.shards import check_seq_len
from lite_attention.parallel.ulysses import HeadTurns, UlyssesPass

__all__ = ["DistributedAttention", "DistributedAttention_VSA"]


class _DistributedLayer(AttentionLayer):
    """Self-attention of a sequence whose tokens are spread over ranks; a layer says what travels beside q, k, v."""

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
            extra_impl_args,
        )
        name = type(self).__name__
        group = ulysses_group(get_sequence_parallel_mesh() if mesh is None else mesh, name)
        self._turns = HeadTurns(group)
        for what, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads)):
            if heads % group.size != 0:
                raise ValueError(
                    f"{name}: {what} is {heads}, expected a multiple of the {group.size} ranks that share the heads"
                )
        if group.size > 1:
            own = self._turns.of_rank(self.num_heads)
            self.attn_impl.set_local_heads(own.start, own.stop - own.start)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beside: Sequence[Tensor | None],
        text: Sequence[Tensor],
        original_seq_len: int | None,
        freqs_cis: FreqsCis | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Out to the ranks that have the heads, attention there, and home: this rank's tokens, and all of the text."""
        metadata: Any = self._metadata()
        tokens = q.shape[1] * self._turns.group.size
        original_seq_len = self._checked_seq_len(q, k, original_seq_len, freqs_cis)
        self._check_sendable(q, k, v, beside, text, freqs_cis)
        impl: Any = self.attn_impl

        ulysses = UlyssesPass(self._turns, q, k, v, *(x for x in beside if x is not None))
        video = [x[:, :original_seq_len] for x in ulysses.arrived()]
        if freqs_cis is not None:
            video[:2] = [with_rotary_embedding(x, freqs_cis) for x in video[:2]]
        q, k, v, *arrived = (impl.preprocess_qkv(x, metadata) for x in video)

        text_out, note = None, None
        if self.travels_beside:
            rest = iter(arrived)
            out = impl.forward(q, k, v, *(None if x is None else next(rest) for x in beside), metadata)
            self._check_out("forward of the backend", out, q.shape)
        else:
            video_tokens, text_tokens = q.shape[1], text[0].shape[1] if text else 0
            if text:
                q, k, v = (torch.cat([x, self._own_heads(y)], 1) for x, y in zip((q, k, v), text, strict=True))
            out, note = impl.computed_pass(q, k, v, metadata, text_tokens)
            self._check_out("forward_with_text of the backend", out, q.shape)
            if text:
                text_out = all_gather(out[:, video_tokens:], self._turns.group, 2)
                out = out[:, :video_tokens]
        out = impl.postprocess_output(out, metadata)
        self._check_out("postprocess_output of the backend", out, video[0].shape)
        if tokens > original_seq_len:
            out = F.pad(out, (0, 0, 0, 0, 0, tokens - original_seq_len))
        ulysses.send_home(out)
        returned = ulysses.returned()[0]
        if note is not None:
            note()
        return returned, text_out

    def _checked_seq_len(self, q: Tensor, k: Tensor, original_seq_len: int | None, freqs_cis: FreqsCis | None) -> int:
        """How many tokens are no padding. What one rank could find wrong alone, before others begin to wait for it."""
        name = type(self).__name__
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"{name}: k has {k.shape[1]} tokens, expected {q.shape[1]} like q: self-attention")
        tokens = q.shape[1] * self._turns.group.size
        if original_seq_len is None:
            original_seq_len = tokens
        check_seq_len(f"{name}: original_seq_len", original_seq_len, tokens)
        if freqs_cis is not None:
            check_freqs_cis(freqs_cis, original_seq_len, self.head_size, name)
        return original_seq_len

    def _check_sendable(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beside: Sequence[Tensor | None],
        text: Sequence[Tensor],
        freqs_cis: FreqsCis | None,
    ) -> None:
        if self._turns.group.size == 1:
            return
        cos, sin = (None, None) if freqs_cis is None else freqs_cis
        named = dict(zip(self.travels_beside, beside, strict=True)) if beside else {}
        named |= zip(("replicated_q", "replicated_k", "replicated_v"), text, strict=False)
        check_sendable(type(self).__name__, q=q, k=k, v=v, **named, cos=cos, sin=sin)

    def _own_heads(self, x: Tensor) -> Tensor:
        return x[:, :, self._turns.of_rank(x.shape[2])]


class DistributedAttention(_DistributedLayer):
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
        q, k, v = self._checked_qkv(q, k, v)
        text = self._checked_text(replicated_q, replicated_k, replicated_v, q.shape[0])
        return self._attend(q, k, v, (), text, original_seq_len, freqs_cis)

    def _checked_text(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, batch: int) -> list[Tensor]:
        if q is None and k is None and v is None:
            return []
        if q is None or k is None or v is None:
            lacking = [f"replicated_{name}" for name, x in (("q", q), ("k", k), ("v", v)) if x is None]
            raise ValueError(
                f"{type(self).__name__}: {' and '.join(lacking)} is None, expected all of replicated_q, replicated_k "
                "and replicated_v, or none"
            )
        q, k, v = self._checked_qkv(q, k, v, "replicated_")
        if q.shape[0] != batch:
            raise ValueError(
                f"{type(self).__name__}: replicated_q has batch size {q.shape[0]}, expected {batch} like q"
            )
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{type(self).__name__}: replicated_q has {q.shape[1]} tokens, expected {k.shape[1]} like replicated_k"
            )
        return [q, k, v]


class DistributedAttention_VSA(_DistributedLayer):  # noqa: N801 - FastVideo's name
    """Distributed attention for backends with a gated coarse stage, such as Video Sparse Attention.

    Args: as for :class:`DistributedAttention`; the backend is VIDEO_SPARSE_ATTN unless another is asked for.
    """

    travels_beside = ("gate_compress",)
    default_backend = AttentionBackendEnum.VIDEO_SPARSE_ATTN

    def forward(
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
        q, k, v = self._checked_qkv(q, k, v)
        if gate_compress is not None:
            gate_compress = self._checked_tensor("gate_compress", gate_compress, self.num_heads)
            if gate_compress.shape != q.shape:
                raise ValueError(
                    f"{type(self).__name__}: gate_compress has shape {list(gate_compress.shape)}, expected "
                    f"{list(q.shape)} like q"
                )
        out, _ = self._attend(q, k, v, (gate_compress,), (), original_seq_len, freqs_cis)
        return out, None
