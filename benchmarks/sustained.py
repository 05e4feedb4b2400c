"""Time per launch in loops of about a second, with the SM clock and the power drawn meanwhile; time on the host.

A Hopper GPU under attention is limited by power: a single cold launch shows a clock that it cannot keep.
"""

import contextlib
import gc
import importlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

SAMPLE_SECONDS = 0.02
# Samples before this share of a loop still show the launch before it.
SETTLED_SHARE = 0.25
LEAST_LAUNCHES = 3
WARM_UP_LAUNCHES = 3
# A call longer than this is warm after one launch, and one tells how long it takes.
LONG_MS = 300.0
# A call shorter than this is timed as replays of a CUDA graph, because launching it may take as long as it runs.
GRAPH_BELOW_MS = 0.3
CALLS_IN_GRAPH = 20


@dataclass(frozen=True)
class Loop:
    """The mean time of one launch in a loop, and the means of what was sampled while it ran."""

    ms: float
    launches: int
    graph: bool
    sm_clock_mhz: float | None
    power_watts: float | None

    def facts(self) -> dict[str, Any]:
        """As a record holds it."""
        return asdict(self)


class Telemetry:
    """SM clock and power of the current CUDA device, from NVML (package nvidia-ml-py)."""

    def __init__(self) -> None:
        self._nvml = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._device = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")

    def driver(self) -> str:
        """The driver's version."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def _sample(self) -> tuple[float, float]:
        clock = self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM)
        # the plain power reading of NVML is a mean over a second, as long as a whole loop
        power = self._nvml.nvmlDeviceGetFieldValues(self._device, [self._nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if power.nvmlReturn != self._nvml.NVML_SUCCESS:
            return float(clock), math.nan
        return float(clock), power.value.uiVal / 1000

    @contextlib.contextmanager
    def sampling(self) -> Iterator[list[tuple[float, float]]]:
        """Samples `(MHz, W)`, added to the list in a thread until the block ends."""
        samples: list[tuple[float, float]] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_SECONDS):
                samples.append(self._sample())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            done.set()
            thread.join()


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(statistics.fmean(known), 1) if known else None


def settled(samples: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Mean SM clock and power of a loop's samples, without those that still show the launch before it."""
    kept = samples[int(SETTLED_SHARE * len(samples)) :]
    return _mean([clock for clock, _ in kept]), _mean([power for _, power in kept])


def _elapsed_ms(call: Callable[[], object], launches: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def in_graph(call: Callable[[], Result]) -> Callable[[], Result]:
    """`call`, which has run before, as a CUDA graph that writes the same result again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def sustained(call: Callable[[], object], seconds: float, telemetry: Telemetry) -> Loop:
    """Launch `call` back to back for about `seconds` and return the mean time of one."""
    estimate = _elapsed_ms(call, 1)
    if estimate < LONG_MS:
        _elapsed_ms(call, WARM_UP_LAUNCHES)
        estimate = _elapsed_ms(call, WARM_UP_LAUNCHES) / WARM_UP_LAUNCHES
    calls, run = 1, call
    if estimate < GRAPH_BELOW_MS:

        def many_calls() -> None:
            for _ in range(CALLS_IN_GRAPH):
                call()

        calls, run = CALLS_IN_GRAPH, in_graph(many_calls)
        estimate = _elapsed_ms(run, WARM_UP_LAUNCHES) / WARM_UP_LAUNCHES
    repeats = max(LEAST_LAUNCHES, round(seconds * 1000 / estimate))
    with telemetry.sampling() as samples:
        total = _elapsed_ms(run, repeats)
    clock, power = settled(samples)
    return Loop(
        ms=total / (repeats * calls),
        launches=repeats * calls,
        graph=calls > 1,
        sm_clock_mhz=clock,
        power_watts=power,
    )


def host_microseconds(call: Callable[[], object], calls: int, in_flight: int) -> float:
    """Median time until a call returns, over `calls` of them, of which never more than `in_flight` wait for the GPU."""
    nanoseconds = []
    gc.collect()
    gc.disable()
    for _ in range(calls // in_flight):
        torch.cuda.synchronize()
        for _ in range(in_flight):
            start = time.perf_counter_ns()
            call()
            nanoseconds.append(time.perf_counter_ns() - start)
    gc.enable()
    return statistics.median(nanoseconds) / 1000
