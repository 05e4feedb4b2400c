"""What one call keeps the GPU busy with, from torch's profiler."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Timeline:
    """Kernels and copies of one call: how many, their time together, and from the first's start to the last's end."""

    kernels: int
    kernels_ms: float
    span_ms: float

    @property
    def gaps(self) -> float:
        """Share by which the call takes longer than its kernels."""
        return self.span_ms / self.kernels_ms - 1

    def facts(self) -> dict[str, Any]:
        """As a record holds it."""
        return {**asdict(self), "gaps": self.gaps}


def timeline(call: Callable[[], object]) -> Timeline | None:
    """Profile one call whose kernels run one after the other; None where the profiler sees no kernel."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = [
        event.time_range
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    if not spans:
        return None
    return Timeline(
        kernels=len(spans),
        kernels_ms=sum(span.end - span.start for span in spans) / 1000,
        span_ms=(max(span.end for span in spans) - min(span.start for span in spans)) / 1000,
    )
