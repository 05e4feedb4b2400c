"""Putting LiteAttention into a transformer of someone else, and taking it out without a trace."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from lite_attention.integrations.diffusers.guidance import BranchNames, in_branch
from lite_attention.integrations.diffusers.models import chosen_layers, video_model
from lite_attention.integrations.diffusers.processor import LiteAttentionProcessor, processor_class
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.skipping.module import LiteAttention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["PatchedTransformer", "Replaced", "watched_scheduler"]

# The name under which a transformer registers what its layers share.
GENERATION = "lite_attention_generation"


class Replaced:
    """Methods put on an object, and how to take them off again."""

    def __init__(self, owner: object, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._owner, self._methods = owner, methods
        self._before = {name: vars(owner).get(name) for name in methods}
        vars(owner).update(methods)

    def restore(self) -> None:
        """Take off those that are still there."""
        present = vars(self._owner)
        for name, method in self._methods.items():
            if present.get(name) is not method:
                continue  # replaced or wrapped by someone else since then, whose it is now
            if self._before[name] is None:
                del present[name]
            else:
                present[name] = self._before[name]


class PatchedTransformer:
    """One transformer with LiteAttention in its layers, and how to take it out again.

    What is put on the transformer are partial functions of its own bound methods: a deep copy of it gets its own.

    Args:
        transformer: of a class that ``models`` knows. Errors leave it as it is.
        branches: numbers for the branches that its ``cache_context`` is told, shared by the transformers of a pipeline.
        make_attention: the attention of one layer, called for each.
        dense_steps: steps at the start of a generation that compute everything.
        layers: numbers of the layers that skip, or None for all.
        mesh: the ranks that make one video together, or None.
    """

    def __init__(
        self,
        transformer: nn.Module,
        branches: BranchNames,
        make_attention: Callable[[], LiteAttention | DistributedLiteAttention],
        dense_steps: int,
        layers: Sequence[int] | None,
        mesh: DeviceMesh | None,
    ) -> None:
        model = video_model(transformer)
        if hasattr(transformer, GENERATION):
            raise ValueError(
                f"enable_lite_attention: LiteAttention is in this {type(transformer).__name__} already, expected one "
                "handle: disable() it first"
            )
        chosen = chosen_layers(transformer, model, layers)
        timestep_position = _position_of_timestep(transformer)
        _refuse_group_offloading(transformer)
        is_split = parallel_mesh(transformer) is not None
        if splits_tokens(mesh):
            check_splittable(transformer, model, is_split)
        self.transformer = transformer
        self.generation = Generation(dense_steps)
        self.generation.to(next(transformer.parameters()).device)
        self.processors: dict[str, LiteAttentionProcessor] = {}
        self._originals: dict[str, Callable[..., Any]] = {}
        for name, layer in chosen.items():
            original = layer.processor
            check_processor(name, original, transformer)
            self._originals[name] = original
            stand_in = processor_class(type(original))(  # type: ignore[arg-type]
                name, original, model, self.generation, make_attention(), has_all_tokens=not splits_tokens(mesh)
            )
            self.processors[name] = stand_in.to(next(transformer.parameters()).device)
        self._enabled_parallelism = False
        if mesh is not None and splits_tokens(mesh) and not is_split:
            enable_context_parallelism(transformer, model, mesh)
            self._enabled_parallelism = True
        _internals.look_signatures_up(transformer)
        transformer.add_module(GENERATION, self.generation)
        for name, processor in self.processors.items():
            self._layer(name).set_processor(processor)
        self._timestep_position = timestep_position
        self._forwards: list[Replaced] = []
        self._cache_context: Replaced | None = None
        self.keep_ticking()
        if hasattr(transformer, "cache_context"):
            cache_context: Any = transformer.cache_context
            branch = functools.partial(in_branch, cache_context, branches, self.keep_ticking)
            self._cache_context = Replaced(
                transformer, {"cache_context": functools.update_wrapper(branch, cache_context)}
            )

    def keep_ticking(self) -> None:
        """Make the transformer's forward tell the time, where it does not: hooks that are removed take it away."""
        name = _internals.forward_slot(self.transformer)
        forward: Any = getattr(self.transformer, name)
        inner = forward
        while inner is not None:
            if self._is_ticking(inner):
                return
            inner = getattr(inner, "__wrapped__", None)
        ticking = functools.partial(_ticking, forward, self.generation, self._timestep_position)
        self._forwards.append(Replaced(self.transformer, {name: functools.update_wrapper(ticking, forward)}))

    def set_must_do(self, ranges: list[tuple[int, int]]) -> None:
        """Choose the video tokens whose keys every query of every layer attends to."""
        if self.generation.set_must_do(ranges):
            for module in self.transformer.modules():
                if isinstance(module, LiteAttention):
                    module.outdate_captured_graphs()

    def restore(self) -> None:
        """Give the transformer back as it was, but for what others have put there since."""
        delattr(self.transformer, GENERATION)
        for name, original in self._originals.items():
            if self._layer(name).processor is self.processors[name]:
                self._layer(name).set_processor(original)
                later = _internals.parallel_config(self.processors[name])  # enabled since then
                if later is not None:
                    _internals.set_parallel_config(original, later)
        for replaced in (*reversed(self._forwards), self._cache_context):
            if replaced is not None:
                replaced.restore()
        present = vars(self.transformer)
        if self._is_ticking(present.get("forward")):  # put there by a hook that went
            present["forward"] = present["forward"].args[0]
        if self._enabled_parallelism:
            disable_context_parallelism(self.transformer)

    def _is_ticking(self, forward: object) -> bool:
        is_partial = isinstance(forward, functools.partial) and forward.func is _ticking
        return is_partial and forward.args[1] is self.generation  # type: ignore[attr-defined]

    def _layer(self, name: str) -> Any:
        return self.transformer.get_submodule(name)


def _ticking(
    forward: Callable[..., Any], generation: Generation, timestep_position: int, *args: Any, **kwargs: Any
) -> Any:
    """A transformer's forward. Part of it and not a hook before it, so that one graph holds both."""
    generation.tick(args[timestep_position] if len(args) > timestep_position else kwargs["timestep"])
    return forward(*args, **kwargs)


def _position_of_timestep(transformer: nn.Module) -> int:
    # The class's own: hooks of older versions of diffusers hide the signature of what they wrap.
    _, *parameters = inspect.signature(type(transformer).forward).parameters
    if "timestep" not in parameters:
        raise ValueError(
            f"enable_lite_attention: {type(transformer).__name__}.forward has the parameters {', '.join(parameters)}, "
            "expected timestep among them"
        )
    return parameters.index("timestep")


def _refuse_group_offloading(transformer: nn.Module) -> None:
    for name, module in transformer.named_modules():
        if _internals.is_group_offloaded(module):
            raise RuntimeError(
                f"enable_lite_attention: {name or type(transformer).__name__} is set up for group offloading, which "
                "loses the skip state on the way, expected a transformer that stays, or is offloaded as a whole"
            )


def watched_scheduler(scheduler: Any, start_generation: Callable[[], None]) -> Replaced:
    """Have ``start_generation`` called where a pipeline starts a generation: in ``scheduler.set_timesteps``."""
    return Replaced(scheduler, {"set_timesteps": _Resetting(scheduler.set_timesteps, start_generation)})


class _Resetting:
    """``scheduler.set_timesteps`` with what is to be done where a generation starts."""

    def __init__(self, set_timesteps: Callable[..., Any], start_generation: Callable[[], None]) -> None:
        self._set_timesteps, self._start_generation = set_timesteps, start_generation
        functools.update_wrapper(self, set_timesteps)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._start_generation()
        return self._set_timesteps(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A pipeline's copy of its scheduler, for the sound of a video, has its own timesteps and starts no generation.
        return copy.deepcopy(self._set_timesteps, memo)
