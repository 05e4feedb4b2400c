"""The diffusers door wherever a model's weights lie, and however it travels: offloading, meta, copies, pickles, dtypes."""

import copy
import gc
import io
import math
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention.integrations.diffusers import LiteAttentionHandle, enable_lite_attention
from support.video_models import CASES, VideoCase, make_latents, make_transformer, run
from support.video_pipelines import wan

WAN = CASES["wan"]
CPU = torch.device("cpu")
TIMESTEPS = (900.0, 700.0, 500.0, 300.0)
THRESHOLD = -2.0

every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def step_of(transformer: Any, step: int, seed: int = 0, case: VideoCase = WAN) -> Tensor:
    return run(transformer, case, make_latents(case, step, seed=seed), TIMESTEPS[step])


def denoise(transformer: Any, seed: int = 0, case: VideoCase = WAN) -> list[Tensor]:
    """The outputs of one generation."""
    return [step_of(transformer, step, seed, case) for step in range(len(TIMESTEPS))]


def assert_works(transformer: nn.Module, handle: LiteAttentionHandle, case: VideoCase = WAN) -> None:
    """Two generations, each as a model that stays on the CPU makes it, tile by tile."""
    other = make_transformer(case)
    other_handle = enable_lite_attention(other, threshold=THRESHOLD, must_do=[0, 10])
    handle.set_must_do([0, 10])
    for seed in range(2):
        assert all(map(torch.equal, denoise(transformer, seed, case), denoise(other, seed, case)))
        fractions = handle.skip_fraction()
        assert torch.equal(fractions, other_handle.skip_fraction())
        assert (fractions[:, 1:] > 0.02).all()


# Where the weights lie


def cpu_offload(transformer: nn.Module, folder: Path) -> None:
    """What ``pipe.enable_sequential_cpu_offload()`` does, there to a GPU."""
    accelerate.cpu_offload(transformer, execution_device=CPU)


def cpu_offload_with_buffers(transformer: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(transformer, execution_device=CPU, offload_buffers=True)


def disk_offload(transformer: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(transformer, folder, execution_device=CPU)


def device_map(transformer: nn.Module, folder: Path) -> None:
    places = {name: "disk" if name.startswith("blocks") else "cpu" for name, _ in transformer.named_children()}
    places |= {name: "cpu" for name, _ in transformer.named_parameters(recurse=False)}
    accelerate.dispatch_model(transformer, places, main_device="cpu", offload_dir=folder)  # type: ignore[arg-type]


def whole_models(transformer: nn.Module, folder: Path) -> None:
    """What ``pipe.enable_model_cpu_offload()`` does, there to a GPU."""
    accelerate.cpu_offload_with_hook(transformer, execution_device=CPU)


def groups_of_leaves(transformer: nn.Module, folder: Path) -> None:
    apply_group_offloading(transformer, CPU, offload_type="leaf_level")


def groups_of_blocks(transformer: nn.Module, folder: Path) -> None:
    apply_group_offloading(transformer, CPU, offload_type="block_level", num_blocks_per_group=1)


def groups_on_disk(transformer: nn.Module, folder: Path) -> None:
    apply_group_offloading(transformer, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


OFFLOADS = (
    cpu_offload,
    cpu_offload_with_buffers,
    disk_offload,
    device_map,
    whole_models,
    groups_of_leaves,
    groups_of_blocks,
    groups_on_disk,
)


@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda offload: offload.__name__)
@pytest.mark.parametrize("first", [False, True], ids=["offloaded after", "offloaded before"])
def test_offloaded_models_skip(offload: Callable[[nn.Module, Path], None], first: bool, tmp_path: Path) -> None:
    transformer = make_transformer(WAN)
    if first:
        offload(transformer, tmp_path)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    if not first:
        offload(transformer, tmp_path)
    assert_works(transformer, handle)


def test_an_offloaded_model_that_comes_home_skips_and_is_disabled() -> None:
    transformer = make_transformer(WAN)
    accelerate.cpu_offload(transformer, execution_device=CPU)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    remove_hook_from_submodules(transformer)
    assert_works(transformer, handle)
    handle.disable()
    assert transformer.forward.__func__ is type(transformer).forward  # type: ignore[attr-defined]


@pytest.mark.parametrize("enabled", ["inside", "before weights", "after weights"])
def test_models_made_on_meta_skip(enabled: str) -> None:
    weights = make_transformer(WAN).state_dict()
    with accelerate.init_empty_weights(include_buffers=False):
        transformer = make_transformer(WAN)
        if enabled == "inside":
            handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    if enabled == "before weights":
        handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    transformer.load_state_dict(weights, assign=True)
    if enabled == "after weights":
        handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    assert_works(transformer, handle)


def test_a_model_enabled_where_new_tensors_are_meta_skips() -> None:
    transformer = make_transformer(WAN)
    with torch.device("meta"):
        handle = enable_lite_attention(transformer, threshold=THRESHOLD, must_do=[0, 10])
    assert_works(transformer, handle)


def test_a_model_that_goes_to_meta_and_back_skips() -> None:
    transformer = make_transformer(WAN)
    weights = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in transformer.named_buffers()}
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    denoise(transformer, seed=3)
    with torch.inference_mode():
        transformer.to("meta").to_empty(device="cpu")
        transformer.load_state_dict(weights)
        for name, buffer in transformer.named_buffers():
            buffer.copy_(buffers[name])
    handle.reset()
    assert_works(transformer, handle)


def test_nothing_that_is_derived_is_a_part_of_the_model() -> None:
    transformer = make_transformer(WAN)
    before = {name for name, _ in transformer.named_buffers()}
    enable_lite_attention(transformer, threshold=THRESHOLD, must_do=[0, 10])
    denoise(transformer)
    assert {name for name, _ in transformer.named_buffers()} == before


# Copies and pickles


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


each_way = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])


@every_model
@each_way
def test_a_copy_in_mid_video_goes_on_as_the_model_does(case: VideoCase, duplicate: Callable[[Any], Any]) -> None:
    transformer = make_transformer(case)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD, must_do=[0, 10])
    for step in range(2):
        step_of(transformer, step, case=case)
    other = duplicate(transformer)
    rest = [step_of(transformer, step, case=case) for step in (2, 3)]
    assert (handle.skip_fraction()[:, 2:] > 0).all()
    assert all(map(torch.equal, [step_of(other, step, case=case) for step in (2, 3)], rest))
    fractions = handle.skip_fraction()
    with other.cache_context("cond"):
        denoise(other, seed=5, case=case)
    assert torch.equal(handle.skip_fraction(), fractions), "the copy has a state of its own"
    assert all(map(torch.equal, denoise(other, seed=1, case=case), denoise(transformer, seed=1, case=case)))


@each_way
def test_copies_of_a_model_before_its_first_call_work(duplicate: Callable[[Any], Any]) -> None:
    transformer = make_transformer(WAN)
    enable_lite_attention(transformer, threshold=THRESHOLD)
    assert all(map(torch.equal, denoise(duplicate(transformer)), denoise(transformer)))


@each_way
def test_a_copy_of_a_pipeline_starts_generations_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    other = duplicate(pipeline)
    assert other.scheduler is not pipeline.scheduler
    fresh = make_transformer(WAN)
    enable_lite_attention(fresh, threshold=THRESHOLD)
    other.scheduler.set_timesteps(4)
    for transformer in (pipeline.transformer, other.transformer):
        for step in range(2):
            step_of(transformer, step)
    other.scheduler.set_timesteps(4)
    # Below where the last video ended, so that the timesteps could not tell.
    latents = make_latents(WAN, seed=1)
    assert torch.equal(run(other.transformer, WAN, latents, 600.0), run(fresh, WAN, latents, 600.0))
    run(pipeline.transformer, WAN, latents, 600.0)
    assert (handle.skip_fraction()[:, 2] > 0).all(), "nothing was reset in the original"


@pytest.mark.parametrize("is_replaced", [False, True], ids=["its scheduler", "another scheduler"])
@pytest.mark.parametrize("first", ["pipeline", "handle", "transformer"])
@each_way
def test_a_copy_of_a_pipeline_looks_at_its_own_scheduler_whatever_is_copied_first(
    duplicate: Callable[[Any], Any], first: str, is_replaced: bool
) -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    if is_replaced:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline.scheduler.set_timesteps(4)
    step_of(pipeline.transformer, 0)
    things = {"handle": handle, "transformer": pipeline.transformer, "pipeline": pipeline}
    names = sorted(things, key=lambda name: name != first)
    copies = dict(zip(names, duplicate([things[name] for name in names]), strict=True))
    other, other_handle = copies["pipeline"], copies["handle"]
    assert other.transformer is copies["transformer"]
    step_of(pipeline.transformer, 1)
    step_of(other.transformer, 1)
    pipeline.scheduler.set_timesteps(7)
    step_of(other.transformer, 2)
    assert (other_handle.skip_fraction()[:, 1:3] > 0).all(), "it goes on, whatever the original begins"
    if is_replaced:
        other.scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    other.scheduler.set_timesteps(4)
    step_of(other.transformer, 3)
    assert other_handle.skip_fraction().tolist() == [[0.0], [0.0]], "a video below where the last one ended"
    before = set(vars(pipeline))
    other_handle.disable()
    assert vars(other).keys() == vars(wan()).keys()
    assert vars(pipeline).keys() == before
    handle.disable()
    assert vars(pipeline).keys() == vars(wan()).keys()


@pytest.mark.parametrize("first", ["scheduler", "transformer"])
@pytest.mark.parametrize("times", [1, 2])
@each_way
def test_a_pipeline_made_of_copied_parts_looks_at_its_own_scheduler(
    duplicate: Callable[[Any], Any], times: int, first: str
) -> None:
    pipeline, fresh = wan(), wan()
    for each in (pipeline, fresh):
        enable_lite_attention(each, threshold=THRESHOLD)
    pipeline.scheduler.set_timesteps(4)
    step_of(pipeline.transformer, 0)
    parts = {"scheduler": pipeline.scheduler, "transformer": pipeline.transformer}
    names = sorted(parts, key=lambda name: name != first)
    for _ in range(times):
        parts = dict(zip(names, duplicate([parts[name] for name in names]), strict=True))
    other = WanPipeline(**pipeline.components | parts)
    alone = copy.deepcopy(pipeline.transformer)
    for step in (1, 2):
        other.scheduler._step_index = step
        assert torch.equal(step_of(other.transformer, step), step_of(alone, step)), "it goes on"
    other.scheduler.set_timesteps(4)
    outs = [step_of(each.transformer, 3, seed=1) for each in (other, fresh)]
    assert torch.equal(*outs), "a video below where the last one ended"


def test_a_scheduler_that_cannot_be_copied_does_not_keep_the_transformer_from_it() -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    pipeline.scheduler.sampler = (number for number in range(2))
    other = copy.deepcopy(pipeline.transformer)
    assert all(map(torch.equal, denoise(other), denoise(pipeline.transformer)))
    assert (handle.skip_fraction()[:, 1:] > 0).all()


def test_a_deep_copy_of_a_shallow_copy_looks_at_its_own_scheduler() -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    other_handle, other = copy.deepcopy((handle, copy.copy(pipeline)))
    gc.collect()
    for step in range(2):
        step_of(other.transformer, step)
    other.scheduler.set_timesteps(4)
    step_of(other.transformer, 2)
    assert other_handle.skip_fraction().tolist() == [[0.0], [0.0]]


def test_an_error_leaves_nothing_in_the_pipeline() -> None:
    pipeline = wan()
    pipeline.transformer_2 = pipeline.transformer
    before = set(vars(pipeline))
    with pytest.raises(ValueError, match="expected one handle"):
        enable_lite_attention(pipeline)
    assert set(vars(pipeline)) == before


def test_a_pipeline_is_gone_when_nobody_holds_it() -> None:
    pipeline = wan()
    enable_lite_attention(pipeline)
    gone = weakref.ref(pipeline)
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert gone() is None, "not only when garbage is collected: it holds a GPU's memory"
    finally:
        gc.enable()


@each_way
def test_a_copy_of_the_scheduler_is_light_and_starts_nothing(duplicate: Callable[[Any], Any]) -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    for step in range(2):
        step_of(pipeline.transformer, step)
    other = duplicate(pipeline.scheduler)
    assert vars(other).keys() == vars(wan().scheduler).keys()
    other.set_timesteps(7)
    assert len(other.timesteps) == 7
    step_of(pipeline.transformer, 2)
    assert (handle.skip_fraction()[:, 2] > 0).all(), "nothing was reset"
    assert len(pickle.dumps(pipeline.scheduler)) < 50_000, "without the transformer"


def test_a_transformer_does_not_take_its_pipeline_along() -> None:
    pipeline, alone = wan(), make_transformer(WAN)
    enable_lite_attention(pipeline)
    enable_lite_attention(alone)
    sizes = [len(pickle.dumps(transformer)) for transformer in (pipeline.transformer, alone)]
    assert sizes[0] < sizes[1] + 50_000
    gone = weakref.ref(pipeline)
    transformer = pipeline.transformer
    del pipeline
    gc.collect()
    assert gone() is None
    assert denoise(transformer)


@each_way
def test_a_handle_is_copied_with_its_model(duplicate: Callable[[Any], Any]) -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    denoise(transformer)
    other, other_handle = duplicate((transformer, handle))
    assert torch.equal(other_handle.skip_fraction(), handle.skip_fraction())
    other_handle.disable()
    assert set(vars(other)) == set(vars(make_transformer(WAN)))
    assert denoise(other)
    assert len(handle.layers) == 2
    step_of(transformer, 0)


@pytest.mark.slow
def test_a_saved_model_is_loaded_by_another_process(tmp_path: Path) -> None:
    transformer = make_transformer(WAN)
    enable_lite_attention(transformer, threshold=THRESHOLD)
    torch.save(transformer, tmp_path / "model.pt")
    inputs = [WAN.inputs(make_latents(WAN, step), timestep) for step, timestep in enumerate(TIMESTEPS)]
    torch.save(inputs, tmp_path / "inputs.pt")
    program = (
        "import torch\n"
        "model, inputs = (torch.load(f'{name}.pt', weights_only=False) for name in ('model', 'inputs'))\n"
        "with torch.no_grad():\n"
        "    torch.save([model(**each)[0] for each in inputs], 'outs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "outs.pt"), denoise(transformer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("called", [False, True], ids=["before its first call", "after calls"])
def test_copies_made_in_inference_mode_work_outside(called: bool) -> None:
    transformer = make_transformer(WAN)
    enable_lite_attention(transformer, threshold=THRESHOLD, must_do=[0, 10])
    if called:
        denoise(transformer, seed=3)
    with torch.inference_mode():
        other, other_saved = copy.deepcopy(transformer), saved(transformer)
    expected = denoise(transformer)
    for each in (other, other_saved):
        for parameter in each.parameters():
            assert parameter.is_inference()
        assert all(map(torch.equal, denoise(each), expected))


# Default dtype


@pytest.fixture
def default_bfloat16() -> Callable[[], AbstractContextManager[None]]:
    """A block in which bf16 is the dtype of tensors that are made without one."""

    @contextmanager
    def block() -> Iterator[None]:
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return block


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_default_dtype_changes_nothing(
    case: VideoCase, dtype: torch.dtype, default_bfloat16: Callable[[], AbstractContextManager[None]]
) -> None:
    def with_inputs_of(step: int) -> dict[str, Any]:
        return case.inputs(make_latents(case, step).to(dtype), TIMESTEPS[step])

    steps = [with_inputs_of(step) for step in range(len(TIMESTEPS))]
    plain, exact, skipping = (make_transformer(case).to(dtype) for _ in range(3))
    with default_bfloat16():
        enable_lite_attention(exact, threshold=-math.inf)
        handle = enable_lite_attention(skipping, threshold=THRESHOLD, must_do=[0, 10])
        layer = next(iter(handle.layers.values()))
        for inputs in steps:
            expected = plain(**inputs)[0]
            error = float((exact(**inputs)[0] - expected).float().norm() / expected.float().norm())
            assert error < (1e-5 if dtype == torch.float32 else 0.02)
            skipping(**inputs)
        share = 1.0 - layer.keep_map().double().mean()
        assert abs(float(layer.skip_fraction()) - float(share)) < 1e-6
        fractions = handle.skip_fraction()
    assert fractions.dtype == torch.float32
    assert (fractions[:, 0] == 0).all()
    assert (fractions[:, 1:] > 0.02).all()


def test_what_is_told_while_tensors_are_fake_is_told() -> None:
    pipeline, fresh = wan(), wan()
    handle = enable_lite_attention(pipeline, threshold=0.0, guidance="named", must_do=[0, 10])
    enable_lite_attention(fresh, threshold=THRESHOLD, guidance="named", must_do=[0, 300])
    latents = make_latents(WAN, seed=1)
    for _ in range(2):
        pipeline.scheduler.set_timesteps(4)
        denoise(pipeline.transformer)
        with FakeTensorMode(allow_non_fake_inputs=True):
            pipeline.scheduler.timesteps = pipeline.scheduler.timesteps.clone()
            handle.set_threshold(THRESHOLD)
            handle.set_must_do([0, 300])
            handle.reset()
        outs = [run(pipeline.transformer, WAN, latents, timestep) for timestep in (200.0, 100.0)]
        assert all(
            map(torch.equal, outs, [run(fresh.transformer, WAN, latents, timestep) for timestep in (200.0, 100.0)])
        )
        fresh.scheduler.set_timesteps(4)


def test_a_layer_is_reset_while_tensors_are_fake() -> None:
    transformer = make_transformer(WAN)
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    denoise(transformer)
    layer: Any = handle.layers["blocks.0.attn1"]
    assert layer.skip_fraction() > 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.reset_skip_state()
    assert layer.skip_fraction() == 0
