"""Processes that share a torch.distributed group and run tasks together, until one of them fails or hangs."""

import contextlib
import faulthandler
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# How long the other ranks may go on once one has raised: enough to raise too, if they do.
GRACE_SECONDS = 3.0
STACKS_SECONDS = 1.0


# What every rank would import in its turn, where this process has it: then its tasks will likely need it too. Not where
# there is a GPU: diffusers asks for it as it is imported, and who is forked after that can no longer use it.
OFTEN = {"diffusers.models.transformers.transformer_wan", "diffusers.pipelines.pipeline_utils"}


class RankError(Exception):
    """A rank raised or its process ended; the text tells in its first line what, and then holds the tracebacks."""


class RankPool:
    """So many processes of one group, each on a GPU of its own where the device is "cuda"."""

    def __init__(self, world_size: int, device: str, collective_timeout: float = 60.0) -> None:
        # Forked from a process that has imported what takes longest, and done nothing else.
        server = multiprocessing.get_context("forkserver")
        often = set() if torch.cuda.is_available() else OFTEN & sys.modules.keys()
        server.set_forkserver_preload(["torch.distributed", "lite_attention", *often])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._stacks = [Path(self._folder.name) / f"stacks-{rank}.txt" for rank in range(world_size)]
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._processes: list[multiprocessing.context.ForkServerProcess] = []
        for rank in range(world_size):
            ours, theirs = server.Pipe()
            settings = (rank, world_size, port, device, collective_timeout, str(self._stacks[rank]))
            process = server.Process(target=_serve, args=(theirs, *settings), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, task: Callable[..., Any], args: tuple[Any, ...] = (), timeout: float = 120.0) -> list[Any]:
        """What ``task(*args)`` returns on each rank; ``task`` is a function of a module.

        Raises:
            RankError: a rank raised. The pool is of no use afterwards.
            TimeoutError: a rank took longer than so many seconds. The pool is of no use afterwards.
        """
        deadline = time.monotonic() + timeout
        for pipe in self._pipes:
            pipe.send((task, args))
        answers = self._answers(deadline)
        failures = {rank: text for rank, (kind, text) in sorted(answers.items()) if kind == "error"}
        hanging = [rank for rank in range(len(self._pipes)) if rank not in answers]
        if not failures and not hanging:
            return [answers[rank][1] for rank in range(len(self._pipes))]
        stacks = self._stacks_of(hanging)
        self._kill()
        if failures:
            what = "; ".join(f"rank {rank}: {text.strip().splitlines()[-1]}" for rank, text in failures.items())
            tracebacks = [f"rank {rank}:\n{text}" for rank, text in failures.items()]
            raise RankError("\n".join([what, *tracebacks, f"still waiting then: ranks {hanging}" if hanging else ""]))
        raise TimeoutError(f"ranks {hanging} hung for more than {timeout} s and were killed\n{stacks}")

    def _answers(self, deadline: float) -> dict[int, tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting and time.monotonic() < deadline:
            ready = multiprocessing.connection.wait(
                list(waiting.values()), min(1.0, max(deadline - time.monotonic(), 0.0))
            )
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    answers[rank] = waiting.pop(rank).recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(STACKS_SECONDS)
                    answers[rank] = "error", f"the process ended with exit code {self._processes[rank].exitcode}"
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _stacks_of(self, ranks: list[int]) -> str:
        for rank in ranks:
            pid = self._processes[rank].pid
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        if ranks:
            time.sleep(STACKS_SECONDS)
        texts = {rank: self._stacks[rank] for rank in ranks if self._stacks[rank].exists()}
        return "\n".join(f"rank {rank}:\n{path.read_text()}" for rank, path in texts.items())

    def close(self) -> None:
        """Let the processes end, and kill those that do not."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []
        self._folder.cleanup()


def _serve(
    pipe: "multiprocessing.connection.Connection",
    rank: int,
    world_size: int,
    port: int,
    device: str,
    collective_timeout: float,
    stacks: str,
) -> None:
    """What each process runs until the pool is closed."""
    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        if device == "cuda":
            torch.cuda.set_device(rank)
            os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"  # no record of what hangs: the stacks tell
        dist.init_process_group(
            BACKENDS[device],
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_timeout),
            device_id=torch.device(device, rank) if device == "cuda" else None,
        )
        while True:
            try:
                task, args = pipe.recv()
            except EOFError:
                dist.destroy_process_group()
                return
            torch.manual_seed(0)
            try:
                answer = "result", task(*args)
            except Exception:  # whatever it is, the caller reports it
                answer = "error", traceback.format_exc()
            pipe.send(answer)
