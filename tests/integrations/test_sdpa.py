"""The door for models that call torch's scaled_dot_product_attention."""

import copy
import functools
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lite_attention import SkipPolicy, skip_branch
from lite_attention.integrations.sdpa import LiteSDPA
from support.inputs import report

HEADS, HEAD_DIM, TOKENS = 2, 32, 1000
WIDTH = HEADS * HEAD_DIM
LAYERS = r"blocks\.\d+"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.text = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        x = x + scaled_dot_product_attention(4 * q, 4 * k, v).transpose(1, 2).flatten(2)
        k, v = self.text(text).unflatten(-1, (2, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return x + scaled_dot_product_attention(q, k, value=v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Runs its blocks in an order that is an argument, so that the order of calls tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, order: tuple[int, ...] = (0, 1)) -> Tensor:
        for index in order:
            x = self.blocks[index](x, text)
        return x


def inputs(step: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ramp = torch.randn(1, 8, WIDTH, generator=random).repeat_interleave(TOKENS // 8, 1)
    noise = torch.randn(2, 1, TOKENS, WIDTH, generator=random)
    return ramp + 0.1 * noise[0] + 0.01 * step * noise[1], noise[0, :, :20]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def test_nothing_changes_when_nothing_is_dropped() -> None:
    model = Model()
    expected = model(*inputs())
    with LiteSDPA(model, LAYERS, threshold=-torch.inf):
        for _ in range(2):
            torch.testing.assert_close(model(*inputs()), expected, atol=1e-3, rtol=0)


def test_self_attention_skips_inside_the_context_and_only_there() -> None:
    model = Model()
    expected = model(*inputs(1))
    attention = LiteSDPA(model, LAYERS, threshold=-2.0)
    with attention:
        model(*inputs(0))
        skipping = model(*inputs(1))
    fractions = attention.skip_fraction()
    assert list(attention.layers) == ["blocks.0", "blocks.1"]
    assert (fractions > 0.1).all()
    assert not torch.equal(skipping, expected)
    assert torch.equal(model(*inputs(1)), expected), "outside the context, nothing of it is left"
    assert torch.equal(attention.skip_fraction(), fractions)
    assert not any("forward" in vars(module) for module in model.modules())
    with attention:
        model(*inputs(2))
    assert (attention.skip_fraction() >= fractions).all(), "it goes on where it was left"
    attention.reset()
    assert (attention.skip_fraction() == 0).all()


def test_state_belongs_to_the_module_and_not_to_the_order_of_calls() -> None:
    model, swapped = Model(), Model()
    attention, other = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(swapped, LAYERS, threshold=-2.0)
    x, text = inputs()
    with attention, other:
        for index in (0, 1):
            model.blocks[index](x, text)
        for index in (1, 0):
            swapped.blocks[index](x, text)
    for name, layer in attention.layers.items():
        assert torch.equal(layer.keep_map(), other.layers[name].keep_map())
    assert not torch.equal(attention.layers["blocks.0"].keep_map(), attention.layers["blocks.1"].keep_map())


def test_masked_causal_and_dropout_calls_stay_with_torch() -> None:
    class Odd(nn.Module):
        def forward(self, q: Tensor, kind: str) -> Tensor:
            mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
            given = {"mask": {"attn_mask": mask}, "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.5}}[kind]
            return scaled_dot_product_attention(q, q, q, **given)  # type: ignore[arg-type]

    model = nn.Sequential(Odd())
    q = torch.randn(1, HEADS, TOKENS, HEAD_DIM)
    with LiteSDPA(model, "0") as attention:
        for kind in ("mask", "causal", "dropout"):
            torch.manual_seed(1)
            inside = model[0](q, kind)
            torch.manual_seed(1)
            assert torch.equal(inside, Odd()(q, kind))
    with pytest.raises(RuntimeError, match="has no keep map yet"):
        attention.layers["0"].keep_map()


def test_branches_have_their_own_maps() -> None:
    model = Model()
    with LiteSDPA(model, LAYERS, threshold=-2.0) as attention:
        for step in range(2):
            model(*inputs(step))
            with skip_branch(1):
                model(*inputs(step, seed=1))
    layer = attention.layers["blocks.0"]
    assert not torch.equal(layer.keep_map(0), layer.keep_map(1))


def test_autocast_gives_attention_the_dtype_it_gives_torch() -> None:
    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs())
        with LiteSDPA(model, LAYERS, threshold=-torch.inf):
            out = model(*inputs())
    assert float((out - expected).norm() / expected.norm()) < 0.01


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = Model()
    with pytest.raises(IndexError), LiteSDPA(model, LAYERS):
        model(*inputs(), order=(7,))
    assert not any("forward" in vars(module) for module in model.modules())


def patched(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if {"forward", "__getstate__"} & vars(module).keys()]


def test_contexts_may_be_nested() -> None:
    model = Model()
    attention = LiteSDPA(model, LAYERS, threshold=-2.0)
    with attention:
        with attention:
            model(*inputs(0))
        model(*inputs(1))
    assert (attention.skip_fraction() > 0.1).all()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_contexts_of_one_model_may_be_left_in_any_order(order: tuple[int, int]) -> None:
    model = Model()
    doors = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(model, r"blocks\.1", threshold=-2.0)
    dense = model(*inputs(2))
    for door in doors:
        door.__enter__()
    model(*inputs(0))
    model(*inputs(1))
    first, last = (doors[index] for index in order)
    first.__exit__(None, None, None)
    fraction = first.skip_fraction()
    assert not torch.equal(model(*inputs(2)), dense), "the other one is still there"
    assert torch.equal(first.skip_fraction(), fraction)
    with first:
        model(*inputs(2))
    last.__exit__(None, None, None)
    assert torch.equal(model(*inputs(2)), dense)
    assert patched(model) == []


def test_what_others_put_in_place_of_a_forward_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    attention = LiteSDPA(model, LAYERS, threshold=-2.0)
    dense = model(*inputs(1))
    calls = []
    with attention:
        model(*inputs(0))
        ours = model.blocks[1].forward

        def theirs(*args: Tensor) -> Tensor:
            calls.append(len(args))
            return ours(*args)

        model.blocks[1].forward = theirs
    assert "LiteSDPA: Block: its forward was replaced by" in caplog.text
    assert patched(model) == ["blocks.1"]
    assert torch.equal(model(*inputs(1)), dense), "ours, which theirs calls, is as good as gone"
    assert calls == [2]
    with attention:
        assert not torch.equal(model(*inputs(1)), dense)
    assert model.blocks[1].forward is theirs


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_inside_are_models_of_their_own(how: Callable[[Any], Any]) -> None:
    model = Model()
    model.blocks[0].forward = functools.partial(Block.forward, model.blocks[0])  # as hooks of others do
    attention = LiteSDPA(model, LAYERS, threshold=-2.0)
    dense = model(*inputs(1))
    with attention:
        model(*inputs(0))
        twin = how(model)
        both_twins, other = how((model, attention))
        fraction = attention.skip_fraction()
        for copied in (twin, both_twins):
            assert patched(copied) == ["blocks.0"]
            assert copied.blocks[0].forward.args[0] is copied.blocks[0]
            assert torch.equal(copied(*inputs(1)), dense)
        assert not other.entered
        assert torch.equal(attention.skip_fraction(), fraction)
    with other:
        assert not torch.equal(both_twins(*inputs(1)), dense)
    assert patched(model) == patched(both_twins) == ["blocks.0"]


# Modules that make several calls in a step


class Twice(Block):
    """Makes two self-attention calls in one forward."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return super().forward(super().forward(x, text).roll(300, 1), text)


class Checkpointed(Model):
    reentrant = False

    def forward(self, x: Tensor, text: Tensor, order: tuple[int, ...] = (0, 1)) -> Tensor:
        for index in order:
            x = checkpoint(self.blocks[index], x, text, use_reentrant=self.reentrant)
        return x


class Reentrant(Checkpointed):
    reentrant = True


class Inner(nn.Module):
    """Model, with the looped blocks in a module that may be called by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()

    def forward(self, *args: Any) -> Tensor:
        return self.inner(*args)


def looped(kind: type[nn.Module] = Model) -> nn.Module:
    """Runs its two blocks by turns, twice."""
    model = kind()
    inner: Any = getattr(model, "inner", model)
    inner.run = inner.forward
    inner.forward = lambda x, text: inner.run(x, text, (0, 1, 0, 1))
    return model


def unrolled() -> nn.Module:
    """The same with a block for each turn."""
    model = Model()
    model.blocks = nn.ModuleList([*model.blocks, *copy.deepcopy(model.blocks)])
    run = model.forward
    model.forward = lambda x, text: run(x, text, (0, 1, 2, 3))  # type: ignore[method-assign]
    return model


def assert_each_turn_has_its_map(door: LiteSDPA, own: LiteSDPA, branch: int = 0) -> None:
    maps = [layer.keep_map(branch) for layer in own.layers.values()]
    assert not torch.equal(maps[0], maps[2])
    layers = [*door.layers.values()]
    for index, expected in enumerate(maps):
        stream = index // 2
        assert torch.equal(layers[index % 2].keep_map(door.branch_of(stream, branch)), expected)


@pytest.mark.parametrize("kind", [Model, Checkpointed, Reentrant, Inner])
def test_a_module_that_runs_again_in_a_step_has_a_map_for_each_turn(kind: type[nn.Module]) -> None:
    model, plain = looped(kind), unrolled()
    door, own = LiteSDPA(model, rf".*{LAYERS}", threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)
    for step in range(3):
        with door, own:
            for branch in (0, 1):
                with skip_branch(branch):
                    assert torch.equal(model(*inputs(step, branch)), plain(*inputs(step, branch)))
    for branch in (0, 1):
        assert_each_turn_has_its_map(door, own, branch)
    door.reset()
    assert (door.skip_fraction(1) == 0).all()


def test_a_part_of_the_model_that_is_called_by_itself_is_a_step() -> None:
    model, plain = looped(Inner), unrolled()
    door, own = LiteSDPA(model, rf".*{LAYERS}", threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)
    with door, own:
        for step in range(3):
            assert torch.equal(model.inner(*inputs(step)), plain(*inputs(step)))  # type: ignore[operator]
    assert_each_turn_has_its_map(door, own)


def test_calls_of_one_forward_have_a_map_each() -> None:
    model, plain = Model(), Model()
    model.blocks[0].__class__ = Twice
    plain.blocks = nn.ModuleList([plain.blocks[0], copy.deepcopy(plain.blocks[0])])

    def run(x: Tensor, text: Tensor) -> Tensor:
        return plain.blocks[1](plain.blocks[0](x, text).roll(300, 1), text)

    door, own = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)
    for step in range(3):
        with door, own:
            assert torch.equal(model(*inputs(step), (0,)), run(*inputs(step)))
    for stream, layer in enumerate(own.layers.values()):
        assert torch.equal(door.layers["blocks.0"].keep_map(door.branch_of(stream)), layer.keep_map())


def test_a_module_with_two_names_is_found_by_either() -> None:
    block = Block()
    model = nn.Sequential(block, nn.Identity(), block)
    assert list(LiteSDPA(model, "2").layers) == ["2"]
    assert list(LiteSDPA(model, "[02]").layers) == ["0"]


def test_a_step_that_fails_is_no_part_of_the_next() -> None:
    model, plain = looped(), looped()
    door, own = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)
    with door, own:
        assert torch.equal(model(*inputs(0)), plain(*inputs(0)))
        for each in (model, plain):
            run = each.run
            each.run = lambda x, text, order, run=run: run(x, text, (0, 7))  # type: ignore[misc, operator]
            with pytest.raises(IndexError):
                each(*inputs(1))
            each.run = run
        assert torch.equal(model(*inputs(1)), plain(*inputs(1)))
    assert (door.skip_fraction(1) > 0).all()


class Asked(nn.Module):
    """Two self-attention calls in one forward, of which ``ways`` says how they go."""

    def forward(self, x: Tensor, ways: tuple[str, ...]) -> list[Tensor]:
        return [self.call(x.roll(300 * index, 1), way) for index, way in enumerate(ways) if way != "left out"]

    def call(self, x: Tensor, way: str) -> Tensor:
        q = 4 * x.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
        longer = torch.cat([q, q[:, :, :1]], 2) if way == "more keys" else q
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool) if way == "a mask" else None
        if way == "again":
            with pytest.raises(TypeError):
                scaled_dot_product_attention(q, q, q, scale=1.0, enable_gqa=object(), dropout_p="none")  # type: ignore[arg-type]
        return scaled_dot_product_attention(q, longer, longer, mask)


@pytest.mark.parametrize("way", ["a mask", "more keys", "again"])
def test_calls_left_to_torch_count_and_failed_ones_do_not(way: str) -> None:
    """The second call goes on with its own map whatever becomes of the first."""
    model, plain = nn.Sequential(Asked()), nn.Sequential(Asked())
    door, own = LiteSDPA(model, "0", threshold=-2.0), LiteSDPA(plain, "0", threshold=-2.0)
    with door, own:
        for step, first in enumerate(["taken", "taken", way, "taken"]):
            ours = model[0](inputs(step)[0], (first, "taken"))
            theirs = plain[0](inputs(step)[0], ("taken", "taken"))
            assert torch.equal(ours[1], theirs[1])
    assert (door.skip_fraction(1) > 0.1).all()


@pytest.mark.parametrize("at", ["the call", "the block", "the part"])
def test_what_fails_and_is_run_again_is_the_same_call(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third step, the second call of the first block's second turn finds no memory at first."""
    model: Any = looped(Inner)
    model.inner.blocks[0].__class__ = Twice
    door = LiteSDPA(model, rf".*{LAYERS}", threshold=-2.0)
    attention: Any = door.layers["inner.blocks.0"]
    places, calls = [], iter(range(100))

    def again(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def twice(*args: Any, **given: Any) -> Tensor:
            try:
                return run(*args, **given)
            except torch.OutOfMemoryError:
                return run(*args, **given)

        return twice

    def noted(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(*args: Any, branch: int, **given: Any) -> Tensor:
            places.append(branch)
            if next(calls) == 11:
                raise torch.OutOfMemoryError("no memory")
            return run(*args, branch=branch, **given)

        return attend

    attention.forward = noted(attention.forward)
    with door:
        if at == "the call":
            monkeypatch.setattr(
                sys.modules[__name__], "scaled_dot_product_attention", again(scaled_dot_product_attention)
            )
        else:
            where = model.inner.blocks[0] if at == "the block" else model.inner
            where.forward = again(where.forward)
        for step in range(4):
            model(*inputs(step))
    step = places[:4]
    assert len(set(step)) == 4
    run_again = {"the call": step[3:], "the block": step[2:], "the part": step}[at]
    assert places == 3 * step + run_again + step
    assert "another number" not in door.summary()


@pytest.mark.parametrize("order", [(0, 1, 1), (0, 1), (0, 1, 0, 1, 0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_another_number_of_calls_is_not_silent(
    order: tuple[int, ...], compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
    door = LiteSDPA(model, LAYERS, threshold=-2.0)
    usual = (0, 1, 0, 1)
    dense = Model()(*inputs(3), usual)
    differ = [layer for layer in (0, 1) if order.count(layer) != 2]
    with door:
        for given in (usual, usual, order):
            model(*inputs(3), given)
        assert caplog.text.count("LiteSDPA: blocks.") == 1
        name = f"blocks.{differ[0]}"
        assert (
            f"{name} made {2 * order.count(differ[0])} attention calls in a step of branch 0, and 4 in" in caplog.text
        )
        out = model(*inputs(3), usual)
        assert torch.allclose(out, dense, atol=1e-4) is (len(differ) == 2)
        assert "nothing taken over" in door.summary().splitlines()[differ[0]]
        assert [float(fraction) == 0 for fraction in door.skip_fraction()] == [layer in differ for layer in (0, 1)]
        assert "a step had another number of calls than those before" in door.left_to_torch[name]
        door.reset()
        for _ in range(2):
            model(*inputs(3), usual)
    assert (door.skip_fraction(1) > 0).all()
    assert caplog.text.count("LiteSDPA: blocks.") == 1


def test_a_module_that_is_left_out_of_a_step_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with LiteSDPA(model, LAYERS, threshold=-2.0) as door:
        for order in ((0, 1, 0), (1,), (0, 1, 0)):
            model(*inputs(), order)
    assert caplog.text == ""
    assert (door.skip_fraction() > 0).all()


def test_compiled_steps_that_make_another_number_of_calls_are_refused() -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with LiteSDPA(model, LAYERS, threshold=-2.0) as door:
        compiled(*inputs(), (0, 1, 0, 1))
        door.reset()
        with pytest.raises(Exception, match="makes 2 attention calls in a compiled step of branch 0, expected 4"):
            compiled(*inputs(), (0, 1))


def test_threads_with_branches_of_their_own_count_their_own_calls() -> None:
    model, alone = looped(), looped()
    door, own = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(alone, LAYERS, threshold=-2.0)
    results: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(branch: int) -> None:
        with torch.no_grad(), skip_branch(branch):
            results[branch] += [model(*inputs(step, branch)) for step in range(3)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with door:
            threads = [threading.Thread(target=run, args=(branch,)) for branch in results]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    for branch, outs in results.items():
        with own, skip_branch(branch):
            for step, out in enumerate(outs):
                torch.testing.assert_close(out, alone(*inputs(step, branch)))


def noted_places(attention: Any) -> list[int]:
    """Of the layer's passes from now on, where their maps are."""
    places = []
    run = attention.forward

    def attend(*args: Any, branch: int, **given: Any) -> Tensor:
        places.append(branch)
        return run(*args, branch=branch, **given)

    attention.forward = attend
    return places


def in_a_thread(run: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(torch.no_grad()(run)()))
    thread.start()
    thread.join()
    return results[0]


# Models that choose branches inside of the step


class Guided(Model):
    """Runs its blocks in a branch of each side: ``order`` of the first, and of the one that it chooses inside."""

    inner = 1
    between: Callable[[], object] = staticmethod(lambda: None)

    def forward(self, x: Tensor, text: Tensor, order: Any = ((0, 1, 0, 1), (0, 1, 0, 1))) -> Any:
        first = super().forward(x, text, order[0])
        with skip_branch(self.inner):
            for index in order[1]:
                x = self.blocks[index](x.roll(300, 1), text)
                self.between()
        return torch.stack([first, x])


def guided_maps(door: LiteSDPA, branches: tuple[int, ...] = (0, 1)) -> list[Tensor]:
    layers = door.layers.values()
    return [layer.keep_map(door.branch_of(stream, b)) for layer in layers for stream in (0, 1) for b in branches]


@pytest.mark.parametrize("compiled", ["no", "by blocks", "whole"])
def test_calls_of_branches_chosen_inside_are_counted(compiled: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Guided()
    run: Any = torch.compile(model, fullgraph=True, backend="eager") if compiled == "whole" else model
    counter = CompileCounter()
    if compiled == "by blocks":
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
    dense = Guided()(*inputs(3))
    with LiteSDPA(model, LAYERS, threshold=-2.0):
        for _ in range(2):
            run(*inputs(3))
        assert counter.frame_count in (0, 4), "a graph for each turn of a block in each branch, and no more"
        fewer = ((0, 1, 0, 1), (0, 1))
        if compiled == "whole":
            with pytest.raises(Exception, match="makes 2 attention calls in a compiled step of branch 1, expected 4"):
                run(*inputs(3), fewer)
            return
        run(*inputs(3), fewer)
        assert "blocks.0 made 2 attention calls in a step of branch 1, and 4 in those before" in caplog.text
        first, second = run(*inputs(3))
        assert not torch.allclose(first, dense[0], atol=1e-4)
        torch.testing.assert_close(second, dense[1], atol=1e-4, rtol=0)


def test_a_part_that_fails_in_a_branch_of_its_own_and_is_run_again_is_the_same() -> None:
    """In the third step, after the first call of the branch that it chooses inside."""
    model = Guided()
    outer = nn.Sequential(model)
    door = LiteSDPA(outer, rf"0\.{LAYERS}", threshold=-2.0)
    places = noted_places(door.layers["0.blocks.0"])
    failures = iter([None] * 8 + [ZeroDivisionError()] + [None] * 100)

    def fail() -> None:
        error = next(failures)
        if error is not None:
            raise error

    model.between = fail  # type: ignore[method-assign]

    def again(*args: Any) -> Any:
        try:
            return model(*args)
        except ZeroDivisionError:
            return model(*args)

    outer.forward = again  # type: ignore[method-assign]
    with door:
        for step in range(4):
            outer(*inputs(step))
    step = places[:4]
    assert len(set(step)) == 4
    assert places == 2 * step + step[:3] + 2 * step
    assert "another number" not in door.summary()


def test_a_step_of_another_thread_leaves_the_branches_chosen_inside_alone() -> None:
    """It begins and ends between two calls of the branch that the first step chooses inside."""
    model, plain, theirs = Guided(), Guided(), Guided()
    theirs.inner = 3
    theirs.blocks = model.blocks
    both = nn.ModuleDict({"model": model, "theirs": theirs})
    both.forward = lambda which, *args: both[which](*args)  # type: ignore[method-assign]
    door, own = LiteSDPA(both, rf"model\.{LAYERS}", threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)

    def other() -> None:
        def run() -> None:
            with skip_branch(2):
                both("theirs", *inputs(0, 1))

        in_a_thread(run)

    model.between = other  # type: ignore[method-assign]
    for step in range(3):
        with door, own:
            assert torch.equal(both("model", *inputs(step)), plain(*inputs(step)))
    assert all(torch.equal(a, b) for a, b in zip(guided_maps(door), guided_maps(own), strict=True))
    assert set(door.left_to_torch["model.blocks.0"]) == {"other keys than queries, as in cross-attention"}


@pytest.mark.parametrize("other", ["a block", "the model in its branch", "the model in the branch inside"])
def test_what_another_thread_calls_meanwhile_and_cannot_be_told_is_torch_s(
    other: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Guided()
    x, text = inputs(0)

    def run() -> Any:
        if other == "a block":
            return model.blocks[0](x, text)
        with skip_branch(0 if other == "the model in its branch" else 2):
            return Model.forward(model, x, text) if other == "the model in its branch" else model(x, text)

    dense = run()
    results: list[Any] = []
    model_forward = model.forward

    def forward(*args: Any, nested: bool = False) -> Any:
        return run_plain() if nested else model_forward(*args)

    def run_plain() -> Any:
        return Model.forward(model, x, text)

    model.forward = forward  # type: ignore[method-assign]

    def meanwhile() -> None:
        model.between = lambda: None  # type: ignore[method-assign]
        if other == "the model in its branch":
            results.append(in_a_thread(lambda: model(x, text, nested=True)))
        else:
            results.append(in_a_thread(run))

    with LiteSDPA(model, LAYERS, threshold=-2.0) as door:
        for _ in range(2):
            model(x, text)
        for _ in range(2):
            model.between = meanwhile  # type: ignore[method-assign]
            model(x, text)
        left = door.left_to_torch["blocks.0"]
        for _ in range(2):
            out = model(x, text)
    assert not torch.equal(out[0], model_forward(x, text)[0]), "after that, the model goes on with its maps"
    assert caplog.text.count("another thread was inside of the model") == 1
    (shared,) = (count for reason, count in left.items() if reason.startswith("another thread"))
    assert shared > 0
    assert "another number" not in door.summary()
    for result in results:
        last = (slice(None),) if other != "the model in the branch inside" else (1,)
        torch.testing.assert_close(result[last], dense[last], atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_a_copy_made_inside_of_a_step_is_in_none(how: Callable[[Any], Any]) -> None:
    model = Guided()
    copies: list[Any] = []
    with LiteSDPA(model, LAYERS, threshold=-2.0) as door, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guided, "between", staticmethod(lambda: copies.append(how(door))))
        model(*inputs())
    other = copies[0]
    assert not other.entered
    assert other._steps.current is None
    assert other._steps.next_number(False) == 0
    assert all(layer.steps is other._steps for layer in other._each())


# Graphs that break inside of a chosen module


class Broken(Block):
    """Of which torch.compile runs a part in Python."""

    fails = False

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        out = super().forward(x, text)
        if self.fails:
            type(self).fails = False
            raise ZeroDivisionError
        return out


class BrokenOff(Broken):
    forward = torch.compiler.disable(Broken.forward)


def broken(kind: type[Broken], model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [Broken, BrokenOff])
@pytest.mark.parametrize("whole", ["the model", "a module around it"])
def test_a_graph_that_breaks_counts_as_python_does(
    kind: type[Broken], whole: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = broken(kind, Guided())
    given: nn.Module = model if whole == "the model" else nn.Sequential(model)
    run = torch.compile(given, backend="eager")
    if whole != "the model":
        given.forward = lambda *args: model(*args)  # type: ignore[method-assign]
    plain = Guided()
    door, own = LiteSDPA(given, rf".*{LAYERS}", threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)
    usual, fewer = ((0, 1, 0, 1), (0, 1, 0, 1)), ((0, 1, 0, 1), (0, 1))
    with door, own:
        for step, order in enumerate([usual, usual, fewer, usual]):
            assert torch.equal(run(*inputs(step), order), plain(*inputs(step), order)), step
        assert caplog.text.count("made 2 attention calls in a step of branch 1") == 2, "of both models"
        for summary, expected in zip(door.summary().splitlines(), own.summary().splitlines(), strict=True):
            assert summary.split(";")[0] == ("0." if given is not model else "") + expected.split(";")[0]
        own.reset()
        door.reset()
        for step in range(3):
            assert torch.equal(run(*inputs(step)), plain(*inputs(step)))
    assert all(torch.equal(a, b) for a, b in zip(guided_maps(door), guided_maps(own), strict=True))


def test_what_fails_in_a_graph_that_breaks_is_taken_back() -> None:
    model: Any = broken(Broken, looped(Inner))

    def again(x: Tensor, text: Tensor) -> Any:
        try:
            return model.inner(x, text)
        except ZeroDivisionError:
            return model.inner(x, text)

    model.forward = again
    door = LiteSDPA(model, rf".*{LAYERS}", threshold=-2.0)
    places = noted_places(door.layers["inner.blocks.0"])
    run = torch.compile(model, backend="eager")
    with door:
        for step in range(4):
            Broken.fails = step == 2
            run(*inputs(step))
            assert not Broken.fails
    step = places[:2]
    assert len(set(step)) == 2
    assert places == 2 * step + step[:1] + 2 * step
    assert "another number" not in door.summary()


@pytest.mark.parametrize("mode", ["whole", "by blocks"])
def test_compiled_turns_are_told_apart_while_tracing(mode: str) -> None:
    model, plain = looped(), looped()
    door, own = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)
    counter = CompileCounter()
    run: Any = model
    if mode == "whole":
        run = torch.compile(model, fullgraph=True, backend=counter)
    else:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(fullgraph=True, backend=counter)
    for step in range(4):
        with door, own:
            torch.testing.assert_close(run(*inputs(step)), plain(*inputs(step)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == (1 if mode == "whole" else 2), "a graph for each turn of a block, and no more"
    assert (door.skip_fraction(1) > 0).all()


def test_compiled_checkpoints_where_torch_allows_side_effects_in_them() -> None:
    model, plain = looped(Checkpointed), looped()
    door, own = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(plain, LAYERS, threshold=-2.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True), door, own:
        for step in range(3):
            torch.testing.assert_close(compiled(*inputs(step)), plain(*inputs(step)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
def test_a_checkpoint_whose_gradient_is_asked_for_is_refused(kind: type[nn.Module]) -> None:
    model = kind()
    door = LiteSDPA(model, LAYERS, threshold=-2.0)
    x, text = inputs(0)
    with torch.enable_grad(), door:
        out = model(x, text.requires_grad_(), (0,))  # attention's own inputs need no gradient
        kept = [layer.keep_map() for layer in door.layers.values() if layer.used_branches()]
        with pytest.raises(RuntimeError, match="LiteAttention: called inside a backward pass"):
            out.sum().backward()
        assert len(kept) == 1
        assert torch.equal(door.layers["blocks.0"].keep_map(), kept[0])


# What stays torch's


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return scaled_dot_product_attention(q, k, v, **given)


def heads(*shape: int, **given: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **given)


LEFT: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "a head_dim that is no multiple of 8 up to 256": ([heads(1, 2, 90, 12)] * 3, {}),
    "a head_dim that is no multiple": ([heads(1, 2, 90, 512)] * 3, {}),
    "torch.float64 on cpu": ([heads(1, 2, 90, 64, dtype=torch.float64)] * 3, {}),
    "a value of another head_dim": ([*[heads(1, 2, 90, 64)] * 2, heads(1, 2, 90, 32)], {}),
    "strides whose last one is not 1": ([heads(1, 2, 64, 90).mT] * 3, {}),
    "a batch above max_batch_size, 4": ([heads(5, 2, 90, 64)] * 3, {}),
    "heads that do not fit each other": ([heads(1, 4, 90, 64), *[heads(1, 1, 90, 64)] * 2], {}),
    "not three dense tensors": ([heads(2, 90, 64)] * 3, {}),
    "shapes that do not fit each other": ([heads(2, 2, 90, 64), *[heads(1, 2, 90, 64)] * 2], {}),
    "other keys than queries": ([heads(1, 2, 90, 64), *[heads(1, 2, 80, 64)] * 2], {}),
    "a size of 0": ([heads(1, 2, 0, 64)] * 3, {}),
    "a mask": ([heads(1, 2, 90, 64)] * 3, {"attn_mask": torch.ones(90, 90, dtype=torch.bool).tril()}),
    "a causal mask": ([heads(1, 2, 90, 64)] * 3, {"is_causal": True}),
    "dropout": ([heads(1, 2, 90, 64)] * 3, {"dropout_p": 0.5}),
    "a scale that is no positive number of fp32": ([heads(1, 2, 90, 64)] * 3, {"scale": 0.0}),
    "a scale that is no positive": ([heads(1, 2, 90, 64)] * 3, {"scale": -0.5}),
    "a scale that is no": ([heads(1, 2, 90, 64)] * 3, {"scale": True}),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reason", LEFT)
def test_what_is_not_taken_is_torch_s_and_counted(reason: str, compiled: bool) -> None:
    tensors, given = LEFT[reason]
    model = nn.Sequential(Plain())
    run = torch.compile(model[0], fullgraph=True, backend="eager") if compiled else model[0]
    torch.manual_seed(0)
    expected = Plain()(*tensors, **given)
    with LiteSDPA(model, "0") as attention:
        torch.manual_seed(0)
        assert torch.equal(run(*tensors, **given), expected)
    ((counted, times),) = attention.left_to_torch["0"].items()
    assert reason in counted
    assert times == 1
    assert attention.summary() == f"0: nothing taken over; left to torch: 1 x {counted}"


@pytest.mark.parametrize("given", [{}, {"enable_gqa": False}])
def test_what_torch_refuses_is_refused_in_torch_s_words(given: dict[str, Any]) -> None:
    tensors = [heads(1, 4, 90, 64), *[heads(1, 2, 90, 64)] * 2]
    with pytest.raises(RuntimeError) as expected:
        Plain()(*tensors, **given)
    model = nn.Sequential(Plain())
    with LiteSDPA(model, "0"), pytest.raises(RuntimeError) as raised:
        model[0](*tensors, **given)
    assert str(raised.value) == str(expected.value)


def test_grouped_heads_are_taken_over_where_torch_is_told_of_them() -> None:
    tensors = [heads(1, 4, 90, 64), *[heads(1, 2, 90, 64)] * 2]
    model = nn.Sequential(Plain())
    with LiteSDPA(model, "0") as attention:
        out = model[0](*tensors, enable_gqa=True)
    torch.testing.assert_close(out, Plain()(*tensors, enable_gqa=True), atol=1e-5, rtol=0)
    assert attention.left_to_torch == {"0": {}}


def test_lengths_that_vary_do_not_recompile_what_stays_torch_s() -> None:
    counter = CompileCounter()
    model = nn.Sequential(Plain())
    compiled = torch.compile(model[0], fullgraph=True, backend=counter, dynamic=True)
    with LiteSDPA(model, "0"):
        for length in range(20, 90, 10):
            compiled(heads(1, 2, 100, 64), *[heads(1, 2, length, 64)] * 2)
    assert counter.frame_count == 1


def test_the_summary_says_what_is_skipped_and_what_is_not() -> None:
    model = Model()
    with LiteSDPA(model, LAYERS, threshold=-2.0) as attention:
        for step in range(3):
            model(*inputs(step), (0, 1, 0))
    assert_expected_inline(
        re.sub(r"\d+%", "..%", attention.summary()),
        """\
blocks.0: call 0 of a step in branch 0 skips ..%, call 1 of a step in branch 0 skips ..%; left to torch: 6 x other keys than queries, as in cross-attention
blocks.1: call 0 of a step in branch 0 skips ..%; left to torch: 3 x other keys than queries, as in cross-attention""",
    )


def test_the_summary_says_that_skipping_is_off() -> None:
    model = Model()
    with LiteSDPA(model, r"blocks\.0", policy=SkipPolicy(enabled=False)) as attention:
        model(*inputs())
    assert attention.summary().startswith(
        "blocks.0: nothing skipped, as skipping is off; left to torch: 1 x other keys"
    )


def test_one_graph_inside_and_one_outside() -> None:
    counter = CompileCounter()
    model, eager = Model(), Model()
    attention, other = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(eager, LAYERS, threshold=-2.0)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(4):
        torch.testing.assert_close(compiled(*inputs(step)), eager(*inputs(step)), atol=1e-5, rtol=1e-5)
        with attention, other:
            torch.testing.assert_close(compiled(*inputs(step)), eager(*inputs(step)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2
    assert (attention.skip_fraction() > 0.1).all()


class CrossFirst(Block):
    """Its self-attention is the second call."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        k, v = self.text(text).unflatten(-1, (2, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        x = x + scaled_dot_product_attention(k[:, :, :1].expand(-1, -1, TOKENS, -1), k, v).transpose(1, 2).flatten(2)
        return super().forward(x, text)


def test_streams_are_counted_for_each_layer() -> None:
    model = Model()
    model.blocks[1].__class__ = CrossFirst
    with LiteSDPA(model, LAYERS, threshold=-2.0) as door:
        for step in range(2):
            model(*inputs(step), (0, 1, 0))
    assert (door.skip_fraction() > 0.1).all()
    assert [float(fraction) > 0 for fraction in door.skip_fraction(1)] == [True, False]
    assert "blocks.1: call 0 of a step in branch 0 skips" in door.summary()
    places = [door.branch_of(0, layer=name) for name in door.layers]
    assert places[0] != places[1]
    assert door.branch_of(1) == door.branch_of(1, layer="blocks.0")
    assert_expected_inline(
        report(
            {
                "of several": lambda: door.branch_of(0),
                "of none": lambda: door.branch_of(1, layer="blocks.1"),
                "no layer": lambda: door.branch_of(0, layer="blocks.2"),
            }
        ),
        """\
of several -> ValueError: LiteSDPA: layer is None, expected one of ['blocks.0', 'blocks.1']: these keep the map of call 0 of a step in branch 0 under different branches
of none -> RuntimeError: LiteSDPA: blocks.1 has not made call 1 of a step in branch 0 yet
no layer -> ValueError: LiteSDPA: layer is 'blocks.2', expected one of ['blocks.0', 'blocks.1']""",
    )


def test_a_context_that_is_left_and_entered_again_inside_of_another_stands_once() -> None:
    model = Model()
    first, second = (LiteSDPA(model, LAYERS, threshold=-2.0) for _ in range(2))
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        with first:
            model(*inputs())
            # A call is the innermost one's.
            assert first.left_to_torch["blocks.0"] == {"other keys than queries, as in cross-attention": 1}
            assert second.left_to_torch["blocks.0"] == {}
    assert patched(model) == []


class Outer(nn.Module):
    """A block around another module, whose calls are not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.forward = lambda x: scaled_dot_product_attention(x, x, x)  # type: ignore[method-assign]

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.inner(x) for x in xs]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_a_chosen_module_leaves_to_torch_is_not_taken_by_one_around_it(compiled: bool) -> None:
    model = nn.Sequential(Outer())
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    videos = [heads_of(inputs(0, seed)[0]) for seed in range(3)]
    with LiteSDPA(model, ".*", threshold=-1.0) as door:
        for order in [(0, 1), (0, 1)] if compiled else [(0, 1), (0, 1), (2, 0, 1)]:
            out = run([videos[index] for index in order])
        if compiled:
            assert door.left_to_torch["0"] == {}
            return
        for order in [(0, 1), (0, 1), (2, 0, 1), (0, 1)]:
            for ours, index in zip(run([videos[index] for index in order]), order, strict=True):
                expected = scaled_dot_product_attention(videos[index], videos[index], videos[index])
                torch.testing.assert_close(ours, expected)
    assert len(out) == 3
    assert "nothing taken over" in door.summary().splitlines()[0]
    assert door.left_to_torch["0"] == {}


def heads_of(x: Tensor) -> Tensor:
    return 4 * x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


class Values(TorchFunctionMode):
    """Attention without scores, as perturbed attention guidance makes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return args[2]
        if getattr(func, "__module__", None) == "torch._tensor":
            return getattr(args[0], func.__name__)(*args[1:], **kwargs or {})
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_function_mode_of_someone_else_gets_the_call(compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Outer(), Outer())
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    x = heads_of(inputs()[0])
    with LiteSDPA(model, r"\d", threshold=-1.0) as door:
        for _ in range(2):
            with Values():
                assert run([x])[0] is x or torch.equal(run([x])[0], x)
        assert caplog.text.count("a torch function mode is around it and may replace the call, Values") == 1
        with torch.device("cpu"):  # a mode of torch's own
            for _ in range(2):
                run([x])
        assert (door.skip_fraction() > 0.1).all()
    assert "x a torch function mode is around it" in door.summary()


def _generates(self: Outer, xs: list[Tensor]) -> Iterator[Tensor]:
    for x in xs:
        yield self.inner(x)


async def _awaits(self: Outer, xs: list[Tensor]) -> list[Tensor]:
    return [self.inner(x) for x in xs]


@pytest.mark.parametrize("forward", [_generates, _awaits])
@pytest.mark.parametrize("layers", ["inner", ""], ids=["inside", "itself"])
def test_a_forward_whose_body_runs_later_is_refused(
    forward: Callable[..., Any], layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outer, "forward", forward)
    model = Outer()
    with LiteSDPA(model, layers), pytest.raises(TypeError, match=r"LiteSDPA: the forward of .* returned a .*later"):
        model([heads_of(inputs()[0])]).close()


class MaskedFirst(nn.Module):
    def forward(self, x: Tensor, masked: bool) -> Tensor:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool) if masked else None
        return scaled_dot_product_attention(x, x, x, attn_mask=mask) + scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_streams_are_counted_anew_for_each_video(compiled: bool) -> None:
    model = MaskedFirst()
    run = torch.compile(model, backend="eager") if compiled else model
    x = heads_of(inputs()[0])
    with LiteSDPA(model, "", threshold=-1.0) as door:
        for masked in (False, True, False):
            for _ in range(2):
                run(x, masked)
            assert (door.skip_fraction() > 0.1).all()
            assert (door.branch_of(0) != 0) is masked
            assert bool(door.skip_fraction(1) > 0.1) is not masked
            assert door.summary().count("of a step in branch 0 skips") == (1 if masked else 2)
            door.reset()
            assert door.skip_fraction().tolist() == [0.0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_that_bypasses_the_model_s_forward_is_said(compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    step = torch.compile(model.forward, backend="eager") if compiled else model.forward
    with LiteSDPA(model, LAYERS, threshold=-2.0):
        model(*inputs())
        assert caplog.text == ""
        for _ in range(2):
            step(*inputs(), (0, 1, 0))
    assert caplog.text.count("blocks.0 was called outside of a call of the model") == 1
    assert caplog.text.count("LiteSDPA: ") == 1


def test_errors() -> None:
    model = Model()

    def too_many_calls() -> None:
        with LiteSDPA(model, LAYERS):
            model(*inputs(), order=(1,) * 9)

    def left_twice() -> None:
        attention = LiteSDPA(model, LAYERS)
        with attention:
            pass
        attention.__exit__(None, None, None)

    def hidden_call() -> None:
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        layers = nn.ModuleDict({"0": nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True)})
        layers["0"].self_attn = attention
        with LiteSDPA(layers, "0"), torch.enable_grad():
            layers["0"].train()(inputs()[0])

    calls: dict[str, Callable[[], object]] = {
        "a call inside of torch": hidden_call,
        "no such layer": lambda: LiteSDPA(model, r"layers\.\d+"),
        "no pattern": lambda: LiteSDPA(model, "blocks.("),
        "a number": lambda: LiteSDPA(model, 0),  # type: ignore[arg-type]
        "a list of layers": lambda: LiteSDPA(model, "blocks"),
        "no model": lambda: LiteSDPA(model.forward, LAYERS),  # type: ignore[arg-type]
        "no batch": lambda: LiteSDPA(model, LAYERS, max_batch_size=0),
        "too many calls": too_many_calls,
        "left twice": left_twice,
        "no such stream": lambda: LiteSDPA(model, LAYERS).skip_fraction(1),
        "no number of a stream": lambda: LiteSDPA(model, LAYERS).skip_fraction(-1),
        "threshold above 0": lambda: LiteSDPA(model, LAYERS, threshold=1.0),
    }
    assert_expected_inline(
        report(calls),
        """\
a call inside of torch -> NotImplementedError: torch.nn.MultiheadAttention calls its attention out of reach, expected a layer that calls torch.nn.functional.scaled_dot_product_attention itself
no such layer -> ValueError: LiteSDPA: layers is layers\\.\\d+, expected to match the name of a module of the Model
no pattern -> ValueError: LiteSDPA: layers is 'blocks.(', expected a regular expression: missing ), unterminated subpattern at position 7
a number -> TypeError: LiteSDPA: layers has type int, expected a regular expression
a list of layers -> ValueError: LiteSDPA: layers is blocks, which matches blocks, a ModuleList that is never called, expected modules whose forward makes the call
no model -> TypeError: LiteSDPA: model has type method, expected a torch.nn.Module
no batch -> ValueError: LiteSDPA: max_batch_size is 0, expected at least 1
too many calls -> RuntimeError: LiteSDPA: blocks.1 makes attention call 16 of one call of the model in branch 0, and all 8 maps that a layer has are taken, expected no more pairs of call and branch than that. If the model given to LiteSDPA runs several steps in one call, give it the part that one step calls
left twice -> RuntimeError: LiteSDPA: left where it was not entered, expected it to be left as often as entered
no such stream -> RuntimeError: LiteSDPA: no layer has made call 1 of a step in branch 0 yet
no number of a stream -> ValueError: LiteSDPA: stream is -1, expected at least 0
threshold above 0 -> ValueError: LiteSDPA: threshold is 1.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG""",
    )
