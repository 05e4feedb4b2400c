"""A result is compared with fp64 attention over a few query tiles before its kernel is timed."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

TILES_CHECKED = 6
# bf16 kernels that round P to bf16 lie near 2.3e-3 on random normal inputs; something wrong lies near 1.
LARGEST_OUT_ERROR = 1e-2
LARGEST_LSE_ERROR = 1e-3


class WrongResultError(Exception):
    """A kernel's result is not the reference's."""


@dataclass
class Check:
    """What a comparison found on some query tiles."""

    query_tiles: int
    out_error: float  # |out - reference| / |reference|
    lse_error: float | None  # largest |lse - reference|; None where the kernel gives none

    def facts(self) -> dict[str, Any]:
        """As a record holds it."""
        return asdict(self)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, batch: int, head: int, rows: slice, keep_row: Tensor | None, tile_n: int
) -> tuple[Tensor, Tensor]:
    """Fp64 out `[rows, D]` and lse `[rows]` of one query tile."""
    scores = q[batch, rows, head].double() @ k[batch, :, head].double().T / math.sqrt(q.shape[3])
    if keep_row is not None:
        kept = keep_row.repeat_interleave(tile_n)[: k.shape[1]]
        scores = scores.masked_fill(~kept, -math.inf)
    return scores.softmax(dim=-1) @ v[batch, :, head].double(), scores.logsumexp(dim=-1)


def check(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, keep: Tensor | None, tile: tuple[int, int]
) -> Check:
    """Compare out `[B, S, H, D]` and lse `[B, H, S]` with the reference on the first, the last and some random tiles.

    Args:
        keep: bool `[B, H, query tiles, KV tiles]` without empty rows, or None for dense attention.
        tile: query rows and keys of one tile.

    Raises:
        WrongResultError: the result is not finite or too far from the reference.
    """
    tile_m, tile_n = tile
    batches, length, heads, _ = q.shape
    query_tiles = -(-length // tile_m)
    places = [(0, 0, 0), (batches - 1, heads - 1, query_tiles - 1)]
    for _ in range(TILES_CHECKED - len(places)):
        places.append(tuple(int(torch.randint(n, ())) for n in (batches, heads, query_tiles)))  # type: ignore[arg-type]
    errors, expected_outs, lse_errors = [], [], []
    for batch, head, query_tile in places:
        rows = slice(query_tile * tile_m, (query_tile + 1) * tile_m)
        keep_row = None if keep is None else keep[batch, head, query_tile]
        expected, expected_lse = _reference(q, k, v, batch, head, rows, keep_row, tile_n)
        expected_outs.append(expected)
        errors.append(out[batch, rows, head].double() - expected)
        if lse is not None:
            lse_errors.append(lse[batch, head, rows].double() - expected_lse)
    out_error = (torch.cat(errors).norm() / torch.cat(expected_outs).norm()).item()
    lse_error = torch.cat(lse_errors).abs().max().item() if lse_errors else None
    if not bool(torch.isfinite(out).all()):
        raise WrongResultError("out has elements that are not finite")
    if not out_error <= LARGEST_OUT_ERROR or not (lse_error is None or lse_error <= LARGEST_LSE_ERROR):
        raise WrongResultError(f"out error {out_error}, lse error {lse_error}")
    return Check(len(places), out_error, lse_error)
