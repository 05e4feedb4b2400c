"""Inputs for the tests, the rule by which a low-precision result is judged, and how errors are listed."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lite_attention import attention, reference, skip_attention
from lite_attention.maps.keep_map import ceil_div, pack_keep_map, tile_counts, unpack_keep_map
from lite_attention.maps.tiles import tile_shape, visit_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU = torch.device("cuda", 0)
GPU_DTYPES = (torch.bfloat16, torch.float16)
KINDS = ("gaussian", "peaked", "heavy_tailed")


class Case(NamedTuple):
    """One attention problem. Readable as a pytest id."""

    batch: int = 1
    query_len: int = 300
    kv_len: int = 300
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64

    def __str__(self) -> str:
        return f"B{self.batch}-Sq{self.query_len}-Sk{self.kv_len}-H{self.heads}of{self.kv_heads}-D{self.head_dim}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def tiles(self, dtype: torch.dtype = torch.float32, tile_n: int | None = None) -> tuple[int, int]:
        return tile_counts(self.query_len, self.kv_len, self.head_dim, dtype, tile_n)


def make_qkv(
    case: Case, dtype: torch.dtype, kind: str = "gaussian", seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous BSHD inputs. 'peaked': a few keys win by far; 'heavy_tailed': rare large entries."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    q = normal(case.batch, case.query_len, case.heads, case.head_dim)
    k = normal(case.batch, case.kv_len, case.kv_heads, case.head_dim)
    v = normal(case.batch, case.kv_len, case.kv_heads, case.head_dim)
    if kind == "peaked":
        near = torch.arange(case.query_len, device=device) * case.kv_len // case.query_len
        q = 0.5 * q + 1.5 * k[:, near].repeat_interleave(case.heads // case.kv_heads, 2)
    elif kind == "heavy_tailed":
        # Student's t with 3 degrees of freedom, cut where fp16 scores would overflow.
        q, k, v = (
            (x / (torch.stack([normal(*x.shape) for _ in range(3)]).square().mean(0)).sqrt()).clamp(-12, 12)
            for x in (q, k, v)
        )
    elif kind != "gaussian":
        raise ValueError(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def correlated_passes(
    case: Case, dtype: torch.dtype, passes: int, seed: int = 0, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs of consecutive denoising steps: smooth along the sequence, each a little noise away from the one before.

    Queries are near their keys and grow sharper, so that the maps go on shrinking.
    """
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    k = normal(case.batch, case.kv_len, case.kv_heads, case.head_dim).cumsum(1)
    k = (k - k.mean(1, keepdim=True)) / k.std(1, keepdim=True)
    near = torch.arange(case.query_len, device=device) * case.kv_len // case.query_len
    q = 0.7 * k[:, near].repeat_interleave(case.heads // case.kv_heads, 2)
    v = normal(*k.shape)
    for _ in range(passes):
        yield q.to(dtype), k.to(dtype), v.to(dtype)
        q, k, v = (x + 0.1 * normal(*x.shape) for x in (1.25 * q, k, v))


def random_map(
    case: Case,
    density: float,
    seed: int = 0,
    sizes: tuple[int, int, int] | None = None,
    device: torch.device | str = "cpu",
    tile_n: int | None = None,
) -> Tensor:
    """A packed map ``[*sizes, words]``, by default of the case's own sizes, with about this share of bits set."""
    query_tiles, kv_tiles = case.tiles(tile_n=tile_n)
    sizes = sizes or (case.batch, case.heads, query_tiles)
    random = torch.Generator(device).manual_seed(seed)
    return pack_keep_map(torch.rand(*sizes, kv_tiles, generator=random, device=device) < density)


# scale * log2(e) is 1/8 exactly, in fp32 and in fp64: what follows then is free of rounding on every backend.
TIE_SCALE = math.log(2) / 8
# The largest score of each tile, in the order of the walk, and which tiles a threshold keeps, ties being dropped: the
# first one, and those whose score exceeds the largest before by more than 8 * threshold.
TIE_SCORES = (0, 0, 8, 0, 1, 8, 9)
TIES = {0.0: (0, 2, 6), -1.0: (0, 1, 2, 4, 5, 6), -0.875: (0, 1, 2, 5, 6)}


def make_ties(
    head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Case, Tensor, Tensor, Tensor]:
    """A case and its q, k and v, whose query tile meets a tile for each of ``TIE_SCORES``: every row at one key of it."""
    tile_n = tile_shape(head_dim, dtype)[1]
    assert torch.tensor(TIE_SCALE, dtype=torch.float32) * torch.tensor(math.log2(math.e), dtype=torch.float32) == 1 / 8
    assert TIE_SCALE * math.log2(math.e) == 1 / 8
    case = Case(query_len=40, kv_len=len(TIE_SCORES) * tile_n - 3, heads=1, kv_heads=1, head_dim=head_dim)
    q = torch.zeros(1, case.query_len, 1, head_dim, dtype=dtype, device=device)
    k = torch.zeros(1, case.kv_len, 1, head_dim, dtype=dtype, device=device)
    q[..., 0] = 1
    k[..., 0] = -64
    for tile, score in enumerate(TIE_SCORES):
        k[:, tile * tile_n + 5 * tile, :, 0] = score
    return case, q, k, torch.ones_like(k)


MAPS = (
    "every tile",
    "no tile",
    "first tile",
    "last tile",
    "one tile a row",
    "contiguous",
    "checkerboard",
    "random 10%",
    "random 50%",
    "random 95%",
    "shared by visit group",
    "shared by pairs of visit groups",
    "unequal densities",
    "some rows empty",
    "one row of each visit group",
    "one head full",
)


def make_map(
    kind: str, case: Case, seed: int = 0, device: torch.device | str = "cpu", tile_n: int | None = None
) -> Tensor:
    """A packed map of the case's own sizes; ``kind`` is one of ``MAPS``."""
    tile_m, default_tile_n = tile_shape(case.head_dim, torch.bfloat16)
    group = visit_rows(case.head_dim, torch.bfloat16) // tile_m
    query_tiles, kv_tiles = case.tiles(tile_n=tile_n)
    shape = (case.batch, case.heads, query_tiles, kv_tiles)
    random = torch.Generator(device).manual_seed(seed)
    row = torch.arange(query_tiles, device=device).unsqueeze(-1)
    head = torch.arange(case.heads, device=device).view(-1, 1, 1)
    tile = torch.arange(kv_tiles, device=device)

    def noise(*size: int) -> Tensor:
        return torch.rand(*size, generator=random, device=device)

    def shared(rows: int) -> Tensor:
        few = noise(case.batch, case.heads, ceil_div(query_tiles, rows), kv_tiles) < 0.4
        return few.repeat_interleave(rows, 2)[:, :, :query_tiles]

    match kind:
        case "every tile":
            keep = tile >= 0
        case "no tile":
            keep = tile < 0
        case "first tile":
            keep = tile == 0
        case "last tile":
            keep = tile == kv_tiles - 1
        case "one tile a row":
            keep = tile == (noise(*shape[:3], 1) * kv_tiles).long()
        case "contiguous":
            keep = (tile * (tile_n or default_tile_n) * case.query_len - row * tile_m * case.kv_len).abs() <= (
                0.2 * case.query_len * case.kv_len
            )
        case "checkerboard":
            keep = (tile + row + head) % 2 == 0
        case "shared by visit group":
            keep = shared(group)
        case "shared by pairs of visit groups":
            keep = shared(2 * group)
        case "unequal densities":
            keep = noise(*shape) < 0.02 + 0.58 * noise(*shape[:3], 1)
        case "some rows empty":
            keep = (noise(*shape) < 0.5) & (noise(*shape[:3], 1) < 0.6)
        case "one row of each visit group":
            keep = (noise(*shape) < 0.5) & (row % group == (row // group) % group)
        case "one head full":
            keep = (noise(*shape) < 0.1) | (head == 0)
        case _:
            keep = noise(*shape) < float(kind.removeprefix("random ").removesuffix("%")) / 100
    return pack_keep_map(keep.expand(shape))


@contextlib.contextmanager
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """Whatever is allocated on this GPU in the context holds NaN (bytes of 0xFF) until it is written.

    Otherwise a result that was not written everywhere may pass: its memory still holds the right one of an earlier call.
    The allocator hands freed memory out as it was left. In the context it serves from a pool of its own, all of whose
    memory was filled and freed just before; that the pool did not have to grow is asserted. Does nothing on the CPU.
    """
    if device.type != "cuda":
        yield
        return
    mebibyte = 2**20
    with torch.cuda.use_mem_pool(torch.cuda.MemPool(), device):
        # Whole segments: those of 2 MiB serve requests up to 1 MiB, those of 20 MiB what is larger.
        poison = [
            torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
            for size in 8 * [mebibyte] + 8 * [5 * mebibyte] + 2 * [64 * mebibyte]
        ]
        del poison
        reserved = torch.cuda.memory_reserved(device)
        yield
        assert torch.cuda.memory_reserved(device) == reserved, "more memory was taken than was poisoned"


def worst(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference in fp64; infinities must agree exactly, NaN is as bad as it gets."""
    result, exact = result.double(), exact.double()
    infinite = torch.isinf(exact)
    if result.isnan().any() or not torch.equal(result[infinite], exact[infinite]):
        return math.inf
    return float((result - exact)[~infinite].abs().max()) if not infinite.all() else 0.0


def assert_as_good_as_naive(name: str, result: Tensor, exact: Tensor, naive: Tensor) -> None:
    """FlashAttention's rule: at most twice the error of the same computation done naively in that precision."""
    error, allowed = worst(result, exact), 2 * worst(naive, exact) + 1e-5
    assert error <= allowed, f"{name}: error {error:.3g} above {allowed:.3g}"


def check_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    kv_lens: Tensor | None,
    scale: float,
    **masks: Any,
) -> None:
    """The values, shapes and dtypes of an attention result over the kept tiles and visible keys."""
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    exact = reference.attention(q, k, v, keep, kv_lens, scale, **masks)
    naive = reference.attention(q, k, v, keep, kv_lens, scale, **masks, compute_dtype=q.dtype)
    assert_as_good_as_naive("out", out, exact[0], naive[0])
    assert_as_good_as_naive("lse", lse, exact[1], naive[1])


def score_rounding(q: Tensor, k: Tensor, scale: float) -> float:
    """Margins, in powers of two, that fp32 accumulation of q.k may move: a bound on its rounding."""
    largest = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
    return 4 * q.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps * largest * scale * math.log2(math.e)


def check_decisions(
    next_keep: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor,
    must_keep: Tensor | None,
    kv_lens: Tensor | None,
    threshold: Tensor,
    scale: float,
    most_unsure: float = 0.01,
) -> Tensor:
    """next_keep equals the oracle's, bit by bit, except where a margin is within rounding of the threshold.

    Asserts that at most ``most_unsure`` of the visited tiles (or one tile) are that close. Returns the visited tiles.
    """
    expected, margins = reference.decisions(q, k, keep, must_keep, kv_lens, threshold, scale)
    assert next_keep.dtype == torch.int32
    assert next_keep.shape == expected.shape
    visited = margins > -math.inf
    distance = (margins - threshold.double().reshape(-1, 1, 1)).abs()
    unsure = visited & (distance <= score_rounding(q, k, scale))
    assert unsure.sum() <= max(1.0, most_unsure * float(visited.sum()))
    tiles_same = unpack_keep_map(next_keep ^ expected, margins.shape[-1]).logical_not()
    assert bool((tiles_same | unsure).all()), "a decision differs where rounding cannot explain it"
    # Compared as words too: bits past the last tile must be 0.
    assert torch.equal(next_keep & ~pack_keep_map(unsure), expected & ~pack_keep_map(unsure))
    return visited


def check_dense_or_mapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    keep: Tensor | None = None,
    kv_lens: Tensor | None = None,
    **masks: Any,
) -> tuple[Tensor, Tensor]:
    """Run ``attention`` into poisoned memory and compare what it returns with the oracle."""
    with poisoned_memory(q.device):
        out, lse = attention(q, k, v, keep=keep, kv_lens=kv_lens, scale=scale, **masks)
    check_attention(out, lse, q, k, v, keep, kv_lens, scale, **masks)
    return out, lse


def check_skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    threshold: Tensor,
    scale: float,
    *,
    must_keep: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``skip_attention`` into poisoned memory, compare all of it with the oracle, see that no input was written."""
    given = [x for x in (q, k, v, keep, must_keep, kv_lens, threshold) if x is not None]
    before = [x.clone() for x in given]
    with poisoned_memory(q.device):
        out, lse, next_keep = skip_attention(
            q, k, v, keep, threshold, must_keep=must_keep, kv_lens=kv_lens, scale=scale
        )
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    visited = check_decisions(next_keep, q, k, keep, must_keep, kv_lens, threshold, scale)
    check_attention(out, lse, q, k, v, pack_keep_map(visited), kv_lens, scale)
    return out, lse, next_keep


def report(calls: dict[str, Callable[[], object]]) -> str:
    """One line for each bad call: what was wrong with it, and the error it raised."""
    lines = []
    for name, call in calls.items():
        with pytest.raises(Exception, match=r".+") as raised:
            call()
        lines.append(f"{name} -> {raised.type.__name__}: {str(raised.value).splitlines()[0]}")
    return "\n".join(lines)
