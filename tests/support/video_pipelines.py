"""diffusers' pipelines in small, around the transformers of video_models."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
)
from torch import Tensor

from support.video_models import CASES, FRAMES, SIDE, TEXT_DIM, TEXT_LEN, make_latents, make_transformer

SIZE = 2 * SIDE * 8
STEPS = 4


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
