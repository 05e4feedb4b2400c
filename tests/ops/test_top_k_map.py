"""top_k_map: the largest scores of each row as bits of a keep map, against sorting in Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention import top_k_map, unpack_keep_map
from lite_attention.maps.keep_map import pack_keep_map
from support.inputs import DTYPES, poisoned_memory
from support.scores import KINDS, make_scores

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Around 32 a word, and around what a lane of the CUDA kernel holds in registers: 16, 24, 32, 48, 64 or 128 words.
COLUMNS = (1, 2, 31, 32, 33, 64, 511, 512, 513, 768, 769, 1024, 1025, 1440, 1537, 2048, 2049, 4095, 4096, 4097, 5000)


def by_sorting(scores: Tensor, count: int) -> Tensor:
    """NaN first, then by score, -0 and 0 being equal, then by index."""
    values = scores.double().flatten(0, -2).tolist()
    keep = torch.zeros(len(values), scores.shape[-1], dtype=torch.bool)
    for row, scores_of_row in enumerate(values):
        # NaN would not be ordered: it is neither smaller nor larger than anything.
        rank = [(False, 0.0) if math.isnan(score) else (True, -score) for score in scores_of_row]
        keep[row, sorted(range(len(rank)), key=lambda column: (rank[column], column))[:count]] = True
    return pack_keep_map(keep.view(scores.shape))


def check(scores: Tensor, count: int, device: str) -> None:
    on_device = scores.to(device)
    with poisoned_memory(on_device.device):
        chosen = top_k_map(on_device, count)
    assert chosen.dtype == torch.int32
    assert chosen.is_contiguous()
    assert torch.equal(chosen.cpu(), by_sorting(scores, count))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_are_chosen_and_of_equal_ones_the_first(dtype: torch.dtype, columns: int, device: str) -> None:
    for kind in KINDS:
        scores = make_scores(kind, 1, 1, 2, columns, dtype=dtype)
        for count in {1, max(1, columns // 8), max(1, columns - 1)}:
            check(scores, count, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 31, 32, 100, 5000])
def test_a_count_of_all_or_more_chooses_everything(columns: int, kind: str, device: str) -> None:
    for count in (columns, columns + 1, 2**40):
        chosen = top_k_map(make_scores(kind, 2, columns).to(device), count)
        assert torch.equal(unpack_keep_map(chosen, columns), torch.ones(2, columns, dtype=torch.bool, device=device))
        assert torch.equal(chosen, pack_keep_map(unpack_keep_map(chosen, columns))), "a bit past the last column is set"


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_has_its_own_answer(device: str) -> None:
    check(make_scores("many ties", 3, 4, 50, 77, seed=1), 9, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(40,), (3, 40), (2, 3, 40), (2, 3, 5, 40), (0, 40), (2, 0, 3, 40)], ids=str)
def test_leading_dimensions_are_kept(sizes: tuple[int, ...], device: str) -> None:
    scores = make_scores("distinct", *sizes)
    chosen = top_k_map(scores.to(device), 7)
    assert chosen.shape == (*sizes[:-1], 2)
    expected = by_sorting(scores.reshape(-1, 40), 7).view(chosen.shape) if scores.numel() else torch.zeros(chosen.shape)
    assert torch.equal(chosen.cpu(), expected.int())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_may_be_slices_transposed_or_expanded(dtype: torch.dtype, device: str) -> None:
    scores = make_scores("many ties", 4, 5, 6, 90, dtype=dtype)
    for view in (
        scores[:, :, :, 7:80],  # rows that start anywhere
        scores[::2, 1:4, ::3],
        scores.transpose(0, 2),
        scores.transpose(1, 2),
        scores[:, :1, :1].expand(-1, 3, 4, -1),
        scores[:1].expand(3, -1, -1, -1),
    ):
        on_device = scores.to(device).as_strided(view.shape, view.stride(), view.storage_offset())
        assert torch.equal(top_k_map(on_device, 5).cpu(), by_sorting(view, 5))


def test_subnormal_scores_keep_their_ranks_where_the_processor_flushes_them() -> None:
    scores = torch.tensor([[1e-41, -1e-41, 2e-41, 0.0, -2e-41]])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        chosen = [top_k_map(scores, count) for count in range(1, 6)]
    finally:
        torch.set_flush_denormal(False)
    assert [int(words) for words in chosen] == [0b00100, 0b00101, 0b01101, 0b01111, 0b11111]


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]),
    st.floats(width=16),
)


@given(row=st.lists(FLOATS, min_size=1, max_size=80), count=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
def test_any_row_is_ranked_as_python_sorts_it(row: list[float], count: int, dtype: torch.dtype) -> None:
    scores = torch.tensor([row]).to(dtype)
    assert torch.equal(top_k_map(scores, count), by_sorting(scores, count))


@given(columns=st.integers(1, 300), count=st.integers(1, 300), seed=st.integers(0, 2**20))
def test_a_row_has_as_many_bits_as_were_asked_for(columns: int, count: int, seed: int) -> None:
    scores = make_scores("special values", 3, columns, seed=seed)
    bits = unpack_keep_map(top_k_map(scores, count), columns)
    assert bits.sum(-1).tolist() == [min(count, columns)] * 3


@pytest.mark.parametrize("count", [2**70, -(2**70)])
def test_a_count_beyond_the_operator_s_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"^top_k_map: count is beyond the integers of 64 bits"):
        top_k_map(torch.zeros(2, 4), count)


@pytest.mark.parametrize("device", DEVICES)
def test_one_compile_serves_all_scores(device: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda scores: top_k_map(2 * scores, 5), fullgraph=True, backend=counter)
    for seed in range(3):
        scores = make_scores("distinct", 2, 3, 70, seed=seed)
        assert torch.equal(compiled(scores.to(device)).cpu(), by_sorting(scores, 5))
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_a_captured_graph_reads_the_scores_of_each_replay() -> None:
    scores = torch.zeros(2, 3, 1440, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = top_k_map(scores, 180)
    for seed in range(3):
        fresh = make_scores("distinct", 2, 3, 1440, seed=seed)
        scores.copy_(fresh)
        graph.replay()
        assert torch.equal(chosen.cpu(), by_sorting(fresh, 180))
