"""Putting LiteAttention into a transformer of someone else, and taking it out without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lite_attention.integrations.diffusers import _internals
from lite_attention.integrations.diffusers.context_parallel import (
    check_processor,
    check_splittable,
    disable_context_parallelism,
    enable_context_parallelism,
    parallel_mesh,
    splits_tokens,
)
from lite_attention.integrations.diffusers.generation import Generation
from lite_attention.integrations.diffusers.guidance import BranchNames, is_named
from lite_attention.integrations.diffusers.models import (
    VideoModel,
    check_threshold_count,
    chosen_layers,
    video_model,
)
from lite_attention.integrations.diffusers.processor import LiteAttentionProcessor, processor_class
from lite_attention.integrations.diffusers.schedule import PipelineSchedule, is_plain_call
from lite_attention.integrations.diffusers.wrapped import NamedContext, Replaced, TickingForward
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["PatchedTransformer"]

# The name under which a transformer registers what its layers share.
GENERATION = "lite_attention_generation"

LOOKS_AT_THE_SCHEDULER = (
    "LiteAttention: the cache_context of a transformer that was enabled with its pipeline looks at the pipeline's "
    "scheduler, in Python, to notice a new video; expected a step that is compiled without fullgraph=True, or whose "
    "transformer is compiled alone. Else enable_lite_attention(pipeline.transformer), and call reset() on the handle "
    "before each video"
)


class PatchedTransformer:
    """One transformer with LiteAttention in its layers, and how to take it out again.

    What is put on the transformer holds on to this: a copy of the transformer gets one of its own.

    Args:
        transformer: of a class that ``models`` knows. Errors leave it as it is.
        branches: numbers for the branches that its ``cache_context`` is told, shared by the transformers of a pipeline.
        policy: of the layers; its dense steps are those of ``generation``.
        make_attention: the attention of one layer, called for each.
        generation: what the layers share.
        layers: numbers of the layers that skip, or None for all.
        mesh: the ranks that make one video together, or None.
        pipeline: that the transformer is in, or None.
    """

    ticking: TickingForward
    """The forward that tells the time."""

    def __init__(
        self,
        transformer: nn.Module,
        branches: BranchNames,
        policy: SkipPolicy,
        make_attention: Callable[[], LiteAttention | DistributedLiteAttention],
        generation: Generation,
        layers: Sequence[int] | None,
        mesh: DeviceMesh | None,
        pipeline: object | None = None,
    ) -> None:
        model = video_model(transformer)
        if hasattr(transformer, GENERATION):
            raise ValueError(
                f"enable_lite_attention: LiteAttention is in this {type(transformer).__name__} already, expected one "
                "handle: disable() it first"
            )
        chosen = chosen_layers(transformer, model, layers)
        check_threshold_count("enable_lite_attention", policy.threshold, chosen)
        self.timestep_position, self.text_position = _positions(transformer)
        self.is_enabled = True
        self._schedule = PipelineSchedule(pipeline)
        is_split = parallel_mesh(transformer) is not None
        if splits_tokens(mesh):
            check_splittable(transformer, model, is_split)
        self.transformer = transformer
        self.generation = generation
        self.processors: dict[str, LiteAttentionProcessor] = {}
        # The modules themselves: whoever takes blocks out of the model changes the others' names.
        self._layers: dict[str, Any] = dict(chosen)
        self._originals: dict[str, Callable[..., Any]] = {}
        for name, layer in chosen.items():
            original = layer.processor
            check_processor(name, original, transformer)
            self._originals[name] = original
            self.processors[name] = processor_class(type(original))(  # type: ignore[arg-type]
                name,
                original,
                model,
                self.generation,
                make_attention(),
                has_all_tokens=not splits_tokens(mesh),
                check_forward=self.check_forward,
            )
        self._enabled_parallelism = False
        self._forwards: list[Replaced] = []
        self._cache_context: Replaced | None = None
        with ExitStack() as where_it_fails:
            where_it_fails.callback(self.restore)
            self._put_on(model, branches, mesh if splits_tokens(mesh) and not is_split else None)
            where_it_fails.pop_all()

    def _put_on(self, model: VideoModel, branches: BranchNames, mesh: DeviceMesh | None) -> None:
        """Change the transformer, and make diffusers split its tokens over a mesh."""
        transformer = self.transformer
        if mesh is not None:
            enable_context_parallelism(transformer, model, mesh)
            self._enabled_parallelism = True
        _internals.look_signatures_up(transformer)
        self._schedule.join()
        transformer.add_module(GENERATION, self.generation)
        for name, processor in self.processors.items():
            self._layers[name].set_processor(processor)
        self.keep_ticking()
        if hasattr(transformer, "cache_context"):
            self._cache_context = Replaced(transformer, {"cache_context": NamedContext(self, branches)})

    def keep_ticking(self) -> None:
        """Make the transformer's forward tell the time, where it does not.

        Hooks that are removed take it away, and so does who puts another forward in its place.
        """
        present = self._present_ticking()
        if present is None:
            slot = _internals.forward_slot(self.transformer)
            present = TickingForward(self, slot)
            self._forwards.append(Replaced(self.transformer, {slot: present}))
        present.look_up_again()
        self.ticking = present

    def begin_named_call(self) -> None:
        """Do what is to be done before a call whose branch has a name; in a pipeline never as a part of a graph."""
        if self._schedule.is_empty and torch.compiler.is_compiling():
            return
        self._begin_named_call()

    # The reason is part of the error where no graph break is allowed.
    @torch.compiler.disable(reason=LOOKS_AT_THE_SCHEDULER)
    def _begin_named_call(self) -> None:
        self.keep_ticking()
        self.look_at_schedule()
        if is_plain_call():
            self.generation.clock.at_schedule_step(*self._schedule.step())

    def look_at_schedule(self) -> None:
        """Begin a generation where the pipeline's scheduler tells of one, in plain Python; else the log says so."""
        if is_plain_call():
            if self._schedule.video_begins():
                self.generation.start()
        elif not self._schedule.is_empty and not is_named():
            self.generation.say_unseen()

    def check_forward(self, layer: str) -> None:
        """Refuse a call of a layer whose transformer lost the forward that tells the time."""
        if self._present_ticking() is not self.ticking:
            raise RuntimeError(
                f"{layer}: the forward of this {type(self.transformer).__name__} was replaced after "
                "enable_lite_attention, which does not learn the timesteps any more, expected another forward before "
                "it, or one that calls the forward that was there. Call disable() on the handle, then "
                "enable_lite_attention again"
            )

    def check_threshold_count(self, caller: str, threshold: float | tuple[float, ...]) -> None:
        """Refuse thresholds that are not one for each head of every layer."""
        check_threshold_count(caller, threshold, self._layers)

    def set_must_do(self, ranges: list[tuple[int, int]]) -> None:
        """Choose the video tokens whose keys every query of every layer attends to."""
        self.generation.must_do.set(ranges)

    def restore(self) -> None:
        """Give the transformer back as it was, but for what others have put there since; after an error, too."""
        self.is_enabled = False
        self.transformer._modules.pop(GENERATION, None)
        with ExitStack() as undo:
            undo.callback(self._schedule.leave)
            if self._enabled_parallelism:
                undo.callback(disable_context_parallelism, self.transformer)
            undo.callback(self._restore_forward)
            for name in self.processors:
                undo.callback(self._restore_layer, name)

    def _restore_layer(self, name: str) -> None:
        layer, processor, original = self._layers[name], self.processors[name], self._originals[name]
        if layer.processor is processor:
            later = _internals.parallel_config(processor)  # enabled since then
            if later is not None:
                _internals.set_parallel_config(original, later)
            layer.set_processor(original)

    def _restore_forward(self) -> None:
        for replaced in (*reversed(self._forwards), self._cache_context):
            if replaced is not None:
                replaced.restore()
        left = vars(self.transformer).get("forward")
        if isinstance(left, TickingForward) and left.patched is self:
            left.put_back()  # left there by a hook that went

    def _present_ticking(self) -> TickingForward | None:
        """The outermost of this transformer's in its forward."""
        forward: Any = getattr(self.transformer, _internals.forward_slot(self.transformer))
        while forward is not None:
            if isinstance(forward, TickingForward) and forward.patched is self:
                return forward
            forward = getattr(forward, "__wrapped__", None)
        return None


def _positions(transformer: nn.Module) -> tuple[int, int | None]:
    """Where the timestep and the text stand among the arguments of forward; None where there is no text."""
    # The class's own: hooks of older versions of diffusers hide the signature of what they wrap.
    _, *parameters = inspect.signature(type(transformer).forward).parameters
    if "timestep" not in parameters:
        raise ValueError(
            f"enable_lite_attention: {type(transformer).__name__}.forward has the parameters {', '.join(parameters)}, "
            "expected timestep among them"
        )
    text = "encoder_hidden_states"
    return parameters.index("timestep"), parameters.index(text) if text in parameters else None
