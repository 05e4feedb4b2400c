"""What the sparse families keep, token by token, and fp64 attention over a few rows of it to compare a result with.

Everything here is written from its definition and knows nothing of the package's maps and tiles. Sequences are those of
self-attention, and a rule holds for every batch entry.
"""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from checks import LARGEST_LSE_ERROR, LARGEST_OUT_ERROR, WrongResultError

HEADS_CHECKED = 3
EDGE_ROWS, RANDOM_ROWS = 64, 64  # of a head that is checked: the first and the last ones, and some of the rest


class Rule(Protocol):
    """Which keys each query row of each head sees."""

    def kept(self, head: int, rows: Tensor) -> Tensor:
        """Bool `[rows, keys]` for the rows of one head."""
        ...

    @property
    def pairs(self) -> int:
        """Kept (query, key) pairs of all heads."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every row sees every key."""

    length: int
    heads: int

    def kept(self, head: int, rows: Tensor) -> Tensor:
        """Everything."""
        return torch.ones(rows.numel(), self.length, dtype=torch.bool, device=rows.device)

    @property
    def pairs(self) -> int:
        """Kept (query, key) pairs of all heads."""
        return self.heads * self.length**2


@dataclass(frozen=True)
class Causal:
    """Every row sees the keys up to itself, or of these, in a streaming head, the first ones and the last ones."""

    length: int
    windows: tuple[tuple[int, int] | None, ...]  # a head: (sink_size, recent_size), or None: all keys up to a row

    def kept(self, head: int, rows: Tensor) -> Tensor:
        """Keys up to the row, those below sink_size, and the recent_size ones that end with the row."""
        key, row = torch.arange(self.length, device=rows.device), rows.unsqueeze(-1)
        seen, window = key <= row, self.windows[head]
        if window is not None:
            sink_size, recent_size = window
            seen &= (key < sink_size) | (key > row - recent_size)
        return seen

    @property
    def pairs(self) -> int:
        """Row i sees i + 1 keys, in a streaming head no more than sink_size + recent_size."""
        total = 0
        for window in self.windows:
            most = self.length if window is None else min(self.length, sum(window))
            total += most * (most + 1) // 2 + (self.length - most) * most
        return total


@dataclass(frozen=True)
class SlidingTiles:
    """Tokens in tile order; a tile sees the tiles of a window around it, which is shifted inwards at the borders."""

    canvas: tuple[int, int, int]  # tokens along time, height and width
    tile: tuple[int, int, int]  # tokens, which divide the canvas
    window: tuple[int, int, int]  # tiles along each axis, odd or all of them
    heads: int

    @property
    def length(self) -> int:
        """Tokens."""
        return math.prod(self.canvas)

    def kept(self, head: int, rows: Tensor) -> Tensor:
        """Keys whose tiles lie within half a window of the row's, or of the nearest tile with a whole window."""
        volume, counts = math.prod(self.tile), [n // size for n, size in zip(self.canvas, self.tile, strict=True)]
        row_places = torch.unravel_index(rows // volume, counts)
        key_places = torch.unravel_index(torch.arange(self.length, device=rows.device) // volume, counts)
        seen = torch.ones(rows.numel(), self.length, dtype=torch.bool, device=rows.device)
        for row, key, count, window in zip(row_places, key_places, counts, self.window, strict=True):
            if window < count:
                half = window // 2
                centre = row.clamp(half, count - 1 - half).unsqueeze(-1)
                seen &= (key - centre).abs() <= half
        return seen

    @property
    def pairs(self) -> int:
        """The same for every row, because windows are shifted and not cut."""
        return self.heads * self.length * math.prod(self.window) * math.prod(self.tile)


@dataclass(frozen=True)
class Blocks:
    """Every block of queries sees whole blocks of keys, of each of which the first tokens exist."""

    keep: Tensor  # bool [heads, blocks, blocks]
    block: int
    sizes: Tensor  # int [blocks], the tokens that exist

    def kept(self, head: int, rows: Tensor) -> Tensor:
        """Keys that exist, of the blocks that the row's block keeps."""
        slot = torch.arange(self.block, device=rows.device)
        exists = (slot < self.sizes.unsqueeze(-1)).flatten()
        return self.keep[head, rows // self.block].repeat_interleave(self.block, dim=-1) & exists

    @property
    def pairs(self) -> int:
        """Pairs of two tokens that exist."""
        sizes = self.sizes.double()
        return int((sizes @ self.keep.sum(dim=0, dtype=torch.float64) @ sizes).item())


@dataclass(frozen=True)
class RowCheck:
    """What a comparison found on some rows."""

    rows: int
    out_error: float  # |out - reference| / |reference|
    lse_error: float | None  # largest |lse - reference|; None where the kernel gives none

    def facts(self) -> dict[str, Any]:
        """As a record holds it."""
        return asdict(self)


def _sample(length: int, device: torch.device) -> Tensor:
    """The first rows, the last ones and random ones between them, each once."""
    rows = torch.arange(length, device=device)
    if length <= 2 * EDGE_ROWS + RANDOM_ROWS:
        return rows
    between = EDGE_ROWS + torch.randperm(length - 2 * EDGE_ROWS, device=device)[:RANDOM_ROWS]
    return torch.cat([rows[:EDGE_ROWS], between, rows[-EDGE_ROWS:]])


def check_rows(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rule: Rule) -> RowCheck:
    """Compare out `[B, S, H, D]` and lse `[B, H, S]` with the reference on some rows of some heads of each batch entry.

    Raises:
        WrongResultError: the result is not finite or too far from the reference.
    """
    batches, length, heads, head_dim = q.shape
    inner = torch.randperm(max(heads - 2, 0))[: HEADS_CHECKED - 2] + 1
    checked_heads = sorted({0, heads - 1, *inner.tolist()})
    errors, expected_outs, lse_errors = [], [], []
    for batch, head in itertools.product(range(batches), checked_heads):
        rows = _sample(length, q.device)
        scores = q[batch, rows, head].double() @ k[batch, :, head].double().T / math.sqrt(head_dim)
        scores = scores.masked_fill(~rule.kept(head, rows), -math.inf)
        expected = scores.softmax(dim=-1) @ v[batch, :, head].double()
        expected_outs.append(expected)
        errors.append(out[batch, rows, head].double() - expected)
        if lse is not None:
            lse_errors.append(lse[batch, head, rows].double() - scores.logsumexp(dim=-1))
    if not bool(torch.isfinite(out).all()):
        raise WrongResultError("out has elements that are not finite")
    out_error = (torch.cat(errors).norm() / torch.cat(expected_outs).norm()).item()
    lse_error = torch.cat(lse_errors).abs().max().item() if lse_errors else None
    if not out_error <= LARGEST_OUT_ERROR or not (lse_error is None or lse_error <= LARGEST_LSE_ERROR):
        raise WrongResultError(f"out error {out_error}, lse error {lse_error}")
    return RowCheck(sum(expected.shape[0] for expected in expected_outs), out_error, lse_error)


def coarse_stage(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Attention between the means of blocks, in fp64.

    Args:
        q, k, v: `[B, H, S, D]`, with zeros in the slots of a block past its size.
        sizes: int `[blocks]`, the tokens that exist.

    Returns:
        The scores `[B, H, blocks, blocks]`, and out `[B, H, blocks, D]`.
    """
    sums = (x.unflatten(2, (sizes.numel(), -1)).sum(dim=3, dtype=torch.float64) for x in (q, k, v))
    queries, keys, values = (total / sizes.unsqueeze(-1) for total in sums)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(q.shape[3])
    return scores, scores.softmax(dim=-1) @ values


def check_largest(keep: Tensor, scores: Tensor, count: int, tolerance: float) -> None:
    """Whether a bool map `[..., n]` keeps the count largest scores of each row.

    Args:
        tolerance: a kept score may be so much smaller than one that is not. At 0, of equal scores the first are kept.

    Raises:
        WrongResultError: it does not.
    """
    if not bool((keep.sum(dim=-1) == count).all()):
        raise WrongResultError(f"a row of the map does not keep {count}")
    if tolerance == 0:
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        right = torch.equal(keep, torch.zeros_like(keep).scatter_(-1, ranked, True))
    else:
        smallest = scores.masked_fill(~keep, math.inf).amin(dim=-1)
        right = bool((smallest >= scores.masked_fill(keep, -math.inf).amax(dim=-1) - tolerance).all())
    if not right:
        raise WrongResultError(f"a row of the map does not keep its {count} largest scores")
