"""One layer: its own attention processor, with LiteAttention in place of the attention call in it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lite_attention.integrations._routing import reason_to_refuse, route_sdpa
from lite_attention.integrations.diffusers import _internals
from lite_attention.integrations.diffusers.generation import Generation
from lite_attention.integrations.diffusers.models import VideoModel
from lite_attention.ops.modes import ordinary_tensors
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.skipping.arguments import Ranges
from lite_attention.skipping.branches import MAX_BRANCHES, resolved_branch
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["RECORDED_STEPS", "LiteAttentionProcessor", "layer_attention", "processor_class"]

RECORDED_STEPS = 128
"""Steps of a generation whose skip fraction is remembered; later ones are left out."""

# Fractions are kept as integers, which nn.Module.to does not cast.
FRACTION_UNIT = 1_000_000
NOT_RECORDED = -1
# Batches are as large as the pipeline makes them; the module's own limit is for callers that know theirs.
ANY_BATCH = 2**31


def layer_attention(policy: SkipPolicy, mesh: DeviceMesh | None) -> LiteAttention | DistributedLiteAttention:
    """The attention of one layer."""
    if mesh is None:
        return LiteAttention(max_batch_size=ANY_BATCH, policy=policy)
    return DistributedLiteAttention(mesh, max_batch_size=ANY_BATCH, policy=policy)


class LiteAttentionProcessor(nn.Module, _internals.ParallelProcessor):
    """Runs a layer's own processor, with LiteAttention in place of its attention call.

    Args:
        name: of the layer's module, for errors.
        processor: the layer's own. A copy of it runs, so that it is what it was when it comes back.
        model: what is known about the layer's transformer.
        generation: what the layers of the transformer share.
        attention: of this layer, from :func:`layer_attention`.
        has_all_tokens: whether this rank's tokens are all there are, so that masks can be read.
    """

    generation: Generation
    _history: Tensor

    def __init__(
        self,
        name: str,
        processor: Callable[..., Any],
        model: VideoModel,
        generation: Generation,
        attention: LiteAttention | DistributedLiteAttention,
        has_all_tokens: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.processor = copy.copy(processor)
        _internals.use_torch_attention(self.processor)
        _internals.set_parallel_config(self.processor, None)
        self.model = model
        # Not as a submodule: the transformer registers it, once, as torch.export wants it.
        vars(self)["generation"] = generation
        self.attention = attention
        self._masks_fit = model.prefix_mask and has_all_tokens
        with ordinary_tensors():
            history = torch.full((MAX_BRANCHES, RECORDED_STEPS), NOT_RECORDED, dtype=torch.int32)
            self.register_buffer("_history", history, persistent=False)

    def attend(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """What the layer calls, with the arguments of its own processor."""
        if _internals.parallel_config(self) is not None:
            raise RuntimeError(
                f"{self.name}: context parallelism was enabled after LiteAttention, expected before it. Call disable() "
                "on the handle, then enable_lite_attention again"
            )
        calls: list[int] = []
        handler = functools.partial(self._attention, 0, calls)
        if self.model.text != "none" and encoder_hidden_states is not None:
            handler = functools.partial(self._attention, encoder_hidden_states.shape[1], calls)
        with route_sdpa(handler):
            out = self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        if self.model.may_bypass and len(calls) == 0:
            self.attention.reset_skip_state(resolved_branch(None, "LiteAttentionProcessor"))  # it may miss a start
        elif len(calls) != 1:
            raise RuntimeError(
                f"{self.name}: {type(self.processor).__name__} called scaled_dot_product_attention {len(calls)} times, "
                "expected once"
            )
        return out

    def _attention(
        self,
        text_len: int,
        calls: list[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        calls.append(text_len)
        refused = reason_to_refuse(query, key, dropout_p, is_causal)
        if refused is not None:
            raise ValueError(f"{self.name}: {refused}")
        batch, _, tokens, _ = query.shape
        kv_lens = None
        if attn_mask is not None:
            fits = attn_mask.dtype == torch.bool and attn_mask.shape == (batch, 1, 1, tokens)
            if not (self._masks_fit and fits):
                expected = f"torch.bool and {[batch, 1, 1, tokens]}" if self._masks_fit else "no mask"
                raise ValueError(
                    f"{self.name}: attn_mask has dtype {attn_mask.dtype} and shape {list(attn_mask.shape)}, expected "
                    f"{expected}"
                )
            kv_lens = attn_mask.view(batch, tokens).sum(-1, dtype=torch.int32)
        must_do, must_do_queries = self._must_do(tokens, text_len)
        fraction = torch.zeros((), device=query.device)
        out: Tensor = self.attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale,
            must_do_list=must_do,
            must_do_queries=must_do_queries,
            kv_lens=kv_lens,
            start_full=self.generation.clock.start_full.to(query.device),
            generation=self.generation.clock.generation.to(query.device),
            skip_fraction_out=fraction,
        )
        self._record(fraction)
        return out.transpose(1, 2)

    def _must_do(self, tokens: int, text_len: int) -> tuple[Ranges | None, Ranges | None]:
        """Ranges of keys and of queries that are always computed: the text's, and what the user asks for."""
        ranges = self.generation.must_do
        if text_len == 0:
            return ranges, None
        first = 0 if self.model.text == "first" else tokens - text_len
        text = [first, first + text_len]
        if ranges is None:
            return text, text
        video_start = text_len if self.model.text == "first" else 0
        # Filled, not copied from the host, which a CUDA graph could not capture.
        text_row = torch.cat([ranges.new_full((1, 1), text[0]), ranges.new_full((1, 1), text[1])], 1)
        return torch.cat([ranges + video_start, text_row]), text

    def _record(self, fraction: Tensor) -> None:
        branch = resolved_branch(None, "LiteAttentionProcessor")
        row = self._history[branch]
        step = self.generation.clock.step(branch).to(row.device)
        steps = torch.arange(RECORDED_STEPS, device=row.device)
        value = (fraction * FRACTION_UNIT).round().to(row.dtype)
        row.copy_(torch.where(steps == step, value, torch.where(step == 0, NOT_RECORDED, row)))

    def skip_fractions(self, branch: int) -> Tensor:
        """Share of tiles skipped in each step of the generation: fp32 ``[steps]``, NaN where not recorded."""
        steps = int(self.generation.clock.step(branch)) + 1
        row = self._history[branch, : max(0, min(steps, RECORDED_STEPS))].cpu()
        return torch.where(row == NOT_RECORDED, torch.nan, row / FRACTION_UNIT)


@functools.cache
def processor_class(original: Any) -> type[LiteAttentionProcessor]:
    """The class of processors that stand in for those of class ``original``.

    Its call tells the signature of the original's: diffusers' attention modules leave out arguments that the signature
    of ``processor.__call__`` does not name. One class for each and not one for each layer, so that one compiled block
    serves all.
    """

    @functools.wraps(original.__call__)
    def call(
        self: LiteAttentionProcessor,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return self.attend(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    return type(f"Lite{original.__name__}", (LiteAttentionProcessor,), {"__call__": call})
