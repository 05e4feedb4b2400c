"""Captured steps, as far as a machine without a GPU can tell: what is checked, what is copied, what is set back.

A stand-in for the CUDA graph replays by calling the step again. What only the GPU can show is in
test_gpu_cuda_graphs.py. The texts are pinned; EXPECTTEST_ACCEPT=1 pytest tests/skipping/test_cuda_graphs.py accepts new ones.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lite_attention import LiteAttention, skip_branch
from lite_attention.skipping import cuda_graphs
from lite_attention.skipping.cuda_graphs import CapturedStep, capture_step
from lite_attention.skipping.dense_steps import GenerationClock
from lite_attention.skipping.map_table import MAP_SLOTS
from support.models import Model, noise, same_state


class Repeatable:
    """A step that remembers how it was last called and what it returned, so that the call can be repeated."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.args, self.kwargs = args, kwargs
        self.outputs = self.step(*args, **kwargs)
        return self.outputs

    def repeat(self) -> None:
        """As a graph does: the same arguments read again, and the same outputs overwritten."""
        outputs = self.step(*self.args, **self.kwargs)
        for old, new in zip(*map(torch.utils._pytree.tree_leaves, (self.outputs, outputs)), strict=True):
            if isinstance(old, Tensor):
                with torch.inference_mode():  # a graph writes memory, of whatever kind of tensor
                    old.copy_(new)


class Graph:
    """In place of torch.cuda.CUDAGraph; ``step`` is set once it is captured."""

    step: Repeatable

    def replay(self) -> None:
        self.step.repeat()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


@pytest.fixture
def _no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        """A call inside is recorded, not run: the state stays as it is."""
        with cuda_graphs._unchanged_buffers({str(index): root for index, root in enumerate(captured_modules)}):
            yield

    monkeypatch.setattr(cuda_graphs, "_check_device", lambda device: None)
    monkeypatch.setattr(cuda_graphs, "_side_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)


captured_modules: list[nn.Module] = []


def captured(step: Callable[..., Any], *args: Any, modules: list[nn.Module], **kwargs: Any) -> CapturedStep[Any]:
    captured_modules[:] = modules
    repeatable = Repeatable(step)
    result = capture_step(repeatable, args, kwargs, modules=modules)
    assert repeatable.calls == 3, "two calls to warm up, one to capture"
    result._graph.step = repeatable
    return result


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in cuda_graphs._buffers({"": module}).items()}


def timed_model() -> nn.ModuleList:
    return nn.ModuleList([Model(2), GenerationClock()])


def run(models: nn.ModuleList, x: Tensor, timestep: Tensor, scale: float = 1.0) -> dict[str, Any]:
    model, clock = models
    clock.tick(timestep)
    conditional = model(scale * x)
    with skip_branch(1):
        return {"out": [conditional, model(x + 1)], "scale": scale}


@pytest.mark.usefixtures("_no_gpu_needed")
def test_replays_follow_inputs_thresholds_resets_and_time() -> None:
    models = timed_model()
    eager = copy.deepcopy(models)

    def step(x: Tensor, timestep: Tensor, scale: float) -> dict[str, Any]:
        return run(models, x, timestep, scale)

    replayed = captured(step, noise(7), timestep=torch.tensor(7.0), scale=0.9, modules=[models])
    skipped = 0.0
    for index in range(8):
        if index == 3:
            for layer in (*models[0].layers(), *eager[0].layers()):
                layer.set_threshold(-0.1)
        if index == 5:
            for layer in (*models[0].layers(), *eager[0].layers()):
                layer.reset_skip_state()
        x, timestep = noise(index), torch.tensor(900.0 - 100 * (index % 4))
        # Keyword arguments in another order are the same arguments.
        result, expected = replayed(x, scale=0.9, timestep=timestep), run(eager, x, timestep, 0.9)
        torch.testing.assert_close(result, expected, atol=0, rtol=0)
        assert same_state(models[0], eager[0], range(2))
        assert models[1].step() == eager[1].step() == index % 4
        skipped = max(skipped, float(next(models[0].layers()).skip_fraction()))
    assert skipped > 0.02, "the model is meant to skip something"


@pytest.mark.usefixtures("_no_gpu_needed")
def test_outputs_are_not_touched_by_the_next_call() -> None:
    model = Model(1)
    replayed = captured(model, noise(0), modules=[model])
    first = replayed(noise(1))
    kept = first.clone()
    assert not torch.equal(replayed(noise(2)), kept)
    assert torch.equal(first, kept)


@pytest.mark.usefixtures("_no_gpu_needed")
@pytest.mark.parametrize("passes_before", [0, 1, 3])
def test_warming_up_leaves_the_state_as_it_was(passes_before: int) -> None:
    models = timed_model()
    for index in range(passes_before):
        run(models, noise(index), torch.tensor(1000.0 - index))
    eager, before = copy.deepcopy(models), state_of(models)
    captured(lambda x, t: run(models, x, t), noise(5), torch.tensor(3.0), modules=[models])
    for name, buffer in state_of(models).items():
        assert buffer.shape != before[name].shape or torch.equal(buffer, before[name]), name
    assert all(layer.skip_fraction() == other.skip_fraction() for layer, other in pairs(models[0], eager[0]))
    if passes_before == 0:
        with pytest.raises(RuntimeError, match="branch 0 has no keep map yet"):
            next(models[0].layers()).keep_map()
    for index in range(2):  # and what follows is what would have followed
        x, timestep = noise(index), torch.tensor(500.0 - index)
        torch.testing.assert_close(run(models, x, timestep), run(eager, x, timestep), atol=0, rtol=0)
        assert same_state(models[0], eager[0], range(2))


def pairs(one: Model, other: Model) -> Iterator[tuple[LiteAttention, LiteAttention]]:
    return zip(one.layers(), other.layers(), strict=True)


@pytest.mark.usefixtures("_no_gpu_needed")
def test_the_state_is_set_back_when_warming_up_fails() -> None:
    model = Model(1)
    model(noise(0))
    before = state_of(model)

    def step(x: Tensor) -> Tensor:
        model(x)
        raise KeyError("the step's own")

    with pytest.raises(KeyError, match="the step's own"):
        captured(step, noise(1), modules=[model])
    torch.testing.assert_close(state_of(model), before, atol=0, rtol=0)


@pytest.mark.usefixtures("_no_gpu_needed")
def test_a_map_that_warming_up_evicted_is_not_mistaken_for_another() -> None:
    layer = LiteAttention(threshold=-0.5)

    def inputs(length: int) -> list[Tensor]:
        return [2 * noise(length, length).unflatten(-1, (2, 32))] * 3

    for length in range(520, 520 + MAP_SLOTS):
        layer(*inputs(length))
    captured(layer, *inputs(100), modules=[layer])
    for length in (100, 520, 520 + MAP_SLOTS - 1):  # the newcomer, the evicted, and one that is still there
        fresh = LiteAttention(threshold=-0.5)
        assert torch.equal(layer(*inputs(length)), fresh(*inputs(length)))


@pytest.mark.usefixtures("_no_gpu_needed")
def test_one_captured_step_a_shape() -> None:
    model = Model(2)
    eager = copy.deepcopy(model)
    steps = {length: captured(model, noise(0, length), modules=[model]) for length in (520, 700)}
    for index, length in enumerate((520, 520, 700, 700, 520)):
        x = noise(index, length)
        assert torch.equal(steps[length](x), eager(x))
        assert same_state(model, eager)


@pytest.mark.usefixtures("_no_gpu_needed")
def test_inputs_made_in_inference_mode_may_be_followed_by_others() -> None:
    model = Model(1)
    with torch.inference_mode():
        replayed = captured(model, noise(0), modules=[model])
        inside = replayed(noise(1))
    assert replayed(noise(1)).shape == inside.shape


def report(calls: dict[str, Callable[[], object]]) -> str:
    lines = []
    for name, call in calls.items():
        with pytest.raises(Exception, match=r".+") as raised:
            call()
        lines.append(f"{name} -> {raised.type.__name__}: {raised.value}")
    return "\n".join(lines)


def in_autocast(call: Callable[[], object]) -> object:
    torch.set_autocast_enabled("cuda", True)  # torch.autocast does not without a GPU
    try:
        return call()
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_arguments_that_cannot_be_captured() -> None:
    model, x = Model(1), noise(0)
    calls: dict[str, Callable[[], object]] = {
        "no step": lambda: capture_step(None, [x], modules=model),
        "a function alone": lambda: capture_step(lambda x: model(x), [x]),
        "a pipeline": lambda: capture_step(model, [x], modules=object()),
        "a list of others": lambda: capture_step(model, [x], modules=[model, "transformer"]),
        "no LiteAttention": lambda: capture_step(nn.Linear(3, 3), [x]),
        "no warm-up": lambda: capture_step(model, [x], warmup_calls=0),
        "half a warm-up": lambda: capture_step(model, [x], warmup_calls=0.5),
        "no tensor": lambda: capture_step(model, [3], {"scale": 2.0}),
        "two devices": lambda: capture_step(model, [x], {"masks": {"text": [x.to("meta")]}}),
        "a gradient": lambda: torch.enable_grad()(capture_step)(model, [x.clone().requires_grad_()]),
        "autocast": lambda: in_autocast(lambda: capture_step(model, [x])),
    }
    if not torch.cuda.is_available():
        calls["no CUDA"] = lambda: capture_step(model, [x])
    assert_expected_inline(
        report(calls),
        """\
no step -> TypeError: capture_step: step has type NoneType, expected a module or function
a function alone -> ValueError: capture_step: modules is None, expected the modules that step runs, as step is not one
a pipeline -> TypeError: capture_step: modules has type object, expected a module or a list of them
a list of others -> TypeError: capture_step: modules[1] has type str, expected a module
no LiteAttention -> ValueError: capture_step: modules hold no LiteAttention layer, expected the transformers that step runs, with LiteAttention in them
no warm-up -> ValueError: capture_step: warmup_calls is 0, expected at least 1
half a warm-up -> TypeError: capture_step: warmup_calls has type float, expected an int
no tensor -> ValueError: capture_step: args and kwargs hold no tensor, expected the inputs of step
two devices -> ValueError: capture_step: masks['text'][0] is on meta, expected cpu, as args[0] is
a gradient -> ValueError: capture_step: args[0] requires a gradient, expected none: the step is forward-only. Detach it, or call under torch.no_grad()
autocast -> RuntimeError: capture_step: autocast is on and caches what it casts, which the graph would read after it is freed; expected autocast inside step, or with cache_enabled=False
no CUDA -> RuntimeError: capture_step: torch sees no CUDA device, expected the one that step runs on""",
    )


@pytest.mark.usefixtures("_no_gpu_needed")
def test_steps_that_cannot_be_captured() -> None:
    class Rebinding(Model):
        def forward(self, x: Tensor) -> Tensor:
            state = self.blocks[0].attn.state
            state.live = state.live.clone()
            return super().forward(x)

    class Opaque:
        pass

    model, rebinding = Model(1), Rebinding(1)
    crowded = LiteAttention()

    def many_shapes(x: Tensor) -> None:
        for length in range(100, 100 + 200 * (MAP_SLOTS + 1), 200):
            crowded(*[x.new_ones(1, length, 1, 32)] * 3)

    calls: dict[str, Callable[[], object]] = {
        "writes its input": lambda: captured(lambda x: model(x.add_(1)), noise(0), modules=[model]),
        "rebinds its state": lambda: captured(rebinding, noise(0), modules=[rebinding]),
        "has more shapes than slots": lambda: captured(many_shapes, noise(0), modules=[crowded]),
        "returns an object": lambda: captured(lambda x: (model(x), Opaque()), noise(0), modules=[model]),
    }
    assert_expected_inline(
        report(calls),
        """\
writes its input -> RuntimeError: capture_step: step writes args[0] in place, expected it to return what it computes: a replay works on copies
rebinds its state -> RuntimeError: capture_step: step replaced modules[0].blocks.0.attn.state.live while it was captured, expected it to be written in place. A LiteAttention layer does so where one step uses it with more branches and shapes than it has room for
has more shapes than slots -> RuntimeError: capture_step: step replaced modules[0].state.slots.0.words while it was captured, expected it to be written in place. A LiteAttention layer does so where one step uses it with more branches and shapes than it has room for
returns an object -> TypeError: capture_step: step returned something of type Opaque, expected tensors, numbers, strings or None, possibly in lists, tuples and dicts""",
    )


@pytest.mark.usefixtures("_no_gpu_needed")
def test_calls_that_the_graph_would_answer_wrongly() -> None:
    model, x = Model(2), noise(0)
    text = {"tokens": x, "lens": [3, None]}

    def step(x: Tensor, text: dict[str, Any], guidance: float | Tensor | None = 5.0, **more: Tensor) -> Tensor:
        return model(x)

    replayed = captured(step, x, text=text, guidance=5.0, modules=[model])

    def changed_layer(change: Callable[[LiteAttention], object]) -> Callable[[], object]:
        model = Model(2)
        replayed = captured(model, noise(0), modules=[model])
        change(model.blocks[1].attn)
        return lambda: replayed(noise(0))

    def in_branch_1() -> object:
        with skip_branch(1):
            return replayed(x, text=text, guidance=5.0)

    calls: dict[str, Callable[[], object]] = {
        "shape": lambda: replayed(noise(0, 521), text=text, guidance=5.0),
        "dtype": lambda: replayed(x, text=text | {"tokens": x.half()}, guidance=5.0),
        "device": lambda: replayed(x.to("meta"), text=text, guidance=5.0),
        "a number for a tensor": lambda: replayed(3, text=text, guidance=5.0),
        "a tensor for a number": lambda: replayed(x, text=text, guidance=torch.tensor(5.0)),
        "another number": lambda: replayed(x, text=text, guidance=6.0),
        "another kind of number": lambda: replayed(x, text=text, guidance=5),
        "a tensor for None": lambda: replayed(x, text={"tokens": x, "lens": [3, x]}, guidance=5.0),
        "by keyword": lambda: replayed(x=x, text=text, guidance=5.0),
        "one left out": lambda: replayed(x, text={"tokens": x, "lens": [3]}, guidance=5.0),
        "one more": lambda: replayed(x, text=text, guidance=5.0, mask=x),
        "a tuple for a list": lambda: replayed(x, text={"tokens": x, "lens": (3, None)}, guidance=5.0),
        "a gradient": lambda: torch.enable_grad()(replayed)(x.clone().requires_grad_(), text=text, guidance=5.0),
        "another branch": in_branch_1,
        "skipping off": changed_layer(lambda layer: layer.enable_skip_optimization(False)),
        "threshold per head": changed_layer(lambda layer: layer.set_threshold([-1.0, -2.0])),
        "state moved": changed_layer(lambda layer: layer.to("meta")),
    }
    before = state_of(model)
    assert_expected_inline(
        report(calls),
        """\
shape -> ValueError: CapturedStep: args[0] is [1, 521, 64] of torch.float32 on cpu, expected [1, 520, 64] of torch.float32 on cpu, as captured. Other inputs need a captured step of their own
dtype -> ValueError: CapturedStep: text['tokens'] is [1, 520, 64] of torch.float16 on cpu, expected [1, 520, 64] of torch.float32 on cpu, as captured. Other inputs need a captured step of their own
device -> ValueError: CapturedStep: args[0] is [1, 520, 64] of torch.float32 on meta, expected [1, 520, 64] of torch.float32 on cpu, as captured. Other inputs need a captured step of their own
a number for a tensor -> ValueError: CapturedStep: args[0] is 3, expected [1, 520, 64] of torch.float32 on cpu, as captured. Other inputs need a captured step of their own
a tensor for a number -> ValueError: CapturedStep: guidance is [] of torch.float32 on cpu, expected 5.0, as captured. What changes from call to call must be a tensor
another number -> ValueError: CapturedStep: guidance is 6.0, expected 5.0, as captured. What changes from call to call must be a tensor
another kind of number -> ValueError: CapturedStep: guidance is 5, expected 5.0, as captured. What changes from call to call must be a tensor
a tensor for None -> ValueError: CapturedStep: text['lens'][1] is [1, 520, 64] of torch.float32 on cpu, expected None, as captured. What changes from call to call must be a tensor
by keyword -> ValueError: CapturedStep: args[0] is missing, expected args[0], guidance, text['tokens'], text['lens'][0], text['lens'][1], as captured
one left out -> ValueError: CapturedStep: text['lens'][1] is missing, expected args[0], guidance, text['tokens'], text['lens'][0], text['lens'][1], as captured
one more -> ValueError: CapturedStep: mask is given, expected only args[0], guidance, text['tokens'], text['lens'][0], text['lens'][1], as captured
a tuple for a list -> ValueError: CapturedStep: the arguments are in other lists, tuples or dicts, expected those captured
a gradient -> ValueError: CapturedStep: args[0] requires a gradient, expected none: the step is forward-only. Detach it, or call under torch.no_grad()
another branch -> RuntimeError: CapturedStep: called in skip_branch(1), expected 0, the branch of the capture. Capture one step for each branch, or one that runs both
skipping off -> RuntimeError: CapturedStep: modules[0].blocks.1.attn has layout version 1, expected 0, the one captured: its state moved or made room for another shape, skipping was switched on or off, or its threshold changed between one number and one per head. Capture the step again
threshold per head -> RuntimeError: CapturedStep: modules[0].blocks.1.attn has layout version 2, expected 0, the one captured: its state moved or made room for another shape, skipping was switched on or off, or its threshold changed between one number and one per head. Capture the step again
state moved -> RuntimeError: CapturedStep: modules[0].blocks.1.attn has layout version 2, expected 0, the one captured: its state moved or made room for another shape, skipping was switched on or off, or its threshold changed between one number and one per head. Capture the step again""",
    )
    torch.testing.assert_close(state_of(model), before, atol=0, rtol=0)
    replayed(x, text=text, guidance=5.0)


@pytest.mark.usefixtures("_no_gpu_needed")
def test_a_clock_that_has_moved_outdates_the_graph_that_reads_it() -> None:
    models = timed_model()
    replayed = captured(lambda x, t: run(models, x, t), noise(0), torch.tensor(3.0), modules=[models])
    replayed(noise(0), torch.tensor(9.0))
    models[1].tick(torch.tensor(8.0, device="meta"))
    with pytest.raises(
        RuntimeError, match=r"modules\[0\]\.1 has layout version 1, expected 0, the one captured: its state"
    ):
        replayed(noise(0), torch.tensor(7.0))


def test_what_changes_nothing_in_the_layout_is_accepted() -> None:
    """The other half of the claims above: the version a captured step compares stays the same."""
    model = Model(1)
    layer = next(model.layers())
    model(noise(0))
    version = layer.layout_version
    layer.set_threshold(-1.0)
    layer.reset_skip_state()
    layer.set_keep_map(layer.keep_map())
    layer.enable_skip_optimization(True)
    model(noise(1))
    with skip_branch(1):
        model(noise(1))
    model(noise(1, 700))
    assert layer.layout_version == version, "new maps beside the old ones leave these where they are"


@pytest.mark.usefixtures("_no_gpu_needed")
def test_a_backward_does_not_replay_a_step_again() -> None:
    model = Model()
    step = captured(model, noise(0), modules=[model])
    weight = torch.ones(1, requires_grad=True)
    with torch.enable_grad():
        out = checkpoint(lambda weight: (step(noise(1)) * weight).square().sum(), weight, use_reentrant=False)
        before = state_of(model)
        with pytest.raises(RuntimeError, match=r"CapturedStep: called inside a backward pass"):
            out.backward()
    assert all(torch.equal(state_of(model)[name], buffer) for name, buffer in before.items())
