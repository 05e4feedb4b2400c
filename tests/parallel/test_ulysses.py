"""Which heads go where in which turn, and the way of the tokens there and home."""

import pytest
import torch

from lite_attention import attention
from lite_attention.parallel.mesh import RankGroup, sequence_mesh
from lite_attention.parallel.ring import blocks_of_ring
from lite_attention.parallel.shards import Block, block_of, gather_sequence, shard_sequence
from lite_attention.parallel.ulysses import HeadTurns, UlyssesPass
from support.ranks import mesh_of, run_on_ranks


@pytest.mark.parametrize(("heads", "ranks", "turns"), [(8, 2, 1), (8, 2, 2), (11, 3, 2), (5, 2, 2), (3, 3, 1)])
def test_every_head_goes_to_one_rank_in_one_turn_in_shares_as_equal_as_can_be(
    heads: int, ranks: int, turns: int
) -> None:
    spans = HeadTurns(RankGroup("", ranks, 0), turns).spans(heads)
    in_order = [range(*spans[turn][rank]) for rank in range(ranks) for turn in range(turns)]
    assert [head for share in in_order for head in share] == list(range(heads))
    of_ranks = [sum(map(len, in_order[rank * turns :][:turns])) for rank in range(ranks)]
    assert max(of_ranks) - min(of_ranks) <= 1
    for rank in range(ranks):
        own = HeadTurns(RankGroup("", ranks, rank), turns).of_rank(heads)
        assert (own.start, own.stop) == (in_order[rank * turns].start, in_order[rank * turns + turns - 1].stop)


def _there_and_home(turns: int, kv_heads: int) -> None:
    mesh = sequence_mesh(mesh_of("cpu", 1, 2), "test")
    random = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 50, heads, 16, generator=random) for heads in (8, kv_heads, kv_heads)]
    ulysses = UlyssesPass(HeadTurns(mesh.ulysses, turns), *(shard_sequence(x, mesh) for x in whole))
    for turn in range(turns):
        out, lse = attention(*ulysses.arrived(turn))
        ulysses.send_home(out, lse.transpose(1, 2).unsqueeze(-1))
    out, lse = (gather_sequence(x, mesh) for x in ulysses.returned())
    expected = attention(*whole)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse.squeeze(-1).transpose(1, 2), expected[1])


@pytest.mark.parametrize(("turns", "kv_heads"), [(1, 8), (2, 4), (4, 8)])
def test_any_attention_on_two_ranks_is_that_of_one(turns: int, kv_heads: int) -> None:
    run_on_ranks(2, "cpu", _there_and_home, turns, kv_heads)


def test_on_one_rank_nothing_is_copied() -> None:
    q = torch.randn(1, 10, 4, 8)
    ulysses = UlyssesPass(HeadTurns(RankGroup("", 1, 0)), q)
    (arrived,) = ulysses.arrived()
    assert arrived.data_ptr() == q.data_ptr()
    ulysses.send_home(arrived)
    assert ulysses.returned()[0] is arrived


def _round() -> list[tuple[int, float, float]]:
    ring = sequence_mesh(mesh_of("cpu", 4, 1), "test").ring
    key = torch.full((1, 3, 2, 4), float(ring.rank))
    return [(rank, float(k.mean()), float(v.mean())) for rank, k, v in blocks_of_ring(key, -key, ring)]


def test_every_block_comes_round_once_this_rank_s_own_first() -> None:
    for rank, seen in enumerate(run_on_ranks(4, "cpu", _round)):
        owners = [(rank - step) % 4 for step in range(4)]
        assert seen == [(owner, float(owner), -float(owner)) for owner in owners]


def test_a_block_has_the_tokens_that_are_no_padding() -> None:
    assert [block_of(rank, 4, 9) for rank in range(4)] == [Block(0, 4), Block(4, 4), Block(8, 1), Block(12, 0)]
