"""Processes that share a torch.distributed group, kept for a whole pytest session, and tasks run in all of them.

A task that raises on some rank fails the test with that rank's traceback; ranks that hang are killed and reported with
the stacks of all their threads.
"""

import atexit
import contextlib
import faulthandler
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# How long the other ranks may go on once one has raised: enough to raise too, if they do.
GRACE_SECONDS = 3.0
STACKS_SECONDS = 1.0


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
    return _pool(world_size, device).run(task, args, timeout)


class RankPool:
    """So many processes of one group."""

    def __init__(self, world_size: int, device: str) -> None:
        # Forked from a process that has imported what takes longest, and done nothing else.
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["torch.distributed", "lite_attention"])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._stacks = [Path(self._folder.name) / f"stacks-{rank}.txt" for rank in range(world_size)]
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = server.Pipe()
            settings = (rank, world_size, port, device, str(self._stacks[rank]))
            process = server.Process(target=_serve, args=(theirs, *settings), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, task: Callable[..., Any], args: tuple[Any, ...] = (), timeout: float = 120.0) -> list[Any]:
        """Results of the ranks. A rank that raises or hangs ends the pool."""
        for pipe in self._pipes:
            pipe.send((task, args))
        answers = self._answers(time.monotonic() + timeout)
        failures = [f"rank {rank}:\n{text}" for rank, (kind, text) in answers.items() if kind == "error"]
        hanging = [rank for rank in range(len(self._pipes)) if rank not in answers]
        if not failures and not hanging:
            return [answers[rank][1] for rank in range(len(self._pipes))]
        stacks = self._stacks_of(hanging)
        self.close()
        if failures:
            raise AssertionError("\n".join([*failures, f"still waiting then: ranks {hanging}" if hanging else ""]))
        raise TimeoutError(f"ranks {hanging} hung for more than {timeout} s and were killed\n{stacks}")

    def _answers(self, deadline: float) -> dict[int, tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting and time.monotonic() < deadline:
            ready = multiprocessing.connection.wait(waiting.values(), min(1.0, max(deadline - time.monotonic(), 0.0)))
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    answers[rank] = waiting.pop(rank).recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = "error", f"the process ended with exit code {self._exit_code(rank)}"
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _exit_code(self, rank: int) -> int | None:
        self._processes[rank].join(STACKS_SECONDS)
        return self._processes[rank].exitcode

    def _stacks_of(self, ranks: list[int]) -> str:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        if ranks:
            time.sleep(STACKS_SECONDS)
        return "\n".join(f"rank {rank}:\n{self._stacks[rank].read_text()}" for rank in ranks)

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []
        self._folder.cleanup()


_pools: dict[tuple[int, str], RankPool] = {}


def _pool(world_size: int, device: str) -> RankPool:
    key = world_size, device
    if key not in _pools or not _pools[key].alive:
        _pools[key] = RankPool(world_size, device)
    return _pools[key]


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()


def _serve(pipe: Any, rank: int, world_size: int, port: int, device: str, stacks: str) -> None:
    """What each process runs until the pool is closed."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if device == "cuda":
        torch.cuda.set_device(rank)
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"  # ranks that time out would wait a minute for a record
    dist.init_process_group(
        BACKENDS[device],
        rank=rank,
        world_size=world_size,
        device_id=torch.device(device, rank) if device == "cuda" else None,
    )
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        while True:
            try:
                task, args = pipe.recv()
            except EOFError:
                return
            torch.manual_seed(0)
            try:
                answer = "result", task(*args)
            except Exception:  # whatever it is, the test that gave the task reports it
                answer = "error", traceback.format_exc()
            pipe.send(answer)
