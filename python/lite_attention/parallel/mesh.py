"""Which ranks share a sequence, read from a DeviceMesh; and the mesh of layers that are not given one.

A forward is traced and captured, and all it needs to know of a mesh are constants, so the mesh is read once, by
:func:`sequence_mesh`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from lite_attention.scoped_default import ScopedDefault

__all__ = [
    "RankGroup",
    "SequenceMesh",
    "check_present",
    "get_sequence_parallel_mesh",
    "sequence_mesh",
    "sequence_parallel_mesh",
    "set_sequence_parallel_mesh",
    "ulysses_group",
]

RING = "ring"
ULYSSES = "ulysses"


class RankGroup(NamedTuple):
    """The ranks along one dimension of a mesh, and which of them this process is.

    Whatever holds it is this rank's own: pickled, it is refused by another rank, which would send and take what belongs
    to this one.
    """

    name: str
    """torch's name of the process group; empty for a group of one."""
    size: int
    rank: int

    def __deepcopy__(self, memo: object) -> RankGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, tuple(self)


def _unpickled(name: str, size: int, rank: int) -> RankGroup:
    group = RankGroup(name, size, rank)
    _check_still(group, "a layer was loaded", "each rank makes layers of its own, after the mesh")
    return group


def check_present(group: RankGroup) -> None:
    """That torch's process group of this name is still the one of these ranks; in compiled code nobody looks.

    torch gives the names of destroyed process groups to later ones.

    Raises:
        RuntimeError: it is another, or there is none.
    """
    if not torch.compiler.is_compiling():
        _check_still(group, "an exchange between ranks is called", "layers end with their process group")


def _check_still(group: RankGroup, what: str, why: str) -> None:
    if group.size == 1:
        return
    expected = f"expected rank {group.rank} of {group.size}, for which it was made: {why}"
    try:
        found = distributed_c10d._resolve_process_group(group.name)  # type: ignore[attr-defined,arg-type]
    except Exception as error:
        raise RuntimeError(f"RankGroup: {what} where there is no process group {group.name!r}, {expected}") from error
    if (found.size(), found.rank()) != (group.size, group.rank):
        raise RuntimeError(f"RankGroup: {what} by rank {found.rank()} of {found.size()}, {expected}")


class SequenceMesh(NamedTuple):
    """Which ranks share a sequence: along ``ring`` they hold blocks of keys, along ``ulysses`` heads.

    The rank at (r, u) holds shard ``r * ulysses.size + u`` of the tokens.
    """

    ring: RankGroup
    ulysses: RankGroup

    @property
    def shards(self) -> int:
        """Number of shards of the sequence, one for each rank."""
        return self.ring.size * self.ulysses.size

    @property
    def shard(self) -> int:
        """Which shard of the sequence this rank holds."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank


def sequence_mesh(mesh: DeviceMesh, name: str) -> SequenceMesh:
    """What attention needs to know of ``mesh``, whose dimensions are named "ring" and "ulysses" or one of the two.

    Args:
        mesh: of the ranks that share one sequence. A missing dimension counts as one of size 1.
        name: begins the text of errors.

    Raises:
        TypeError, ValueError: ``mesh`` is no such mesh, or this process is not in it.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{name}: mesh has type {type(mesh).__name__}, expected a DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= {RING, ULYSSES}:
        raise ValueError(
            f"{name}: mesh has dimensions named {', '.join(map(repr, names)) or 'nothing'}, expected 'ring', 'ulysses' "
            "or both. Of a larger mesh, pass mesh['ring', 'ulysses']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name}: mesh does not contain this process, expected a mesh that does")

    def group(dim: str) -> RankGroup:
        if dim not in names or mesh.size(names.index(dim)) == 1:
            return RankGroup("", 1, 0)
        members = mesh.get_group(dim)
        return RankGroup(members.group_name, members.size(), mesh.get_local_rank(dim))

    return SequenceMesh(group(RING), group(ULYSSES))


def ulysses_group(mesh: DeviceMesh | None, name: str) -> RankGroup:
    """The ranks that share a sequence by heads alone; this process alone for None.

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


_default: ScopedDefault[DeviceMesh | None] = ScopedDefault("lite_attention.sequence_parallel_mesh", None)


def set_sequence_parallel_mesh(mesh: DeviceMesh | None) -> None:
    """Distributed layers that this process makes from now on, in any thread, are spread over this mesh.

    Args:
        mesh: with a dimension named "ulysses"; one named "ring" of size 1 may be there. None for one rank.

    Raises:
        TypeError, ValueError: ``mesh`` is something else.
    """
    ulysses_group(mesh, "set_sequence_parallel_mesh")
    _default.set(mesh)


def get_sequence_parallel_mesh() -> DeviceMesh | None:
    """The mesh of the innermost :func:`sequence_parallel_mesh`, or that of :func:`set_sequence_parallel_mesh`."""
    return _default.get()


def sequence_parallel_mesh(mesh: DeviceMesh | None) -> AbstractContextManager[None]:
    """Distributed layers made inside, in this thread or asyncio task, are spread over this mesh.

    Raises:
        TypeError, ValueError: as :func:`set_sequence_parallel_mesh`.
    """
    ulysses_group(mesh, "sequence_parallel_mesh")
    return _default.scope(mesh)
