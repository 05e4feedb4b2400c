"""Splitting a transformer's tokens among ranks: what diffusers has enabled, what it can be asked for, and back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import get_process_group_ranks, get_rank

from lite_attention.integrations.diffusers import _internals
from lite_attention.integrations.diffusers.models import VideoModel, layers_matching
from lite_attention.parallel.mesh import sequence_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "check_processor",
    "check_splittable",
    "common_mesh",
    "disable_context_parallelism",
    "enable_context_parallelism",
    "parallel_mesh",
    "splits_tokens",
]


def splits_tokens(mesh: DeviceMesh | None) -> bool:
    """Whether there is more than one rank to split tokens among."""
    return mesh is not None and mesh.size() > 1


def common_mesh(transformers: dict[str, nn.Module], mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The mesh for all layers: the one that diffusers splits the tokens over, else the one that was given."""
    if mesh is not None:
        sequence_mesh(mesh, "enable_lite_attention")
    meshes = {prefix: parallel_mesh(transformer) for prefix, transformer in transformers.items()}
    split = {prefix: found for prefix, found in meshes.items() if found is not None}
    if not split:
        return mesh
    if len(split) < len(meshes):
        missing = next(prefix for prefix in meshes if prefix not in split)
        raise RuntimeError(
            f"enable_lite_attention: context parallelism is enabled on {next(iter(split)).rstrip('.')} and not on "
            f"{missing.rstrip('.')}, expected both or neither"
        )
    first, *others = split.values()
    for other in others:
        if _ranks(other) != _ranks(first):
            raise ValueError(
                f"enable_lite_attention: context parallelism of one transformer has {_described(first)}, of the other "
                f"{_described(other)}, expected the same mesh for both"
            )
    if mesh is not None and _ranks(mesh) != _ranks(first):
        raise ValueError(
            f"enable_lite_attention: mesh has {_described(mesh)}, expected {_described(first)} as the context "
            "parallelism that is enabled already, or mesh=None"
        )
    return first


def parallel_mesh(transformer: nn.Module) -> DeviceMesh | None:
    """The ranks over which diffusers splits the transformer's tokens, or None."""
    config = _internals.context_parallel_config(transformer)
    if config is None:
        return None
    option = _internals.unequal_shards(config)
    if option is not None:
        raise ValueError(
            f"enable_lite_attention: context parallelism has {option}=True, which makes shards of unequal length, "
            "expected False and a number of tokens that the ranks divide"
        )
    mesh = _internals.mesh_of(config)
    return mesh if set(mesh.mesh_dim_names or ()) == {"ring", "ulysses"} else mesh["ring", "ulysses"]


def _ranks(mesh: DeviceMesh) -> tuple[list[int], list[int]]:
    """The ranks that this one shares a ring with, and those that it exchanges heads with."""
    names = mesh.mesh_dim_names or ()
    ring, ulysses = (
        get_process_group_ranks(mesh.get_group(name)) if name in names else [get_rank()] for name in ("ring", "ulysses")
    )
    return ring, ulysses


def _described(mesh: DeviceMesh) -> str:
    ring, ulysses = _ranks(mesh)
    return f"the ranks {ring} in a ring and {ulysses} for Ulysses"


def check_splittable(transformer: nn.Module, model: VideoModel, is_split: bool) -> None:
    """Refuse transformers whose tokens cannot be split, or, where they are split already, not so."""
    class_name = type(transformer).__name__
    if model.text != "none":
        raise ValueError(
            f"enable_lite_attention: layers of {class_name} attend over text and video together, expected a model with "
            "video alone in its self-attention where tokens are split among ranks"
        )
    if model.token_split == "none":
        raise ValueError(
            f"enable_lite_attention: diffusers' plan of how to split the tokens of {class_name} does not work, "
            "expected no mesh and no context parallelism"
        )
    if model.token_split == "mesh only" and is_split:
        raise ValueError(
            f"enable_lite_attention: context parallelism is enabled on {class_name}, by a plan that splits the text "
            "too, expected mesh= instead"
        )
    if not is_split and _internals.split_plan(transformer) is None:
        raise ValueError(
            f"enable_lite_attention: {class_name} does not say how its tokens can be split (_cp_plan is None), "
            "expected mesh=None, or a transformer on which enable_parallelism was called with a cp_plan"
        )
    if not is_split and torch.accelerator.device_count() == 0:
        raise RuntimeError(
            "enable_lite_attention: mesh is given where torch.accelerator.device_count() is 0, expected one "
            "at least: diffusers' context parallelism gives each rank a device by its number"
        )
    if not is_split and _internals.parallel_config(transformer) is not None:
        raise ValueError(
            f"enable_lite_attention: {class_name} is set up for tensor parallelism, expected mesh=None with it"
        )


def check_processor(name: str, processor: object, transformer: nn.Module) -> None:
    """Refuse a layer that exchanges tokens of which its transformer knows nothing."""
    config = _internals.parallel_config(processor)
    if config is not None and config is not _internals.parallel_config(transformer):
        raise RuntimeError(
            f"{name}: its processor is set up for context parallelism and the transformer is not, expected both, by "
            "transformer.enable_parallelism"
        )


def enable_context_parallelism(transformer: Any, model: VideoModel, mesh: DeviceMesh) -> None:
    """Make diffusers split the transformer's tokens over a mesh of the dimensions ring and ulysses."""
    from diffusers import ContextParallelConfig

    if not _internals.context_parallelism_takes_a_mesh():
        raise RuntimeError(
            "enable_lite_attention: mesh needs diffusers 0.38 or newer. With an older one, call "
            "transformer.enable_parallelism before and leave mesh=None"
        )
    names = mesh.mesh_dim_names or ()
    if set(names) != {"ring", "ulysses"}:
        raise ValueError(
            f"enable_lite_attention: mesh has the dimension {', '.join(names)} alone, expected ring and ulysses, of "
            "size 1 where it is not used: diffusers wants both"
        )
    ring, ulysses = (mesh.size(names.index(name)) for name in ("ring", "ulysses"))
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, mesh=mesh)  # type: ignore[no-untyped-call]
    plan = _internals.split_plan(transformer) or {}
    if model.text_layers:
        plan = {module: _without_text(split) for module, split in plan.items()}
    with ExitStack() as where_it_fails:
        where_it_fails.callback(disable_context_parallelism, transformer)  # it may have begun
        transformer.enable_parallelism(config=config, cp_plan=plan)
        where_it_fails.pop_all()
    # With the whole text at hand there is nothing to exchange. Diffusers' own way of splitting it takes no masks under
    # Ulysses, and in a ring only some attention backends.
    for module in layers_matching(transformer, model.text_layers).values():
        _internals.set_parallel_config(module.processor, None)


def _without_text(split: Any) -> Any:
    """An entry of diffusers' plan of what to split, but for the inputs that are text."""
    if not isinstance(split, dict):
        return split
    return {name: how for name, how in split.items() if not str(name).startswith("encoder_")}


def disable_context_parallelism(transformer: nn.Module) -> None:
    """What diffusers has no call for: take its hooks out and tell the layers."""
    _internals.remove_split_hooks(transformer)
    config = _internals.forget_parallel_config(transformer)
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if config is not None and _internals.parallel_config(processor) is config:
            _internals.set_parallel_config(processor, None)
