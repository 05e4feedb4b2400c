"""Tensors of more than 2**31 elements, 4.3 GB each: every index that could overflow does so here if it can.

A dense oracle of that size would take hours: single query tiles are judged, among them the last rows of the last head.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lite_attention import attention, reference, skip_attention, tile_shape, unpack_keep_map, visit_rows
from lite_attention.maps.keep_map import WORD_BITS, keep_map_shape, tile_counts
from support.inputs import GPU, assert_as_good_as_naive, score_rounding

pytestmark = pytest.mark.gpu
LENGTH, HEADS, HEAD_DIM, DTYPE = 262_200, 64, 128, torch.bfloat16
SCALE = HEAD_DIM**-0.5
THRESHOLD = -2.0


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Room for the test, and what it took given back to other programs."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def normal(layout: str, length: int) -> Tensor:
    """``[1, length, HEADS, HEAD_DIM]``, in memory as the layout says."""
    if layout == "BHSD":
        return torch.randn(1, HEADS, length, HEAD_DIM, dtype=DTYPE, device=GPU).transpose(1, 2)
    return torch.randn(1, length, HEADS, HEAD_DIM, dtype=DTYPE, device=GPU)


def sparse_map() -> Tensor:
    """Two random KV tiles a query tile; for the last query tile also the last KV tile."""
    shape = keep_map_shape(1, HEADS, LENGTH, LENGTH, HEAD_DIM, DTYPE)
    kv_tiles = tile_counts(LENGTH, LENGTH, HEAD_DIM, DTYPE)[1]
    keep = torch.zeros(shape, dtype=torch.int32, device=GPU)
    for _ in range(2):
        tile = torch.randint(kv_tiles, (*shape[:-1], 1), device=GPU)
        bit = torch.ones((), dtype=torch.int32, device=GPU) << (tile % WORD_BITS).int()
        keep |= torch.zeros_like(keep).scatter_(-1, tile // WORD_BITS, bit)
    last = kv_tiles - 1
    keep[:, :, -1, last // WORD_BITS] |= 1 << last % WORD_BITS
    return keep


def rows_of(query_tile: int) -> slice:
    tile_m = tile_shape(HEAD_DIM, DTYPE)[0]
    return slice(query_tile * tile_m, min((query_tile + 1) * tile_m, LENGTH))


class Judged:
    """The rows of single query tiles, gathered, with what the oracle says they should be."""

    def __init__(self) -> None:
        self.results: list[tuple[Tensor, Tensor]] = []
        self.exact: list[tuple[Tensor, Tensor]] = []
        self.naive: list[tuple[Tensor, Tensor]] = []

    def add(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Rows of one head and the keys that they attend to: ``[1, rows or keys, 1, HEAD_DIM]``."""
        self.results.append((out, lse))
        self.exact.append(reference.attention(q, k, v, None, None, SCALE))
        self.naive.append(reference.attention(q, k, v, None, None, SCALE, compute_dtype=DTYPE))

    def check(self) -> None:
        for index, name in enumerate(("out", "lse")):
            columns = [torch.cat([x[index].flatten() for x in rows]) for rows in (self.results, self.exact, self.naive)]
            assert_as_good_as_naive(name, *columns)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_skipping(layout: str) -> None:
    q, k, v = (normal(layout, LENGTH) for _ in range(3))
    tile_n = tile_shape(HEAD_DIM, DTYPE)[1]
    query_tiles, kv_tiles = tile_counts(LENGTH, LENGTH, HEAD_DIM, DTYPE)
    keep, threshold = sparse_map(), torch.tensor(THRESHOLD, device=GPU)
    torch.full((1, LENGTH, HEADS, HEAD_DIM), torch.nan, dtype=DTYPE, device=GPU)  # freed at once: the output's memory
    out, lse, next_keep = skip_attention(q, k, v, keep, threshold)
    assert bool(lse.isfinite().all())
    assert torch.equal(next_keep & ~keep, torch.zeros_like(keep))

    order = reference.visit_order(LENGTH, LENGTH, *tile_shape(HEAD_DIM, DTYPE), visit_rows(HEAD_DIM, DTYPE), GPU)
    judged, unsure = Judged(), 0
    random = torch.Generator().manual_seed(0)
    for head in range(HEADS):
        some = torch.randint(query_tiles, (2,), generator=random).tolist()
        for query_tile in (0, *some, query_tiles - 1):
            rows, one = rows_of(query_tile), slice(head, head + 1)
            visited = unpack_keep_map(keep[0, head, query_tile], kv_tiles)
            keys = visited.repeat_interleave(tile_n)[:LENGTH].nonzero().flatten()
            query, key, value = q[:, rows, one], k[:, keys, one], v[:, keys, one]
            judged.add(out[:, rows, one], lse[:, one, rows], query, key, value)

            scores = torch.full((query.shape[1], kv_tiles * tile_n), -torch.inf, dtype=torch.float64, device=GPU)
            scores[:, keys] = query[0, :, 0].double() @ key[0, :, 0].double().T
            tile_max = scores.view(-1, kv_tiles, tile_n).amax(-1)
            margins = reference.drop_margin(tile_max[None], visited[None], order[query_tile][None], SCALE)[0]
            differs = unpack_keep_map(next_keep[0, head, query_tile], kv_tiles) != (margins > THRESHOLD)
            close = (margins - THRESHOLD).abs() <= score_rounding(query, key, SCALE)
            assert not (differs & ~close).any(), f"head {head}, query tile {query_tile}"
            unsure += int(differs.sum())
    judged.check()
    assert unsure <= 10


@pytest.mark.parametrize(("query_len", "kv_len"), [(LENGTH, 300), (200, LENGTH)], ids=["many queries", "many keys"])
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_dense_attention(layout: str, query_len: int, kv_len: int) -> None:
    q, k, v = normal(layout, query_len), normal(layout, kv_len), normal(layout, kv_len)
    out, lse = attention(q, k, v)
    judged = Judged()
    for head in (0, HEADS // 2, HEADS - 1):
        one = slice(head, head + 1)
        judged.add(out[:, :, one], lse[:, one], q[:, :, one], k[:, :, one], v[:, :, one])
    judged.check()
