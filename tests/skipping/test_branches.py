"""Guidance branches: who is in which, in threads, asyncio tasks and compiled code."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lite_attention import LiteAttention, skip_branch
from lite_attention.ops.context import Scoped
from lite_attention.skipping.branches import MAX_BRANCHES, resolved_branch
from support.inputs import report
from support.passes import THRESHOLD, by_hand, kept, passes


def current() -> int:
    return resolved_branch(None, "test")


def in_threads(*functions: Callable[[], None]) -> None:
    """Run them at the same time; an error of one is raised here."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_the_outer_branch_comes_back_after_an_error() -> None:
    again = skip_branch(2)
    with skip_branch(1):
        with pytest.raises(KeyError), again:
            raise KeyError
        assert current() == 1
        with again, again:
            assert current() == 2
        assert current() == 1
    assert current() == 0


def test_threads_run_different_branches_at_the_same_time() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    streams = [passes(seed=seed) for seed in range(3)]
    turn = threading.Barrier(len(streams), timeout=60)
    shared = [skip_branch(branch) for branch in range(3)]

    def run(branch: int) -> None:
        for inputs in streams[branch]:
            with shared[branch], shared[(branch + 1) % 3], shared[branch]:  # an object that another thread is in too
                turn.wait()  # all have entered before any calls, and called before any leaves
                assert current() == branch
                layer(*inputs)
                turn.wait()
        assert current() == 0

    with skip_branch(4):
        in_threads(*(lambda branch=branch: run(branch) for branch in range(3)))  # type: ignore[misc]
        assert current() == 4
    for branch in range(3):
        assert torch.equal(kept(layer, branch), by_hand(streams[branch])[-1][2])


def test_asyncio_tasks_run_different_branches_at_the_same_time() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    streams = [passes(seed=seed) for seed in range(2)]

    async def run(branch: int) -> None:
        with skip_branch(branch):
            for inputs in streams[branch]:
                await asyncio.sleep(0)  # the other's turn
                layer(*inputs)
        assert current() == 5, "a task starts in the branch it is made in"

    async def both() -> None:
        with skip_branch(5):
            await asyncio.gather(run(0), run(1))

    asyncio.run(both())
    for branch in range(2):
        assert torch.equal(kept(layer, branch), by_hand(streams[branch])[-1][2])


def test_a_thread_starts_without_a_branch_unless_it_is_handed_on() -> None:
    seen = []
    with skip_branch(3):
        context = contextvars.copy_context()
        in_threads(lambda: seen.append(current()))
        in_threads(lambda: seen.append(context.run(current)))
    assert seen == [0, 3]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_is_compiled_once_a_branch_and_follows_it_in_every_thread() -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def add_branch(x: Tensor) -> Tensor:
        return x + current()

    results: list[list[float]] = [[], [], []]
    turn = threading.Barrier(2, timeout=60)

    def run(branch: int) -> None:
        for _ in range(3):
            with skip_branch(branch), torch.no_grad():
                turn.wait()
                results[branch].append(float(add_branch(torch.zeros(2))[0]))

    for branch in (1, 2):  # torch compiles in one thread at a time
        with skip_branch(branch):
            add_branch(torch.zeros(2))
    in_threads(lambda: run(1), lambda: run(2))
    assert results[1:] == [[1.0] * 3, [2.0] * 3]
    assert counter.frame_count == 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_branches_entered_in_a_graph_are_left_in_it() -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def nested(x: Tensor) -> list[Tensor]:
        outs = [x + current()]
        with skip_branch(1):
            outs.append(x + current())
            with skip_branch(2):
                outs.append(x + current())
            outs.append(x + current())
        return [*outs, x + current()]

    for outer in (0, 0, 3):
        with skip_branch(outer):
            assert [int(out) for out in nested(torch.tensor(0))] == [outer, 1, 2, 1, outer]
            assert current() == outer
    assert counter.frame_count == 2, "one for each branch around it"


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_block_that_breaks_the_graph_is_of_its_thread_alone() -> None:
    seen = []
    add = torch.compile(lambda x: x + current(), backend="aot_eager")

    @torch._dynamo.disable
    def meanwhile() -> None:
        seen.append(current())
        in_threads(lambda: seen.append(current()), lambda: seen.append(int(add(torch.tensor(0)))))

    @torch.compile(backend="aot_eager")
    def broken(x: Tensor, raises: bool) -> Tensor:
        with skip_branch(1), skip_branch(2):
            x = x + current()
            meanwhile()
            if raises:
                raise KeyError
            return x + current()

    assert int(broken(torch.tensor(0), False)) == 4
    assert (seen, current()) == ([2, 0, 0], 0)
    with pytest.raises(KeyError):
        broken(torch.tensor(0), True)
    assert (seen[3:], current()) == ([2, 0, 0], 0)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_block_that_a_graph_enters_and_does_not_leave_is_refused() -> None:
    @torch.compile(backend="aot_eager")
    def entered(x: Tensor) -> Tensor:
        skip_branch(5).__enter__()
        return x + current()

    assert int(entered(torch.tensor(0))) == 5
    assert_expected_inline(
        report({"current": current}),
        """current -> RuntimeError: lite_attention.skip_branch: compiled code entered the block of 5 and did not leave it in the same graph, expected `with` around the body, or the block outside of the compiled function""",
    )
    assert current() == 0


def test_a_scope_holds_what_it_was_given() -> None:
    scope: Scoped[str] = Scoped("test")
    assert scope.current is None
    with scope.having("outer"):
        with scope.having("inner"):
            assert scope.current == "inner"
        with pytest.raises(KeyError), scope.having("inner"):
            raise KeyError
        assert scope.current == "outer"
    assert scope.current is None


def test_every_branch_can_be_current() -> None:
    for branch in range(MAX_BRANCHES):
        with skip_branch(branch):
            assert current() == branch


def test_generators_that_yield_in_their_blocks_leave_none_behind() -> None:
    def stream(branch: int) -> Iterator[int]:
        with skip_branch(branch):
            while True:
                yield current()

    first, second = stream(1), stream(2)
    assert [next(first), next(second), next(first)] == [1, 2, 2], "a generator has no context of its own"
    with pytest.raises(RuntimeError, match="left the block of 1 where the innermost is that of 2"):
        first.close()  # type: ignore[attr-defined]
    second.close()  # type: ignore[attr-defined]
    assert current() == 0


def test_blocks_left_out_of_order_are_refused() -> None:
    outer, inner = skip_branch(1), skip_branch(2)

    def leave_outer() -> None:
        outer.__exit__(None, None, None)

    first = report({"in no block": leave_outer})
    outer.__enter__()
    with inner:
        second = report({"in another": leave_outer})
        assert current() == 2
    assert current() == 0, "a block that was left does not come back"
    assert_expected_inline(
        f"{first}\n{second}",
        """\
in no block -> RuntimeError: lite_attention.skip_branch: left the block of 1 where there is none, expected blocks to be left in the thread or task that entered them, the last one first
in another -> RuntimeError: lite_attention.skip_branch: left the block of 1 where the innermost is that of 2, expected blocks to be left in the thread or task that entered them, the last one first""",
    )
