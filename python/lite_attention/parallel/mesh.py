"""The mesh that distributed layers get which are not given one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.device_mesh import DeviceMesh

from lite_attention.parallel.collectives import RankGroup, sequence_mesh

__all__ = ["get_sequence_parallel_mesh", "sequence_parallel_mesh", "set_sequence_parallel_mesh", "ulysses_group"]

_mesh: DeviceMesh | None = None


def set_sequence_parallel_mesh(mesh: DeviceMesh | None) -> None:
    """Distributed layers that this process makes from now on, in any thread, are spread over this mesh.

    Args:
        mesh: with a dimension named "ulysses"; one named "ring" of size 1 may be there. None for one rank.

    Raises:
        TypeError, ValueError: ``mesh`` is something else.
    """
    global _mesh
    if mesh is not None:
        ulysses_group(mesh, "set_sequence_parallel_mesh")
    _mesh = mesh


def get_sequence_parallel_mesh() -> DeviceMesh | None:
    """The mesh of :func:`set_sequence_parallel_mesh`."""
    return _mesh


@contextmanager
def sequence_parallel_mesh(mesh: DeviceMesh | None) -> Iterator[None]:
    """Distributed layers made inside are spread over this mesh; afterwards the one before counts again."""
    outer = _mesh
    set_sequence_parallel_mesh(mesh)
    try:
        yield
    finally:
        set_sequence_parallel_mesh(outer)


def ulysses_group(mesh: DeviceMesh | None, name: str) -> RankGroup:
    """The ranks that share a sequence by heads.

    Raises:
        TypeError, ValueError: ``mesh`` is no such mesh; the text begins with ``name``.
    """
    if mesh is None:
        return RankGroup("", 1, 0)
    ranks = sequence_mesh(mesh, name)
    if ranks.ring.size > 1:
        raise ValueError(
            f"{name}: mesh has {ranks.ring.size} ranks along 'ring', expected 1, as the layers exchange heads "
            "('ulysses'). DistributedLiteAttention attends in a ring too"
        )
    return ranks.ulysses
