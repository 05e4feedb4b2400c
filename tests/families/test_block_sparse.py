"""Block-sparse attention against dense arithmetic: which blocks attend is the caller's word, padding does not count."""

import math

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention.families import block_sparse
from lite_attention.maps.blocks import expand_blocks
from support.blocks import Video, exists, make_inputs, masked_attention, random_blocks, swapped, token_mask
from support.inputs import DTYPES, GPU_DTYPES, assert_as_good_as_naive, poisoned_memory, report

BACKENDS = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in DTYPES),
    *(pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in GPU_DTYPES),
]
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
CASES = {
    "one of each": Video(),
    "batch": Video(batch=2),
    "grouped heads": Video(heads=6, kv_heads=2, batch=2),
    "scale": Video(scale=0.5),
    "fewer query blocks": Video(q_sizes=(16, 64, 64)),
    "blocks of 192": Video(volume=192, sizes=(128, 64, 2, 128), topk=2),
}


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("video", CASES.values(), ids=CASES)
def test_blocks_of_a_map_are_attended_to(video: Video, device: str, dtype: torch.dtype) -> None:
    q, k, v, _ = make_inputs(video, dtype)
    blocks = random_blocks(video)
    blocks[0, 0, 1] = False  # a query block that sees nothing
    keep = expand_blocks(blocks, video.volume).to(device)
    sizes = torch.tensor(video.sizes, dtype=torch.int32, device=device)
    with poisoned_memory(sizes.device):
        out, lse = block_sparse.attention(*(swapped(x.to(device)) for x in (q, k, v)), keep, sizes, scale=video.scale)
    assert out.is_contiguous()
    assert lse.shape == q.shape[:3]
    mask = token_mask(blocks, video.sizes, video.volume)
    scale = video.head_dim**-0.5 if video.scale is None else video.scale
    exact, naive = (masked_attention(*(x.to(d) for x in (q, k, v)), mask, scale) for d in (torch.float64, dtype))
    assert_as_good_as_naive("out", swapped(out).cpu(), exact[0], naive[0])
    assert_as_good_as_naive("lse", lse.cpu(), exact[1], naive[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
def test_what_padding_holds_does_not_matter(value: float, device: str) -> None:
    video = Video(volume=128, sizes=(128, 70, 5, 100))
    q, k, v, _ = (x if x is None else swapped(x).to(device) for x in make_inputs(video, torch.bfloat16))
    tokens = exists(video.sizes, video.volume).to(device)
    keep, sizes = expand_blocks(random_blocks(video), 128).to(device), torch.tensor(video.sizes, device=device)
    clean, _ = block_sparse.attention(q, k, v, keep, sizes)
    dirty = (torch.where(tokens[:, None, None], x, value) for x in (q, k, v))
    out, _ = block_sparse.attention(*dirty, keep, sizes)
    assert torch.equal(out[:, tokens], clean[:, tokens])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [-3, 65, 10**6])
def test_sizes_out_of_range_are_refused_on_the_cpu_and_limited_on_the_gpu(size: int, device: str) -> None:
    video = Video(sizes=(64,) * 6)
    q, k, v, _ = (x if x is None else swapped(x).to(device) for x in make_inputs(video, torch.bfloat16))
    keep = expand_blocks(random_blocks(video), 64).to(device)
    sizes = torch.tensor([64, 64, size, 0, 64, 1], dtype=torch.int32, device=device)
    if device == "cpu":
        with pytest.raises(
            ValueError, match=rf"^block_sparse\.attention: block_sizes\[2\] is {size}, expected 0 to 64$"
        ):
            block_sparse.attention(q, k, v, keep, sizes)
        return
    limited = block_sparse.attention(q, k, v, keep, sizes.clamp(0, 64))
    for result, expected in zip(block_sparse.attention(q, k, v, keep, sizes), limited, strict=True):
        assert torch.equal(result, expected)


def test_queries_need_no_blocks() -> None:
    video = Video()
    q, k, v, _ = (x if x is None else swapped(x) for x in make_inputs(video, torch.float32))
    keep, sizes = expand_blocks(random_blocks(video), 64), torch.tensor(video.sizes)
    out, _ = block_sparse.attention(q, k, v, keep, sizes)
    some, _ = block_sparse.attention(q[:, :100], k, v, keep[:, :, :2], sizes)
    torch.testing.assert_close(some, out[:, :100])


def test_errors_name_the_argument() -> None:
    video = Video(batch=2)
    q, k, v, _ = (x if x is None else swapped(x) for x in make_inputs(video, torch.float32))
    keep, sizes = expand_blocks(random_blocks(video), 64), torch.tensor(video.sizes)
    attend = block_sparse.attention
    assert_expected_inline(
        report(
            {
                "k": lambda: attend(q, k[0], v, keep, sizes),
                "v": lambda: attend(q, k, v[:, :, :1], keep, sizes),
                "no sizes": lambda: attend(q, k, v, keep, sizes[:0]),
                "too many sizes": lambda: attend(q, k, v, keep, sizes.repeat(2)),
                "sizes that do not divide": lambda: attend(q, k, v, keep, sizes[:5]),
                "matrix of sizes": lambda: attend(q, k, v, keep, sizes[None]),
                "map of fewer queries": lambda: attend(q, k, v, keep[:, :, :3], sizes),
                "map of one batch entry": lambda: attend(q, k, v, keep[:1], sizes),
                "map of bools": lambda: attend(q, k, v, random_blocks(video), sizes),
            }
        ),
        """\
k -> ValueError: block_sparse.attention: k has 3 dimensions, expected 4, [B, S, H, D]
v -> ValueError: block_sparse.attention: v has shape [2, 512, 1, 16], expected [2, 512, 2, 16] like k, as [B, S, H, D]
no sizes -> ValueError: block_sparse.attention: block_sizes has shape [0], expected [1], one size for each block of 512 slots of k
too many sizes -> ValueError: block_sparse.attention: k has 512 slots for 16 block_sizes: volume is 32 slots, expected a multiple of 64
sizes that do not divide -> ValueError: block_sparse.attention: k has 512 slots for 5 block_sizes: volume is 102 slots, expected a multiple of 64
matrix of sizes -> ValueError: block_sparse.attention: block_sizes has shape [1, 8], expected [8], one size for each block of 64 slots of k
map of fewer queries -> ValueError: block_sparse.attention: keep has shape [2, 2, 3, 1], expected [2, 2, 8, 1], packed
map of one batch entry -> ValueError: block_sparse.attention: keep has shape [1, 2, 8, 1], expected [2, 2, 8, 1], packed
map of bools -> TypeError: block_sparse.attention: keep has dtype torch.bool, expected torch.int32""",
    )
