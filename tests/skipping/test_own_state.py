"""State belongs to its layer alone: what others do with a model, in whatever mode, neither reaches nor spoils it."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import PretrainedConfig, PreTrainedModel

from lite_attention import LiteAttention, exportable
from lite_attention.ops.own_state import OwnState, StateHolder, held_states, hold
from lite_attention.skipping.dense_steps import GenerationClock
from support.inputs import poisoned_memory, report
from support.passes import video
from support.ranks import run_on_ranks

THRESHOLD = -6.0
CPU = torch.device("cpu")


class Timed(nn.Module):
    """A layer and a clock in a model with a weight."""

    def __init__(self, threshold: float | list[float] = THRESHOLD) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.clock, self.attn = GenerationClock(dense_steps=2), LiteAttention(threshold=threshold)

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        self.clock.tick(torch.tensor(timestep))
        x = x * self.scale
        out: Tensor = self.attn(x, x, x, start_full=self.clock.start_full, generation=self.clock.generation)
        return out


STEPS = ((1, 900.0), (1, 700.0), (1, 500.0), (1, 300.0), (2, 900.0), (2, 800.0), (2, 700.0))


def two_videos(model: nn.Module, length: int = 1024) -> tuple[list[Tensor], list[float]]:
    """What each step computes and skips: a map that is lost shows in the share, one of another video in the values."""
    outs, fractions = [], []
    layer = next(part for part in model.modules() if isinstance(part, LiteAttention))
    with torch.no_grad():
        for seed, timestep in STEPS:
            outs.append(model(video(seed, length), timestep))
            fractions.append(float(layer.skip_fraction()))
    return outs, fractions


def assert_steps_like_a_new_one(model: nn.Module) -> None:
    (outs, fractions), (expected, expected_fractions) = two_videos(model), two_videos(Timed())
    assert all(map(torch.equal, outs, expected))
    assert fractions == expected_fractions
    assert min(fractions) > 0.3


def test_walks_through_a_model_do_not_meet_the_state() -> None:
    model = Timed()
    two_videos(model)
    assert [name for name, _ in model.named_parameters()] == ["scale"]
    assert not list(model.buffers())
    assert list(model.state_dict()) == ["scale"]
    assert [type(part) for part in model.modules()] == [Timed, GenerationClock, LiteAttention]
    assert [held.name for held in held_states(model)] == ["clock.state", "attn.state"]


def spoil(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, 77 if tensor.dtype != torch.bool else 1)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "casts": lambda model: model.half().float(),
    "moves": lambda model: model._apply(lambda tensor: tensor.to("meta").new_ones(tensor.shape, device="cpu")),
    "memory without values": lambda model: [buffer.copy_(spoil(buffer)) for buffer in model.buffers()],
    "initialisation": lambda model: model.apply(lambda part: [buffer.zero_() for buffer in part.buffers(False)]),
    "loading": lambda model: model.load_state_dict(Timed().state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_done_to_a_model_in_the_middle_of_a_video_leaves_its_state(
    change: Callable[[nn.Module], object],
) -> None:
    model, untouched = Timed(), Timed()
    with torch.no_grad():
        for seed, timestep in STEPS:
            assert torch.equal(model(video(seed), timestep), untouched(video(seed), timestep))
            change(model)
    assert torch.equal(model.attn.keep_map(), untouched.attn.keep_map())


def test_a_model_made_on_meta_and_materialised_without_values_works() -> None:
    with torch.device("meta"):
        model = Timed()
    with poisoned_memory(CPU):
        model.to_empty(device="cpu")
    nn.init.ones_(model.scale)
    assert_steps_like_a_new_one(model)


class Config(PretrainedConfig):  # type: ignore[misc]
    model_type = "toy_video"


class Pretrained(PreTrainedModel):  # type: ignore[misc]
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.inner = Timed([THRESHOLD])
        self.post_init()

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        out: Tensor = self.inner(x, timestep)
        return out


def test_a_model_loaded_by_transformers_is_as_made(tmp_path: Path) -> None:
    Pretrained(Config()).save_pretrained(tmp_path)
    for _ in range(3):
        with poisoned_memory(CPU):
            model = Pretrained.from_pretrained(tmp_path)
        assert model.inner.attn.state.threshold.tolist() == [THRESHOLD]
        assert_steps_like_a_new_one(model)


def test_averaging_a_model_with_its_buffers_leaves_the_state_out() -> None:
    model = Timed()
    average = AveragedModel(model, use_buffers=True)
    two_videos(model)
    average.update_parameters(model)
    average.update_parameters(model)
    assert_steps_like_a_new_one(average)


def _in_parallel(wrap: str, more_tokens: int) -> None:
    """Each rank makes a video of its own; no_grad was forgotten."""
    rank = dist.get_rank()
    length = 1024 + more_tokens * rank
    model, alone = Timed(), Timed()
    two_videos(model, length)  # a first look before it is wrapped
    model.clock.reset()
    wrapped: nn.Module
    if wrap == "DDP":
        wrapped = DistributedDataParallel(model)
    elif wrap == "FSDP1":
        precision = MixedPrecision(buffer_dtype=torch.bfloat16)
        wrapped = FullyShardedDataParallel(model, mixed_precision=precision, device_id=CPU, use_orig_params=True)
    else:
        fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))
        wrapped = model
    for seed, timestep in STEPS:
        x = video(10 * rank + seed, length)
        assert torch.equal(wrapped(x, timestep).detach(), alone(x, timestep).detach())
    assert torch.equal(model.attn.keep_map(), alone.attn.keep_map())
    assert alone.attn.skip_fraction() > 0.1


@pytest.mark.parametrize("more_tokens", [0, 128])
@pytest.mark.parametrize("wrap", ["DDP", "FSDP1", "FSDP2"])
def test_ranks_of_a_data_parallel_model_have_maps_of_their_own(wrap: str, more_tokens: int) -> None:
    run_on_ranks(2, "cpu", _in_parallel, wrap, more_tokens)


# Modes


def test_a_run_under_fake_tensors_leaves_nothing_behind() -> None:
    model = Timed()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for timestep in (900.0, 700.0):
            assert isinstance(model(mode.from_tensor(video(1)), timestep), FakeTensor)
        assert isinstance(model(video(1), 500.0), FakeTensor), "a real query in the mode"
    assert_steps_like_a_new_one(model)


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("change", [None, [-1.0, -2.0]], ids=["as made", "threshold of another shape"])
def test_a_layer_called_with_fake_tensors_keeps_its_map(allow: bool, change: list[float] | None) -> None:
    x = video(1).expand(1, -1, 2, -1)
    layer, untouched = LiteAttention(threshold=THRESHOLD), LiteAttention(threshold=THRESHOLD)
    with torch.no_grad():
        for each in (layer, untouched):
            each(x, x, x)
            each(x, x, x)
        with FakeTensorMode(allow_non_fake_inputs=allow):
            fake = torch.empty(x.shape)
            for enabled in (True, False, True):
                layer.enable_skip_optimization(enabled)
                out = layer(fake, fake, fake, start_full=torch.ones((), dtype=torch.bool))
                assert isinstance(out, FakeTensor)
            if change is not None:
                layer.set_threshold(change)
        if change is not None:
            untouched.set_threshold(change)
        assert torch.equal(layer(x, x, x), untouched(x, x, x))
    assert torch.equal(layer.keep_map(), untouched.keep_map())


def test_layers_made_or_copied_under_fake_tensors_are_real() -> None:
    x = video(1)
    with FakeTensorMode():
        made = LiteAttention(threshold=THRESHOLD)
        copied, clock = copy.deepcopy(made), copy.deepcopy(GenerationClock())
    alone = LiteAttention(threshold=THRESHOLD)
    for _ in range(3):
        out = alone(x, x, x)
        assert torch.equal(made(x, x, x), out)
        assert torch.equal(copied(x, x, x), out)
    assert made.skip_fraction() == copied.skip_fraction() == alone.skip_fraction() > 0.3
    clock.tick(torch.tensor(3.0))
    assert int(clock.step()) == 0


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_tracing_with_make_fx_computes_every_tile_and_leaves_real_calls_as_they_were(mode: str) -> None:
    x, layer, untouched = video(1), LiteAttention(threshold=THRESHOLD), LiteAttention(threshold=THRESHOLD)
    with torch.no_grad():
        graph = make_fx(lambda y: layer(y, y, y), tracing_mode=mode)(x)
        torch.testing.assert_close(graph(x), untouched(x, x, x))
        layer.reset_skip_state()
        untouched.reset_skip_state()
        for _ in range(2):
            assert torch.equal(layer(x, x, x), untouched(x, x, x))


RECORDERS: dict[str, Callable[[nn.Module, Tensor], Callable[..., Tensor]]] = {
    "torch.jit.trace": lambda layer, x: torch.jit.trace(layer, (x, x, x), check_trace=False),
    "make_fx": lambda layer, x: make_fx(layer)(x, x, x),
}


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("passes", [0, 2])
def test_a_recording_that_would_hold_todays_state_is_refused(recorder: str, passes: int) -> None:
    x, y = video(1), video(2)
    layer, untouched = LiteAttention(threshold=THRESHOLD), LiteAttention(threshold=THRESHOLD)
    with torch.no_grad():
        for _ in range(passes):
            assert torch.equal(layer(x, x, x), untouched(x, x, x))
        with pytest.raises(NotImplementedError, match=f"LiteAttention: {recorder} does not see the skip state"):
            RECORDERS[recorder](layer, x)
        assert torch.equal(layer(x, x, x), untouched(x, x, x))
        assert torch.equal(layer.keep_map(), untouched.keep_map())
        layer.enable_skip_optimization(False)
        recorded = RECORDERS[recorder](layer, x)
        torch.testing.assert_close(recorded(y, y, y), layer(y, y, y))


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LiteAttention(threshold=THRESHOLD)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.layer(q, k, v)
        return out


class LayersAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LiteAttention)


STAND_INS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "torch.func.functional_call": lambda model: lambda *x: torch.func.functional_call(model, {}, x),
    "torch.fx": lambda model: fx.GraphModule(model, LayersAreLeaves().trace(model)),
}


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_what_calls_the_layer_itself_shares_its_state(stand_in: str) -> None:
    x = video(1)
    model, untouched = Single(), Single()
    call = STAND_INS[stand_in](model)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(call(x, x, x), untouched(x, x, x))
    assert torch.equal(model.layer.keep_map(), untouched.layer.keep_map())
    with pytest.raises(TypeError, match="LiteAttention: query has type Proxy, expected a tensor"):
        fx.symbolic_trace(model)


def through_pickle(model: Timed) -> Timed:
    result: Timed = pickle.loads(pickle.dumps(model))
    return result


def through_save(model: Timed) -> Timed:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    result: Timed = torch.load(file, weights_only=False)
    return result


def through_shared_memory(model: Timed) -> Timed:
    """As torch.multiprocessing hands a model to another process: in memory of both."""
    result: Timed = pickle.loads(ForkingPickler.dumps(model))
    return result


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_save, through_shared_memory])
@pytest.mark.parametrize("moved", [False, True])
def test_copies_made_in_inference_mode_can_be_written_outside(duplicate: Callable[[Timed], Timed], moved: bool) -> None:
    model = Timed()
    two_videos(model)
    with torch.inference_mode():
        copied = duplicate(model)
        if moved:
            copied.to("meta").to_empty(device="cpu")
            nn.init.ones_(copied.scale)
    for write in (
        lambda: copied.attn.set_threshold(-1.0),
        lambda: copied.attn.set_threshold([THRESHOLD]),
        lambda: copied.attn.set_keep_map(model.attn.keep_map()),
        copied.attn.reset_skip_state,
        lambda: copied.clock.tick(torch.tensor(100.0)),
        copied.clock.reset,
    ):
        write()
    if moved:
        copied.scale = nn.Parameter(torch.ones(64))
    assert_steps_like_a_new_one(copied)
    held = {buffer.data_ptr() for each in held_states(model) for buffer in each.state.buffers() if buffer.numel()}
    copies = {buffer.data_ptr() for each in held_states(copied) for buffer in each.state.buffers() if buffer.numel()}
    assert held.isdisjoint(copies)
    assert held
    assert copies


def test_processes_that_are_handed_one_model_have_maps_of_their_own() -> None:
    model = Timed()
    two_videos(model)
    kept = model.attn.keep_map()
    sent = through_shared_memory(model)
    assert torch.equal(sent.attn.keep_map(), kept)
    assert sent.scale.data_ptr() == model.scale.data_ptr()
    sent.clock.reset()
    with torch.no_grad():
        sent(video(7), 100.0)
        sent(video(7), 50.0)
    assert not torch.equal(sent.attn.keep_map(), kept)
    assert torch.equal(model.attn.keep_map(), kept)


def test_a_model_loaded_to_another_device_than_it_was_saved_on_starts_over() -> None:
    model = Timed([THRESHOLD])
    two_videos(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False, map_location="meta")
    loaded.scale = nn.Parameter(torch.ones(64))
    assert_steps_like_a_new_one(loaded)


def test_replicas_that_would_share_the_state_are_refused() -> None:
    with pytest.raises(RuntimeError) as error:
        [part._replicate_for_data_parallel() for part in Timed().modules()]  # type: ignore[operator]
    assert_expected_inline(
        str(error.value),
        """LiteAttention: nn.DataParallel makes copies of the model in each call, which would share one skip state, expected a model of its own for each device, as DistributedDataParallel has""",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    x, expected = video(1), two_videos(Timed())[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Timed().float()
        fraction = torch.zeros((), dtype=torch.float32)
        got = [model(video_, timestep) for video_, timestep in zip(_videos(before), [t for _, t in STEPS], strict=True)]
        model.attn(x, x, x, skip_fraction_out=fraction)
        assert model.attn.skip_fraction().dtype == model.attn.state.threshold.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, got, expected))


def _videos(dtype: torch.dtype) -> Iterator[Tensor]:
    """Made in the usual default dtype."""
    current = torch.get_default_dtype()
    for seed, _ in STEPS:
        torch.set_default_dtype(dtype)
        x = video(seed)
        torch.set_default_dtype(current)
        yield x


# What compilers see


def test_compiled_code_takes_the_state_for_memory_at_fixed_addresses() -> None:
    """As it takes buffers of a part of the model: CUDA graphs then read and write it in place."""
    static: dict[str, bool] = {}

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                static[node.name] = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Timed(), backend=backend, fullgraph=True)(video(1), 900.0)
    state = {name: is_static for name, is_static in static.items() if "state" in name}
    assert len(state) == 27, list(static)
    assert all(state.values())
    assert not all(static.values())


def test_the_state_is_a_part_of_the_model_inside_exportable_alone() -> None:
    model = Timed()
    two_videos(model)
    clock, state = model.clock.state, model.attn.state

    @exportable(model)
    def look_and_fail() -> None:
        with exportable(model):  # again changes nothing
            pass
        names = [name for name, _ in model.named_buffers()]
        assert {"clock.state.steps", "attn.state.live", "attn.state.slots.0.words"} <= set(names)
        assert list(model.state_dict()) == ["scale"]
        assert (model.clock.state, model.attn.state) == (clock, state)
        before = model.attn.keep_map()
        model.half().float()
        assert torch.equal(model.attn.keep_map(), before)
        assert state.threshold.dtype == torch.float32
        raise KeyError("the block's own")

    with pytest.raises(KeyError, match="the block's own"):
        look_and_fail()
    assert not list(model.buffers())
    assert (model.clock.state, model.attn.state) == (clock, state)
    two_videos(model)


@pytest.mark.parametrize("strict", [True, False])
def test_export_outside_of_exportable_is_refused(strict: bool) -> None:
    layer, clock, x = LiteAttention(), GenerationClock(), video(1)

    class Clocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clock = clock

        def forward(self, timestep: Tensor) -> Tensor:
            self.clock.tick(timestep)
            return self.clock.start_full.clone()

    def message(model: nn.Module, *args: Tensor) -> str:
        with pytest.raises(Exception, match="exportable") as raised, torch.no_grad():
            torch.export.export(model, args, strict=strict)
        return next(line for line in str(raised.value).splitlines() if "exportable" in line)

    layer(x, x, x)
    assert "LiteAttention: torch.export does not see the state" in message(layer, x, x, x)
    assert "GenerationClock: torch.export does not see the state" in message(Clocked(), torch.tensor(3.0))


def _pickled(model: Timed) -> Timed:
    copied: Timed = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("copy_of", [copy.deepcopy, _pickled])
def test_a_copy_made_inside_exportable_has_its_state_out_of_reach(copy_of: Callable[[Timed], Timed]) -> None:
    model = Timed()
    expected = two_videos(copy.deepcopy(model))
    with exportable(model):
        copied = copy_of(model)
        assert {name for name, _ in copied.named_modules()} == {"", "clock", "attn"}
        assert any(isinstance(part, OwnState) for part in model.modules())
        with pytest.raises(Exception, match=r"torch\.export does not see the state"), torch.no_grad():
            torch.export.export(copied, (video(1, 256), 900.0), strict=False)
    assert [held.name for held in held_states(copied)] == [held.name for held in held_states(model)]
    outs, fractions = two_videos(copied)
    assert fractions == expected[1]
    assert all(torch.equal(out, like) for out, like in zip(outs, expected[0], strict=True))
    with exportable(copied):
        assert any(isinstance(part, OwnState) for part in copied.modules())


def test_a_shallow_copy_made_inside_exportable_is_refused() -> None:
    model = Timed()
    with exportable(model), pytest.raises(RuntimeError, match=r"^LiteAttention: copy\.copy inside lite_attention\.exp"):
        copy.copy(model.attn)
    shallow = copy.copy(model.attn)
    assert shallow.state is model.attn.state


def test_exportable_takes_modules() -> None:
    def enter(model: object) -> None:
        with exportable(model):  # type: ignore[arg-type]
            pass

    assert_expected_inline(
        report({"a function": lambda: enter(print)}),
        """a function -> TypeError: exportable: model has type builtin_function_or_method, expected a module""",
    )


class _Number(OwnState):
    """A state that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.start_over(torch.device("cpu"))

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor]:
        return {"number": torch.zeros((), dtype=torch.int64, device=device)}

    @property
    def device(self) -> torch.device:
        return self.number.device


class _Placed(StateHolder):
    def __init__(self) -> None:
        super().__init__()
        hold(self, "state", _Number())

    def forward(self, device: torch.device, compiling: bool) -> None:
        self.state.place(device, "Placed", compiling)


class _FirstOf(nn.Module):
    """Stands for a trace of its first block, while the model is called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Placed() for _ in range(3))

    def forward(self, device: torch.device, compiling: bool, block: int = 0) -> list[str]:
        self.blocks[block](device, compiling)
        return [str(block.state.device) for block in self.blocks]


def test_a_trace_places_the_state_of_sisters_that_nobody_placed_elsewhere() -> None:
    """So that code compiled for one block fits the others; a second device stands for another GPU."""
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert _FirstOf()(other, False) == ["meta", "cpu", "cpu"]
    assert _FirstOf()(other, True) == ["meta", "meta", "meta"]
    split = _FirstOf()
    split(cpu, False, block=2)  # the last block runs on a device of its own
    assert split(other, True) == ["meta", "meta", "cpu"]
