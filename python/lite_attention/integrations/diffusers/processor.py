"""One layer: its own attention processor, with LiteAttention in place of the attention call in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lite_attention.integrations._routing import foreign_function_mode, route_sdpa
from lite_attention.integrations.diffusers import _internals
from lite_attention.integrations.diffusers.generation import Generation
from lite_attention.integrations.diffusers.models import VideoModel
from lite_attention.ops.own_state import OwnState, StateHolder, hold
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

# In errors of state, where a layer's own name would make torch.compile trace each layer anew.
_CALLER = "LiteAttentionProcessor"
# Batches are as large as the pipeline makes them; the module's own limit is for callers that know theirs.
ANY_BATCH = 2**31


def layer_attention(policy: SkipPolicy, mesh: DeviceMesh | None) -> LiteAttention | DistributedLiteAttention:
    """The attention of one layer."""
    if mesh is None:
        return LiteAttention(max_batch_size=ANY_BATCH, policy=policy)
    return DistributedLiteAttention(mesh, max_batch_size=ANY_BATCH, policy=policy)


class History(OwnState):
    """What a layer skipped in each step of the latest generation in which it ran, for each branch."""

    fractions: Tensor
    """fp32 ``[MAX_BRANCHES, RECORDED_STEPS]``, NaN for steps in which it did not run."""

    generations: Tensor
    """Whose steps these are, by the clock's numbers: int64 ``[MAX_BRANCHES]``."""

    calls: Tensor
    """Of the transformer, up to that of the latest pass: int64 ``[MAX_BRANCHES]``."""

    repeats: Tensor
    """Passes in this generation that shared a call with the pass before: int64 ``[MAX_BRANCHES]``."""

    def __init__(self) -> None:
        super().__init__()
        self.start_over(torch.device("cpu"))

    def fresh_buffers(self, device: torch.device) -> dict[str, Tensor]:
        nothing = torch.full((MAX_BRANCHES, RECORDED_STEPS), torch.nan, dtype=torch.float32, device=device)
        return {
            "fractions": nothing,
            "generations": torch.zeros(MAX_BRANCHES, dtype=torch.int64, device=device),
            "calls": torch.full((MAX_BRANCHES,), -1, dtype=torch.int64, device=device),
            "repeats": torch.zeros(MAX_BRANCHES, dtype=torch.int64, device=device),
        }

    @property
    def device(self) -> torch.device:
        return self.fractions.device

    def is_looped(self, branch: int, call: Tensor, generation: Tensor) -> Tensor:
        """Note that a pass begins, and tell whether several share a call: bool, 0-d.

        Then the map that one leaves is not the next one's: they are different depths of the model.
        """
        repeats, last = self.repeats[branch], self.calls[branch]
        repeats.copy_(torch.where(self.generations[branch] == generation, repeats, 0) + (last == call))
        last.copy_(call)
        return repeats > 0

    def record(self, branch: int, step: Tensor, generation: Tensor, fraction: Tensor) -> None:
        """Note the fraction of a step, a scalar as the others, on the device of the state."""
        row, number = self.fractions[branch], self.generations[branch]
        before = torch.where(number == generation, row, torch.nan)
        row.copy_(torch.where(torch.arange(RECORDED_STEPS, device=row.device) == step, fraction, before))
        number.copy_(generation)

    def of_generation(self, branch: int, step: Tensor, generation: Tensor) -> Tensor:
        """The fractions up to this step, fp32 on the CPU; all NaN where the layer did not run in this generation."""
        row = self.fractions[branch, : min(int(step) + 1, RECORDED_STEPS)].cpu()
        return row if int(self.generations[branch]) == int(generation) else torch.full_like(row, torch.nan)


class LiteAttentionProcessor(StateHolder, _internals.ParallelProcessor):
    """Runs a layer's own processor, with LiteAttention in place of its attention call.

    Args:
        name: of the layer's module, for errors.
        processor: the layer's own.
        model: what is known about the layer's transformer.
        generation: what the layers of the transformer share.
        attention: of this layer, from :func:`layer_attention`.
        has_all_tokens: whether this rank's tokens are all there are, so that masks can be read.
        check_forward: raises, with the name, where the transformer's forward does not tell the time any more.
    """

    stands_for: type
    """The class of the layer's own processor."""

    generation: Generation
    history: History

    def __init__(
        self,
        name: str,
        processor: Callable[..., Any],
        model: VideoModel,
        generation: Generation,
        attention: LiteAttention | DistributedLiteAttention,
        has_all_tokens: bool,
        check_forward: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.name = name
        self.processor = processor
        with _internals.torch_attention(processor):
            pass  # its attributes are its own from here on, as they are after each call: compiled code guards on that
        self.model = model
        # Not as a submodule: the transformer registers it, once, as torch.export wants it.
        vars(self)["generation"] = generation
        self.attention = attention
        self._masks_fit = model.prefix_mask and has_all_tokens
        self._check_forward = check_forward
        hold(self, "history", History())

    def attend(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """What the layer calls, with the arguments of its own processor."""
        if _internals.parallel_config(self) is not None:
            raise RuntimeError(
                f"{self.name}: context parallelism was enabled after LiteAttention, expected before it. Call disable() "
                "on the handle, then enable_lite_attention again"
            )
        if not self.generation.call.is_running:
            self._check_forward(self.name)
        mode = foreign_function_mode()
        if mode is not None:  # what it does to torch's attention must not be left out
            self.generation.say_left_to(mode)
            return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        if self.model.text != "none" and encoder_hidden_states is None:
            raise ValueError(
                f"{self.name}: encoder_hidden_states is None, expected the text, which its VideoModel has among the "
                f"tokens of this layer (text={self.model.text!r})"
            )
        calls: list[int] = []
        handler = functools.partial(self._attention, 0, calls)
        if self.model.text != "none" and encoder_hidden_states is not None:
            handler = functools.partial(self._attention, encoder_hidden_states.shape[1], calls)
        with _internals.torch_attention(self.processor), route_sdpa(handler):
            out = self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        if len(calls) != 1 and not (self.model.may_bypass and len(calls) == 0):
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
        refused = _reason_to_refuse(query, key, dropout_p, is_causal)
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
        must_do, must_do_queries = self._must_do(tokens, text_len, query.device)
        fraction = torch.zeros((), dtype=torch.float32, device=query.device)
        branch, device = resolved_branch(None, _CALLER), query.device
        clock = self.generation.clock
        start_full, generation = (told.to(device) for told in clock.told(branch))
        self.history.place(device, _CALLER, torch.compiler.is_compiling())
        is_looped = self.history.is_looped(branch, clock.calls(branch).to(device), generation)
        out: Tensor = self.attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale,
            must_do_list=must_do,
            must_do_queries=must_do_queries,
            kv_lens=kv_lens,
            start_full=start_full | is_looped,
            generation=generation,
            skip_fraction_out=fraction,
        )
        self.history.record(branch, clock.step(branch).to(device), generation, fraction)
        return out.transpose(1, 2)

    def _must_do(self, tokens: int, text_len: int, device: torch.device) -> tuple[Ranges | None, Ranges | None]:
        """Ranges of keys and of queries that are always computed: the text's, and what the user asks for."""
        ranges = self.generation.must_do.ranges
        if ranges is not None:
            ranges = ranges.to(device)
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

    def skip_fractions(self, branch: int) -> Tensor:
        """Share of tiles skipped in each step of the generation: fp32 ``[steps]``, NaN where the layer did not run."""
        clock = self.generation.clock
        return self.history.of_generation(branch, clock.step(branch), clock.state.generations[branch])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_processor, (self.stands_for,), self.__dict__.copy()


@functools.cache
def processor_class(original: type) -> type[LiteAttentionProcessor]:
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

    names = {"__call__": call, "stands_for": original, "__module__": __name__}
    return type(f"Lite{original.__name__}", (LiteAttentionProcessor,), names)


def _empty_processor(original: type) -> LiteAttentionProcessor:
    """What a pickle of a processor begins with: it finds the class, which no module holds, by the original's."""
    made_for = processor_class(original)
    return made_for.__new__(made_for)


def _reason_to_refuse(query: Tensor, key: Tensor, dropout_p: float, is_causal: bool) -> str | None:
    """Why LiteAttention cannot take over a call, or None if it can.

    A reason and not an error: torch.compile would trace a layer's name, once it is an argument, for each layer anew.
    """
    if dropout_p != 0.0:
        return f"attention with dropout_p={dropout_p}, expected 0: skipping is for inference"
    if is_causal:
        return "attention with is_causal=True, expected bidirectional attention"
    if query.shape[-2] != key.shape[-2]:
        return f"attention of {query.shape[-2]} queries to {key.shape[-2]} keys, expected as many: self-attention"
    return None
