"""Ranges of keys: how they are written, and which tiles they touch or hold."""

import pytest
import torch
from expecttest import assert_expected_inline

from lite_attention.maps.ranges import parse_ranges, tiles_inside, tiles_touched


def test_ranges_are_read_ascending_and_descending() -> None:
    assert parse_ranges([80, 60, 45, 40, 12, 2], 100) == [(60, 80), (40, 45), (2, 12)]
    assert parse_ranges([2, 12, 40, 45, 60, 100], 100) == [(2, 12), (40, 45), (60, 100)]
    assert parse_ranges((), 100) == []


@pytest.mark.parametrize(
    ("ranges", "touched", "inside"),
    [
        ([(0, 1)], [0], []),
        ([(0, 128)], [0], [0]),
        ([(127, 129)], [0, 1], []),
        ([(1, 256)], [0, 1], [1]),
        ([(0, 100), (100, 128)], [0], [0]),  # together they cover the tile
        ([(384, 500)], [3], [3]),  # all the keys of a ragged last tile
        ([(384, 499)], [3], []),
        ([(0, 500)], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([], [], []),
    ],
)
def test_must_do_rounds_outward_and_must_skip_inward(
    ranges: list[tuple[int, int]], touched: list[int], inside: list[int]
) -> None:
    assert tiles_touched(ranges, 500, 128).nonzero().flatten().tolist() == touched
    assert tiles_inside(ranges, 500, 128).nonzero().flatten().tolist() == inside
    as_tensor = torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)
    assert tiles_touched(as_tensor, 500, 128).nonzero().flatten().tolist() == touched
    assert tiles_inside(as_tensor.flip(-1), 500, 128).nonzero().flatten().tolist() == inside


def test_a_tensor_of_ranges_may_be_padded_and_reach_past_the_end() -> None:
    ranges = torch.tensor([[300, 9999], [0, 0], [77, 77]])
    assert tiles_touched(ranges, 500, 128).tolist() == [False, False, True, True]
    assert tiles_inside(ranges, 500, 128).tolist() == [False, False, False, True]


def error_text(kind: type[Exception], function: object, *arguments: object) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments)  # type: ignore[operator]
    return str(caught.value)


def test_bad_ranges_are_named() -> None:
    texts = [
        error_text(ValueError, parse_ranges, [0, 5, 7], 100),
        error_text(ValueError, parse_ranges, [0, 5, 7, 7], 100),
        error_text(ValueError, parse_ranges, [5, -1], 100),
        error_text(ValueError, parse_ranges, [0, 101], 100, "must_do_list"),
        error_text(TypeError, parse_ranges, [0, 5.0], 100),
        error_text(TypeError, parse_ranges, [True, 5], 100),
        error_text(ValueError, tiles_touched, torch.zeros(4), 100, 64),
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
ranges has 3 entries, expected an even number: [start, end, start, end, ...] (entry 2, 7, has no partner)
ranges[2:4] is [7, 7], an empty range
ranges[1] is -1, expected a position of at least 0
must_do_list[1] is 101, expected at most the number of keys, 100
ranges[1] is 5.0 of type float, expected an int
ranges[0] is True of type bool, expected an int
ranges has shape [4], expected [count, 2]""",
    )
