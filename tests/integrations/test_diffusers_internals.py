"""A canary for each name that diffusers, accelerate and torch keep to themselves and the diffusers door needs.

Where one fails, the name went or means something else in the version that is installed: follow it in
``lite_attention/integrations/diffusers/_internals.py``, whose table says until which version it was seen.
"""

import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import ContextParallelConfig
from diffusers.hooks import HookRegistry, ModelHook, context_parallel
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lite_attention.integrations._routing import route_sdpa
from lite_attention.integrations.diffusers import _internals
from support.video_models import CASES, HEAD_DIM, HEADS, make_transformer


def unknown(name: str, package: str = "diffusers") -> str:
    """What a canary says."""
    version = importlib.metadata.version(package)
    return f"{package} {version} has no {name}, or another one than the door knows: see _internals.py of the door"


@pytest.fixture
def transformer() -> Any:
    return make_transformer(CASES["wan"])


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which only this process is there: enough to set up what would exchange tokens."""
    # Diffusers numbers the accelerators of a host, of which a machine without one has none to divide by.
    count = torch.accelerator.device_count() or 1
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    with mock.patch.object(torch.accelerator, "device_count", return_value=count):
        yield init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    dist.destroy_process_group()


@pytest.fixture
def split(transformer: Any, mesh: DeviceMesh) -> Any:
    """A transformer whose tokens diffusers splits."""
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    return transformer


def processors(transformer: Any) -> list[Any]:
    return list(transformer.attn_processors.values())


def names_of_hooks(transformer: nn.Module) -> list[str]:
    return [name for module in transformer.modules() for name in _internals.hooks_of(module)]


# Attention of one layer


def test_the_backend_of_a_processor(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # set below, for the whole process
    transformer.set_attention_backend("flex")  # which is not torch's scaled_dot_product_attention
    calls = []

    def handler(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(query.shape)
        return query

    layer = transformer.blocks[0].attn1
    with torch.no_grad(), _internals.torch_attention(layer.processor), route_sdpa(handler):
        layer(torch.randn(1, 8, HEADS * HEAD_DIM))
    assert len(calls) == 1, unknown("processor._attention_backend or AttentionBackendName.NATIVE")


# Context parallelism


def test_processors_are_told_of_context_parallelism(split: Any) -> None:
    configs = [_internals.parallel_config(processor) for processor in processors(split)]
    assert configs[0] is not None, unknown("processor._parallel_config")
    assert all(config is _internals.parallel_config(split) for config in configs), unknown("processor._parallel_config")


def test_a_processor_that_is_told_there_is_none_computes_alone(split: Any) -> None:
    calls = []

    def handler(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(list(query.shape))
        return query

    layer = split.blocks[0].attn1
    config = _internals.parallel_config(layer.processor)
    with torch.no_grad(), _internals.torch_attention(layer.processor), route_sdpa(handler):
        layer(torch.randn(1, 8, HEADS * HEAD_DIM))
    assert calls == [[1, HEADS, 8, HEAD_DIM]], unknown("processor._parallel_config")
    assert _internals.parallel_config(layer.processor) is config, "as before"


def test_processors_of_the_door_are_told_too(transformer: Any, mesh: DeviceMesh) -> None:
    listener: Any = type("Listener", (_internals.ParallelProcessor,), {})()
    transformer.blocks[0].attn1.set_processor(listener)
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    assert _internals.parallel_config(listener) is not None, unknown("processor._parallel_config")


def test_a_transformer_that_forgets_can_be_split_again(split: Any, mesh: DeviceMesh) -> None:
    assert _internals.forget_parallel_config(split) is not None, unknown("transformer._parallel_config")
    assert _internals.parallel_config(split) is None, unknown("transformer._parallel_config")
    _internals.remove_split_hooks(split)
    split.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))


def test_the_configuration_of_context_parallelism(transformer: Any, mesh: DeviceMesh) -> None:
    assert _internals.context_parallel_config(transformer) is None
    config = ContextParallelConfig(ulysses_degree=2, mesh=mesh)
    transformer.enable_parallelism(config=config)
    assert _internals.context_parallel_config(transformer) is config, unknown(
        "_parallel_config.context_parallel_config"
    )


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_options_for_shards_of_unequal_length(axis: str) -> None:
    assert _internals.unequal_shards(ContextParallelConfig(**{f"{axis}_degree": 2})) is None
    option = f"{axis}_anything"
    assert option in inspect.signature(ContextParallelConfig).parameters, unknown(f"ContextParallelConfig.{option}")
    uneven = ContextParallelConfig(**{f"{axis}_degree": 2, option: True})
    assert _internals.unequal_shards(uneven) == option, unknown(f"ContextParallelConfig.{option}")


def test_context_parallelism_over_a_given_mesh(split: Any, mesh: DeviceMesh) -> None:
    assert _internals.context_parallelism_takes_a_mesh(), unknown("ContextParallelConfig(mesh=)")
    found = getattr(_internals.context_parallel_config(split), "_mesh", None)
    assert found == mesh, unknown("ContextParallelConfig._mesh")
    assert _internals.mesh_of(_internals.context_parallel_config(split)) == mesh


def test_the_plan_of_what_to_split() -> None:
    plan = _internals.split_plan(make_transformer(CASES["ltx"]))
    assert plan is not None, unknown("transformer._cp_plan")
    inputs = {name for split in plan.values() if isinstance(split, dict) for name in split}
    assert {"hidden_states", "encoder_hidden_states", "encoder_attention_mask"} <= inputs, unknown("_cp_plan")
    assert _internals.split_plan(make_transformer(CASES["wan-vace"])) is None


def test_hooks_that_split_tokens_can_be_removed(split: Any) -> None:
    assert len(names_of_hooks(split)) > 0, unknown("module._diffusers_hook.hooks")
    name = "hooks.context_parallel.remove_context_parallel"
    assert hasattr(context_parallel, "remove_context_parallel"), unknown(name)
    _internals.remove_split_hooks(split)
    assert names_of_hooks(split) == [], unknown(name)


# Hooks


def test_hooks_of_a_module(transformer: Any) -> None:
    assert names_of_hooks(transformer) == []
    hook = ModelHook()
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, "mine")
    assert _internals.hooks_of(transformer) == {"mine": hook}, unknown("module._diffusers_hook.hooks")


def test_signatures_that_hooks_look_up(split: Any) -> None:
    def metadata() -> list[Any]:
        hooks = [hook for module in split.modules() for hook in _internals.hooks_of(module).values()]
        return [found for hook in hooks if (found := getattr(hook, "module_forward_metadata", None)) is not None]

    assert len(metadata()) > 0, unknown("hook.module_forward_metadata")
    for known in metadata():
        assert {"_cls", "cached_parameter_indices"} <= set(vars(known)), unknown("hook.module_forward_metadata")
        assert known.cached_parameter_indices is None
    _internals.look_signatures_up(split)
    for known in metadata():
        by_the_door = known.cached_parameter_indices
        fresh = type(known)(_cls=known._cls)
        fresh._get_parameter_from_args_kwargs("hidden_states", [None], {})
        assert by_the_door == fresh.cached_parameter_indices, unknown("hook.module_forward_metadata")


def test_the_forward_that_hooks_of_accelerate_call() -> None:
    layer = nn.Identity()
    assert _internals.forward_slot(layer) == "forward"
    add_hook_to_module(layer, AccelerateHook())
    setattr(layer, _internals.forward_slot(layer), lambda x: x + 1)
    assert vars(layer)["forward"](1) == 2, unknown("module._old_forward", "accelerate")
    remove_hook_from_module(layer)
    assert layer(1) == 2, unknown("module._old_forward", "accelerate")
    assert _internals.forward_slot(layer) == "forward"


# torch.compile


def test_the_module_that_was_compiled() -> None:
    layer = nn.Linear(2, 2)
    compiled = torch.compile(layer, backend="eager")
    assert compiled is not layer
    assert _internals.uncompiled(compiled) is layer, unknown("compiled._orig_mod", "torch")
    assert _internals.uncompiled(layer) is layer


def test_classes_that_a_graph_takes_whole() -> None:
    class Ordinary(nn.Module):
        pass

    @torch.compiler.allow_in_graph
    class Whole(nn.Module):
        pass

    assert not _internals.is_opaque_to_compile(Ordinary)
    assert _internals.is_opaque_to_compile(Whole), unknown("_dynamo.trace_rules.is_callable_allowed", "torch")
