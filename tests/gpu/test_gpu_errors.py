"""Bad input on the GPU: the errors of the CPU in the same words, and those that only the GPU has."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lite_attention import attention, full_keep_map, merge_attention, skip_attention
from support.inputs import GPU, report

pytestmark = pytest.mark.gpu
BATCH, QUERIES, KEYS, HEADS, KV_HEADS, HEAD_DIM = 2, 100, 2400, 4, 2, 64


def bad_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).bfloat16()

    q, k, v = normal(BATCH, QUERIES, HEADS, HEAD_DIM), *normal(2, BATCH, KEYS, KV_HEADS, HEAD_DIM)
    keep = full_keep_map(BATCH, HEADS, QUERIES, KEYS, HEAD_DIM, q.dtype, device)
    lens = torch.full((BATCH,), KEYS, dtype=torch.int32, device=device)
    limit = torch.tensor(-1.0, device=device)
    out, lse = normal(2, 5, 3, 8), torch.randn(2, 3, 5, device=device)
    return {
        "rank of q": lambda: attention(q[0], k, v),
        "dtype of k": lambda: attention(q, k.half(), v),
        "no queries": lambda: attention(q[:, :0], k, v),
        "head_dim 12": lambda: attention(q[..., :12], k[..., :12], v[..., :12]),
        "head dims differ": lambda: attention(q, k[..., :8], v[..., :8]),
        "batches differ": lambda: attention(q, k[:1], v[:1]),
        "heads do not divide": lambda: attention(q[:, :, :3], k, v),
        "shape of v": lambda: attention(q, k, v[:, :7]),
        "last stride of v": lambda: attention(q, k, v.transpose(2, 3).contiguous().transpose(2, 3)),
        "scale": lambda: attention(q, k, v, scale=-1.0),
        "dtype of keep": lambda: attention(q, k, v, keep=keep.long()),
        "words of keep": lambda: attention(q, k, v, keep=keep[..., :-1]),
        "query tiles of keep": lambda: skip_attention(q, k, v, keep[:, :, :1], limit),
        "heads of must_keep": lambda: skip_attention(q, k, v, keep, limit, must_keep=keep[:, :3]),
        "shape of kv_lens": lambda: attention(q, k, v, kv_lens=lens[:1]),
        "dtype of kv_lens": lambda: attention(q, k, v, kv_lens=lens.long()),
        "shape of threshold": lambda: skip_attention(q, k, v, keep, limit.expand(3)),
        "dtype of threshold": lambda: skip_attention(q, k, v, keep, limit.double()),
        "no parts": lambda: merge_attention([], []),
        "fewer lses than outs": lambda: merge_attention([out, out], [lse]),
        "shape of an out": lambda: merge_attention([out, out[:1]], [lse, lse]),
        "dtype of an lse": lambda: merge_attention([out], [lse.bfloat16()]),
        "a gradient": lambda: attention(q.requires_grad_(), k, v)[0].sum().backward(),
    }


def test_errors_are_those_of_the_cpu() -> None:
    assert report(bad_calls(GPU)) == report(bad_calls(torch.device("cpu")))


@pytest.mark.parametrize("name", ["attention", "skip_attention"])
def test_float32_is_refused(name: str) -> None:
    q = torch.randn(1, 100, 2, 64, device=GPU)
    keep = full_keep_map(1, 2, 100, 100, 64, q.dtype, GPU)
    with pytest.raises(RuntimeError, match=f"{name}: q has dtype float32, expected.* bfloat16 or float16"):
        attention(q, q, q) if name == "attention" else skip_attention(q, q, q, keep, -1.0)


@pytest.mark.parametrize("elsewhere", ["k", "v", "keep", "must_keep", "kv_lens", "threshold"])
def test_arguments_on_another_device_are_named(elsewhere: str) -> None:
    q, k, v = torch.randn(3, 1, 100, 2, 64, device=GPU, dtype=torch.bfloat16)
    given = {"q": q, "k": k, "v": v, "keep": full_keep_map(1, 2, 100, 100, 64, q.dtype, GPU)}
    given["must_keep"], given["threshold"] = given["keep"], torch.tensor(-1.0, device=GPU)
    given["kv_lens"] = torch.tensor([100], dtype=torch.int32, device=GPU)
    given[elsewhere] = given[elsewhere].cpu()
    with pytest.raises(RuntimeError, match=rf"skip_attention: {elsewhere} .*cpu"):
        skip_attention(**given)


def laid_out(batch: int, batch_stride: int, row_stride: int, head_stride: int, offset: int = 0) -> Tensor:
    """``[batch, 50, 2, 64]`` of zeros with these strides."""
    sizes, strides = (batch, 50, 2, 64), (batch_stride, row_stride, head_stride, 1)
    memory = torch.zeros(20_000, dtype=torch.bfloat16, device=GPU)
    return memory.as_strided(sizes, strides, offset)


@pytest.mark.parametrize("name", ["attention", "skip_attention"])
@pytest.mark.parametrize("argument", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("view", "text"),
    [
        ((2, 8000, 132, 64), "row stride 132, expected a multiple of 8"),
        ((2, 8000, 136, 68), "head stride 68, expected a multiple of 8"),
        ((2, 8004, 128, 64), "batch stride 8004, expected a multiple of 8"),
        ((2, 8000, 128, 64, 4), "starts 8 bytes past a 16-byte boundary"),
    ],
)
def test_what_the_copy_engine_cannot_address_is_refused(
    view: tuple[int, ...], text: str, argument: str, name: str
) -> None:
    given = dict.fromkeys(("q", "k", "v"), laid_out(2, 6400, 128, 64)) | {argument: laid_out(*view)}
    keep = full_keep_map(2, 2, 50, 50, 64, torch.bfloat16, GPU)
    with pytest.raises(RuntimeError, match=f"{name}: {argument} (has )?{text}"):
        attention(**given) if name == "attention" else skip_attention(**given, keep=keep, threshold=-1.0)


def test_strides_of_single_elements_do_not_matter() -> None:
    normal = torch.randn(1, 1, 1, 64, device=GPU).bfloat16()
    odd = normal.as_strided(normal.shape, (3, 5, 7, 1))
    assert torch.equal(attention(odd, odd, odd)[0], normal)
