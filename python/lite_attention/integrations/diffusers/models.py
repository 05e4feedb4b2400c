"""Which transformer classes have which video self-attention layers, and what else attends there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

__all__ = [
    "VideoModel",
    "check_threshold_count",
    "chosen_layers",
    "layers_matching",
    "register_video_model",
    "video_model",
]


@dataclass(frozen=True)
class VideoModel:
    """Where a transformer class keeps its video self-attention, and what else attends there.

    Args:
        layers: regular expressions that match the whole name of each such attention module.
        text: whether text tokens stand before or after the video tokens in these layers, or are not there. The layers
            must be given them as ``encoder_hidden_states``, which tells how many they are.
        prefix_mask: the layers are given a mask ``[batch, 1, 1, tokens]`` that is True for the first so many tokens of
            each batch entry and False for the padding after them. Other masks are refused.
        may_bypass: some calls leave attention out (spatio-temporal guidance).
        token_split: whether tokens can be split among ranks. "mesh only": by ``mesh``, not by diffusers' own plan,
            which splits the text too; "none": diffusers' plan does not work.
        text_layers: like ``layers``, the attention modules in which video attends to text and to nothing else. Where
            ``mesh`` makes diffusers split tokens among ranks, these layers get the whole text on every rank.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    layers: tuple[str, ...]
    text: Literal["none", "first", "last"] = "none"
    prefix_mask: bool = False
    may_bypass: bool = False
    token_split: Literal["any", "mesh only", "none"] = "any"
    text_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "text_layers"):
            patterns = getattr(self, name)
            if not isinstance(patterns, (tuple, list)) or not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"VideoModel: {name} is {patterns!r}, expected a tuple of regular expressions")
        for name, words in (("text", ("none", "first", "last")), ("token_split", ("any", "mesh only", "none"))):
            if getattr(self, name) not in words:
                expected = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
                raise ValueError(f"VideoModel: {name} is {getattr(self, name)!r}, expected {expected}")


_VIDEO_MODELS = {
    "CogVideoXTransformer3DModel": VideoModel((r"transformer_blocks\.\d+\.attn1",), text="first"),
    "HunyuanVideoTransformer3DModel": VideoModel(
        (r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"), text="last", prefix_mask=True
    ),
    "LTXVideoTransformer3DModel": VideoModel(
        (r"transformer_blocks\.\d+\.attn1",), token_split="mesh only", text_layers=(r"transformer_blocks\.\d+\.attn2",)
    ),
    "LTX2VideoTransformer3DModel": VideoModel(
        (r"transformer_blocks\.\d+\.attn1",), may_bypass=True, token_split="none"
    ),
    "WanTransformer3DModel": VideoModel((r"blocks\.\d+\.attn1",), text_layers=(r"blocks\.\d+\.attn2",)),
    "WanVACETransformer3DModel": VideoModel((r"blocks\.\d+\.attn1", r"vace_blocks\.\d+\.attn1")),
}


def register_video_model(class_name: str, model: VideoModel) -> None:
    """Say how :func:`enable_lite_attention` is to treat transformers of another class.

    Check that the model's output is unchanged at a threshold of -inf before relying on it.

    Args:
        class_name: name of the transformer's class; subclasses are treated likewise.
        model: where its video self-attention is. Its attention processors must call diffusers' dispatcher or torch's
            scaled_dot_product_attention once.

    Raises:
        TypeError: ``class_name`` is no text, or ``model`` no VideoModel.
    """
    if not isinstance(class_name, str):
        raise TypeError(f"register_video_model: class_name has type {type(class_name).__name__}, expected a str")
    if not isinstance(model, VideoModel):
        raise TypeError(f"register_video_model: model has type {type(model).__name__}, expected a VideoModel")
    _VIDEO_MODELS[class_name] = model


def video_model(transformer: nn.Module) -> VideoModel:
    """What is known about a transformer's class or the nearest of its bases; TypeError where nothing is."""
    for base in type(transformer).__mro__:
        if base.__name__ in _VIDEO_MODELS:
            return _VIDEO_MODELS[base.__name__]
    raise TypeError(
        f"enable_lite_attention: the transformer is a {type(transformer).__name__}, expected one of "
        f"{', '.join(sorted(_VIDEO_MODELS))}; register_video_model adds others"
    )


def layers_matching(transformer: nn.Module, patterns: tuple[str, ...]) -> dict[str, Any]:
    """The attention modules whose whole names match one of the patterns, by name, in the model's order."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if any(re.fullmatch(pattern, name) for pattern in patterns) and hasattr(module, "set_processor")
    }


def chosen_layers(transformer: nn.Module, model: VideoModel, layers: Sequence[int] | None) -> dict[str, Any]:
    """The self-attention modules of a transformer that ``layers`` numbers, by name, in the model's order."""
    found = layers_matching(transformer, model.layers)
    class_name = type(transformer).__name__
    if not found:
        raise ValueError(
            f"enable_lite_attention: {class_name} has no attention module whose name matches "
            f"{' or '.join(model.layers)}"
        )
    if layers is None:
        return found
    if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
        raise TypeError(
            f"enable_lite_attention: layers has type {type(layers).__name__}, expected a list of ints, or None for all"
        )
    names = list(found)
    for index, layer in enumerate(layers):
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(
                f"enable_lite_attention: layers[{index}] is {layer!r} of type {type(layer).__name__}, expected an int"
            )
        if not -len(names) <= layer < len(names):
            raise ValueError(
                f"enable_lite_attention: layers[{index}] is {layer}, expected {-len(names)} to {len(names) - 1}: "
                f"{class_name} has {len(names)} self-attention layers"
            )
    chosen = {names[layer] for layer in layers}
    if not chosen:
        raise ValueError("enable_lite_attention: layers is empty, expected at least one layer, or None for all")
    return {name: module for name, module in found.items() if name in chosen}


def check_threshold_count(caller: str, threshold: float | tuple[float, ...], layers: dict[str, Any]) -> None:
    """Refuse a threshold for each head where it is not one for each head of every layer."""
    for name, layer in layers.items():
        heads = getattr(layer, "heads", None)  # diffusers' own have it
        if isinstance(threshold, tuple) and isinstance(heads, int) and len(threshold) != heads:
            raise ValueError(
                f"{caller}: threshold has {len(threshold)} values, expected {heads}, one per head of {name}, or one "
                "number for all"
            )
