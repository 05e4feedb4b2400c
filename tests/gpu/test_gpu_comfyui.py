"""The ComfyUI door on the GPU: what the CPU tests cannot see is where its buffers are."""

import pytest
import torch

from lite_attention.integrations.comfyui import patch_model
from support.comfyui_host import ModelPatcher, VideoModel, prompts, sample, schedule
from support.inputs import GPU

pytestmark = pytest.mark.gpu


def test_steps_that_start_full_are_dense_and_others_skip() -> None:
    model = ModelPatcher(VideoModel().to(GPU, torch.bfloat16))
    conds = [prompts(1), prompts(2)]
    lite = patch_model(model, -1.0, min_tokens=256)
    for _ in range(2):
        sigmas = schedule(2).to(GPU)
        ours, dense = sample(lite, conds, sigmas, 1024), sample(model, conds, sigmas, 1024)
        for one, other in zip(ours[0], dense[0], strict=True):
            torch.testing.assert_close(one, other, atol=3e-2, rtol=2e-2)
        override = lite.model_options["transformer_options"]["optimized_attention_override"]
        assert min(float(layer.skip_fraction(1)) for layer in override.layers.values()) > 0.2
