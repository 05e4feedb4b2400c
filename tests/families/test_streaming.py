"""Streaming attention: which keys each row sees, and mixed heads."""

from collections.abc import Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention import attention
from lite_attention.families.streaming import attention as streaming_attention
from lite_attention.families.streaming import head_windows
from lite_attention.maps.tiles import UNLIMITED
from lite_attention.ops import CausalAlignment
from support.inputs import Case, make_qkv, report
from support.streaming import check, seen

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICES_AND_DTYPES = [
    pytest.param("cpu", torch.float32, id="cpu-fp32"),
    pytest.param("cpu", torch.bfloat16, id="cpu-bf16"),
    pytest.param("cpu", torch.float16, id="cpu-fp16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-fp16", marks=pytest.mark.gpu),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
on_every_device_and_dtype = pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES)
ALIGNMENTS: tuple[CausalAlignment, ...] = ("top-left", "bottom-right")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", ALIGNMENTS)
@pytest.mark.parametrize(("sink_size", "recent_size"), [(0, 1), (4, 31), (130, 70), (1, 1000), (0, UNLIMITED)], ids=str)
@pytest.mark.parametrize("lengths", [(300, 300), (70, 300), (300, 100)], ids=str)
@on_every_device_and_dtype
def test_a_row_sees_the_first_and_the_last_keys(
    device: str,
    dtype: torch.dtype,
    lengths: tuple[int, int],
    sink_size: int,
    recent_size: int,
    causal: CausalAlignment,
) -> None:
    queries, keys = lengths
    q, k, v = make_qkv(Case(1, queries, keys, 2, 1, 32), dtype, "peaked", device=device)
    result = streaming_attention(q, k, v, sink_size, recent_size, causal=causal)
    first_position = keys - queries if causal == "bottom-right" else 0
    check(result, q, k, v, seen(queries, keys, first_position, sink_size, recent_size))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@on_every_device_and_dtype
def test_mixed_heads_in_one_launch(device: str, dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = make_qkv(Case(2, 100, 300, 4, 2, head_dim), dtype, "peaked", device=device)
    streaming, full = seen(100, 300, 200, 4, 31), seen(100, 300, 200, 0, UNLIMITED)
    of_queries = torch.tensor([True, False, False, True], device=device)
    result = streaming_attention(q, k, v, 4, 31, full_heads=of_queries)
    check(result, q, k, v, torch.stack([full, streaming, streaming, full]))
    of_keys = torch.tensor([False, True], device=device)
    result = streaming_attention(q, k, v, 4, 31, full_heads=of_keys)
    check(result, q, k, v, torch.stack([streaming, streaming, full, full]))


@on_every_device
def test_each_head_may_have_sizes_of_its_own(device: str) -> None:
    q, k, v = make_qkv(Case(1, 300, 300, 4, 2, 64), torch.bfloat16, "peaked", device=device)
    sinks, recents = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 7, 0, 129], [9, 1, 200, 64]))
    mask = torch.stack([seen(300, 300, 0, int(s), int(r)) for s, r in zip(sinks, recents, strict=True)])
    check(streaming_attention(q, k, v, sinks, recents), q, k, v, mask)
    mask[2] = seen(300, 300, 0, 0, UNLIMITED)
    full = torch.tensor([False, False, True, False], device=device)
    check(streaming_attention(q, k, v, sinks, recents, full_heads=full), q, k, v, mask)


@on_every_device
def test_the_table_says_what_each_head_sees(device: str) -> None:
    full = torch.tensor([True, False], device=device)
    assert head_windows(full, 4, 31).tolist() == [[4, UNLIMITED], [4, 31]]
    sizes = torch.tensor([5, 6], dtype=torch.int32, device=device)
    assert head_windows(full, sizes, 31).tolist() == [[5, UNLIMITED], [6, 31]]
    q, k, v = make_qkv(Case(1, 100, 100, 2, 2, 64), torch.bfloat16, device=device)
    by_table = attention(q, k, v, causal="bottom-right", head_windows=head_windows(full, 4, 31))
    for one, other in zip(by_table, streaming_attention(q, k, v, 4, 31, full_heads=full), strict=True):
        assert torch.equal(one, other)


@on_every_device
def test_chunks_of_a_prefill_give_what_the_whole_gives(device: str) -> None:
    q, k, v = make_qkv(Case(2, 300, 300, 4, 2, 64), torch.bfloat16, "peaked", device=device)
    full = torch.tensor([False, True], device=device)
    whole, _ = streaming_attention(q, k, v, 4, 100, full_heads=full)
    chunks, start = [], 0
    for end in (150, 151, 299, 300):  # a single query is a decoding step
        out, _ = streaming_attention(q[:, start:end], k[:, :end], v[:, :end], 4, 100, full_heads=full)
        chunks.append(out)
        start = end
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("causal", ALIGNMENTS)
@on_every_device
def test_positions_follow_each_batch_entrys_own_length(device: str, causal: CausalAlignment) -> None:
    lens = [300, 131, 20]
    q, k, v = make_qkv(Case(3, 50, 300, 2, 2, 64), torch.bfloat16, "peaked", device=device)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    masks = []
    for keys in lens:
        mask = seen(50, 300, keys - 50 if causal == "bottom-right" else 0, 4, 31)
        mask[:, keys:] = False
        masks.append(mask[None])
    result = streaming_attention(q, k, v, 4, 31, causal=causal, kv_lens=kv_lens)
    check(result, q, k, v, torch.stack(masks))


@on_every_device
def test_transposed_inputs_are_read_in_place(device: str) -> None:
    q, k, v = make_qkv(Case(2, 200, 200, 4, 2, 64), torch.bfloat16, device=device)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not turned[0].is_contiguous()
    expected = streaming_attention(q, k, v, 4, 31)
    for one, other in zip(streaming_attention(*turned, 4, 31), expected, strict=True):
        assert torch.equal(one, other)


@on_every_device
def test_a_needle_is_found_by_full_heads_at_any_depth_and_by_streaming_heads_in_their_windows(device: str) -> None:
    keys, head_dim, sink_size, recent_size = 1024, 64, 16, 128
    depths = [0, 15, 16, 17, 300, 512, 700, 895, 896, 897, 1000, 1023]
    random = torch.Generator().manual_seed(0)
    k = torch.randn(len(depths), keys, 2, head_dim, generator=random)
    v = torch.zeros_like(k)
    for entry, depth in enumerate(depths):
        v[entry, depth, :, 0] = 1  # so that the first column of out is the weight of the needle
    # The last query asks for the needle; the KV heads have two queries each.
    needles = torch.stack([k[entry, depth] for entry, depth in enumerate(depths)])
    q = needles.repeat_interleave(2, 1)[:, None]
    q, k, v = (x.to(device, torch.bfloat16) for x in (q, k, v))
    found, _ = streaming_attention(
        q, k, v, sink_size, recent_size, full_heads=torch.tensor([True, False], device=device), scale=1.0
    )
    full, streaming = found[:, 0, :2, 0], found[:, 0, 2:, 0]
    in_window = torch.tensor([depth < sink_size or depth >= keys - recent_size for depth in depths])
    assert in_window.tolist().count(True) == 6
    assert (full > 0.95).all()
    assert (streaming[in_window.to(device)] > 0.95).all()
    assert (streaming[~in_window.to(device)] == 0).all(), "what is not seen has no weight at all"


# torch.compile, CUDA graphs


@on_every_device
def test_one_graph_whatever_the_heads_are(device: str) -> None:
    counter = CompileCounter()
    q, k, v = make_qkv(Case(2, 200, 300, 4, 2, 64), torch.bfloat16, device=device)
    kv_lens = torch.tensor([300, 250], dtype=torch.int32, device=device)

    def run(full: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        table = head_windows(full.repeat_interleave(2), 4, 31)
        by_table = attention(q, k, v, causal="top-left", head_windows=table)
        return *streaming_attention(q, k, v, sinks, 31, full_heads=full, kv_lens=kv_lens), *by_table

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for heads in ([True, False], [False, True], [False, False]):
        full, sinks = torch.tensor(heads, device=device), torch.full((4,), 3, dtype=torch.int32, device=device)
        for one, other in zip(compiled(full, sinks), run(full, sinks), strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_a_captured_graph_reads_the_heads_anew() -> None:
    device = torch.device("cuda", 0)
    q, k, v = make_qkv(Case(1, 300, 300, 4, 2, 128), torch.bfloat16, device=device)
    full = torch.tensor([True, False], device=device)

    def run() -> tuple[Tensor, Tensor]:
        return streaming_attention(q, k, v, 4, 31, full_heads=full)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for heads in ([True, False], [False, True]):
        full.copy_(torch.tensor(heads))
        graph.replay()
        for one, other in zip(captured, run(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.usefixtures("_no_waiting")
def test_nothing_waits_for_the_device() -> None:
    device = torch.device("cuda", 0)
    q, k, v = make_qkv(Case(1, 300, 300, 4, 2, 128), torch.bfloat16, device=device)
    full = torch.ones(2, dtype=torch.bool, device=device)
    streaming_attention(q, k, v, 4, 31, full_heads=full)
    head_windows(full, 4, 31)
    with pytest.raises(RuntimeError, match="synchroniz"):  # what a wait would have raised above
        full.any().item()


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "size", "smallest"), [("sink_size", -1, 0), ("recent_size", 0, 1), ("recent_size", -5, 1)]
)
def test_sizes_out_of_range_are_refused_on_the_cpu_and_limited_on_the_gpu(
    name: str, size: int, smallest: int, device: str
) -> None:
    full_heads = torch.tensor([False, True, False], device=device)
    sizes = {
        "sink_size": torch.full((3,), 2, dtype=torch.int32, device=device),
        "recent_size": torch.tensor([4, 4, 4], dtype=torch.int32, device=device),
    }
    wrong = sizes | {name: torch.tensor([4, 4, size], dtype=torch.int32, device=device)}
    if device == "cpu":
        with pytest.raises(
            ValueError, match=rf"^head_windows: {name}\[2\] is {size}, expected {smallest} to 2147483647$"
        ):
            head_windows(full_heads, **wrong)
        return
    limited = sizes | {name: wrong[name].clamp(min=smallest)}
    assert torch.equal(head_windows(full_heads, **wrong), head_windows(full_heads, **limited))


def test_errors() -> None:
    q, k, v = make_qkv(Case(1, 20, 20, 4, 2, 16), torch.float32)
    full, sizes = torch.tensor([True, False]), torch.ones(4, dtype=torch.int32)

    calls = {
        "negative sink": lambda: streaming_attention(q, k, v, -1, 4),
        "no recent key": lambda: streaming_attention(q, k, v, 4, 0),
        "sink is a float": lambda: streaming_attention(q, k, v, 4.0, 4),  # type: ignore[arg-type]
        "sizes in int64": lambda: streaming_attention(q, k, v, sizes.long(), 4),
        "sizes of 3 heads": lambda: streaming_attention(q, k, v, 4, sizes[:3]),
        "full_heads in int64": lambda: streaming_attention(q, k, v, 4, 4, full_heads=full.long()),
        "full_heads is a list": lambda: streaming_attention(q, k, v, 4, 4, full_heads=[True]),  # type: ignore[arg-type]
        "full_heads of 3 heads": lambda: streaming_attention(q, k, v, 4, 4, full_heads=full[[0, 0, 0]]),
        "full_heads of a batch": lambda: streaming_attention(q, k, v, 4, 4, full_heads=full[None]),
        "q of rank 3": lambda: streaming_attention(q[0], k, v, 4, 4),
        "3 key heads for 4 query heads": lambda: streaming_attention(q, k[:, :, [0, 0, 0]], v, 4, 4),
        "v of another shape": lambda: streaming_attention(q, k, v[:, :5], 4, 4),
        "causal is a bool": lambda: streaming_attention(q, k, v, 4, 4, causal=True),  # type: ignore[arg-type]
        "table of floats": lambda: head_windows(torch.ones(2), 4, 4),
    }
    assert_expected_inline(
        report(calls),
        """\
negative sink -> ValueError: streaming_attention: sink_size is -1, expected 0 to 2147483647 keys
no recent key -> ValueError: streaming_attention: recent_size is 0, expected 1 to 2147483647 keys
sink is a float -> TypeError: streaming_attention: sink_size has type float, expected an int or a tensor
sizes in int64 -> ValueError: streaming_attention: sink_size is torch.int64 [4] on cpu, expected a number or torch.int32 [4] on cpu, one a head
sizes of 3 heads -> ValueError: streaming_attention: recent_size is torch.int32 [3] on cpu, expected a number or torch.int32 [4] on cpu, one a head
full_heads in int64 -> TypeError: streaming_attention: full_heads has torch.int64, expected a tensor of torch.bool
full_heads is a list -> TypeError: streaming_attention: full_heads has type list, expected a tensor of torch.bool
full_heads of 3 heads -> ValueError: streaming_attention: full_heads has 3 heads on cpu, expected 4, one a query head, or 2, one a KV head, on cpu
full_heads of a batch -> ValueError: streaming_attention: full_heads has 2 dimensions, expected 1: one bool a head
q of rank 3 -> ValueError: streaming_attention: q has 3 dimensions, expected 4: [batch, length, heads, head_dim]
3 key heads for 4 query heads -> ValueError: streaming_attention: k has 3 heads, expected a divisor of q's 4
v of another shape -> RuntimeError: attention: v has shape [1, 5, 2, 16], expected [1, 20, 2, 16] (k's shape)
causal is a bool -> TypeError: attention: causal has type bool, expected 'top-left', 'bottom-right' or None
table of floats -> TypeError: head_windows: full_heads has torch.float32, expected a tensor of torch.bool""",
    )
