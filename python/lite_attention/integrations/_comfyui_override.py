"""The function that ComfyUI hands every attention call of a patched model to.

ComfyUI says in ``transformer_options`` which block an attention call is in (``block_type``, ``block_index``). Once per
model call it says, besides, which conditions are in the batch (``cond_or_uncond``, ``uuids``) and where in the sampling
it is (``sigmas``, ``sample_sigmas``), of which ``_comfyui_streams.py`` makes streams; and it calls wrappers around each
run of a sampler, and around each evaluation of the model in it.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from lite_attention.integrations._comfyui_streams import FOREIGN, Stream, Streams, sigma_of
from lite_attention.integrations._left_to_torch import runs_here, why_scale_is_left
from lite_attention.maps import tiles
from lite_attention.ops.checks import checked_bool, checked_int
from lite_attention.skipping.arguments import Threshold
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.dense_steps import GenerationClock
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy

__all__ = ["MIN_TOKENS", "LiteAttentionOverride"]

# Self-attention over fewer tokens is left to ComfyUI. More than any prompt or audio track has, and under the tokens of
# the shortest clips, in which attention takes little of a step.
MIN_TOKENS = 4096
# ComfyUI batches as many conditions as fit; the module's own limit is for callers that know theirs.
ANY_BATCH = 2**31

# Why whole model calls are not taken, or attention outside of them.
NO_MODEL_CALL = "outside of a sampler's model call"
TOO_MANY_STREAMS = (
    f"more than {MAX_BRANCHES} streams (combinations of conditions, windows, tiles and calls of one step), of which "
    "each would need a skip state"
)

# Keywords that are followed, and those that say nothing of the result.
UNDERSTOOD = frozenset(
    ("transformer_options", "scale", "enable_gqa", "_inside_attn_wrapper", "low_precision_attention")
)

Attention = Callable[..., Tensor]
AttentionOverride = Callable[..., Tensor]
_BlockName = tuple[tuple[str, Hashable], ...]

_logger = logging.getLogger("lite_attention")


class LiteAttentionOverride:
    """An attention override for ComfyUI that remembers, layer by layer, which tiles may be skipped.

    It takes the video self-attention calls: as many queries as keys, at least ``min_tokens``, no mask, a head dim and
    dtype that LiteAttention has. All other calls go to the override that was there before, or to the function that
    ComfyUI passes. Where ``img_slice`` says which tokens are the image's or video's, the others (text) are always kept.

    All parts must be installed, as :func:`patch_model` does: the object itself as the override,
    :meth:`around_model_call` as a wrapper of each model call, :meth:`around_evaluation` of each evaluation, and
    :meth:`around_sampling` as one of each sampling.
    Several model calls of one step with a condition of which ComfyUI says the same, as of the tiles of a latent, run
    dense, and so do all calls with it in the rest of the sampling; with ``fixed_order`` they have states of their own,
    for as long as each step has as many of them. Calls outside of the sampler's evaluations run dense, and those of
    streams beyond the room that there is (``MAX_BRANCHES``). :meth:`summary` and the log tell.

    Args:
        threshold: -10 if None; see :class:`lite_attention.SkipPolicy`.
        dense_steps: in so many steps at the start of a generation every layer computes all tiles. The first step
            is always one of them.
        min_tokens: self-attention over fewer tokens is not taken.
        previous: the override that calls not taken go to; None for the function that ComfyUI passes.
        policy: all that the layers are told about skipping, in place of ``threshold`` and ``dense_steps``.
        fixed_order: whether several model calls of one step for the same conditions come in the same order in each
            step.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    layers: dict[_BlockName, LiteAttention]
    """The state of each attention layer met so far, by what ComfyUI says of its block."""

    left_to_comfyui: Counter[str]
    """How many attention calls were not taken since the latest sampling began, by the reason."""

    def __init__(
        self,
        threshold: Threshold | None = None,
        dense_steps: int | None = None,
        min_tokens: int = MIN_TOKENS,
        previous: AttentionOverride | None = None,
        *,
        policy: SkipPolicy | None = None,
        fixed_order: bool = False,
    ) -> None:
        self.policy = SkipPolicy.resolve("LiteAttentionOverride", policy, threshold=threshold, dense_steps=dense_steps)
        self.min_tokens = checked_int("LiteAttentionOverride: min_tokens", min_tokens, lowest=1)
        if previous is not None and not callable(previous):
            raise TypeError(f"LiteAttentionOverride: previous has type {type(previous).__name__}, expected a function")
        self.previous = previous
        self.clock = GenerationClock(self.policy.dense_steps)
        self.layers = {}
        self.left_to_comfyui = Counter()
        checked_bool("LiteAttentionOverride: fixed_order", fixed_order)
        self._streams = Streams(MAX_BRANCHES, fixed_order)
        self._turns = 0  # of the sigmas, at which a sampling starts full again
        self._branch: int | None = None
        self._why_dense: str | None = NO_MODEL_CALL
        self._attended: set[_BlockName] = set()

    def around_sampling(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a sampling as a generation of its own. An ``outer_sample`` wrapper."""
        self.reset()
        self._streams.tells_steps = True  # ComfyUI told of evaluations before it had overrides
        result = executor(*args, **kwargs)
        self._streams.end_step()
        return result

    def around_evaluation(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an evaluation of the model by the sampler, which is one step. A ``predict_noise`` wrapper."""
        if self._streams.in_told_step:  # guiders call each other
            return executor(*args, **kwargs)
        self._streams.begin_step()
        failed = True
        try:
            result = executor(*args, **kwargs)
            failed = False
            return result
        finally:
            self._streams.end_step(failed)

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
        """
        options = transformer_options or {}
        stream = self._stream_of_call(options)
        self._attended = set()
        try:
            self._branch, self._why_dense = self._branch_of(stream, options["sigmas"])
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        except BaseException:
            self._streams.take_back(stream)
            raise
        finally:
            self._branch, self._why_dense = None, NO_MODEL_CALL

    @torch.compiler.disable(
        reason="LiteAttention's override is told layer and stream in transformer_options, on which ComfyUI compiles "
        "without guards. Compile without fullgraph=True"
    )
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
            kwargs: ``transformer_options``, ``scale``, ``enable_gqa``; a call with others that say something is not
                taken.

        Raises:
            ValueError: ComfyUI does not say which block this is, or says the same of two layers.
        """
        head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
        reason = self._why_dense or self._why_left(q, k, v, head_dim, mask, attn_precision)
        reason = reason or why_scale_is_left(kwargs.get("scale")) or _why_arguments_are_left(kwargs)
        if reason is not None:
            self.left_to_comfyui[reason] += 1
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
            start_full=self.clock.start_full.to(query.device),
            generation=self.clock.generation.to(query.device),
        )
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(-2)

    def reset(self) -> None:
        """Forget what was dropped, as every run of a sampler does: the next model call starts a new generation."""
        self._turns = 0
        self.left_to_comfyui.clear()
        self._start_full()

    def _start_full(self) -> None:
        self._streams.start()
        self.clock.reset()
        for layer in self.layers.values():
            layer.reset_skip_state()

    def _stream_of_call(self, options: dict[str, Any]) -> Stream:
        for name in ("cond_or_uncond", "sigmas", "sample_sigmas"):
            if options.get(name) is None:
                raise ValueError(
                    f"LiteAttention: transformer_options has no {name}, expected a model call by one of ComfyUI's "
                    "samplers; without it guidance branches or generations could not be told apart"
                )
        if "multigpu_thread_device" in options:
            raise ValueError(
                "LiteAttention: transformer_options has multigpu_thread_device, expected none: several GPUs are not "
                "supported"
            )
        sigma = sigma_of(options["sigmas"])
        if self._streams.is_new_run(sigma, options["sample_sigmas"]):
            self._start_full()
            self._turns += 1
        return self._streams.of_call(sigma, options)

    def _branch_of(self, stream: Stream, sigmas: Tensor) -> tuple[int | None, str | None]:
        """The branch whose state a model call goes on with, or why it runs dense."""
        why_mixed = self._streams.why_mixed(stream)
        if why_mixed is not None:
            if why_mixed == FOREIGN and FOREIGN not in self.left_to_comfyui:
                _logger.warning("LiteAttention: %s runs dense: %s", stream, FOREIGN)
            return None, why_mixed
        branch = self._streams.number(stream)
        if branch is None:
            if TOO_MANY_STREAMS not in self.left_to_comfyui:
                _logger.warning("LiteAttention: %s runs dense: %s", stream, TOO_MANY_STREAMS)
            return None, TOO_MANY_STREAMS
        self.clock.tick(sigmas, branch)
        return branch, None

    def _why_left(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        head_dim: int,
        mask: Tensor | None,
        attn_precision: torch.dtype | None,
    ) -> str | None:
        """Why an attention call is not taken, None if it is."""
        if mask is not None:
            return "a mask"
        if attn_precision not in (None, q.dtype):
            return "attn_precision"
        if q.shape[-2] != k.shape[-2]:
            return "other keys than queries, as in cross-attention"
        if q.shape[-2] < self.min_tokens:
            return f"fewer than {self.min_tokens} tokens"
        if head_dim % tiles.HEAD_DIM_MULTIPLE != 0 or head_dim > tiles.MAX_HEAD_DIM:
            return f"head_dim {head_dim}, no multiple of {tiles.HEAD_DIM_MULTIPLE} up to {tiles.MAX_HEAD_DIM}"
        if v.shape != k.shape or q.shape[0] != k.shape[0]:
            return "shapes that do not fit each other"
        if q.dtype != k.dtype or q.dtype != v.dtype or not runs_here(q.dtype, q.device):
            return f"{q.dtype} on {q.device.type}"
        if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
            return "strides whose last one is not 1"
        return None

    @property
    def streams(self) -> dict[Stream, int]:
        """The streams of the latest sampling that have a skip state, each with its branch in :attr:`layers`."""
        return dict(self._streams.numbers)

    def summary(self) -> str:
        """For people: what each stream of the latest sampling skips, and how many calls were not taken. Waits."""
        lines = []
        for stream, branch in self._streams.numbers.items():
            if self._streams.why_mixed(stream) is not None:
                lines.append(f"{stream}: runs dense")
                continue
            counts = (layer.skipped_tiles(branch).cpu() for layer in self.layers.values())
            skipped = sum(counts, torch.zeros(2, dtype=torch.float32))
            lines.append(f"{stream}: {float(skipped[0] / skipped[1].clamp(min=1)):.0%} skipped")
        if self._turns:
            lines.append(f"started full again {self._turns} times, as the sigmas or their schedule turned")
        lines += [f"left to ComfyUI: {count} x {reason}" for reason, count in self.left_to_comfyui.items()]
        return "\n".join(lines) or "no model call yet"

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


def _why_arguments_are_left(arguments: dict[str, Any]) -> str | None:
    """Why a call with these keywords is not taken; None and False are what one without them has."""
    unknown = (
        name for name, value in arguments.items() if name not in UNDERSTOOD and value is not None and value is not False
    )
    name = next(unknown, None)
    return None if name is None else f"an argument of which nothing is known, {name}"


def _text_ranges(options: dict[str, Any], tokens: int) -> list[int] | None:
    """The tokens that are not the video's, where ComfyUI says which are: ranges of both queries and keys."""
    if "img_slice" not in options:
        return None
    try:
        start, end = map(operator.index, options["img_slice"])
    except (TypeError, ValueError):
        raise TypeError(f"LiteAttention: img_slice is {options['img_slice']!r}, expected [start, end]") from None
    if not 0 <= start < end <= tokens:
        raise ValueError(f"LiteAttention: img_slice is {[start, end]}, expected a range within the {tokens} tokens")
    return [bound for first, last in ((0, start), (end, tokens)) if first < last for bound in (first, last)]
