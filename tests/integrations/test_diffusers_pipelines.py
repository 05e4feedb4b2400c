"""The diffusers door in whole pipelines: guidance, schedulers, two transformers, one generation after another."""

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

from lite_attention.integrations.diffusers import LiteAttentionHandle, enable_lite_attention
from support.video_models import CASES, make_latents, run
from support.video_pipelines import STEPS, cogvideox, generate, wan

pytestmark = pytest.mark.slow

THRESHOLD = -2.0


def assert_second_video_is_as_if_it_were_the_first(
    pipeline: Any, handle: LiteAttentionHandle, **arguments: Any
) -> None:
    generate(pipeline, seed=0, **arguments)
    after_another = generate(pipeline, seed=1, **arguments)
    for patched in handle._patched:
        for layer in patched.processors.values():
            layer.attention.reset_skip_state()
    assert torch.equal(generate(pipeline, seed=1, **arguments), after_another)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_wan_with_sequential_guidance(scheduler: Any) -> None:
    pipeline = wan(scheduler)
    dense = generate(pipeline)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    latents = generate(pipeline)
    assert 0 < float((latents - dense).norm() / dense.norm()) < 0.05
    for name in ("cond", "uncond"):
        fractions = handle.skip_fraction(name)
        assert fractions.shape == (2, STEPS)
        assert (fractions[:, 0] == 0).all()
        assert (fractions[:, 1:] > 0.05).all()
    assert_second_video_is_as_if_it_were_the_first(pipeline, handle)
    handle.disable()
    assert torch.equal(generate(pipeline), dense)


def test_videos_of_a_single_step_do_not_see_each_other() -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    assert_second_video_is_as_if_it_were_the_first(pipeline, handle, steps=1)
    assert (handle.skip_fraction("cond") == 0).all()


def test_a_video_after_one_that_was_broken_off() -> None:
    def break_off(pipeline: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return values

    pipeline = wan()
    enable_lite_attention(pipeline, threshold=THRESHOLD)
    expected = generate(pipeline, seed=1)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, callback_on_step_end=break_off)
    assert torch.equal(generate(pipeline, seed=1), expected)


def test_a_video_that_starts_below_where_the_last_one_broke_off() -> None:
    pipeline, case = wan(), CASES["wan"]
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    with torch.no_grad():
        for step, timestep in enumerate((900.0, 800.0)):
            run(pipeline.transformer, case, make_latents(case, step), timestep)
        pipeline.scheduler.set_timesteps(STEPS)
        run(pipeline.transformer, case, make_latents(case), 600.0)
    assert (handle.skip_fraction() == 0).all()
    assert handle.skip_fraction().shape == (2, 1)


def test_two_transformers_have_a_state_each() -> None:
    pipeline = wan(transformers=2)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD, dense_steps=2)
    assert [name.split(".")[0] for name in handle.layers] == ["transformer"] * 2 + ["transformer_2"] * 2
    generate(pipeline, steps=8)
    fractions = handle.skip_fraction("cond")
    high, low = fractions[:2], fractions[2:]
    high_steps = int((~high.isnan()).sum(1)[0])
    assert high_steps >= 3, "the scheduler spends so many steps above the boundary"
    assert (high[:, :2] == 0).all(), "the first steps of the generation"
    assert (high[:, 2:high_steps] > 0.05).all()
    assert (low[:, 0] == 0).all()
    assert (low[:, 1 : 8 - high_steps] > 0.05).all()
    assert low[:, 8 - high_steps :].isnan().all()
    assert_second_video_is_as_if_it_were_the_first(pipeline, handle, steps=8)


def test_cogvideox_with_batched_guidance() -> None:
    pipeline = cogvideox()
    dense = generate(pipeline)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    latents = generate(pipeline)
    assert 0 < float((latents - dense).norm() / dense.norm()) < 0.05
    assert (handle.skip_fraction("cond_uncond")[:, 1:] > 0.05).all()
    keep = next(iter(handle.layers.values())).keep_map()
    assert keep.shape[0] == 2
    assert not torch.equal(keep[0], keep[1])
    assert_second_video_is_as_if_it_were_the_first(pipeline, handle)


def test_a_copy_of_the_scheduler_is_not_the_scheduler() -> None:
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    generate(pipeline)
    for duplicate in (copy.deepcopy(pipeline.scheduler), copy.copy(pipeline.scheduler)):
        duplicate.set_timesteps(7)
        assert len(duplicate.timesteps) == 7
        assert len(pipeline.scheduler.timesteps) == STEPS
    assert handle.skip_fraction("cond").shape == (2, STEPS), "nothing was reset"


BROKEN_OFF, BELOW = (900.0, 700.0), (600.0, 300.0)


def calls(transformer: Any, timesteps: tuple[float, ...], seed: int, names: tuple[str | None, ...]) -> list[Tensor]:
    outs, case = [], CASES["wan"]
    with torch.no_grad():
        for step, timestep in enumerate(timesteps):
            for name in names:
                with transformer.cache_context(name) if name else contextlib.nullcontext():
                    outs.append(run(transformer, case, make_latents(case, step, seed=seed), timestep))
    return outs


def restored(pipeline: Any) -> Any:
    """As pipelines of views do that take the scheduler's steps for each of them."""
    vars(pipeline.scheduler).update(copy.deepcopy(vars(pipeline.scheduler)))
    return pipeline.scheduler


def replaced(pipeline: Any) -> Any:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return pipeline.scheduler


def shallow(pipeline: Any) -> Any:
    pipeline.scheduler = copy.copy(pipeline.scheduler)
    return pipeline.scheduler


@pytest.mark.parametrize("name", ["cond", None], ids=["named", "without a name"])
@pytest.mark.parametrize("change", [restored, replaced, shallow, lambda pipeline: pipeline.scheduler])
def test_whatever_scheduler_the_pipeline_has_begins_a_video(change: Callable[[Any], Any], name: str | None) -> None:
    pipeline, fresh = wan(), wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD, guidance="named")
    enable_lite_attention(fresh, threshold=THRESHOLD, guidance="named")
    for _ in range(2):
        scheduler = change(pipeline)
        scheduler.set_timesteps(STEPS)
        calls(pipeline.transformer, BROKEN_OFF, 0, (name,))
    scheduler.set_timesteps(STEPS + 1)
    assert len(pipeline.scheduler.timesteps) == STEPS + 1
    outs = calls(pipeline.transformer, BELOW, 1, (name,))
    assert all(map(torch.equal, outs, calls(fresh.transformer, BELOW, 1, (name,))))
    assert (handle.skip_fraction("cond" if name else 0)[:, 1] > 0).all()
    handle.disable()
    assert "set_timesteps" not in vars(pipeline.scheduler)


def test_a_scheduler_that_goes_back_begins_a_video() -> None:
    pipeline, fresh = wan(), wan()
    enable_lite_attention(pipeline, threshold=THRESHOLD, guidance="named")
    enable_lite_attention(fresh, threshold=THRESHOLD, guidance="named")
    pipeline.scheduler.set_timesteps(STEPS)
    calls(pipeline.transformer, BROKEN_OFF[:1], 0, ("cond",))
    pipeline.scheduler._step_index = 1
    calls(pipeline.transformer, BROKEN_OFF[1:], 0, ("cond",))
    pipeline.scheduler._step_index = None  # by one whose timesteps never change
    outs = calls(pipeline.transformer, BELOW, 1, ("cond",))
    assert all(map(torch.equal, outs, calls(fresh.transformer, BELOW, 1, ("cond",))))


@pytest.mark.parametrize("guidance", [None, "named"])
def test_two_transformers_notice_a_turn_between_them(guidance: Any) -> None:
    def video(pipeline: Any, seed: int, timesteps: tuple[float, ...]) -> list[Tensor]:
        pipeline.scheduler.set_timesteps(len(timesteps))
        names = ("cond", "uncond")
        outs = calls(pipeline.transformer, tuple(t for t in timesteps if t >= 800.0), seed, names)
        return outs + calls(pipeline.transformer_2, tuple(t for t in timesteps if t < 800.0), seed, names)

    pipelines = [wan(transformers=2) for _ in range(2)]
    for pipeline in pipelines:
        enable_lite_attention(pipeline, threshold=THRESHOLD, guidance=guidance)
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    video(pipelines[0], 0, (1000.0, 900.0, 700.0, 400.0, 100.0))
    second = (850.0, 600.0, 300.0)
    assert all(map(torch.equal, *(video(pipeline, 1, second) for pipeline in pipelines)))


def test_pipelines_that_share_a_scheduler_are_disabled_one_by_one() -> None:
    first, dense = wan(), wan()
    second = wan(first.scheduler)
    handle = enable_lite_attention(first, threshold=THRESHOLD)
    other = enable_lite_attention(second, threshold=THRESHOLD)
    handle.disable()
    generate(second)
    assert "forward" not in vars(first.transformer)
    assert torch.equal(generate(first), generate(dense))
    other.disable()
    assert torch.equal(generate(second), generate(dense))


class Schedule:
    """Of someone's own pipeline, with nothing but its numbers."""

    __slots__ = ("timesteps",)

    def __init__(self) -> None:
        self.timesteps = (900.0, 700.0)


@pytest.mark.parametrize("scheduler", [Schedule(), object(), None])
def test_any_object_may_stand_for_a_scheduler(scheduler: object) -> None:
    transformer = wan().transformer
    pipeline = SimpleNamespace(transformer=transformer, scheduler=scheduler)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    calls(transformer, BROKEN_OFF, 0, ("cond",))
    assert (handle.skip_fraction("cond")[:, 1] > 0).all()
    copy.deepcopy(transformer)
    handle.disable()
    assert "forward" not in vars(transformer)


def test_a_transformer_copied_alone_looks_at_the_scheduler_that_it_shares() -> None:
    pipeline, fresh = wan(), wan()
    enable_lite_attention(pipeline, threshold=THRESHOLD, guidance="named")
    enable_lite_attention(fresh, threshold=THRESHOLD, guidance="named")
    other = WanPipeline(**pipeline.components | {"transformer": copy.deepcopy(pipeline.transformer)})
    other.scheduler.set_timesteps(STEPS)
    calls(other.transformer, BROKEN_OFF, 0, ("cond",))
    other.scheduler.set_timesteps(STEPS)
    outs = calls(other.transformer, BELOW, 1, ("cond",))
    assert all(map(torch.equal, outs, calls(fresh.transformer, BELOW, 1, ("cond",))))


# Steps that are compiled, and where nobody sees the scheduler


def named_step(transformer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A step function of the user's own."""
    with transformer.cache_context("cond"):
        out: Tensor = transformer(**inputs)[0]
    return out


def unnamed_step(transformer: Any, inputs: dict[str, Tensor]) -> Tensor:
    out: Tensor = transformer(**inputs)[0]
    return out


def steps(step: Callable[..., Tensor], transformer: Any, timesteps: tuple[float, ...], seed: int) -> list[Tensor]:
    case = CASES["wan"]
    with torch.no_grad():
        return [step(transformer, case.inputs(make_latents(case, at, seed=seed), t)) for at, t in enumerate(timesteps)]


def test_a_compiled_step_that_names_its_branch_sees_the_scheduler() -> None:
    torch._dynamo.reset()
    pipeline, fresh = wan(), wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    enable_lite_attention(fresh, threshold=THRESHOLD)
    compiled = torch.compile(named_step, backend="eager")
    pipeline.scheduler.set_timesteps(STEPS)
    steps(compiled, pipeline.transformer, BROKEN_OFF, 0)
    pipeline.scheduler.set_timesteps(STEPS + 1)
    outs = steps(compiled, pipeline.transformer, BELOW, 1)
    assert all(map(torch.equal, outs, steps(named_step, fresh.transformer, BELOW, 1)))
    assert (handle.skip_fraction("cond")[:, 1] > 0).all()


def test_a_step_in_one_graph_names_its_branch_where_there_is_no_scheduler_to_look_at() -> None:
    torch._dynamo.reset()
    transformer, eager = wan().transformer, wan().transformer
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    other = enable_lite_attention(eager, threshold=THRESHOLD)
    counter = CompileCounter()
    compiled = torch.compile(named_step, backend=counter, fullgraph=True)
    for seed in range(2):
        outs = steps(compiled, transformer, BROKEN_OFF, seed)
        assert all(map(torch.equal, outs, steps(named_step, eager, BROKEN_OFF, seed)))
    assert counter.frame_count == 2, "once more for what diffusers and BranchNames note in the first call"
    assert torch.equal(handle.skip_fraction("cond"), other.skip_fraction("cond"))


def test_a_step_in_one_graph_that_would_have_to_look_at_a_scheduler_is_refused() -> None:
    torch._dynamo.reset()
    pipeline = wan()
    enable_lite_attention(pipeline, threshold=THRESHOLD)
    compiled = torch.compile(named_step, backend="eager", fullgraph=True)
    with pytest.raises(
        Unsupported, match="LiteAttention: the cache_context of a transformer that was enabled with its"
    ):
        steps(compiled, pipeline.transformer, BROKEN_OFF, 0)


@pytest.mark.parametrize("compiled", ["transformer", "step"])
def test_the_log_says_once_where_the_scheduler_is_not_seen(compiled: str, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    pipeline = wan()
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD)
    transformer: Any = pipeline.transformer
    step: Callable[..., Tensor] = unnamed_step
    if compiled == "transformer":
        transformer = torch.compile(transformer, backend="eager", fullgraph=True)
    else:
        step = torch.compile(unnamed_step, backend="eager")

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "lite_attention"]

    steps(named_step, transformer, BROKEN_OFF, 0)  # in a name it is seen
    assert not said()
    for _ in range(2):
        steps(step, transformer, BROKEN_OFF, 0)
    (text,) = said()
    assert "nothing there sees the pipeline's scheduler" in text
    handle.disable()
    bare = enable_lite_attention(pipeline.transformer, threshold=THRESHOLD)
    steps(step, transformer, BROKEN_OFF, 0)
    assert len(said()) == 1, "a bare transformer never sees one"
    bare.disable()


@pytest.mark.parametrize(
    "videos",
    [
        ((900.0, 700.0), (700.0, 500.0)),
        ((999.0, 937.0, 833.0, 625.0), (556.0, 400.0)),
        ((0.0, 200.0, 450.0, 700.0), (950.0, 700.0, 450.0), (0.0, 200.0, 450.0)),
        ((200.0,), (400.0,), (600.0,), (800.0,)),
    ],
    ids=["same timestep", "starts lower", "inversion", "single steps that start higher"],
)
def test_a_reset_tells_of_videos_that_timesteps_do_not(videos: tuple[tuple[float, ...], ...]) -> None:
    transformer = wan().transformer
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    for seed, video in enumerate(videos):
        handle.reset()
        first, *_ = steps(unnamed_step, transformer, video, seed)
        fresh = wan().transformer
        enable_lite_attention(fresh, threshold=THRESHOLD)
        assert torch.equal(first, steps(unnamed_step, fresh, video[:1], seed)[0])
    assert handle.mixed_calls() == 0


def test_a_reset_lets_batch_entries_of_one_text_change_places() -> None:
    transformer, dense = wan().transformer, wan().transformer
    handle = enable_lite_attention(transformer, threshold=THRESHOLD)
    case = CASES["wan"]
    with torch.no_grad():
        for step, (timestep, seeds) in enumerate(((900.0, (0, 1)), (700.0, (1, 0)), (500.0, (1, 1)))):
            latents = torch.cat([make_latents(case, step, seed=seed) for seed in seeds])
            handle.reset()
            torch.testing.assert_close(run(transformer, case, latents, timestep), run(dense, case, latents, timestep))
    assert handle.mixed_calls() == 0
