"""Every name that diffusers, accelerate and torch keep to themselves and this door needs: one function for each.

``tests/integrations/test_diffusers_internals.py`` fails for each name that is renamed. Where they were seen:

=============================================  =====================  ===========================================
name                                           seen in                read or written by
=============================================  =====================  ===========================================
processor._attention_backend                   diffusers 0.36 - 0.42  torch_attention, ParallelProcessor
attention_dispatch.AttentionBackendName        diffusers 0.36 - 0.42  torch_attention
processor._parallel_config                     diffusers 0.36 - 0.42  torch_attention, ParallelProcessor,
                                                                      parallel_config, and its setter
transformer._parallel_config                   diffusers 0.36 - 0.42  parallel_config, forget_parallel_config
_parallel_config.context_parallel_config       diffusers 0.36 - 0.42  context_parallel_config
ContextParallelConfig.ulysses_anything         diffusers 0.37 - 0.42  unequal_shards
ContextParallelConfig.ring_anything            diffusers 0.38 - 0.42  unequal_shards
ContextParallelConfig(mesh=)                   diffusers 0.38 - 0.42  context_parallelism_takes_a_mesh
ContextParallelConfig._mesh                    diffusers 0.36 - 0.42  mesh_of
transformer._cp_plan                           diffusers 0.36 - 0.42  split_plan
hooks.context_parallel.remove_context_parallel diffusers 0.36 - 0.42  remove_split_hooks
module._diffusers_hook.hooks                   diffusers 0.36 - 0.42  hooks_of
hook.module_forward_metadata                   diffusers 0.36 - 0.42  look_signatures_up
metadata._cls, .cached_parameter_indices       diffusers 0.36 - 0.42  look_signatures_up
module._old_forward                            accelerate 0.31 - 1.15 forward_slot
compiled._orig_mod                             torch 2.10 - 2.13      uncompiled
_dynamo.trace_rules.is_callable_allowed        torch 2.10 - 2.13      is_opaque_to_compile
overrides._get_current_function_mode_stack     torch 2.10 - 2.13      foreign_function_mode, in _routing.py
=============================================  =====================  ===========================================

What else is relied on is public: ``processor`` and ``set_processor`` of attention modules, ``enable_parallelism`` and
``cache_context`` of transformers, ``timesteps``, ``step_index`` and ``begin_index`` of schedulers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lite_attention.ops.modes import real_tensors
from lite_attention.skipping.dense_steps import MAX_SCHEDULE_STEPS

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# diffusers is imported where it is needed, so that the names of this package can be read without it.

# Attention of one layer


class torch_attention:  # noqa: N801 - read as a function, like torch.no_grad
    """Context manager in which a processor's call reaches torch's function, of all tokens that it is given.

    Whatever backend is chosen, and whatever it was told of context parallelism. The processor itself runs and no copy:
    other layers may share it, and what it counts or keeps.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._before: dict[str, Any] = {}

    def __enter__(self) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        for name, value in (("_attention_backend", AttentionBackendName.NATIVE), ("_parallel_config", None)):
            if hasattr(self._processor, name):
                self._before[name] = getattr(self._processor, name)
                setattr(self._processor, name, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, value in self._before.items():
            setattr(self._processor, name, value)


# Context parallelism


class ParallelProcessor:
    """Base of processors that diffusers tells of context parallelism: it writes to those that have this attribute.

    A backend that is chosen is told to the ``processor`` that one stands for, where that one listens.
    """

    processor: Any
    _parallel_config: object | None = None

    @property
    def _attention_backend(self) -> Any:
        return self.processor._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.processor._attention_backend = backend


def parallel_config(owner: object) -> object | None:
    """What diffusers was told of parallelism: tensor or context, of a transformer or of one processor."""
    return getattr(owner, "_parallel_config", None)


def set_parallel_config(processor: Any, config: object | None) -> None:
    """Tell a processor of context parallelism, or that there is none; nothing where it does not listen."""
    if hasattr(processor, "_parallel_config"):
        processor._parallel_config = config


def forget_parallel_config(transformer: nn.Module) -> object | None:
    """Take the transformer's own configuration off it, leaving the None of its class; what it was."""
    config: object | None = vars(transformer).pop("_parallel_config", None)
    return config


def context_parallel_config(transformer: nn.Module) -> object | None:
    """The part of the configuration that is about splitting tokens, or None."""
    return getattr(parallel_config(transformer), "context_parallel_config", None)


def unequal_shards(config: object) -> str | None:
    """The option of a context-parallel configuration that makes shards of unequal length, or None."""
    options = ("ulysses_anything", "ring_anything")
    return next((option for option in options if getattr(config, option, False)), None)


def mesh_of(config: Any) -> DeviceMesh:
    """The ranks that a context-parallel configuration splits tokens over, once it is enabled."""
    mesh: DeviceMesh = config._mesh
    return mesh


def context_parallelism_takes_a_mesh() -> bool:
    """Whether this version of diffusers splits tokens over a mesh that it is given."""
    from diffusers import ContextParallelConfig

    return "mesh" in inspect.signature(ContextParallelConfig).parameters


def split_plan(transformer: nn.Module) -> dict[str, Any] | None:
    """Diffusers' plan of what to split and gather in which module of the transformer, or None."""
    plan: dict[str, Any] | None = getattr(transformer, "_cp_plan", None)
    return plan


def remove_split_hooks(transformer: nn.Module) -> None:
    """Take out the hooks that split and gather tokens by the transformer's plan."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    remove_context_parallel(transformer, split_plan(transformer))  # type: ignore[arg-type]


# Hooks


def hooks_of(module: nn.Module) -> Mapping[str, Any]:
    """The hooks that diffusers put on a module, by name."""
    hooks: Mapping[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return hooks


def look_signatures_up(transformer: nn.Module) -> None:
    """Do what hooks that split tokens do in their first call, where torch.compile could not trace it."""
    for module in transformer.modules():
        for hook in hooks_of(module).values():
            metadata = getattr(hook, "module_forward_metadata", None)
            if metadata is not None and metadata.cached_parameter_indices is None:
                _, *parameters = inspect.signature(metadata._cls.forward).parameters
                metadata.cached_parameter_indices = {name: index for index, name in enumerate(parameters)}


def forward_slot(module: nn.Module) -> str:
    """Under which name a module keeps the forward that hooks end up calling.

    accelerate's hooks put theirs in the place of ``forward``, call what they keep aside, and put it back when they go.
    """
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


# Schedulers


def schedule_step(scheduler: object | None) -> int | None:
    """Which step the scheduler takes next, or None where it does not count them."""
    index = getattr(scheduler, "step_index", None)
    if index is None and hasattr(scheduler, "step_index"):  # before its first one
        index = getattr(scheduler, "begin_index", None) or 0
    return index if isinstance(index, int) and 0 <= index < MAX_SCHEDULE_STEPS - 1 else None


def schedule_values(timesteps: object | None) -> list[float]:
    """A scheduler's timesteps as numbers; none where they are no tensor of one dimension. Waits for the device."""
    if not isinstance(timesteps, Tensor) or timesteps.dim() != 1 or timesteps.is_meta or is_fake(timesteps):
        return []
    with real_tensors():
        values: list[float] = timesteps.detach().to(torch.float64).tolist()
    return values


# torch.compile


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the module itself."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def is_opaque_to_compile(model_class: type) -> bool:
    """Whether torch.compile sees a class as one operator (``allow_in_graph``), whose methods it cannot look up.

    Diffusers marks classes so that are meant to run in a graph, LTX-Video's transformer among them.
    """
    from torch._dynamo import trace_rules

    return bool(trace_rules.is_callable_allowed(model_class))
