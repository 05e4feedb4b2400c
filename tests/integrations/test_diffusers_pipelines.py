"""The diffusers door in whole pipelines: guidance, schedulers, two transformers, one generation after another."""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

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
    duplicate = copy.deepcopy(pipeline.scheduler)
    duplicate.set_timesteps(7)
    assert len(duplicate.timesteps) == 7
    assert len(pipeline.scheduler.timesteps) == STEPS
    assert handle.skip_fraction("cond").shape == (2, STEPS), "nothing was reset"
    handle.disable()
    handle.disable()
    assert "set_timesteps" not in vars(pipeline.scheduler)
