"""Checks of arguments that are no tensors, under torch.compile too, where sizes may be symbols."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention.ops.checks import equals_any, settled


def compare(x: Tensor, y: Tensor) -> tuple[bool, bool, Tensor]:
    same = equals_any(x.shape, (1, y.shape[0]), (y.shape[0], y.shape[0]))
    return same, equals_any(x.shape[0], None, 1, y.shape[0]), x + 1 if settled(x.shape[1] == y.shape[0]) else x


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_are_compared_by_value_also_while_they_are_symbols(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(compare, fullgraph=True, backend="eager", dynamic=dynamic)
    for x, y in (((7, 7), 7), ((5, 5), 5), ((1, 5), 5), ((1, 1), 1), ((4, 1), 1), ((3, 5), 5), ((5, 1), 5)):
        arguments = torch.zeros(x), torch.zeros(y)
        for ours, eager in zip(compiled(*arguments), compare(*arguments), strict=True):
            assert type(ours) is type(eager)
            assert ours.equal(eager) if isinstance(eager, Tensor) else ours is eager


def test_what_is_settled_guards_no_more_than_the_answer() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(compare, fullgraph=True, backend=counter, dynamic=True)
    for size in (5, 6, 9):
        compiled(torch.zeros(size, size), torch.zeros(size))
    assert counter.frame_count == 1
