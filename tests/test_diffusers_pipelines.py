"""The diffusers door in whole pipelines: guidance, schedulers, two transformers, one generation after another."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import Tensor
from video_models import CASES, FRAMES, SIDE, TEXT_DIM, TEXT_LEN, make_latents, make_transformer

from lite_attention.integrations.diffusers import LiteAttentionHandle, enable_lite_attention

STEPS = 4
SIZE = 2 * SIDE * 8
THRESHOLD = -2.0


def prompt(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    texts = torch.randn(2, 1, TEXT_LEN, TEXT_DIM, generator=random)
    return {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}


def generate(pipeline: Any, seed: int = 0, steps: int = STEPS, **arguments: Any) -> Tensor:
    """Latents of a video, from embeddings and latents, without decoding."""
    case = CASES["wan" if isinstance(pipeline, WanPipeline) else "cogvideox"]
    latents: Tensor = pipeline(
        **prompt(seed), height=SIZE, width=SIZE, num_inference_steps=steps, latents=make_latents(case, seed=seed), output_type="latent",
        **{"guidance_scale": 4.0, "num_frames": 4 * FRAMES - 3, **arguments},
    ).frames  # fmt: skip
    return latents


def wan(scheduler: Any = None, transformers: int = 1) -> WanPipeline:
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=make_transformer(CASES["wan"]),
        transformer_2=make_transformer(CASES["wan"], seed=1) if transformers == 2 else None,
        boundary_ratio=0.875 if transformers == 2 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cogvideox() -> CogVideoXPipeline:
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=CogVideoXDDIMScheduler(),
        transformer=make_transformer(CASES["cogvideox"]),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def test_two_transformers_have_a_state_each() -> None:
    pipeline = wan(transformers=2)
    handle = enable_lite_attention(pipeline, threshold=THRESHOLD, skip_first_steps=2)
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
