"""Exchanges of tokens and heads between the ranks of a DeviceMesh, as functional collectives.

They are torch's own ``_c10d_functional`` operators (NCCL on GPUs, gloo on CPUs): a compiled forward traces them, a CUDA
graph captures them, gradients flow through them. What a forward needs to know of a mesh is constants, so the mesh is
read once, by :func:`sequence_mesh`.

Tokens are split into equally long shards, the last ones padded with zeros. On a mesh with the dimensions "ring" and
"ulysses" the rank at (r, u) holds shard ``r * ulysses + u``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lite_attention.maps.keep_map import ceil_div

__all__ = [
    "HeadExchange",
    "RankGroup",
    "SequenceMesh",
    "all_gather",
    "all_reduce",
    "even_spans",
    "finish_shift",
    "gather_heads",
    "gather_sequence",
    "scatter_heads",
    "select_heads",
    "sequence_mesh",
    "shard_sequence",
    "start_shift",
    "wait",
]

RING = "ring"
ULYSSES = "ulysses"

_COLLECTIVES = torch.ops._c10d_functional


class RankGroup(NamedTuple):
    """The ranks along one dimension of a mesh, and which of them this process is."""

    name: str
    """torch's name of the process group; empty for a group of one."""
    size: int
    rank: int


class SequenceMesh(NamedTuple):
    """Which ranks share a sequence: along ``ring`` they hold blocks of keys, along ``ulysses`` heads."""

    ring: RankGroup
    ulysses: RankGroup

    @property
    def shards(self) -> int:
        """Number of shards of the sequence, one for each rank."""
        return self.ring.size * self.ulysses.size

    @property
    def shard(self) -> int:
        """Which shard of the sequence this rank holds."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank


def sequence_mesh(mesh: DeviceMesh, name: str) -> SequenceMesh:
    """What attention needs to know of ``mesh``, whose dimensions are named "ring" and "ulysses" or one of the two.

    Args:
        mesh: of the ranks that share one sequence. A missing dimension counts as one of size 1.
        name: begins the text of errors.

    Raises:
        TypeError, ValueError: ``mesh`` is no such mesh, or this process is not in it.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{name}: mesh has type {type(mesh).__name__}, expected a DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= {RING, ULYSSES}:
        raise ValueError(
            f"{name}: mesh has dimensions named {', '.join(map(repr, names)) or 'nothing'}, expected 'ring', 'ulysses' "
            "or both. Of a larger mesh, pass mesh['ring', 'ulysses']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name}: mesh does not contain this process, expected a mesh that does")

    def group(dim: str) -> RankGroup:
        if dim not in names or mesh.size(names.index(dim)) == 1:
            return RankGroup("", 1, 0)
        members = mesh.get_group(dim)
        return RankGroup(members.group_name, members.size(), mesh.get_local_rank(dim))

    return SequenceMesh(group(RING), group(ULYSSES))


Spans = tuple[tuple[int, int], ...]
"""(start, end) of the heads that each rank gets."""


class HeadExchange(NamedTuple):
    """Ulysses: from a shard of the tokens with all heads to all tokens with some of the heads, and back.

    Tensors of one dtype that are sent together travel as heads of one tensor, in one transfer: a second one could not
    begin while attention has all multiprocessors. ``start_...`` returns a tensor in flight at once; work between it and
    ``finish_...`` overlaps the transfer.
    """

    group: RankGroup
    spans: tuple[Spans, ...]
    """For each of the tensors. What goes back has the heads of the first."""

    def start_scatter(self, *tensors: Tensor) -> Tensor:
        """Begin to send each rank its heads of the tensors, ``[B, S_local, H of each, D]``."""
        ranks = self.group.size
        if ranks == 1:
            return tensors[0]  # nothing travels
        parts = list(zip(_wide(*tensors), self.spans, strict=True))
        per_head = [x.shape[0] * x.shape[1] * x.shape[3] for x, _ in parts]
        sent = [
            sum(size * (spans[rank][1] - spans[rank][0]) for size, (_, spans) in zip(per_head, parts, strict=True))
            for rank in range(ranks)
        ]
        if all(_evenly_spaced(spans, x.shape[2]) for x, spans in parts):
            views = [
                x.unflatten(2, (ranks, -1))[:, :, :, slice(*spans[0])].permute(2, 0, 1, 3, 4) for x, spans in parts
            ]
            packed = torch.cat(views, 3) if len(views) > 1 else views[0].contiguous()
        else:
            packed = torch.cat(
                [torch.cat([x[:, :, slice(*spans[rank])] for x, spans in parts], 2).flatten() for rank in range(ranks)]
            )
        return _all_to_all(packed.view(-1), [sent[self.group.rank]] * ranks, sent, self.group)

    def finish_scatter(self, flight: Tensor, *like: Tensor) -> list[Tensor]:
        """What was received, ``[B, ranks * S_local, heads of each, D]``; ``like`` are the tensors that were sent."""
        counts = [end - start for start, end in (spans[self.group.rank] for spans in self.spans)]
        if self.group.size == 1:
            return [x[:, :, slice(*spans[0])] for x, spans in zip(like, self.spans, strict=True)]
        batch, local = like[0].shape[:2]
        shards = wait(flight).view(self.group.size, batch, local, sum(counts), -1)
        heads = shards.transpose(0, 1).flatten(1, 2)  # copied only for more than one batch entry
        return list(_narrow(heads, like[0].dtype).split(counts, 2))

    def start_gather(self, x: Tensor) -> Tensor:
        """Begin to send each rank its tokens of ``x``, ``[B, ranks * S_local, heads of the first tensor, D]``."""
        ranks = self.group.size
        if ranks == 1:
            return x
        (x,) = _wide(x)
        local = x.shape[1] // ranks
        received = [(end - start) * x.shape[0] * local * x.shape[3] for start, end in self.spans[0]]
        packed = x.unflatten(1, (ranks, local)).transpose(0, 1).contiguous().view(-1)
        return _all_to_all(packed, received, [received[self.group.rank]] * ranks, self.group)

    def finish_gather(self, flight: Tensor, like: Tensor) -> list[Tensor]:
        """The heads of each rank, ``[B, S_local, heads of that rank, D]``; ``like`` is the x that was sent."""
        if self.group.size == 1:
            return [flight]
        batch, local = like.shape[0], like.shape[1] // self.group.size
        counts = [end - start for start, end in self.spans[0]]
        pieces = _narrow(wait(flight), like.dtype).split([count * batch * local * like.shape[3] for count in counts])
        return [piece.view(batch, local, count, -1) for piece, count in zip(pieces, counts, strict=True)]


def _evenly_spaced(spans: Spans, heads: int) -> bool:
    """Whether each rank gets the same heads of its share, all shares being equal."""
    share, start, end = heads // len(spans), *spans[0]
    return (
        heads % len(spans) == 0
        and end <= share
        and spans == tuple((rank * share + start, rank * share + end) for rank in range(len(spans)))
    )


def even_spans(heads: int, ranks: int) -> Spans:
    """Equal shares of the heads, which the ranks divide."""
    share = heads // ranks
    return tuple((rank * share, (rank + 1) * share) for rank in range(ranks))


def _even_exchange(heads: int, group: RankGroup, name: str) -> HeadExchange:
    if heads % group.size != 0:
        raise ValueError(f"{name}: x has {heads} heads, expected a multiple of the {group.size} ranks of the group")
    return HeadExchange(group, (even_spans(heads, group.size),))


def scatter_heads(x: Tensor, group: RankGroup) -> Tensor:
    """All tokens of this rank's share of the heads, from this rank's tokens of all heads.

    Args:
        x: ``[B, S_local, H, D]``, on every rank of the same shape; H is a multiple of the ranks.
        group: the ranks.

    Returns:
        ``[B, ranks * S_local, H / ranks, D]``.

    Raises:
        ValueError: H does not divide evenly.
    """
    exchange = _even_exchange(x.shape[2], group, "scatter_heads")
    return exchange.finish_scatter(exchange.start_scatter(x), x)[0]


def gather_heads(x: Tensor, group: RankGroup) -> Tensor:
    """All heads of this rank's tokens, from all tokens of its share of the heads: the inverse of scatter_heads.

    Args:
        x: ``[B, ranks * S_local, H / ranks, D]``, on every rank of the same shape.
        group: the ranks.

    Returns:
        ``[B, S_local, H, D]``.

    Raises:
        ValueError: the tokens do not divide evenly.
    """
    if x.shape[1] % group.size != 0:
        raise ValueError(f"gather_heads: x has {x.shape[1]} tokens, expected a multiple of the {group.size} ranks")
    if group.size == 1:
        return x
    exchange = _even_exchange(x.shape[2] * group.size, group, "gather_heads")
    return torch.cat(exchange.finish_gather(exchange.start_gather(x), x), 2)


def start_shift(x: Tensor, group: RankGroup) -> Tensor:
    """Begin to send ``x`` to the next rank of a ring and to receive what the previous rank sends."""
    before, after = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    elements = x.numel()
    received = [elements if rank == before else 0 for rank in range(group.size)]
    sent = [elements if rank == after else 0 for rank in range(group.size)]
    return _all_to_all(x.contiguous().view(-1), received, sent, group)


def finish_shift(flight: Tensor, like: Tensor) -> Tensor:
    """What the previous rank sent; ``like`` is what this rank sent, of the same shape."""
    return wait(flight).view(like.shape)


def all_gather(x: Tensor, group: RankGroup, dim: int) -> Tensor:
    """The ranks' tensors, concatenated along ``dim`` in the order of the ranks. All have the same shape."""
    if group.size == 1:
        return x
    gathered = wait(_COLLECTIVES.all_gather_into_tensor(x.contiguous(), group.size, group.name))
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size), dim)


def all_reduce(x: Tensor, group: RankGroup) -> Tensor:
    """The sum of the ranks' tensors."""
    return x if group.size == 1 else wait(_COLLECTIVES.all_reduce(x, "sum", group.name))


def wait(flight: Tensor) -> Tensor:
    """A tensor whose transfer was begun, once it is there: the current stream waits, not the host."""
    arrived: Tensor = _COLLECTIVES.wait_tensor(flight)
    return arrived


def shard_sequence(x: Tensor, mesh: SequenceMesh, dim: int = 1) -> Tensor:
    """The shard of this rank of a tensor that every rank has, padded with zeros so that all shards are equally long."""
    local = ceil_div(x.shape[dim], mesh.shards)
    start = min(mesh.shard * local, x.shape[dim])
    shard = x.narrow(dim, start, min(local, x.shape[dim] - start))
    missing = local - shard.shape[dim]
    if missing == 0:
        return shard
    return F.pad(shard, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing])


def gather_sequence(x: Tensor, mesh: SequenceMesh, seq_len: int | None = None, dim: int = 1) -> Tensor:
    """All shards of a sequence, on every rank, without the padding at and past ``seq_len``.

    Raises:
        ValueError: the shards hold fewer tokens.
    """
    tokens = x.shape[dim] * mesh.shards
    if seq_len is not None and not 0 <= seq_len <= tokens:
        raise ValueError(f"gather_sequence: seq_len is {seq_len}, expected 0 to {tokens}, the tokens of all shards")
    whole = all_gather(all_gather(x, mesh.ulysses, dim), mesh.ring, dim)
    return whole if seq_len is None else whole.narrow(dim, 0, seq_len)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same bytes in elements of 8, if all the tensors can: eager copies of 2-byte ones take twice as long."""
    if torch.compiler.is_compiling() or not all(map(_fits_wide_elements, tensors)):
        return tensors
    return tuple(x.view(torch.int64) for x in tensors)


def _fits_wide_elements(x: Tensor) -> bool:
    width = 8 // x.element_size()
    offsets = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return not x.requires_grad and x.stride(-1) == 1 and all(offset % width == 0 for offset in offsets)


def select_heads(x: Tensor, order: Tensor) -> Tensor:
    """The heads of ``x``, ``[B, S, H, D]``, in another order."""
    (wide,) = _wide(x)
    return _narrow(wide.index_select(2, order), x.dtype)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.view(dtype)


def _all_to_all(packed: Tensor, received: Sequence[int], sent: Sequence[int], group: RankGroup) -> Tensor:
    """Begin to exchange pieces of a flat tensor; sizes in elements."""
    flight: Tensor = _COLLECTIVES.all_to_all_single(packed, list(received), list(sent), group.name)
    return flight
