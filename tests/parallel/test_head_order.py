"""The order of heads: what captured graphs read must stay where it is, and is made where the heads are."""

import torch

from lite_attention.parallel.head_order import HeadOrder

CPU = torch.device("cpu")


def test_another_order_is_written_in_place() -> None:
    order = HeadOrder()
    assert order.take(order.planned([2, 3, 0, 1], 1, CPU)), "the first change is more than data"
    read_by_graphs = order._head_at
    assert read_by_graphs is not None
    assert not order.take(order.planned([1, 0, 2, 3], 1, CPU))
    assert order._head_at is read_by_graphs
    assert read_by_graphs.tolist() == [3, 2, 0, 1]


def test_heads_on_another_device_find_the_order_there() -> None:
    order = HeadOrder()
    order.take(order.planned([2, 3, 0, 1], 1, CPU))
    x = torch.arange(4.0).view(1, 1, 4, 1)
    elsewhere = x.to("meta")
    assert order.to_ranks(elsewhere, elsewhere, elsewhere)[0].device.type == "meta"
    assert [each.flatten().tolist() for each in order.to_ranks(x, x, x)] == [[2, 3, 0, 1]] * 3
    assert order.to_model(order.to_ranks(x, x, x)[0]).tolist() == x.tolist()
