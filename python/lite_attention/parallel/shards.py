"""Which tokens of a sequence a rank holds.

Tokens are split into equally long shards, one for each rank, the last ones padded with zeros. The ranks that exchange
heads hold neighbouring shards; together these are a block, of which each rank of a ring has one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_attention.maps.keep_map import ceil_div
from lite_attention.parallel.collectives import all_gather
from lite_attention.parallel.mesh import SequenceMesh

__all__ = ["Block", "block_of", "check_seq_len", "gather_sequence", "shard_sequence"]


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


def check_seq_len(name: str, seq_len: int, tokens: int) -> None:
    """That so many of the ``tokens`` of all shards can be those of the sequence. Errors begin with ``name``."""
    if isinstance(seq_len, bool) or not isinstance(seq_len, (int, torch.SymInt)):
        raise TypeError(f"{name} has type {type(seq_len).__name__}, expected an int")
    if not 0 < seq_len <= tokens:
        raise ValueError(f"{name} is {seq_len}, expected 1 to {tokens}, the tokens of all shards")


class Block(NamedTuple):
    """The tokens of a sequence that a rank of a ring has, or a split of the keys."""

    start: int
    length: int
    """Without padding; 0 where there is nothing else."""


def block_of(rank: int, tokens: int, seq_len: int) -> Block:
    """The block of one rank of the ring, ``tokens`` long with its padding, of a sequence of ``seq_len`` tokens."""
    return Block(rank * tokens, min(max(seq_len - rank * tokens, 0), tokens))
