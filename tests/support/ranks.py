"""Tasks of tests that run in several processes of one torch.distributed group, which are kept for the pytest session.

A task that raises on some rank fails the test with that rank's traceback; ranks that hang are killed and reported with
the stacks of all their threads.
"""

import atexit
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from support.rank_pool import RankError, RankPool

__all__ = ["RankError", "RankPool", "mesh_of", "require_gpus", "run_on_ranks"]

_pools: dict[tuple[int, str], RankPool] = {}


def require_gpus(count: int) -> None:
    """Skip the test where there are fewer GPUs."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


@functools.cache
def mesh_of(device: str, ring: int, ulysses: int) -> DeviceMesh:
    """For use inside a task: the mesh of all ranks, with both dimensions."""
    return init_device_mesh(device, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))


def run_on_ranks(
    world_size: int, device: str, task: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """What ``task(*args)`` returns on each of so many ranks; ``task`` is a function of a test module."""
    if device == "cuda":
        require_gpus(world_size)
    key = world_size, device
    if key not in _pools or not _pools[key].alive:
        _pools[key] = RankPool(world_size, device)
    return _pools[key].run(task, args, timeout)


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()
