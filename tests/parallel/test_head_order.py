"""The order of heads as a buffer: what captured graphs read must stay where it is."""

from lite_attention.parallel.head_order import HeadOrder


def test_a_cast_or_a_move_to_where_it_is_keeps_the_buffer() -> None:
    order = HeadOrder("cpu")
    assert order.move([2, 3, 0, 1], 1), "the first change is more than data"
    read_by_graphs = order._head_at
    assert read_by_graphs is not None
    order.half().to("cpu")
    assert not order.move([1, 0, 2, 3], 1)
    assert order._head_at is read_by_graphs
    assert read_by_graphs.tolist() == [3, 2, 0, 1]


def test_memory_that_holds_nothing_gets_the_order_again() -> None:
    order = HeadOrder("cpu")
    order.move([2, 3, 0, 1], 1)
    order.to("meta").to_empty(device="cpu")
    assert order._head_at is not None
    assert order._head_at.tolist() == [2, 3, 0, 1]
