"""Time per launch in loops of about a second, with the SM clock and the power drawn meanwhile.

A Hopper GPU under attention is limited by power: a single cold launch shows a clock that it cannot keep.
"""

import contextlib
import importlib
import math
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

SAMPLE_SECONDS = 0.02
# Samples before this share of a loop still show the launch before it.
SETTLED_SHARE = 0.25
LEAST_LAUNCHES = 3
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


def _elapsed_ms(call: Callable[[], object], launches: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def sustained(call: Callable[[], object], seconds: float, telemetry: Telemetry) -> Loop:
    """Launch `call` back to back for about `seconds` and return the mean time of one."""
    _elapsed_ms(call, 3)
    estimate = _elapsed_ms(call, 3) / 3
    calls, run = 1, call
    if estimate < GRAPH_BELOW_MS:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS_IN_GRAPH):
                call()
        calls, run = CALLS_IN_GRAPH, graph.replay
        estimate = _elapsed_ms(run, 3) / 3
    repeats = max(LEAST_LAUNCHES, round(seconds * 1000 / estimate))
    with telemetry.sampling() as samples:
        total = _elapsed_ms(run, repeats)
    settled = samples[int(SETTLED_SHARE * len(samples)) :]
    return Loop(
        ms=total / (repeats * calls),
        launches=repeats * calls,
        graph=calls > 1,
        sm_clock_mhz=_mean([clock for clock, _ in settled]),
        power_watts=_mean([power for _, power in settled]),
    )
