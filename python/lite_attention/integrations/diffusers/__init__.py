"""LiteAttention in the video transformers and pipelines of Hugging Face diffusers.

:func:`enable_lite_attention` gives every video self-attention layer a processor that runs the layer's own processor and
takes over the one attention call in it. Projections, norms and rotary embeddings stay diffusers' code, so what works
with the stock processor (LoRA, fused projections, quantised weights) works here too.

What is not video-to-video is never skipped: cross-attention layers keep their processors, and in layers that attend
over text and video together every tile with a text key or a text query is kept.

On many GPUs diffusers' context parallelism splits the tokens where the model begins and puts them together where it
ends, and layers that are left alone exchange theirs in diffusers' way. A layer with LiteAttention makes the attention
call of a single process, with this rank's tokens, and :class:`lite_attention.DistributedLiteAttention` takes it over.

``handle`` is what users call; it goes through ``patching`` (one transformer) to ``processor`` (one layer) and
``wrapped`` (methods in place of the transformer's). ``models`` holds what is known about diffusers' classes,
``guidance`` how branches are told apart, ``schedule`` looks at the pipeline's scheduler, ``context_parallel`` splits
tokens among ranks, and ``_internals`` alone touches names that diffusers and accelerate keep to themselves.
"""

from lite_attention.integrations.diffusers.generation import MAX_MUST_DO_RANGES
from lite_attention.integrations.diffusers.handle import LiteAttentionHandle, enable_lite_attention
from lite_attention.integrations.diffusers.models import VideoModel, register_video_model
from lite_attention.integrations.diffusers.processor import RECORDED_STEPS

__all__ = [
    "MAX_MUST_DO_RANGES",
    "RECORDED_STEPS",
    "LiteAttentionHandle",
    "VideoModel",
    "enable_lite_attention",
    "register_video_model",
]
