"""DistributedLiteAttention on 2 and 4 ranks, against one process and against the oracle split by split."""

import copy
import dataclasses
import itertools
import math
import pickle
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from lite_attention import (
    DistributedLiteAttention,
    LiteAttention,
    SkipPolicy,
    attention,
    exportable,
    full_keep_map,
    ops,
    pack_keep_map,
    reference,
    unpack_keep_map,
)
from lite_attention.parallel import distributed
from lite_attention.parallel.collectives import all_gather
from lite_attention.parallel.head_order import HeadOrder
from lite_attention.parallel.mesh import SequenceMesh, sequence_mesh
from lite_attention.parallel.shards import gather_sequence, shard_sequence
from lite_attention.skipping.state import SkipState
from support.inputs import Case, check_attention, correlated_passes, report, score_rounding
from support.ranks import mesh_of, run_on_ranks

pytestmark = pytest.mark.slow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
THRESHOLD = -8.0
# A split keeps its first tile, and there are few tiles in each.
RING_THRESHOLD = -2.0
PASSES = 4

CASE = Case(query_len=512, kv_len=512, heads=4, kv_heads=4)
LONG = Case(query_len=1500, kv_len=1500, heads=2, kv_heads=2)
RAGGED = Case(batch=2, query_len=397, kv_len=397, heads=4, kv_heads=2)


def _passes(case: Case, device: str, count: int = PASSES) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(correlated_passes(case, DTYPES[device], count, device=device))


def _shards(x: tuple[Tensor, Tensor, Tensor], mesh: SequenceMesh) -> tuple[Tensor, ...]:
    return tuple(shard_sequence(each, mesh) for each in x)


def _same_as_one_process(
    device: str, ulysses: int, case: Case, head_chunks: int, options: dict[str, Any]
) -> tuple[float, list[int]]:
    mesh = mesh_of(device, 1, ulysses)
    ranks = sequence_mesh(mesh, "test")
    shared = DistributedLiteAttention(mesh, threshold=THRESHOLD, head_chunks=head_chunks)
    alone = LiteAttention(threshold=THRESHOLD)
    for step, inputs in enumerate(_passes(case, device)):
        # Told in one of two ways that branch 1 begins anew.
        start = {"start_full": step == 3} if head_chunks == 1 else {"generation": step // 3}
        told = {name: torch.tensor(value, device=device) for name, value in start.items()}
        given = {**options, "branch": step % 2, **told}
        out, lse = shared(
            *_shards(inputs, ranks), 0.9 * case.scale, return_softmax_lse=True, seq_len=case.query_len, **given
        )
        expected = alone(*inputs, 0.9 * case.scale, return_softmax_lse=True, **given)
        assert torch.equal(gather_sequence(out, ranks, case.query_len), expected[0])
        assert torch.equal(gather_sequence(lse, ranks, case.query_len, dim=2), expected[1])
        kept = alone.keep_map(step % 2)[:, shared.local_heads(case.heads)]
        assert torch.equal(shared.keep_map(branch=step % 2), kept)
    return float(alone.skip_fraction()), shared.local_heads(case.heads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("ulysses", "case", "head_chunks"),
    [
        (2, CASE, 1),
        (4, CASE, 1),
        (2, CASE, 2),
        (2, RAGGED, 1),
        (4, RAGGED, 1),  # fewer key heads than ranks
        (2, RAGGED, 2),
        (2, Case(query_len=301, kv_len=301, heads=5, kv_heads=5, head_dim=40), 2),  # unequal shares and chunks
    ],
    ids=str,
)
def test_ulysses_decides_and_computes_what_one_process_does(
    device: str, ulysses: int, case: Case, head_chunks: int
) -> None:
    answers = run_on_ranks(ulysses, device, _same_as_one_process, device, ulysses, case, head_chunks, {})
    assert all(fraction > 0.1 for fraction, _ in answers), "the inputs are meant to skip something"
    assert sorted(head for _, heads in answers for head in heads) == list(range(case.heads))


@pytest.mark.parametrize("device", DEVICES)
def test_ulysses_takes_the_arguments_of_one_process(device: str) -> None:
    options = {"must_do_list": [300, 200], "must_skip_list": [0, 130], "must_do_queries": [380, 397]}
    answers = run_on_ranks(2, device, _same_as_one_process, device, 2, RAGGED, 1, options)
    assert all(fraction > 0.05 for fraction, _ in answers), "the inputs are meant to skip something"


def _like_the_oracle(device: str, ring: int, ulysses: int, case: Case) -> float:
    """Each split with a map and a running maximum of its own, merged; whatever rank it is computed on."""
    mesh = mesh_of(device, ring, ulysses)
    ranks = sequence_mesh(mesh, "test")
    layer = DistributedLiteAttention(mesh, threshold=RING_THRESHOLD)
    threshold = torch.tensor(RING_THRESHOLD, device=device)
    block = -(-case.query_len // ranks.shards) * ulysses
    heads = layer.local_heads(case.heads)
    groups = case.heads // case.kv_heads
    inputs = _passes(case, device)
    rows = slice(ranks.ring.rank * block, min((ranks.ring.rank + 1) * block, case.query_len))
    maps: dict[int, Tensor] = {}
    for whole in inputs:
        out, lse = layer(*_shards(whole, ranks), case.scale, return_softmax_lse=True, seq_len=case.query_len)
        q = whole[0][:, rows, heads]
        outs, lses = [], []
        for split in range(ring):
            keys = slice(split * block, min((split + 1) * block, case.query_len))
            k, v = (x.repeat_interleave(groups, 2)[:, keys, heads] for x in whole[1:])
            first = full_keep_map(*(len(q), len(heads), q.shape[1], k.shape[1]), case.head_dim, q.dtype, device)
            keep = maps.get(split, first)
            expected, margins = reference.decisions(q, k, keep, None, None, threshold, case.scale)
            maps[split] = pack_keep_map(layer.keep_map(split))
            unsure = (margins - RING_THRESHOLD).abs() <= score_rounding(q, k, case.scale)
            assert unsure.sum() <= max(1.0, 0.01 * float((margins > -torch.inf).sum()))
            differs = unpack_keep_map(maps[split] ^ expected, margins.shape[-1])
            assert not (differs & ~unsure).any()
            visited = pack_keep_map(margins > -torch.inf)
            part = reference.attention(q, k, v, visited, None, case.scale)
            outs.append(part[0])
            lses.append(part[1])
        exact = reference.merge_attention(outs, lses)
        tokens = gather_sequence(out, ranks, case.query_len)[:, rows, heads]
        torch.testing.assert_close(
            (tokens, gather_sequence(lse, ranks, case.query_len, dim=2)[:, heads, rows]),
            (exact[0].to(q.dtype), exact[1].float()),
            atol=1e-5 if device == "cpu" else 2e-2,
            rtol=0,
        )
    return float(layer.skip_fraction())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ring", "ulysses", "case"), [(2, 1, RAGGED), (4, 1, LONG), (2, 2, LONG)], ids=str)
def test_each_split_of_a_ring_follows_the_oracle(device: str, ring: int, ulysses: int, case: Case) -> None:
    skipped = run_on_ranks(ring * ulysses, device, _like_the_oracle, device, ring, ulysses, case)
    assert sum(skipped) / len(skipped) > 0.1, "the inputs are meant to skip something"


def _ranges_across_splits(device: str, as_tensors: bool) -> list[float]:
    mesh = mesh_of(device, 2, 1)
    ranks = sequence_mesh(mesh, "test")
    layer = DistributedLiteAttention(mesh, threshold=-torch.inf)
    case = Case(batch=2, query_len=512, kv_len=512, heads=2)
    q, k, v = _passes(case, device, 1)[0]
    must_do: Any = [[150, 160]]  # tile 1, in the first split
    must_skip: Any = [[100, 400]]  # wholly tiles 1 and 2, one in each split
    queries: Any = [[250, 260]]  # query tiles 3 and 4, one in each block
    kv_lens = torch.tensor([512, 400], dtype=torch.int32, device=device)
    fraction = torch.ones((), device=device)
    if as_tensors:
        must_do, must_skip, queries = (torch.tensor(x, device=device) for x in (must_do, must_skip, queries))
    else:
        must_do, must_skip, queries = must_do[0], must_skip[0], queries[0]
    out, lse = layer(
        *_shards((q, k, v), ranks),
        return_softmax_lse=True,
        must_do_list=must_do,
        must_skip_list=must_skip,
        must_do_queries=queries,
        kv_lens=kv_lens,
        skip_fraction_out=fraction,
    )
    keep = torch.ones(2, 2, 8, 4, dtype=torch.bool, device=device)
    keep[..., 2] = False
    keep[:, :, 3:5] = True
    out, lse = gather_sequence(out, ranks), gather_sequence(lse, ranks, dim=2)
    check_attention(out.contiguous(), lse.contiguous(), q, k, v, pack_keep_map(keep), kv_lens, case.scale)
    return [float(fraction), float(1 - keep.float().mean())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_ranges_and_lengths_count_in_tokens_of_the_whole_sequence(device: str, as_tensors: bool) -> None:
    for fraction, expected in run_on_ranks(2, device, _ranges_across_splits, device, as_tensors):
        assert fraction == pytest.approx(expected)


def _far_positions() -> None:
    mesh = mesh_of("cpu", 2, 1)
    q, k, v = _passes(CASE, "cpu", 1)[0]
    layer = DistributedLiteAttention(mesh, threshold=-torch.inf)
    local = _shards((q, k, v), sequence_mesh(mesh, "test"))
    for dtype in (torch.int32, torch.int64):
        farthest = torch.iinfo(dtype)
        for skipped, seen in (([farthest.min, 256], slice(256, None)), ([256, farthest.max], slice(256))):
            out, lse = layer(
                *local, return_softmax_lse=True, must_skip_list=torch.tensor([skipped], dtype=dtype).flip(1)
            )
            ranks = sequence_mesh(mesh, "test")
            expected = attention(q, k[:, seen], v[:, seen])
            actual = gather_sequence(out, ranks), gather_sequence(lse, ranks, dim=2)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_positions_are_clipped_however_far_they_are() -> None:
    run_on_ranks(2, "cpu", _far_positions)


def _in_a_transform(ring: int, ulysses: int) -> list[str]:
    mesh = mesh_of("cpu", ring, ulysses)
    inputs = _shards(_passes(CASE, "cpu", 1)[0], sequence_mesh(mesh, "test"))
    texts = []
    for enabled, place in itertools.product([True, False], range(3)):
        layer = DistributedLiteAttention(mesh, enabled, threshold=THRESHOLD)

        def attend(x: Tensor, layer: DistributedLiteAttention = layer, place: int = place) -> Any:
            return layer(*inputs[:place], x, *inputs[place + 1 :])

        x = inputs[place]

        def dual(attend: Any = attend, x: Tensor = x) -> None:
            with forward_ad.dual_level():
                attend(forward_ad.make_dual(x, x))

        for attempt in (
            dual,
            lambda attend=attend, x=x: torch.func.jvp(attend, (x,), (x,)),
            lambda attend=attend, x=x: torch.func.vmap(attend)(torch.stack([x, x])),
        ):
            with pytest.raises(NotImplementedError, match=r".") as raised:
                attempt()
            texts.append(str(raised.value).partition(" has ")[0])
            assert not any(split.used_branches() for split in layer.states.splits)  # type: ignore[operator]
    return texts


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1)])
def test_transforms_are_refused_by_name_before_a_pass_counts(ring: int, ulysses: int) -> None:
    named = [f"DistributedLiteAttention: {name}" for name in ("query", "key", "value") for _ in range(3)]
    assert run_on_ranks(2, "cpu", _in_a_transform, ring, ulysses) == [named * 2] * 2


def _another_length(ring: int, ulysses: int) -> list[float]:
    mesh = mesh_of("cpu", ring, ulysses)
    ranks = sequence_mesh(mesh, "test")
    layer, fraction = DistributedLiteAttention(mesh, threshold=RING_THRESHOLD), torch.ones(())
    fractions = []
    for length in (1500, 1500, 1499, 1499, 1500):
        layer(*_shards(_passes(LONG, "cpu", 1)[0], ranks), seq_len=length, skip_fraction_out=fraction)
        fractions.append(float(fraction))
    return fractions


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (4, 1), (2, 2)])
def test_a_sequence_of_another_length_starts_over_on_every_rank(ring: int, ulysses: int) -> None:
    for fractions in run_on_ranks(ring * ulysses, "cpu", _another_length, ring, ulysses):
        assert [fraction > 0 for fraction in fractions] == [False, True, False, True, False]


def _a_length_that_leaves_ranks_without_tokens(backend: str | None, dense_steps: int) -> list[list[float]]:
    """Skipped shares of this rank: in a pass, and told before it and after it."""
    mesh = mesh_of("cpu", 2, 1)
    ranks = sequence_mesh(mesh, "test")
    layer = DistributedLiteAttention(mesh, policy=SkipPolicy(threshold=RING_THRESHOLD, dense_steps=dense_steps))
    call = layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)
    x, fraction, shares = _passes(LONG, "cpu", 1)[0], torch.ones(()), []
    with torch.no_grad():
        for length in (1500, 1500, 700, 1500, 1500, 1500):
            before = float(layer.skip_fraction())
            call(*_shards(x, ranks), seq_len=length, skip_fraction_out=fraction)
            shares.append([before, float(fraction), float(layer.skip_fraction())])
    return shares


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("dense_steps", [0, 2])
def test_a_length_that_leaves_ranks_without_tokens_starts_over_on_them_too(
    backend: str | None, dense_steps: int
) -> None:
    shares = run_on_ranks(2, "cpu", _a_length_that_leaves_ranks_without_tokens, backend, dense_steps)
    for of_rank in shares:
        skips = [skipped > 0 for _, skipped, _ in of_rank]
        assert skips == ([False, True, False] if dense_steps == 0 else [False] * 3) + [False, dense_steps == 0, True]
        assert [before for before, _, _ in of_rank[1:]] == [after for _, _, after in of_rank[:-1]]
    assert shares[1][2] == [shares[1][1][2], 0, 0]  # no token there: nothing of the map of before counts


def _told_without_tokens() -> list[list[float]]:
    mesh = mesh_of("cpu", 2, 1)
    ranks = sequence_mesh(mesh, "test")
    x, fraction, shares = _passes(LONG, "cpu", 1)[0], torch.ones(()), []
    for skipping in (True, False):
        for told in ({"start_full": torch.tensor(True)}, {"generation": torch.tensor(2)}, {}):
            layer = DistributedLiteAttention(mesh, threshold=RING_THRESHOLD)
            layer(*_shards(x, ranks), generation=torch.tensor(1))
            layer.enable_skip_optimization(skipping)
            layer(*_shards(x, ranks), seq_len=700, **told)
            layer.enable_skip_optimization()
            layer(*_shards(x, ranks), skip_fraction_out=fraction)
            shares.append(float(fraction))
    return shares


def test_ranks_without_tokens_are_told_as_the_others() -> None:
    for shares in run_on_ranks(2, "cpu", _told_without_tokens):
        assert [share > 0 for share in shares] == [False, False, False, False, False, True]


def _a_rank_without_tokens() -> None:
    mesh = mesh_of("cpu", 4, 1)
    ranks = sequence_mesh(mesh, "test")
    case = Case(query_len=5, kv_len=5, heads=1, kv_heads=1, head_dim=8)
    inputs = _passes(case, "cpu", 1)[0]
    local = tuple(torch.cat([x, x.new_zeros(1, 3, 1, 8)], 1)[:, 2 * ranks.shard :][:, :2] for x in inputs)
    layer = DistributedLiteAttention(mesh)
    out, lse = layer(*local, return_softmax_lse=True, seq_len=5)
    out, lse = gather_sequence(out, ranks), gather_sequence(lse, ranks, dim=2)
    check_attention(out[:, :5].contiguous(), lse[:, :, :5].contiguous(), *inputs, None, None, case.scale)
    assert not out[:, 5:].any()
    assert (lse[:, :, 5:] == -torch.inf).all()


def test_ranks_of_padding_alone_take_part() -> None:
    run_on_ranks(4, "cpu", _a_rank_without_tokens)


def _refused_without_tokens() -> list[str]:
    layer = DistributedLiteAttention(mesh_of("cpu", 2, 1))
    strided = [torch.randn(1, 8, 2, 16)[..., ::2] for _ in range(3)]
    x = [each.contiguous() for each in strided]
    texts = []
    for inputs, scale in ((x, 0.0), (x, -1.0), (x, math.inf), (strided, None)):
        with pytest.raises(RuntimeError, match=r"scale is|stride 2 in its last dimension") as raised:
            layer(*inputs, scale=scale, seq_len=5)
        texts.append(str(raised.value).partition(":")[2])
    layer(*x, seq_len=5)
    return texts


def test_what_the_operator_refuses_raises_on_a_rank_without_tokens_too() -> None:
    one, other = run_on_ranks(2, "cpu", _refused_without_tokens)
    assert one == other


def _balanced(device: str, ring: int, ulysses: int, head_chunks: int, kv_heads: int) -> tuple[float, float, float]:
    mesh = mesh_of(device, ring, ulysses)
    ranks = sequence_mesh(mesh, "test")
    case = Case(query_len=640, kv_len=640, heads=8, kv_heads=kv_heads)
    # Sharper and sharper heads: those of the first rank skip least.
    thresholds = [-30.0, -25.0, -20.0, -15.0, -6.0, -4.0, -2.0, -1.0]
    moved, as_it_came = (
        DistributedLiteAttention(mesh, threshold=thresholds, head_chunks=head_chunks) for _ in range(2)
    )
    balance = None
    for step, inputs in enumerate(_passes(case, device, 5)):
        local = _shards(inputs, ranks)
        assert torch.equal(moved(*local), as_it_came(*local)), step
        if step in (2, 3):
            balance = moved.balance_heads() if balance is None else balance
            moved.balance_heads()  # nothing or little left to do
            moved.set_threshold(thresholds)
    assert balance is not None
    maps = torch.zeros(8, device=device)
    for layer, sign in ((moved, 1), (as_it_came, -1)):
        for split in range(ring):
            kept = layer.keep_map(split).sum((0, 2, 3)).float()
            maps.index_add_(0, torch.tensor(layer.local_heads(8), device=device), sign * kept)
    return balance.before, balance.after, float(gather_sequence(maps.view(1, -1), ranks, dim=0).sum(0).abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ring", "ulysses", "head_chunks", "kv_heads"), [(1, 2, 1, 8), (2, 2, 2, 8), (1, 2, 1, 4)])
def test_balanced_heads_take_their_maps_and_thresholds_along(
    device: str, ring: int, ulysses: int, head_chunks: int, kv_heads: int
) -> None:
    answers = run_on_ranks(ring * ulysses, device, _balanced, device, ring, ulysses, head_chunks, kv_heads)
    assert len(set(answers)) == 1, "ranks disagree"
    before, after, difference = answers[0]
    assert before > 0.1
    assert after < 0.5 * before
    assert difference == 0


def _settings_of_branches() -> None:
    mesh = mesh_of("cpu", 1, 2)
    ranks = sequence_mesh(mesh, "test")
    shared, alone = DistributedLiteAttention(mesh, threshold=THRESHOLD), LiteAttention(threshold=THRESHOLD)
    *inputs, last = _passes(CASE, "cpu", 4)
    for branch in (0, 1):
        for x in inputs:
            shared(*_shards(x, ranks), branch=branch)
            alone(*x, branch=branch)
    for layer in (shared, alone):
        layer.reset_skip_state(1)
    for branch, least in ((0, 0.1), (1, 0.0)):
        fraction = all_gather(shared.skip_fraction(branch).view(1), ranks.ulysses, 0).mean()
        torch.testing.assert_close(fraction, alone.skip_fraction(branch))
        assert fraction > least or least == fraction == 0
    before = shared.keep_map(branch=0)
    shared.enable_skip_optimization(False)
    dense = gather_sequence(shared(*_shards(last, ranks)), ranks)
    assert torch.equal(dense, attention(*last)[0])
    assert torch.equal(shared.keep_map(branch=0), before)
    never = DistributedLiteAttention(mesh, False, threshold=0.0)
    for _ in range(2):
        assert torch.equal(gather_sequence(never(*_shards(last, ranks)), ranks), dense)


def test_branches_resets_and_switching_off_are_those_of_one_process() -> None:
    run_on_ranks(2, "cpu", _settings_of_branches)


def _fractions(ring: int, ulysses: int) -> tuple[float, float, float, float]:
    """(told in the pass, of the maps it used, told after it, of the maps it left)."""
    mesh = mesh_of("cpu", ring, ulysses)
    case = Case(query_len=1300, kv_len=1300, heads=3, kv_heads=3)
    layer = DistributedLiteAttention(mesh, threshold=RING_THRESHOLD, head_chunks=2 if ulysses == 1 else 1)
    fraction = torch.zeros(())
    used, left = 0.0, 0.0
    for inputs in _passes(case, "cpu"):
        used = left
        layer(*_shards(inputs, sequence_mesh(mesh, "test")), seq_len=1300, skip_fraction_out=fraction)
        left = float(1 - torch.cat([layer.keep_map(split).flatten() for split in range(ring)]).float().mean())
    return float(fraction), used, float(layer.skip_fraction()), left


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2)])
def test_the_share_of_skipped_tiles_is_that_of_all_maps_of_the_rank(ring: int, ulysses: int) -> None:
    for told, used, told_after, left in run_on_ranks(2, "cpu", _fractions, ring, ulysses):
        assert told == pytest.approx(used)
        assert told_after == pytest.approx(left)
        assert 0.05 < used < left


def _under_default_dtype(dtype: torch.dtype) -> None:
    mesh = mesh_of("cpu", 2, 1)
    ranks = sequence_mesh(mesh, "test")
    layer, expected = (DistributedLiteAttention(mesh, threshold=RING_THRESHOLD) for _ in range(2))
    fractions = torch.zeros(2, dtype=torch.float32).unbind()
    before = torch.get_default_dtype()
    for inputs in _passes(LONG, "cpu"):
        local = _shards(inputs, ranks)
        out = expected(*local, skip_fraction_out=fractions[0])
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(layer(*local, skip_fraction_out=fractions[1]), out)
            assert layer.skip_fraction() == expected.skip_fraction()
        finally:
            torch.set_default_dtype(before)
        assert fractions[0] == fractions[1]
    assert fractions[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    run_on_ranks(2, "cpu", _under_default_dtype, dtype)


def _branches_after_balancing() -> None:
    mesh = mesh_of("cpu", 1, 2)
    ranks = sequence_mesh(mesh, "test")
    thresholds = [-30.0, -25.0, -2.0, -1.0]
    moved, as_it_came = (DistributedLiteAttention(mesh, threshold=thresholds) for _ in range(2))
    versions = [split.layout_version for split in moved.states.splits]
    for step, inputs in enumerate(_passes(CASE, "cpu", 4)):
        local = _shards(inputs, ranks)
        for branch in (0, 3):
            assert torch.equal(moved(*local, branch=branch), as_it_came(*local, branch=branch))
        if step == 1:
            assert moved.balance_heads().before > 0.05
            assert [split.layout_version for split in moved.states.splits] > versions, "graphs are out of date"
    copied = copy.deepcopy(moved)
    versions = [split.layout_version for split in copied.states.splits]
    copied.half()
    assert [split.layout_version for split in copied.states.splits] == versions, "nothing has moved"
    copied.to_empty(device="cpu")
    assert [split.layout_version for split in copied.states.splits] > versions, "graphs read weights where they were"
    assert torch.equal(copied(*local, branch=7), as_it_came(*local, branch=7)), (
        "without a map, its heads in their places"
    )


def test_balancing_moves_the_maps_of_every_branch() -> None:
    run_on_ranks(2, "cpu", _branches_after_balancing)


def _dense_steps_after_balancing() -> None:
    mesh = mesh_of("cpu", 1, 2)
    ranks = sequence_mesh(mesh, "test")
    policy = SkipPolicy(threshold=(-30.0, -25.0, -2.0, -1.0), dense_steps=3)
    moved, as_it_came = (DistributedLiteAttention(mesh, policy=policy) for _ in range(2))
    full = []
    for step, inputs in enumerate(_passes(CASE, "cpu", 7)):
        local = _shards(inputs, ranks)
        for branch in (0, 2) if step < 4 else (0, 1, 2):  # branch 1 is in its dense steps when heads move
            assert torch.equal(moved(*local, branch=branch), as_it_came(*local, branch=branch)), (step, branch)
        full.append(float(as_it_came.skip_fraction(1)) == 0)
        if step == 4:
            for layer in (moved, as_it_came):
                layer.reset_skip_state(2)
            assert moved.balance_heads().before > 0.05
            assert moved.head_order.changed
            for split in moved.states.splits:
                assert split.state.passes.tolist()[:3] == [5, 1, 5]
                assert float(split.skip_fraction(2)) == 0
    assert full[4:6] == [True, True]


def test_balancing_leaves_dense_steps_and_resets_alone() -> None:
    run_on_ranks(2, "cpu", _dense_steps_after_balancing)


def _balanced_for_nothing() -> None:
    mesh = mesh_of("cpu", 1, 2)
    layer = DistributedLiteAttention(mesh, threshold=[-30.0, -1.0])
    for inputs in _passes(Case(query_len=512, kv_len=512, heads=2), "cpu"):
        layer(*_shards(inputs, sequence_mesh(mesh, "test")))
    balance = layer.balance_heads()
    assert balance.before == balance.after > 0.05, "a head each cannot be shared better"
    assert layer.local_heads(2) == [sequence_mesh(mesh, "test").shard]
    assert not layer.head_order.changed


def test_heads_stay_where_moving_them_would_not_help() -> None:
    run_on_ranks(2, "cpu", _balanced_for_nothing)


def _compiled(backend: str, ring: int, ulysses: int) -> tuple[int, float]:
    torch._dynamo.reset()
    mesh = mesh_of("cpu", ring, ulysses)
    ranks = sequence_mesh(mesh, "test")
    eager, traced = (DistributedLiteAttention(mesh, threshold=THRESHOLD, head_chunks=2) for _ in range(2))
    counter = CompileCounter()
    compiled = torch.compile(traced, fullgraph=True, backend=counter if backend == "count" else backend)
    skipped = 0.0
    with torch.no_grad():
        for step, inputs in enumerate(_passes(CASE, "cpu", 6)):
            local = _shards(inputs, ranks)
            torch.testing.assert_close(compiled(*local), eager(*local), atol=1e-6, rtol=1e-6)
            for split in range(ring):
                assert torch.equal(traced.keep_map(split), eager.keep_map(split))
            skipped = max(skipped, float(traced.skip_fraction()))
            for layer in (eager, traced):
                if step == 2:
                    layer.set_threshold(-3.0)
                if step == 3:
                    layer.reset_skip_state()
    return counter.frame_count, skipped


def _lengths_in_a_trace() -> None:
    torch._dynamo.reset()
    mesh = mesh_of("cpu", 2, 1)
    local = _shards(_passes(CASE, "cpu", 1)[0], sequence_mesh(mesh, "test"))
    eager, compiled = DistributedLiteAttention(mesh), torch.compile(DistributedLiteAttention(mesh), backend="eager")
    for length, fits in ((512, True), (100, True), (513, False), (-1, False), (-(2**31), False)):
        kv_lens = torch.tensor([length], dtype=torch.int32)
        if fits:
            assert torch.equal(compiled(*local, kv_lens=kv_lens), eager(*local, kv_lens=kv_lens))
        else:
            with pytest.raises(RuntimeError, match="DistributedLiteAttention: kv_lens has an entry that is out of"):
                compiled(*local, kv_lens=kv_lens)


def test_lengths_out_of_range_are_refused_in_a_trace_too() -> None:
    run_on_ranks(2, "cpu", _lengths_in_a_trace)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1)])
def test_one_graph_for_all_steps(ring: int, ulysses: int) -> None:
    for graphs, skipped in run_on_ranks(2, "cpu", _compiled, "count", ring, ulysses):
        assert graphs == 1
        assert skipped > 0.1


def test_inductor_gives_the_results_and_the_state_of_eager() -> None:
    for _, skipped in run_on_ranks(4, "cpu", _compiled, "inductor", 2, 2):
        assert skipped > 0.1


def _errors() -> str:
    mesh = mesh_of("cpu", 1, 2)
    layer = DistributedLiteAttention(mesh)
    q, kv = torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 2, 8)
    calls = {
        "mesh": lambda: DistributedLiteAttention("cpu"),  # type: ignore[arg-type]
        "head_chunks type": lambda: DistributedLiteAttention(mesh, head_chunks=True),
        "head_chunks": lambda: DistributedLiteAttention(mesh, head_chunks=0),
        "max_batch_size": lambda: DistributedLiteAttention(mesh, max_batch_size=0),
        "enable_skipping": lambda: DistributedLiteAttention(mesh, 1),  # type: ignore[arg-type]
        "threshold": lambda: DistributedLiteAttention(mesh, threshold=1.0),
        "policy and threshold": lambda: DistributedLiteAttention(mesh, threshold=-1.0, policy=SkipPolicy()),
        "thresholds": lambda: DistributedLiteAttention(mesh, threshold=[-1.0]),
        "query": lambda: layer("q", kv, kv),
        "dimensions": lambda: layer(q[0], kv, kv),
        "key": lambda: layer(q, kv[:, :4], kv),
        "value": lambda: layer(q, kv, kv[:, :4]),
        "kv_heads": lambda: layer(q, *[torch.zeros(1, 6, 3, 8)] * 2),
        "heads": lambda: layer(*[torch.zeros(1, 6, 1, 8)] * 3),
        "seq_len": lambda: layer(q, kv, kv, seq_len=13),
        "must_do": lambda: layer(q, kv, kv, must_do_list=[0, 13]),
        "must_skip": lambda: layer(q, kv, kv, must_skip_list="0"),
        "balance": lambda: layer.balance_heads(),
        "dtypes": lambda: layer(q, kv.half(), kv.half()),
        "no token": lambda: layer(q[:, :0], kv[:, :0], kv[:, :0]),
        "kv tokens": lambda: layer(q, *[torch.zeros(1, 4, 2, 8)] * 2),
        "kv_lens": lambda: layer(q, kv, kv, kv_lens=torch.tensor([5])),
        "more keys than there are": lambda: layer(q, kv, kv, kv_lens=torch.tensor([10**6], dtype=torch.int32)),
        "fewer than none": lambda: layer(q, kv, kv, kv_lens=torch.tensor([-1], dtype=torch.int32)),
        "seq_len type": lambda: layer(q, kv, kv, seq_len=True),
        "skip_fraction_out": lambda: layer(q, kv, kv, skip_fraction_out=0.0),
        "threshold of other heads": lambda: DistributedLiteAttention(mesh, threshold=[-1.0] * 6)(q, kv, kv),
        "split": lambda: layer.keep_map(1),
        "gather": lambda: gather_sequence(q, sequence_mesh(mesh, "test"), 13),
    }
    odd = Case(query_len=256, kv_len=256, heads=5, kv_heads=5, head_dim=8)
    unequal = DistributedLiteAttention(mesh)
    unequal(*_shards(_passes(odd, "cpu", 1)[0], sequence_mesh(mesh, "test")))
    balanced = DistributedLiteAttention(mesh, threshold=[-30.0, -20.0, -1.0, -1.0])
    for inputs in _passes(CASE, "cpu", 3):
        balanced(*_shards(inputs, sequence_mesh(mesh, "test")))
    balanced.balance_heads()
    calls |= {
        "balance unequal heads": lambda: unequal.balance_heads(),
        "map of text": lambda: balanced.set_keep_map("map"),  # type: ignore[arg-type]
        "map of int": lambda: balanced.set_keep_map(torch.ones(1, 1, 1, 1, dtype=torch.int32)),
        "map of other heads": lambda: balanced.set_keep_map(torch.ones(1, 7, 4, 2, dtype=torch.bool)),
        "threshold after balancing": lambda: balanced.set_threshold([-1.0] * 6),
        "heads after balancing": lambda: balanced(q, kv, kv),
    }
    return report(calls)


def test_errors() -> None:
    text, same = run_on_ranks(2, "cpu", _errors)
    assert text == same
    assert_expected_inline(
        text,
        """\
mesh -> TypeError: DistributedLiteAttention: mesh has type str, expected a DeviceMesh
head_chunks type -> TypeError: DistributedLiteAttention: head_chunks has type bool, expected an int
head_chunks -> ValueError: DistributedLiteAttention: head_chunks is 0, expected at least 1
max_batch_size -> ValueError: DistributedLiteAttention: max_batch_size is 0, expected at least 1
enable_skipping -> TypeError: DistributedLiteAttention: enable_skipping has type int, expected a bool
threshold -> ValueError: DistributedLiteAttention: threshold is 1.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG
policy and threshold -> ValueError: DistributedLiteAttention: policy and threshold are given, expected one or the other
thresholds -> ValueError: DistributedLiteAttention: threshold has 1 values, expected at least 2: 2 ranks along 'ulysses' times 1 head_chunks
query -> TypeError: DistributedLiteAttention: query has type str, expected a tensor
dimensions -> ValueError: DistributedLiteAttention: query has 3 dimensions, expected 4: [batch, length, heads, head_dim]
key -> ValueError: DistributedLiteAttention: value has shape [1, 6, 2, 8], expected key's shape, [1, 4, 2, 8]
value -> ValueError: DistributedLiteAttention: value has shape [1, 4, 2, 8], expected key's shape, [1, 6, 2, 8]
kv_heads -> ValueError: DistributedLiteAttention: key has 3 heads, expected a divisor of query's 4
heads -> ValueError: DistributedLiteAttention: query has 1 heads, expected at least 2: 2 ranks along 'ulysses' times 1 head_chunks
seq_len -> ValueError: DistributedLiteAttention: seq_len is 13, expected 1 to 12, the tokens of all shards
must_do -> ValueError: DistributedLiteAttention: must_do_list[1] is 13, expected at most the number of keys, 12
must_skip -> TypeError: DistributedLiteAttention: must_skip_list has type str, expected a list of ints or an integer tensor
balance -> RuntimeError: DistributedLiteAttention: balance_heads without maps on every rank, expected a skipping pass before
dtypes -> TypeError: DistributedLiteAttention: key has dtype torch.float16, expected torch.float32, query's
no token -> ValueError: DistributedLiteAttention: query has shape [1, 0, 4, 8], expected no size of 0
kv tokens -> ValueError: DistributedLiteAttention: key has 4 tokens, expected 6 like query
kv_lens -> TypeError: DistributedLiteAttention: kv_lens has dtype torch.int64, expected torch.int32
more keys than there are -> ValueError: DistributedLiteAttention: kv_lens[0] is 1000000, expected 0 to 12
fewer than none -> ValueError: DistributedLiteAttention: kv_lens[0] is -1, expected 0 to 12
seq_len type -> TypeError: DistributedLiteAttention: seq_len has type bool, expected an int
skip_fraction_out -> TypeError: DistributedLiteAttention: skip_fraction_out has type float, expected a tensor
threshold of other heads -> ValueError: DistributedLiteAttention: threshold has 6 values, expected 4, one per head of query
split -> ValueError: DistributedLiteAttention: split_idx is 1, expected 0 to 0
gather -> ValueError: gather_sequence: seq_len is 13, expected 0 to 12, the tokens of all shards
balance unequal heads -> ValueError: DistributedLiteAttention: balance_heads with 5 heads, expected a multiple of 2, so that every rank keeps as many
map of text -> TypeError: set_keep_map: keep_map has type str, expected a tensor
map of int -> TypeError: set_keep_map: keep_map has dtype torch.int32, expected torch.bool
map of other heads -> ValueError: set_keep_map: keep_map has shape [1, 7, 4, 2], expected [batch, 2, query_tiles, kv_tiles] or sizes of 1
threshold after balancing -> ValueError: DistributedLiteAttention: threshold has 6 values, expected 4, one per head as when balance_heads() was called
heads after balancing -> ValueError: DistributedLiteAttention: heads of query, and of those for each key head that is sent, are (4, 2), expected (4, 1) as when balance_heads() was called""",
    )


def _loaded_from_each(ring: int, ulysses: int) -> list[bool]:
    mesh = mesh_of("cpu", ring, ulysses)
    layer = DistributedLiteAttention(mesh, threshold=[-1.0] * 4)
    assert copy.deepcopy(layer).ranks == copy.copy(layer).ranks == layer.ranks
    sent: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(sent, pickle.dumps(layer))
    refused = []
    for whole in sent:
        is_own = whole == sent[dist.get_rank()]
        with nullcontext() if is_own else pytest.raises(RuntimeError, match="RankGroup: a layer was loaded"):
            assert pickle.loads(whole).ranks == layer.ranks
        refused.append(not is_own)
    return refused


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1), (2, 2)])
def test_a_pickled_layer_is_of_the_rank_that_made_it(ring: int, ulysses: int) -> None:
    for rank, refused in enumerate(run_on_ranks(ring * ulysses, "cpu", _loaded_from_each, ring, ulysses)):
        assert refused == [other != rank for other in range(ring * ulysses)]


def _policies(policy: SkipPolicy) -> list[SkipPolicy]:
    layer = DistributedLiteAttention(mesh_of("cpu", 1, 2), policy=policy)
    return [layer.policy, *(state.policy for state in layer.states.splits)]  # type: ignore[misc]


def test_ranks_are_told_the_whole_policy_with_the_thresholds_of_their_heads() -> None:
    policy = SkipPolicy(threshold=(-1.0, -2.0, -3.0, -4.0), dense_steps=3, enabled=False)
    for rank, policies in enumerate(run_on_ranks(2, "cpu", _policies, policy)):
        own = policy.threshold[2 * rank : 2 * rank + 2]  # type: ignore[index]
        assert policies == [policy, dataclasses.replace(policy, threshold=own)]


def _thresholds_of_copies(head_chunks: int) -> list[Any]:
    layer = DistributedLiteAttention(mesh_of("cpu", 1, 2), threshold=-4.0, head_chunks=head_chunks)
    copies = layer, copy.copy(layer), copy.deepcopy(layer)
    copies[1].set_threshold([-1.0, -2.0, -3.0, -4.0])
    return [one.threshold for one in copies] + [state.threshold for state in layer.states.splits]


@pytest.mark.parametrize("head_chunks", [1, 2])
def test_a_shallow_copy_shares_its_thresholds(head_chunks: int) -> None:
    for rank, (original, shallow, deep, *of_turns) in enumerate(
        run_on_ranks(2, "cpu", _thresholds_of_copies, head_chunks)
    ):
        assert original == shallow == (-1.0, -2.0, -3.0, -4.0)
        assert deep == -4.0
        assert len({value for of_turn in of_turns for value in of_turn}) == 2, rank


def _walked() -> None:
    layer = DistributedLiteAttention(mesh_of("cpu", 2, 1), threshold=-4.0)
    found = [part for part in layer.modules() if isinstance(part, LiteAttention)]
    for setting in (*(part.set_threshold for part in found), layer.states.set_threshold):
        with pytest.raises(RuntimeError, match=r"set_threshold: .* is a part of a DistributedLiteAttention"):
            setting(-0.5)
    for part in found:
        part.enable_skip_optimization(False)
        part.reset_skip_state()
    assert [each.policy for each in (layer, *found)] == 3 * [SkipPolicy(threshold=-4.0, enabled=False)]
    layer.set_threshold(-0.5)
    assert {each.threshold for each in (layer, *found, *copy.deepcopy(layer).states.splits)} == {-0.5}


def test_the_states_in_a_layer_are_not_told_a_threshold_that_it_does_not_know() -> None:
    run_on_ranks(2, "cpu", _walked)


def _fails_at(owner: Any, name: str, call: int) -> Any:
    """Let the function raise for want of memory at its so-manieth call; a context."""
    real, calls = getattr(owner, name), itertools.count(1)

    def function(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **options)

    return mock.patch.object(owner, name, function)


def _half_a_pass() -> None:
    mesh, told = mesh_of("cpu", 1, 2), torch.tensor(5)
    ranks = sequence_mesh(mesh, "test")
    layer = DistributedLiteAttention(mesh, threshold=-2.0, head_chunks=2)
    states = [split.state for split in layer.states.splits]
    first, second = (_shards(inputs, ranks) for inputs in _passes(CASE, "cpu", 2))
    for failure in (_fails_at(ops, "skip_attention", 2), _fails_at(SkipState, "_room_made_for", 1)):
        with failure, pytest.raises(torch.OutOfMemoryError):
            layer(*first)
        assert not any(state.owners() for state in states)
    with _fails_at(SkipState, "_room_made_for", 2), pytest.raises(torch.OutOfMemoryError):
        layer(*first)
    assert layer.skip_fraction() == 0
    assert not any(state.used_branches() for state in states)
    layer(*first, generation=told)
    before = layer.keep_map()
    assert not before.all()
    with torch.inference_mode():
        cannot_be_written = torch.zeros(())
    with pytest.raises(ValueError, match="DistributedLiteAttention: skip_fraction_out was made in"):
        layer(*second, skip_fraction_out=cannot_be_written)
    for enabled in (True, False):
        layer.enable_skip_optimization(enabled)
        name = "skip_attention" if enabled else "attention"
        with _fails_at(ops, name, 2), pytest.raises(torch.OutOfMemoryError):
            layer(*second, generation=told + 1)
        assert torch.equal(layer.keep_map(), before)
    layer.enable_skip_optimization()
    expected = copy.deepcopy(layer)(*second, generation=told)
    assert torch.equal(layer(*second, generation=told), expected)


def test_a_pass_that_fails_between_the_turns_is_remembered_in_none() -> None:
    run_on_ranks(2, "cpu", _half_a_pass)


def _half_balanced(ring: int, ulysses: int, head_chunks: int) -> int:
    mesh = mesh_of("cpu", ring, ulysses)
    ranks = sequence_mesh(mesh, "test")
    case = Case(query_len=640, kv_len=640, heads=8, kv_heads=8)
    thresholds = [-30.0, -25.0, -20.0, -15.0, -6.0, -4.0, -2.0, -1.0]
    layer = DistributedLiteAttention(mesh, threshold=thresholds, head_chunks=head_chunks)
    *first, last = (_shards(inputs, ranks) for inputs in _passes(case, "cpu", 3))
    for inputs in first:
        layer(*inputs)
    expected = copy.deepcopy(layer)(*last)
    failures = 0
    for call in itertools.count(1):
        failure = _fails_at(distributed, "all_gather", call) if call > 1 else _fails_at(HeadOrder, "planned", 1)
        with failure:
            try:
                layer.balance_heads()
                break
            except torch.OutOfMemoryError:
                failures += 1
        assert layer.local_heads(8) == list(range(8))[ranks.ulysses.rank * 8 // ulysses :][: 8 // ulysses]
        assert torch.equal(copy.deepcopy(layer)(*last), expected), call
    assert layer.local_heads(8) != list(range(8))[ranks.ulysses.rank * 8 // ulysses :][: 8 // ulysses]
    assert torch.equal(layer(*last), expected)
    return failures


@pytest.mark.parametrize(("ring", "ulysses", "head_chunks"), [(1, 2, 1), (2, 2, 2)])
def test_balancing_that_fails_changes_nothing(ring: int, ulysses: int, head_chunks: int) -> None:
    assert min(run_on_ranks(ring * ulysses, "cpu", _half_balanced, ring, ulysses, head_chunks)) >= 2


def _balanced_after_export() -> None:
    mesh = mesh_of("cpu", 1, 2)
    ranks = sequence_mesh(mesh, "test")
    case = Case(query_len=640, kv_len=640, heads=8, kv_heads=8)
    layer = DistributedLiteAttention(mesh, threshold=[-30.0, -25.0, -20.0, -15.0, -6.0, -4.0, -2.0, -1.0])
    first, second, third = (_shards(inputs, ranks) for inputs in _passes(case, "cpu", 3))
    layer(*first)
    with exportable(layer):
        program = torch.export.export(layer, first).module()
    program(*second)
    own = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"balance_heads first called after torch.export, expected before"):
        layer.balance_heads()
    assert torch.equal(program(*third), copy.deepcopy(own)(*third))
    before, after = own.balance_heads()  # a copy shares nothing with the program
    assert after < before


def test_heads_are_not_moved_from_under_a_program() -> None:
    run_on_ranks(2, "cpu", _balanced_after_export)


def _chosen_map_after_a_reset() -> None:
    mesh, fraction = mesh_of("cpu", 1, 2), torch.zeros(())
    layer, told = DistributedLiteAttention(mesh, threshold=-math.inf, head_chunks=2), torch.tensor(5)
    inputs = _shards(_passes(CASE, "cpu", 1)[0], sequence_mesh(mesh, "test"))
    layer(*inputs, generation=told)
    layer.reset_skip_state()
    chosen = torch.rand(layer.keep_map().shape) < 0.5
    chosen[..., 0] = True
    layer.set_keep_map(chosen)
    announced = layer.skip_fraction()
    layer(*inputs, generation=told, skip_fraction_out=fraction)
    assert fraction == pytest.approx(float(announced)) == pytest.approx(1 - float(chosen.float().mean()))
    layer(*inputs, generation=told + 1, skip_fraction_out=fraction)
    assert fraction == 0


def test_a_chosen_map_is_of_the_generation_that_comes_next() -> None:
    run_on_ranks(2, "cpu", _chosen_map_after_a_reset)


def _one_rank_fails(rank_of_failure: int, seconds: float) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ulysses",))
    layer = DistributedLiteAttention(mesh)
    inputs = _shards(_passes(CASE, "cpu", 1)[0], sequence_mesh(mesh, "test"))
    start = time.monotonic()
    try:
        layer(*inputs, must_do_list=[0] if dist.get_rank() == rank_of_failure else None)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, time.monotonic() - start
    return "no error", time.monotonic() - start


def test_a_rank_that_raises_ends_the_others_by_their_timeout() -> None:
    waiting, failed = run_on_ranks(2, "cpu", _one_rank_fails, 1, 3.0)
    assert failed[0] == "ValueError"
    assert waiting[0] == "RuntimeError"
    assert 2.0 < waiting[1] < 30.0


def _computed_again_in_a_backward() -> tuple[str, bool]:
    layer, x = DistributedLiteAttention(mesh_of("cpu", 1, 2), threshold=-0.1), torch.zeros(1, requires_grad=True)
    inputs = _shards(_passes(CASE, "cpu", 1)[0], layer.ranks)
    out = checkpoint(lambda x: (layer(*inputs) + x).pow(3).sum(), x, use_reentrant=False)
    before = layer.keep_map()
    with pytest.raises(RuntimeError, match=r".") as raised:
        out.backward()
    return str(raised.value), torch.equal(layer.keep_map(), before)


def test_a_backward_does_not_run_a_pass_again() -> None:
    for said, unchanged in run_on_ranks(2, "cpu", _computed_again_in_a_backward):
        assert said.startswith("DistributedLiteAttention: called inside a backward pass")
        assert unchanged
