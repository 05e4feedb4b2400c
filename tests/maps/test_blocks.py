"""Maps over blocks: means, scores, the choice and the tiles, each against arithmetic written out here."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lite_attention import attention, top_k_map, unpack_keep_map
from lite_attention.maps.blocks import (
    block_means,
    block_scores,
    block_tile_lens,
    choose_blocks,
    expand_blocks,
    topk_of_sparsity,
)
from support.inputs import DTYPES, GPU_DTYPES, report

BACKENDS = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in DTYPES),
    *(pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in GPU_DTYPES),
]
on_every_backend = pytest.mark.parametrize(("device", "dtype"), BACKENDS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def in_slots(sizes: list[int], volume: int, heads: int, head_dim: int, batch: int = 2) -> Tensor:
    """Random tokens ``[batch, slots, heads, head_dim]``, 0 in slots without one."""
    exists = (torch.arange(volume) < torch.tensor(sizes).unsqueeze(-1)).flatten()
    return torch.randn(batch, len(sizes) * volume, heads, head_dim) * exists[:, None, None]


@on_every_backend
@pytest.mark.parametrize("volume", [64, 192])
def test_a_mean_is_that_of_the_blocks_tokens(device: str, dtype: torch.dtype, volume: int) -> None:
    sizes = [volume, 17, 1]
    x = in_slots(sizes, volume, heads=3, head_dim=24).to(device, dtype)
    means = block_means(x, torch.tensor(sizes, device=device), volume)
    assert means.shape == (2, 3, 3, 24)
    assert means.dtype == dtype
    for block, size in enumerate(sizes):
        exact = x[:, block * volume : block * volume + size].double().mean(1)
        torch.testing.assert_close(means[:, block].double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)


@on_every_backend
def test_means_of_large_values_do_not_overflow(device: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 128, 1, 8), 30000.0, dtype=dtype, device=device)
    assert torch.equal(block_means(x, torch.tensor([64, 64], device=device), 64), x[:, :2])


def test_means_read_any_strides_and_pass_gradients() -> None:
    sizes = torch.tensor([64, 5])
    x = in_slots([64, 5], 64, heads=2, head_dim=8).double()
    turned = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    means = block_means(turned, sizes, 64)
    torch.testing.assert_close(means, block_means(x, sizes, 64))
    means.sum().backward()
    expected = torch.cat([torch.full((64,), 1 / 64), torch.full((64,), 1 / 5)]).double()
    torch.testing.assert_close(turned.grad, expected[:, None, None].expand_as(x))


@on_every_backend
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
def test_scores_are_scaled_products_of_each_head_with_its_keys(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    q, k = torch.randn(2, 5, heads, 16).to(device, dtype), torch.randn(2, 7, kv_heads, 16).to(device, dtype)
    scores = block_scores(q, k, 0.3)
    assert scores.dtype == dtype
    exact = 0.3 * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(heads // kv_heads, 2))
    torch.testing.assert_close(scores.double(), exact, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_are_scaled_before_they_are_rounded(device: str) -> None:
    x = torch.full((1, 1, 1, 64), 100.0, dtype=torch.float16, device=device)  # 640,000 without the scale
    assert block_scores(x, x, 1 / 64).item() == 10000


def chosen(scores: Tensor, topk: int, prefix_blocks: int) -> Tensor:
    """The rule, row by row: the prefix, then the ``topk`` of highest score among the others, of equal ones the first."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for place in itertools.product(*map(range, scores.shape[:-1])):
        row = scores[place].tolist()
        others = sorted(range(prefix_blocks, len(row)), key=lambda block, row=row: (-row[block], block))
        keep[(*place, [*range(prefix_blocks), *others[:topk]])] = True
    keep[..., :prefix_blocks, :] = True
    return keep


@given(
    blocks=st.tuples(st.integers(2, 5), st.integers(2, 40)),
    topk=st.integers(1, 41),
    prefix_blocks=st.integers(0, 2),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    seed=st.integers(0, 999),
)
def test_the_best_blocks_and_the_prefix_are_chosen(
    blocks: tuple[int, int], topk: int, prefix_blocks: int, heads: tuple[int, int], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    q, k = (  # small integers: exact products, and ties
        torch.randint(-2, 3, (2, number, of, 4), generator=random).float()
        for number, of in zip(blocks, heads, strict=True)
    )
    before = q.clone(), k.clone()
    keep = unpack_keep_map(choose_blocks(q, k, topk, 0.5, prefix_blocks=prefix_blocks), blocks[1])
    assert torch.equal(keep, chosen(block_scores(q, k, 0.5), topk, prefix_blocks))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_changes_no_score_and_no_choice(compiled: bool, device: str) -> None:
    q_means, k_means = (torch.randn(1, 40, 2, 64, device=device) for _ in range(2))

    def choose(q_means: Tensor, k_means: Tensor) -> tuple[Tensor, Tensor]:
        return block_scores(q_means, k_means, 0.125), choose_blocks(q_means, k_means, 4, 0.125)

    expected = choose(q_means, k_means)
    torch._dynamo.reset()
    call = torch.compile(choose, fullgraph=True, backend="aot_eager") if compiled else choose
    with torch.autocast(device, torch.bfloat16):
        found = call(q_means, k_means)
        assert (q_means[0, :, 0] @ k_means[0, :, 0].mT).dtype == torch.bfloat16  # it is on again
    for result, wanted in zip(found, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert torch.equal(result, wanted)


def as_vmapped(function: Callable[..., Tensor], x: Tensor, sizes: Tensor) -> Tensor:
    return torch.func.vmap(function, in_dims=(None, 0))(x, sizes[None])


def as_traced(function: Callable[..., Tensor], x: Tensor, sizes: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)(x, sizes)


def as_recorded(function: Callable[..., Tensor], x: Tensor, sizes: Tensor) -> Tensor:
    return make_fx(function)(x, torch.full_like(sizes, 64))(x, sizes)


def as_counted(function: Callable[..., Tensor], x: Tensor, sizes: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return function(x, sizes)


@pytest.mark.parametrize("way", [as_vmapped, as_traced, as_recorded, as_counted])
@pytest.mark.parametrize("size", [-3, 0, 65, 10**6])
def test_sizes_out_of_range_are_refused_on_the_cpu_however_they_come(size: int, way: Callable[..., Tensor]) -> None:
    x, sizes = torch.randn(1, 256, 2, 8), torch.tensor([64, 64, size, 5])
    said = r"^block_means: sizes(\[2\] is -?\d+, expected| holds -?\d+, expected| has an entry that is out of range)"
    with pytest.raises((ValueError, RuntimeError), match=said):
        way(lambda x, sizes: block_means(x, sizes, 64), x, sizes)
    sizes[2] = 64
    found = way(lambda x, sizes: block_means(x, sizes, 64), x, sizes)
    torch.testing.assert_close(found.view(1, 4, 2, 8), block_means(x, sizes, 64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [-3, 0, 65, 10**6])
def test_sizes_out_of_range_are_refused_on_the_cpu_and_limited_elsewhere(size: int, device: str) -> None:
    x, sizes = torch.randn(1, 256, 2, 8, device=device), torch.tensor([64, 64, size, 5], device=device)
    if device == "cuda":
        means, lens = block_means(x, sizes.clamp(1, 64), 64), block_tile_lens(sizes.clamp(0, 64), 64)
        for way in (lambda call, *given: call(*given), as_traced):
            assert torch.equal(way(lambda x, sizes: block_means(x, sizes, 64), x, sizes), means)
            assert torch.equal(way(lambda _, sizes: block_tile_lens(sizes, 64), x, sizes), lens)
        return
    with pytest.raises(ValueError, match=rf"^block_means: sizes\[2\] is {size}, expected 1 to 64$"):
        block_means(x, sizes, 64)
    if size != 0:
        with pytest.raises(ValueError, match=rf"^block_tile_lens: sizes\[2\] is {size}, expected 0 to 64$"):
            block_tile_lens(sizes, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_prefix_the_choice_is_top_k_map_of_the_scores(device: str) -> None:
    q, k = torch.randn(1, 9, 4, 16, device=device), torch.randn(1, 70, 2, 16, device=device)
    assert torch.equal(choose_blocks(q, k, 5, 0.25), top_k_map(block_scores(q, k, 0.25), 5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("volume", [64, 128, 192])
def test_a_block_becomes_all_its_tiles(volume: int, device: str) -> None:
    block_map = (torch.rand(2, 3, 5, 21) < 0.4).to(device)
    keep = expand_blocks(block_map, volume)
    parts = volume // 64
    tiles = unpack_keep_map(keep, 21 * parts)
    assert tiles.shape == (2, 3, 5 * parts, 21 * parts)
    for row, column in itertools.product(range(parts), repeat=2):
        assert torch.equal(tiles[:, :, row::parts, column::parts], block_map)


def test_tile_lens_count_the_keys_of_each_tile() -> None:
    lens = block_tile_lens(torch.tensor([192, 130, 64, 1]), 192)
    assert lens.dtype == torch.int32
    assert lens.tolist() == [64, 64, 64, 64, 64, 2, 64, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_pieces_together_are_attention_to_the_tokens_of_chosen_blocks(device: str) -> None:
    sizes, volume = [128, 40, 128, 99], 128
    q, k, v = (in_slots(sizes, volume, heads, 32).to(device, torch.bfloat16) for heads in (4, 2, 2))
    of_blocks = torch.tensor(sizes, dtype=torch.int32, device=device)
    packed = choose_blocks(block_means(q, of_blocks, volume), block_means(k, of_blocks, volume), 2, 32**-0.5)
    block_map = unpack_keep_map(packed, len(sizes))
    out, _ = attention(
        q, k, v, keep=expand_blocks(block_map, volume), tile_n=64, kv_tile_lens=block_tile_lens(of_blocks, volume)
    )
    exists = (torch.arange(volume, device=device) < of_blocks.unsqueeze(-1)).flatten()
    mask = block_map.repeat_interleave(volume, -1).repeat_interleave(volume, -2) & exists
    query, key, value = (x.double().transpose(1, 2) for x in (q, k, v))
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.mT * 32**-0.5).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(out.double(), (scores.softmax(-1) @ value).transpose(1, 2), atol=0.02, rtol=0)


def test_sparsity_leaves_its_share_of_the_blocks_and_at_least_one() -> None:
    kept = [topk_of_sparsity(sparsity, 1440) for sparsity in (0, 0.5, 0.9, 0.9999, 1)]
    assert kept == [1440, 720, 144, 1, 1]
    assert topk_of_sparsity(0.9, 624) == 63


def test_one_graph_serves_all_inputs() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def build(q: Tensor, k: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        means = block_means(q, sizes, 128), block_means(k, sizes, 128)
        packed = choose_blocks(*means, 2, 0.25, prefix_blocks=1)
        return expand_blocks(unpack_keep_map(packed, sizes.numel()), 128), block_tile_lens(sizes, 128)

    compiled = torch.compile(build, fullgraph=True, backend=counter)
    for sizes in ([128, 3, 128, 60], [1, 128, 128, 2]):
        q, k, of_blocks = in_slots(sizes, 128, 4, 16), in_slots(sizes, 128, 2, 16), torch.tensor(sizes)
        for one, other in zip(compiled(q, k, of_blocks), build(q, k, of_blocks), strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


def test_errors_name_the_argument() -> None:
    x, sizes = torch.zeros(1, 192, 2, 8), torch.tensor([64, 64, 64])
    means = x[:, :3]
    calls = {
        "slots": lambda: block_means(x[:, :100], sizes, 64),
        "sizes": lambda: block_means(x, sizes[:1], 64),
        "sizes of floats": lambda: block_means(x, sizes.float(), 64),
        "sizes elsewhere": lambda: block_means(x, sizes.to("meta"), 64),
        "topk": lambda: choose_blocks(means, means, 0, 1.0),
        "prefix": lambda: choose_blocks(means[:, :2], means, 1, 1.0, prefix_blocks=3),
        "volume": lambda: expand_blocks(torch.ones(1, 1, 3, 3, dtype=torch.bool), 96),
        "a packed map": lambda: expand_blocks(torch.ones(1, 1, 3, 1, dtype=torch.int32), 64),
        "sparsity": lambda: topk_of_sparsity(1.5, 10),
        "no block": lambda: topk_of_sparsity(0.5, 0),
    }
    assert_expected_inline(
        report(calls),
        """\
slots -> ValueError: block_means: x has 100 slots, expected a multiple of the 64 of a block
sizes -> ValueError: block_means: sizes has shape [1], expected [3], one size for each block of 64 slots of x
sizes of floats -> TypeError: block_means: sizes has dtype torch.float32, expected torch.int32
sizes elsewhere -> ValueError: block_means: sizes is on meta, expected cpu like x
topk -> ValueError: choose_blocks: topk is 0, expected at least 1
prefix -> ValueError: choose_blocks: prefix_blocks is 3, expected 0 to 2, the blocks there are
volume -> ValueError: expand_blocks: volume is 96 slots, expected a multiple of 64
a packed map -> TypeError: expand_blocks: block_map has dtype torch.int32, expected torch.bool
sparsity -> ValueError: topk_of_sparsity: sparsity is 1.5, expected a number from 0 to 1
no block -> ValueError: topk_of_sparsity: blocks is 0, expected at least 1""",
    )
