"""diffusers' video transformers in small, with random weights whose attention is sharp enough that tiles drop."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

HEADS, HEAD_DIM, CHANNELS, TEXT_DIM, TEXT_LEN = 2, 64, 4, 16, 40
FRAMES, SIDE = 5, 14  # of the latents after patching: 980 tokens, eight KV tiles and a ragged end
TOKENS = FRAMES * SIDE * SIDE
SHARPNESS = 3.0

Inputs = dict[str, Any]


class VideoCase(NamedTuple):
    """One class of transformer: how to make it, its inputs at a timestep, and what the door should find in it."""

    make: Callable[..., nn.Module]
    inputs: Callable[[Tensor, float], Inputs]
    latents: tuple[int, ...]
    layers: tuple[str, ...]
    text: str = "none"

    @property
    def latents_per_frame(self) -> int:
        return math.prod(self.latents) // (FRAMES * CHANNELS)


def _text(latents: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(7)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=random).to(latents.device, latents.dtype)
    return text.expand(latents.shape[0], -1, -1)


def _timesteps(latents: Tensor, timestep: float) -> Tensor:
    return torch.full((latents.shape[0],), timestep, device=latents.device)


def _make_wan(**arguments: object) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64, **arguments,
    )  # fmt: skip


def _wan_inputs(latents: Tensor, timestep: float) -> Inputs:
    return {
        "hidden_states": latents,
        "timestep": _timesteps(latents, timestep),
        "encoder_hidden_states": _text(latents),
        "return_dict": False,
    }


def _make_wan_from_image() -> nn.Module:
    return _make_wan(image_dim=8, added_kv_proj_dim=HEADS * HEAD_DIM)


def _wan_from_image_inputs(latents: Tensor, timestep: float) -> Inputs:
    text = _text(latents).repeat(1, 13, 1)[:, :512]  # diffusers takes the last 512 tokens as the text
    return _wan_inputs(latents, timestep) | {
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": text[:, :30, :8],
    }


def _make_vace() -> nn.Module:
    return WanVACETransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64, vace_layers=[0],
        vace_in_channels=CHANNELS,
    )  # fmt: skip


def _vace_inputs(latents: Tensor, timestep: float) -> Inputs:
    return _wan_inputs(latents, timestep) | {
        "control_hidden_states": latents,
        "control_hidden_states_scale": latents.new_ones(1),
    }


def _make_cogvideox() -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS, out_channels=CHANNELS,
        time_embed_dim=8, text_embed_dim=TEXT_DIM, num_layers=2, sample_width=2 * SIDE, sample_height=2 * SIDE,
        sample_frames=4 * FRAMES - 3, max_text_seq_length=TEXT_LEN, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def _cogvideox_inputs(latents: Tensor, timestep: float) -> Inputs:
    rotary = get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), (SIDE, SIDE)), (SIDE, SIDE), FRAMES, device=latents.device)
    return _wan_inputs(latents, timestep) | {"image_rotary_emb": rotary}


def _make_ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM, num_layers=2, caption_channels=TEXT_DIM,
    )  # fmt: skip


def _ltx_inputs(latents: Tensor, timestep: float) -> Inputs:
    return _wan_inputs(latents, timestep) | {
        "encoder_attention_mask": latents.new_ones(latents.shape[0], TEXT_LEN),
        "num_frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
    }


def _make_ltx2(**arguments: object) -> nn.Module:
    return LTX2VideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM, audio_in_channels=CHANNELS, audio_out_channels=CHANNELS,
        audio_num_attention_heads=2, audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=2,
        caption_channels=TEXT_DIM, **arguments,
    )  # fmt: skip


def _ltx2_inputs(latents: Tensor, timestep: float) -> Inputs:
    text = _text(latents)
    times = _timesteps(latents, timestep)
    return {
        "hidden_states": latents,
        "audio_hidden_states": latents[:, :20],
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text,
        "timestep": times[:, None].expand(-1, latents.shape[1]),
        "audio_timestep": times,
        "num_frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
        "audio_num_frames": 20,
        "return_dict": False,
    }


def _make_hunyuan() -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=TEXT_DIM, pooled_projection_dim=8,
        rope_axes_dim=(16, 24, 24), guidance_embeds=True,
    )  # fmt: skip


def _hunyuan_inputs(latents: Tensor, timestep: float) -> Inputs:
    batch = latents.shape[0]
    mask = latents.new_ones(batch, TEXT_LEN)
    mask[:, 30:] = 0
    mask[-1, 20:] = 0
    return _wan_inputs(latents, timestep) | {
        "encoder_attention_mask": mask,
        "pooled_projections": _text(latents)[:, 0, :8],
        "guidance": _timesteps(latents, 6.0),
    }


_PATCHED = (CHANNELS, FRAMES, 2 * SIDE, 2 * SIDE)
CASES = {
    "wan": VideoCase(_make_wan, _wan_inputs, _PATCHED, ("blocks.0.attn1", "blocks.1.attn1")),
    "wan-from-image": VideoCase(
        _make_wan_from_image, _wan_from_image_inputs, _PATCHED, ("blocks.0.attn1", "blocks.1.attn1")
    ),
    "wan-vace": VideoCase(
        _make_vace, _vace_inputs, _PATCHED, ("blocks.0.attn1", "blocks.1.attn1", "vace_blocks.0.attn1")
    ),
    "cogvideox": VideoCase(
        _make_cogvideox,
        _cogvideox_inputs,
        (FRAMES, CHANNELS, 2 * SIDE, 2 * SIDE),
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        "first",
    ),
    "ltx": VideoCase(
        _make_ltx, _ltx_inputs, (TOKENS, CHANNELS), ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    ),
    "ltx2": VideoCase(
        _make_ltx2, _ltx2_inputs, (TOKENS, CHANNELS), ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    ),
    "hunyuan": VideoCase(
        _make_hunyuan,
        _hunyuan_inputs,
        _PATCHED,
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        "last",
    ),
}


def make_transformer(case: VideoCase, seed: int = 0) -> nn.Module:
    """A transformer in evaluation mode, on the CPU in fp32."""
    torch.manual_seed(seed)
    transformer = case.make().eval().requires_grad_(False)
    for name in case.layers:
        attention = transformer.get_submodule(name)
        for norm in (attention.norm_q, attention.norm_k):
            assert isinstance(norm, nn.Module)
            norm.weight.mul_(SHARPNESS)
    return transformer


def make_latents(case: VideoCase, step: int = 0, batch: int = 1, seed: int = 0) -> Tensor:
    """Latents whose frames are unlike each other and change little from one step to the next: tiles drop, and stay."""
    random = torch.Generator().manual_seed(seed)
    frames = torch.randn(batch, FRAMES, CHANNELS, 1, generator=random)
    noise, change = torch.randn(2, batch, FRAMES, CHANNELS, case.latents_per_frame, generator=random).unbind()
    video = frames + 0.1 * noise + 0.02 * step * change
    if len(case.latents) == 2:  # [tokens, channels]
        return video.transpose(2, 3).reshape(batch, *case.latents)
    if case.latents[0] == CHANNELS:  # [channels, frames, height, width]
        video = video.transpose(1, 2)
    return video.reshape(batch, *case.latents)


def run(transformer: Any, case: VideoCase, latents: Tensor, timestep: float) -> Tensor:
    """The transformer's prediction for the video."""
    out: Tensor = transformer(**case.inputs(latents, timestep))[0]
    return out
