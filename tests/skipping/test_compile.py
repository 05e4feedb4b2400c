"""torch.compile: one graph over a whole model, nothing recompiled from step to step, the same results as eager."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from lite_attention import LiteAttention, SeqParallelLiteAttention, SkipPolicy, attention, share_room, skip_branch
from lite_attention.skipping.map_table import MAP_SLOTS
from support.models import HEAD_DIM, HEADS, Model, noise, same_state


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def twelve_steps(model: Model, compiled: Callable[..., Tensor], eager: Model, branches: int) -> None:
    """A threshold change, a reset and branch switches in between; every step compared with eager."""
    skipped = 0.0
    for step in range(12):
        if step == 5:
            for layer in (*model.layers(), *eager.layers()):
                layer.set_threshold(-0.1)
        if step == 8:
            skipped = max(float(layer.skip_fraction()) for layer in model.layers())
            for layer in (*model.layers(), *eager.layers()):
                layer.reset_skip_state()
        for branch in range(branches):
            with skip_branch(branch):
                torch.testing.assert_close(compiled(noise(step)), eager(noise(step)), atol=1e-5, rtol=1e-5)
        assert same_state(model, eager, range(branches))
    assert skipped > 0.02, "the model is meant to skip something"


@pytest.mark.parametrize("branches", [1, 2])
def test_one_graph_for_all_layers_and_twelve_steps(branches: int) -> None:
    counter = CompileCounter()
    model = Model()
    eager = copy.deepcopy(model)
    twelve_steps(model, torch.compile(model, fullgraph=True, backend=counter), eager, branches)
    assert counter.frame_count == branches, "one compile, one more for the second branch"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_gives_the_results_and_the_state_of_eager(mode: str) -> None:
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    torch._dynamo.utils.counters.clear()
    twelve_steps(model, compiled, eager, branches=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_one_compile_covers_all_blocks_compiled_one_by_one() -> None:
    counter = CompileCounter()
    model = Model(12)
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    for step in range(3):
        torch.testing.assert_close(model(noise(step)), eager(noise(step)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    with skip_branch(1):
        model(noise(3))
    assert counter.frame_count == 2
    model(noise(3, length=700))
    assert counter.frame_count == 3, "another shape: one more compile for all the blocks"


def test_warm_state_is_not_lost_by_compiling() -> None:
    model = Model(2)
    for step in range(2):
        model(noise(step))
    eager = copy.deepcopy(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(noise(2))
    eager(noise(2))
    assert same_state(model, eager)
    assert float(next(model.layers()).skip_fraction()) > 0


def test_alternating_shapes_are_compiled_once_each_and_never_stale() -> None:
    counter = CompileCounter()
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(12):
        # Two passes of a shape, then two of the next: the second continues the first, the third starts anew.
        x = noise(step, length=(520, 521, 700)[step // 2 % 3])
        torch.testing.assert_close(compiled(x), eager(x), atol=1e-5, rtol=1e-5)
        assert same_state(model, eager)
    assert counter.frame_count == 3


def test_a_graph_whose_slot_was_given_away_starts_from_the_full_map() -> None:
    layer = LiteAttention(threshold=-0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")

    def inputs(step: int, length: int = 520) -> list[Tensor]:
        return [2 * noise(step, length).unflatten(-1, (HEADS, HEAD_DIM))] * 3

    first = compiled(*inputs(0))
    for length in range(521, 520 + MAP_SLOTS):
        layer(*inputs(1, length))  # as many tiles, so the guards of the graph do not see who has the slot
    assert torch.equal(compiled(*inputs(0)), first)
    assert float(layer.skip_fraction()) > 0
    layer(*inputs(2), branch=1)  # takes the oldest slot, the graph's
    assert torch.equal(compiled(*inputs(0)), first)
    # The other way round: what the graph has written is not the newcomer's map.
    fresh = LiteAttention(threshold=-0.5)
    assert torch.equal(layer(*inputs(3), branch=1), fresh(*inputs(3)))


def test_a_graph_whose_slot_was_given_away_never_takes_an_older_map_for_what_an_eager_pass_left() -> None:
    layer = LiteAttention(threshold=-0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")

    def inputs(video: int, length: int = 520) -> list[Tensor]:
        return [2 * noise(video, length).unflatten(-1, (HEADS, HEAD_DIM))] * 3

    compiled(*inputs(0))
    for length in range(521, 521 + MAP_SLOTS):
        layer(*inputs(1, length))  # of as many tiles; the last of them takes the graph's slot
    compiled(*inputs(0))
    assert float(layer.skip_fraction()) > 0, "the graph goes on, and what it will skip is told"
    assert not layer.keep_map().all()
    layer.reset_skip_state()
    dense = layer(*inputs(2))  # the pair's new slot
    assert torch.equal(compiled(*inputs(2)), dense)
    fraction = torch.zeros(())
    layer(*inputs(2), skip_fraction_out=fraction)
    assert float(fraction) == 0, "nor the other way round"


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_shapes_cost_one_compile_a_shape(dynamic: bool) -> None:
    counter = CompileCounter()
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for step, (length, batch) in enumerate(((520, 1), (300, 1), (300, 2), (520, 1), (300, 2))):
        x = noise(step, length, batch)
        torch.testing.assert_close(compiled(x), eager(x), atol=1e-5, rtol=1e-5)
        assert same_state(model, eager)
    assert counter.frame_count == 3


def test_ranges_as_tensors_never_recompile() -> None:
    counter = CompileCounter()
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(5):
        must_do = torch.tensor([[100 * step, 100 * step + 50], [0, 0]])
        must_skip = torch.tensor([[500, 100 * step]])
        out = compiled(noise(step), must_do, must_skip)
        torch.testing.assert_close(out, eager(noise(step), must_do, must_skip), atol=1e-5, rtol=1e-5)
        assert same_state(model, eager)
    assert counter.frame_count == 1


def test_ranges_as_changing_lists_recompile_once() -> None:
    counter = CompileCounter()
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(5):
        lists = [50 + step, 10 + step], [128 + step, 400]
        torch.testing.assert_close(compiled(noise(step), *lists), eager(noise(step), *lists), atol=1e-5, rtol=1e-5)
        assert same_state(model, eager)
    assert counter.frame_count <= 2


def test_both_branches_and_two_shapes_inside_one_graph() -> None:
    def step(model: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        conditional = model(x)
        with skip_branch(1):
            unconditional = model(x + 1)
        return conditional, unconditional, model(x[:, :200])

    counter = CompileCounter()
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for index in range(4):
        results = compiled(model, noise(index)), step(eager, noise(index))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
        assert same_state(model, eager, range(2))
    assert counter.frame_count == 1


@pytest.mark.parametrize("lengths", [range(64, 640, 64), range(640, 631, -1)], ids=["sizes", "one size"])
def test_a_graph_with_more_shapes_than_slots_computes_those_beyond_them_full(
    lengths: range, caplog: pytest.LogCaptureFixture
) -> None:
    def step(layer: LiteAttention, q: Tensor) -> list[Tensor]:
        return [layer(part, part, part) for part in split(q, lengths)]

    layer = LiteAttention()
    compiled = torch.compile(step, fullgraph=True, backend=CompileCounter())
    for index in range(3):
        q = torch.randn(1, 640, 1, 32, generator=torch.Generator().manual_seed(index))
        torch.testing.assert_close(compiled(layer, q), [attention(part, part, part)[0] for part in split(q, lengths)])
        assert layer.skip_fraction() == 0, "the last pass left no map"
    texts = [record.getMessage().partition(":")[0] for record in caplog.records if record.name == "lite_attention"]
    assert texts == ["a graph has passes of a layer in more than 8 pairs of branch and shape"]


def test_a_new_shape_takes_no_slot_that_the_same_graph_uses() -> None:
    def step(layer: LiteAttention, q: Tensor) -> tuple[Tensor, Tensor]:
        return layer(q, q, q, branch=1), layer(q[:, :100], q[:, :100], q[:, :100], branch=1)

    layer, eager = LiteAttention(), LiteAttention()
    compiled = torch.compile(step, fullgraph=True, backend=CompileCounter())
    q = torch.randn(1, 640, 1, 32)
    for other in (layer, eager):
        for length in (640, 600, 560, 520, 480, 440, 400, 360):
            other(q[:, :length], q[:, :length], q[:, :length], branch=int(length == 640))
    for _ in range(3):
        torch.testing.assert_close(compiled(layer, q), step(eager, q))
    assert len(layer.state.owners()) == 8


def split(q: Tensor, lengths: range) -> list[Tensor]:
    return [q[:, :length] for length in lengths]


def test_switching_skipping_off_and_on_costs_one_compile() -> None:
    counter = CompileCounter()
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(6):
        for layer in (*model.layers(), *eager.layers()):
            layer.enable_skip_optimization(step % 2 == 0)
        torch.testing.assert_close(compiled(noise(step)), eager(noise(step)), atol=1e-5, rtol=1e-5)
        assert same_state(model, eager)
    assert counter.frame_count == 2


def test_code_without_guards_on_globals_still_knows_its_branch() -> None:
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
    counter = CompileCounter()
    model = Model(2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter, options=options)
    for step in range(6):
        with skip_branch(step % 2):
            torch.testing.assert_close(compiled(noise(step)), eager(noise(step)), atol=1e-5, rtol=1e-5)
    assert same_state(model, eager, range(2))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.compile(torch.nn.Identity()).forward, "aot_compile"),
    reason="this torch compiles no forward ahead",
)
def test_a_program_of_aot_compile_refuses_another_branch() -> None:
    model = Model(1)
    eager = copy.deepcopy(model)
    with torch.no_grad():
        program = torch.compile(model, fullgraph=True).forward.aot_compile(((noise(0),), {}))
        torch.testing.assert_close(program(model, noise(0)), eager(noise(0)), atol=1e-5, rtol=1e-5)
        with skip_branch(1), pytest.raises(RuntimeError, match="GuardManager check failed"):
            program(model, noise(1))
    assert next(model.layers()).used_branches() == [0]


def test_settings_may_be_changed_inside_the_graph() -> None:
    def video(layer: LiteAttention, q: Tensor) -> tuple[Tensor, Tensor]:
        layer.reset_skip_state()
        layer.set_threshold(-0.1)
        first = layer(q, q, q)
        return first, layer(q, q, q)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(video, fullgraph=True, backend=counter)
    layer = LiteAttention()
    eager = copy.deepcopy(layer)
    for step in range(3):
        q = noise(step).unflatten(-1, (HEADS, HEAD_DIM))
        torch.testing.assert_close(compiled(layer, q), video(eager, q), atol=1e-5, rtol=1e-5)
        assert torch.equal(layer.keep_map(), eager.keep_map())
    assert counter.frame_count == 1
    assert layer.threshold == pytest.approx(-0.1)


def test_sequence_parallel_costs_one_compile_a_split() -> None:
    counter = CompileCounter()
    ring = SeqParallelLiteAttention(2, threshold=-0.5)
    eager = copy.deepcopy(ring)
    compiled = torch.compile(ring, fullgraph=True, backend=counter)
    for step in range(6):
        q = noise(step).unflatten(-1, (HEADS, HEAD_DIM)) * 2
        split = step % 2
        torch.testing.assert_close(compiled(q, q, q, split), eager(q, q, q, split), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2
    assert torch.equal(ring.skip_fraction(), eager.skip_fraction())
    assert float(ring.skip_fraction()) > 0


def test_inference_mode_and_no_grad_share_one_state() -> None:
    model = Model(1)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(4):
        with torch.inference_mode() if step % 2 == 0 else torch.no_grad():
            torch.testing.assert_close(compiled(noise(step)), eager(noise(step)), atol=1e-5, rtol=1e-5)
    assert same_state(model, eager)


def test_asking_for_a_gradient_is_an_error_when_compiling() -> None:
    model = Model(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.enable_grad(), pytest.raises(Exception, match="skip_attention: has no gradient"):
        compiled(noise(0))


def test_counting_dense_steps_recompiles_nothing() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = LiteAttention(policy=SkipPolicy(threshold=-0.5, dense_steps=3))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    skipped = []
    for step in range(10):
        if step == 6:
            layer.reset_skip_state()
            eager.reset_skip_state()
        q = 2 * noise(0).unflatten(-1, (HEADS, HEAD_DIM))
        torch.testing.assert_close(compiled(q, q, q), eager(q, q, q), atol=1e-5, rtol=1e-5)
        assert torch.equal(layer.keep_map(), eager.keep_map())
        skipped.append(bool(layer.skip_fraction() > 0))
    assert skipped == [False, False, *[True] * 4, False, False, True, True]
    assert counter.frame_count == 1


def room(model: Model) -> list[int]:
    return [len(layer.state.owners()) for layer in model.layers()]


class FirstBlock(Model):
    """Calls its first block alone; the others are there."""

    def forward(self, x: Tensor, must_do: object = None, must_skip: object = None) -> Tensor:
        first: Tensor = self.blocks[0](x)
        return first


def test_making_room_in_sister_layers_does_not_touch_what_they_remember() -> None:
    model = FirstBlock(3)
    first, sister, stranger = model.blocks
    for block, length in ((first, 520), (sister, 520), (stranger, 300)):
        block(noise(0, length))
    before = [layer.keep_map() for layer in model.layers()]
    first.compile(fullgraph=True, backend="eager")
    model(noise(1, 600))
    assert room(model) == [2, 2, 1], "a layer that has seen another shape fails the guards of this code anyway"
    assert all(torch.equal(layer.keep_map(), keep) for layer, keep in [*zip(model.layers(), before, strict=True)][1:])
    first(noise(1, 700))
    assert room(model) == [3, 2, 1], "called without the model around it, whose layers are out of sight"


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda _: Model()]
)
def test_compiling_a_model_leaves_another_that_looks_alike_alone(
    duplicate: Callable[[Model], Model], by_blocks: bool
) -> None:
    model = Model()
    other = duplicate(model)
    for part in model.blocks if by_blocks else [model]:
        part.compile(fullgraph=True, backend="eager")
    model(noise(0))
    assert room(model) == [1, 1, 1]
    assert room(other) == [0, 0, 0]
    assert not any(slot.words.numel() for layer in other.layers() for slot in layer.state.slots)


def test_a_model_called_in_a_wrapper_finds_all_its_layers() -> None:
    counter = CompileCounter()
    wrapper = nn.Sequential(nn.Identity(), Model(12))
    for block in wrapper[1].blocks:
        block.compile(fullgraph=True, backend=counter)
    wrapper(noise(0))
    assert counter.frame_count == 1


def test_layers_that_no_module_calls_share_room_when_told() -> None:
    layers = nn.ModuleList(LiteAttention(threshold=-0.5) for _ in range(3))
    share_room(layers)
    counter = CompileCounter()
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter)
    twins = copy.deepcopy(layers)
    q = 2 * noise(0).unflatten(-1, (HEADS, HEAD_DIM))
    for layer in layers:
        layer(q, q, q)
    assert counter.frame_count == 1
    assert not any(layer.state.owners() for layer in twins)
    twins[0].compile(fullgraph=True, backend=counter)
    twins[0](q, q, q)
    assert [len(layer.state.owners()) for layer in twins] == [1, 1, 1], "copies share with each other"


class Block(nn.Module):
    """Driven by a plain function, as in models written for one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = LiteAttention(threshold=-0.5)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, HEAD_DIM))
        out: Tensor = self.attn(heads, heads, heads)
        return out.flatten(-2)


def run(blocks: list[Block], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def test_blocks_of_a_plain_function_are_warned_of_once_and_cured_by_sharing(caplog: pytest.LogCaptureFixture) -> None:

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "lite_attention"]

    counter = CompileCounter()
    blocks = [Block() for _ in range(12)]
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    run(blocks[:1], noise(0))
    run(blocks[:1], noise(0, 700))
    assert not warnings(), "a layer alone may be compiled for as many shapes as it meets"
    run(blocks[:4], noise(0))
    assert_expected_inline(
        "\n".join(warnings()),
        """Block is compiled again for another instance, as no module that is called holds both: each instance costs a compile, and beyond torch._dynamo.config.recompile_limit (8 by default) they raise or run uncompiled. If they are blocks of one model, call lite_attention.share_room(*blocks) first, and one compile serves all""",
    )
    assert counter.frame_count == 5, "without sharing, each layer costs a compile"
    torch._dynamo.reset()
    counter.clear()
    caplog.clear()
    blocks = [Block() for _ in range(12)]
    share_room(*blocks)
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    run(blocks, noise(0))
    assert counter.frame_count == 1
    assert not warnings()
