"""Which heads go where in which turn, and the way of the tokens there and home."""

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention import attention
from lite_attention.parallel.mesh import RankGroup, sequence_mesh
from lite_attention.parallel.ring import blocks_of_ring
from lite_attention.parallel.shards import Block, block_of, gather_sequence, shard_sequence
from lite_attention.parallel.ulysses import HeadTurns, UlyssesPass
from support.inputs import report
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


def _misuse() -> str:
    group = sequence_mesh(mesh_of("cpu", 1, 2), "test").ulysses
    q, kv = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 8)

    def sent_home(turns: int, calls: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        ulysses = UlyssesPass(HeadTurns(group, turns), q, kv, kv)
        for turn in range(calls):
            ulysses.send_home(*(torch.zeros(shape) for shape in shapes[: 1 + turn]))
        return ulysses.returned()

    def there(x: torch.Tensor, *others: torch.Tensor) -> UlyssesPass:
        return UlyssesPass(HeadTurns(group), x, *others)

    of_turn = (1, 6, 2, 8)
    return report(
        {
            "key heads that ranks do not divide": lambda: there(
                torch.zeros(1, 3, 12, 8), *[torch.zeros(1, 3, 3, 8)] * 2
            ),
            "as many shares as key heads": lambda: UlyssesPass(HeadTurns(group, 4), q, kv, kv),
            "key heads that are no divisor": lambda: there(q, torch.zeros(1, 3, 6, 8)),
            "another dtype": lambda: there(q, kv.half()),
            "another length": lambda: there(q, kv[:, :2]),
            "dimensions": lambda: there(q[0]),
            "home too seldom": lambda: sent_home(2, 1, of_turn),
            "home too often": lambda: sent_home(1, 2, (1, 6, 4, 8), (1, 6, 4, 8)),
            "other results": lambda: sent_home(2, 2, of_turn, of_turn),
            "other heads": lambda: sent_home(1, 1, (1, 6, 8, 8)),
            "without padding": lambda: sent_home(1, 1, (1, 5, 4, 8)),
        }
    )


def test_misuse_is_named_on_every_rank() -> None:
    text, same = run_on_ranks(2, "cpu", _misuse)
    assert text == same
    assert_expected_inline(
        text,
        """\
key heads that ranks do not divide -> ValueError: HeadTurns: tensor 1 has 3 heads, expected the query's 12, or a divisor of them that the 2 shares of heads divide (2 ranks in 1 turns): repeat the heads of keys and values until they are (repeat_interleave)
as many shares as key heads -> ValueError: HeadTurns: tensor 1 has 4 heads, expected the query's 8, or a divisor of them that the 8 shares of heads divide (2 ranks in 4 turns): repeat the heads of keys and values until they are (repeat_interleave)
key heads that are no divisor -> ValueError: HeadTurns: tensor 1 has 6 heads, expected the query's 8, or a divisor of them that the 2 shares of heads divide (2 ranks in 1 turns): repeat the heads of keys and values until they are (repeat_interleave)
another dtype -> ValueError: UlyssesPass: tensor 1 has dtype torch.float16 on cpu, expected torch.float32 on cpu like the query
another length -> ValueError: UlyssesPass: tensor 1 has shape [1, 2, 4, 8], expected [1, 3, 4, 8] like the query
dimensions -> ValueError: UlyssesPass: tensor 0 has 3 dimensions, expected 4, [B, S_local, heads, D]
home too seldom -> RuntimeError: UlyssesPass: returned() after 1 calls of send_home, expected 2, one for each turn
home too often -> RuntimeError: UlyssesPass: send_home of turn 1, expected one call for each of the 1 turns
other results -> ValueError: UlyssesPass: send_home of 2 results, expected 1 as in turn 0
other heads -> ValueError: UlyssesPass: result 0 of turn 0 has shape [1, 6, 8, 8], expected [1, 6, 4, any]: all tokens, padding too, of this rank's heads
without padding -> ValueError: UlyssesPass: result 0 of turn 0 has shape [1, 5, 4, 8], expected [1, 6, 4, any]: all tokens, padding too, of this rank's heads""",
    )


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
