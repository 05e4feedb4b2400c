"""No module of the package holds tensors: what a call makes goes with the call, or with an object that the user holds."""

import functools
import gc
import sys
import types
from collections.abc import Iterator

import torch
from torch import Tensor

from lite_attention import (
    block_sparse_attention,
    sliding_tile_attention,
    streaming_attention,
    streaming_sparse_attn_func,
    video_sparse_attn,
)
from lite_attention.compat.fastvideo import build_vsa_metadata
from lite_attention.layers import AttentionBackendEnum, get_attn_backend

PACKAGE = "lite_attention"


def members(thing: object) -> Iterator[object]:
    """What an object of a module holds, as far as the module is answerable for it."""
    if isinstance(thing, dict):
        yield from thing.keys()
        yield from thing.values()
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from thing
    elif isinstance(thing, functools._lru_cache_wrapper):
        yield from gc.get_referents(thing)
    elif isinstance(thing, types.FunctionType):
        yield from (cell.cell_contents for cell in thing.__closure__ or () if gc.get_referents(cell))
        yield from (thing.__defaults__ or (), thing.__kwdefaults__ or {}, vars(thing))
    elif str(getattr(thing, "__module__", "")).startswith(PACKAGE):  # its classes, and objects of them
        yield dict(getattr(thing, "__dict__", {}))


def tensors_of(module: types.ModuleType) -> list[str]:
    """Where a module's globals lead to tensors."""
    found, seen = [], set()
    waiting = [(name, thing) for name, thing in vars(module).items() if not name.startswith("__")]
    while waiting:
        path, thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(path)
        waiting += [(path, member) for member in members(thing)]
    return found


def test_the_walk_finds_what_a_module_keeps() -> None:
    module = types.ModuleType(f"{PACKAGE}.made_up")

    @functools.lru_cache
    def cached(size: int) -> Tensor:
        return torch.zeros(size)

    class Holder:
        __module__ = module.__name__

        def __init__(self) -> None:
            self.tensors = {"one": [torch.zeros(1)]}

    class Keeper:
        __module__ = module.__name__
        kept = torch.zeros(1)

    module.cached = cached
    assert not tensors_of(module)
    cached(3)
    assert tensors_of(module) == ["cached"]
    module.holder, module.keeper, module.table = Holder(), Keeper, {(1, 2): torch.zeros(1)}
    assert sorted(tensors_of(module)) == ["cached", "holder", "keeper", "table"]


def test_no_module_holds_tensors_after_calls_of_every_family() -> None:
    grid, tile = (4, 8, 9), (4, 4, 4)
    sizes = build_vsa_metadata(grid, tile)["variable_block_sizes"]
    x = torch.randn(1, 2, 64 * sizes.numel(), 16)
    video_sparse_attn(x, x, x, sizes, 2)
    block_sparse_attention(x, x, x, torch.ones(2, sizes.numel(), sizes.numel(), dtype=torch.bool), sizes)
    video = torch.randn(1, 2, 288 + 7, 16)
    sliding_tile_attention(video, video, video, [(1, 1, 1), (1, 3, 1)], 5, True, grid, tile=tile)
    streaming_sparse_attn_func(video, video, video, window_size=(31, 0), sink_size=4)
    streaming_attention(video, video, video, 4, 31)
    for backend in (AttentionBackendEnum.VIDEO_SPARSE_ATTN, AttentionBackendEnum.SLIDING_TILE_ATTN):
        builder = get_attn_backend(16, torch.float32, (backend,)).get_builder_cls()()
        if backend is AttentionBackendEnum.VIDEO_SPARSE_ATTN:
            builder.build(current_timestep=0, raw_latent_shape=grid, patch_size=(1, 1, 1), VSA_sparsity=0.5)
        else:
            builder.build(
                STA_param=[[[(1, 1, 1)]]], current_timestep=0, canvas=grid, head_size=16, dtype=torch.float32,
                text_tokens=9, text_length=3,
            )  # fmt: skip
    held = {
        name: tensors
        for name, module in sys.modules.items()
        if name.split(".")[0] == PACKAGE and (tensors := tensors_of(module))
    }
    assert held == {}
