"""LiteAttention in ComfyUI: a node that patches a video model, and the framework-free attention override it installs.

ComfyUI hands every attention call of a model to ``transformer_options["optimized_attention_override"]`` and says there
which block it is in (``block_type``, ``block_index``). Once per model call it says, besides, which conditions are in
the batch (``cond_or_uncond``, ``uuids``) and where in the sampling it is (``sigmas``, ``sample_sigmas``). That is all
that is used here: nothing is told from the order of calls. ComfyUI itself is not imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from lite_attention.maps import tiles
from lite_attention.ops.autocast import autocast_dtype
from lite_attention.ops.backends import Problem, choose, supported_dtypes
from lite_attention.ops.checks import checked_int
from lite_attention.ops.modes import ordinary_tensors
from lite_attention.skipping.arguments import Threshold
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.dense_steps import GenerationClock
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "LiteAttentionNode",
    "LiteAttentionOverride",
    "ModelPatcher",
    "patch_model",
]

# Self-attention over fewer tokens is left to ComfyUI. More than any prompt or audio track has, and under the tokens of
# the shortest clips, in which attention takes little of a step.
MIN_TOKENS = 4096
# ComfyUI batches as many conditions as fit; the module's own limit is for callers that know theirs.
ANY_BATCH = 2**31
# The wrapper type that runs around a whole model call, comfy.patcher_extension.WrappersMP.APPLY_MODEL.
APPLY_MODEL = "apply_model"
WRAPPER_KEY = "lite_attention"
OVERRIDE_KEY = "optimized_attention_override"

Attention = Callable[..., Tensor]
AttentionOverride = Callable[..., Tensor]
_BlockName = tuple[tuple[str, Hashable], ...]


class ModelPatcher(Protocol):
    """What is used of ComfyUI's ``comfy.model_patcher.ModelPatcher``."""

    model_options: dict[str, Any]

    def clone(self) -> ModelPatcher:
        """A patcher of the same model whose options can be changed apart."""

    def get_model_object(self, name: str) -> Any:
        """An attribute of the model, such as ``diffusion_model``."""

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        """Run ``wrapper(executor, *args, **kwargs)`` in place of ``executor(*args, **kwargs)``."""

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        """Take out the wrappers that were added under ``key``."""

    def set_model_patch_replace(self, patch: Callable[..., Any], name: str, block_name: str, number: int) -> None:
        """Run ``patch(args, {"original_block": block})`` in place of ``block(args)``."""


class LiteAttentionOverride:
    """An attention override for ComfyUI that remembers, layer by layer, which tiles may be skipped.

    It takes the video self-attention calls: as many queries as keys, at least ``min_tokens``, no mask, a head dim and
    dtype that LiteAttention has. All other calls go to the override that was there before, or to the function that
    ComfyUI passes. Where ``img_slice`` says which tokens are the image's or video's, the others (text) are always kept.

    Both parts must be installed, as :func:`patch_model` does: the object itself as the override, and
    :meth:`around_model_call` as a wrapper of each model call.

    Args:
        threshold: -10 if None; see :class:`lite_attention.SkipPolicy`.
        dense_steps: in so many steps at the start of a generation every layer computes all tiles. The first step
            is always one of them.
        min_tokens: self-attention over fewer tokens is not taken.
        previous: the override that calls not taken go to; None for the function that ComfyUI passes.
        policy: all that the layers are told about skipping, in place of ``threshold`` and ``dense_steps``.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    layers: dict[_BlockName, LiteAttention]
    """The state of each attention layer met so far, by what ComfyUI says of its block."""

    def __init__(
        self,
        threshold: Threshold | None = None,
        dense_steps: int | None = None,
        min_tokens: int = MIN_TOKENS,
        previous: AttentionOverride | None = None,
        *,
        policy: SkipPolicy | None = None,
    ) -> None:
        self.policy = SkipPolicy.resolve("LiteAttentionOverride", policy, threshold=threshold, dense_steps=dense_steps)
        self.min_tokens = checked_int("LiteAttentionOverride: min_tokens", min_tokens, lowest=1)
        self.previous = previous
        self.clock = GenerationClock(self.policy.dense_steps)
        self.layers = {}
        self._branches: dict[Hashable, int] = {}
        self._schedule: Tensor | None = None
        self._branch: int | None = None  # None outside of model calls
        self._attended: set[_BlockName] = set()

    def around_model_call(
        self,
        executor: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Note which conditions and which step a model call is for, and run it. An ``apply_model`` wrapper.

        Raises:
            ValueError: ComfyUI does not say the conditions or the step, or samples in a way that is not supported.
            RuntimeError: more combinations of conditions than there are branches.
        """
        options = transformer_options or {}
        self._branch = self._branch_of_call(options)
        self._attended = set()
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            self._branch = None

    def __call__(
        self,
        func: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """One attention call, with ComfyUI's arguments.

        Args:
            func: the attention function that ComfyUI would use.
            q, k, v: ``[batch, tokens, heads * head_dim]``, or with ``skip_reshape`` ``[batch, heads, tokens,
                head_dim]``.
            heads: query heads; with ``enable_gqa`` k and v may have fewer.
            mask, attn_precision: not taken if given (``attn_precision`` if other than q's dtype).
            skip_output_reshape: return ``[batch, heads, tokens, head_dim]`` instead of ``[batch, tokens, heads *
                head_dim]``.
            kwargs: ``transformer_options``, ``scale``, ``enable_gqa``; others are passed on.

        Raises:
            ValueError: ComfyUI does not say which block this is, or says the same of two layers.
        """
        head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
        if (
            self._branch is None
            or mask is not None
            or attn_precision not in (None, q.dtype)
            or q.shape[-2] != k.shape[-2]
            or q.shape[-2] < self.min_tokens
            or not _is_supported(q, head_dim)
        ):
            dense = func if self.previous is None else functools.partial(self.previous, func)
            return dense(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **kwargs,
            )
        options = kwargs.get("transformer_options") or {}
        layer = self._layer(options)
        text = _text_ranges(options, q.shape[-2])
        query, key, value = (
            tensor.transpose(1, 2) if skip_reshape else tensor.unflatten(-1, (-1, head_dim)) for tensor in (q, k, v)
        )
        out: Tensor = layer(
            query,
            key,
            value,
            kwargs.get("scale"),
            must_do_list=text,
            must_do_queries=text,
            branch=self._branch,
            start_full=self.clock.start_full,
            generation=self.clock.generation,
        )
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(-2)

    def reset(self) -> None:
        """Forget what was dropped, as every run of a sampler does: the next model call starts a new generation."""
        self._branches.clear()
        self.clock.reset()
        for layer in self.layers.values():
            layer.reset_skip_state()

    def _branch_of_call(self, options: dict[str, Any]) -> int:
        for name in ("cond_or_uncond", "sigmas", "sample_sigmas"):
            if options.get(name) is None:
                raise ValueError(
                    f"LiteAttention: transformer_options has no {name}, expected a model call by one of ComfyUI's "
                    "samplers; without it guidance branches or generations could not be told apart"
                )
        for name, feature in (("context_window", "context windows"), ("multigpu_thread_device", "several GPUs")):
            if name in options:
                raise ValueError(
                    f"LiteAttention: transformer_options has {name}, expected none: {feature} are not supported"
                )
        if options["sample_sigmas"] is not self._schedule:  # every run of a sampler brings a schedule of its own
            self._schedule = options["sample_sigmas"]
            self.reset()
        # The index alone does not tell two prompts of one side apart, as in regional prompting; the uuid does.
        composition = (*options["cond_or_uncond"], *options.get("uuids", ()))
        if composition not in self._branches:
            if len(self._branches) == MAX_BRANCHES:
                raise RuntimeError(
                    f"LiteAttention: more than {MAX_BRANCHES} combinations of conditions in one sampling, expected at "
                    f"most {MAX_BRANCHES}: each has a skip state"
                )
            self._branches[composition] = len(self._branches)
        branch = self._branches[composition]
        sigmas: Tensor = options["sigmas"]
        if self.clock.start_full.device != sigmas.device:
            with ordinary_tensors():
                self.clock.to(sigmas.device)
        self.clock.tick(sigmas, branch)
        return branch

    def _layer(self, options: dict[str, Any]) -> LiteAttention:
        if "block_index" not in options:
            raise ValueError(
                "LiteAttention: transformer_options has no block_index, so this attention layer cannot be told from "
                "others. The model is not supported in this version of ComfyUI"
            )
        name = tuple((key, options[key]) for key in ("block_type", "block", "block_index") if key in options)
        if name in self._attended:
            raise ValueError(
                f"LiteAttention: block {dict(name)} has several self-attention layers (as Wan VACE has), expected one: "
                "they cannot be told apart. The model is not supported"
            )
        self._attended.add(name)
        if name not in self.layers:
            self.layers[name] = LiteAttention(max_batch_size=ANY_BATCH, policy=self.policy)
        return self.layers[name]


def patch_model(
    model: ModelPatcher,
    threshold: Threshold | None = None,
    dense_steps: int | None = None,
    min_tokens: int = MIN_TOKENS,
    *,
    policy: SkipPolicy | None = None,
) -> ModelPatcher:
    """A clone of ``model`` with LiteAttention in its video self-attention; ``model`` stays as it is.

    An override that is there already keeps all other calls. LiteAttention that is there already is replaced.

    Args:
        model: ComfyUI's patcher of a video model.
        threshold, dense_steps, min_tokens, policy: as for :class:`LiteAttentionOverride`.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE_KEY)
    if isinstance(previous, LiteAttentionOverride):
        previous = previous.previous
    override = LiteAttentionOverride(threshold, dense_steps, min_tokens, previous, policy=policy)
    options[OVERRIDE_KEY] = override
    patched.remove_wrappers_with_key(APPLY_MODEL, WRAPPER_KEY)
    patched.add_wrapper_with_key(APPLY_MODEL, WRAPPER_KEY, override.around_model_call)
    _name_blocks(patched)
    return patched


class LiteAttentionNode:
    """The node: a video model in, the model with LiteAttention out."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches"
    DESCRIPTION = "Skips, in the self-attention of video models, the tiles that earlier steps found not to matter."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The node's inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("MODEL",),
                "threshold": (
                    "FLOAT",
                    {
                        "default": -10.0,
                        "min": -40.0,
                        "max": 0.0,
                        "step": 0.5,
                        "tooltip": "Powers of two. At -10, what is below a thousandth of a row's best score is "
                        "skipped. Closer to 0 is faster and less faithful.",
                    },
                ),
                "dense_steps": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 1000,
                        "tooltip": "Steps at the start that compute everything. The first always does.",
                    },
                ),
            }
        }

    def patch(self, model: ModelPatcher, threshold: float, dense_steps: int) -> tuple[ModelPatcher]:
        """What ComfyUI runs."""
        return (patch_model(model, threshold, dense_steps),)


NODE_CLASS_MAPPINGS = {"LiteAttention": LiteAttentionNode}
NODE_DISPLAY_NAME_MAPPINGS = {"LiteAttention": "Lite Attention"}


def _is_supported(query: Tensor, head_dim: int) -> bool:
    dtypes, dtype = supported_dtypes(query.device, "skip_attention"), autocast_dtype(query.dtype, query.device)
    if not dtypes:
        choose(Problem("skip_attention", query.device, dtype, head_dim))  # says why nothing runs on this device
    return dtype in dtypes and head_dim <= tiles.MAX_HEAD_DIM and head_dim % tiles.HEAD_DIM_MULTIPLE == 0


def _text_ranges(options: dict[str, Any], tokens: int) -> list[int] | None:
    """The tokens that are not the video's, where ComfyUI says which are: ranges of both queries and keys."""
    if "img_slice" not in options:
        return None
    start, end = options["img_slice"]
    if not 0 <= start < end <= tokens:
        raise ValueError(f"LiteAttention: img_slice is {[start, end]}, expected a range within the {tokens} tokens")
    return [bound for first, last in ((0, start), (end, tokens)) if first < last for bound in (first, last)]


def _name_blocks(patched: ModelPatcher) -> None:
    """Give the blocks of LTX-Video the names that other models give theirs.

    ComfyUI's LTX-Video does not say ``block_index``, but lets each block be replaced by number.
    """
    diffusion_model = patched.get_model_object("diffusion_model")
    if all(base.__name__ != "LTXVModel" for base in type(diffusion_model).__mro__):
        return
    replacements = patched.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    for index in range(len(diffusion_model.transformer_blocks)):
        named = _NamedBlock(index, replacements.get(("double_block", index)))
        patched.set_model_patch_replace(named, "dit", "double_block", index)


class _NamedBlock:
    """Runs a block, or what replaces it, with its index in ``transformer_options``."""

    def __init__(self, index: int, replacement: Callable[..., Any] | None) -> None:
        self.index = index
        self.replacement = replacement

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        options = {**args["transformer_options"], "block_type": "double", "block_index": self.index}
        args = {**args, "transformer_options": options}
        return extra["original_block"](args) if self.replacement is None else self.replacement(args, extra)
