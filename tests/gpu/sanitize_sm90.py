"""A few small launches through every instantiation and path of the Hopper kernels, to be run under compute-sanitizer:

    compute-sanitizer --tool memcheck  --error-exitcode 1 python tests/gpu/sanitize_sm90.py
    compute-sanitizer --tool synccheck --error-exitcode 1 python tests/gpu/sanitize_sm90.py
    compute-sanitizer --tool initcheck --check-api-memory-access no --error-exitcode 1 python tests/gpu/sanitize_sm90.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_sm90.py

benchmarks/verify_gpu.py runs all four side by side, each in several processes (--share). Inputs are made, and results
judged, on the CPU: the operators' kernels are the only ones that run, and all that reaches or leaves the GPU is copied,
so that the tools see which memory is initialised. Each tensor is an allocation of its own, so that they see its bounds.
initcheck does not see what the copy engine stores, so it would object to copying a result to the host: it is told to
look at kernels only.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read by torch when it first allocates

import torch
from torch import Tensor

from lite_attention import (
    attention,
    merge_attention,
    pack_keep_map,
    reference,
    skip_attention,
    tile_shape,
    top_k_map,
)
from lite_attention.maps.tiles import FINE_TILE_N, UNLIMITED

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.inputs import GPU, GPU_DTYPES, Case, check_attention, check_decisions, make_map, make_qkv, random_map

# Of each instantiation once its own head dim and once a smaller one, padded with zeros.
HEAD_DIMS = (64, 40, 128, 72, 256, 136)
WALKS = (
    "every tile",
    "shared by visit group",
    "shared by pairs of visit groups",
    "unequal densities",
    "some rows empty",
    "no tile",
)


class Launch(NamedTuple):
    """One call; ``keep`` names one of ``inputs.MAPS``, None is dense attention."""

    case: Case
    dtype: torch.dtype
    keep: str | None = None
    record: bool = False
    must_keep: bool = False
    kv_lens: tuple[int, ...] | None = None
    masked: bool = False  # causal, a window in every second head, and tiles of all lengths
    fine: bool = False  # tiles of 64 keys

    def __str__(self) -> str:
        marks = [name for name in ("record", "must_keep", "masked", "fine") if getattr(self, name)]
        return " ".join(map(str, (self.case, self.dtype, self.keep or "dense", *marks, self.kv_lens or "")))


def launches() -> Iterator[Launch]:
    """Few keys and queries, but more than one visit group, pairs of them not complete, and ragged ends."""
    for index, head_dim in enumerate(HEAD_DIMS):
        case = Case(query_len=500, kv_len=450, head_dim=head_dim)
        grouped = Case(batch=2, query_len=210, kv_len=330, heads=4, kv_heads=2, head_dim=head_dim)
        for dtype in GPU_DTYPES if index % 2 == 0 else GPU_DTYPES[:1]:
            yield Launch(case, dtype)
            yield Launch(grouped, dtype, kv_lens=(330, 129))
            yield Launch(case, dtype, WALKS[index])
            yield Launch(case, dtype, WALKS[(index + 1) % len(WALKS)], record=True)
            yield Launch(grouped, dtype, WALKS[(index + 3) % len(WALKS)], True, must_keep=True, kv_lens=(0, 200))
            yield Launch(grouped, dtype, kv_lens=(330, 129), masked=True)
            yield Launch(grouped, dtype, kv_lens=(330, 129), masked=True, fine=True)
            yield Launch(case, dtype, "random 50%", fine=True)
    # Several words a row, and walks of one row and one key.
    yield Launch(Case(query_len=200, kv_len=5000, head_dim=128), torch.bfloat16, "unequal densities", record=True)
    yield Launch(Case(query_len=1, kv_len=1), torch.bfloat16)
    yield Launch(Case(query_len=1, kv_len=1), torch.bfloat16, "every tile", record=True)


def on_gpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(GPU)


def check_launch(launch: Launch) -> None:
    case = launch.case
    inputs = make_qkv(case, launch.dtype)
    tile_n = FINE_TILE_N if launch.fine else None
    if launch.keep is None:
        keep = None
    elif launch.fine:
        keep = random_map(case, 0.5, tile_n=tile_n)
    else:
        keep = make_map(launch.keep, case)
    masks = masks_of(case, tile_n) if launch.masked else {}
    must_keep = random_map(case, 0.2, 1, (1, case.heads, 1)) if launch.must_keep else None
    kv_lens = None if launch.kv_lens is None else torch.tensor(launch.kv_lens, dtype=torch.int32)
    threshold = torch.linspace(-3.0, 0.0, case.heads)
    q, k, v = (x.to(GPU) for x in inputs)
    if launch.record:
        assert keep is not None
        results = skip_attention(
            q, k, v, keep.to(GPU), threshold.to(GPU), must_keep=on_gpu(must_keep), kv_lens=on_gpu(kv_lens)
        )
        out, lse, next_keep = (x.cpu() for x in results)
        visited = check_decisions(next_keep, *inputs[:2], keep, must_keep, kv_lens, threshold, case.scale)
        keep = pack_keep_map(visited)
    else:
        causal = "bottom-right" if launch.masked else None
        arguments = {name: on_gpu(mask) for name, mask in masks.items()}
        results = attention(
            q, k, v, keep=on_gpu(keep), kv_lens=on_gpu(kv_lens), tile_n=tile_n, causal=causal, **arguments
        )
        out, lse = (x.cpu() for x in results)
        check_attention(out, lse, *inputs, keep, kv_lens, case.scale, tile_n=tile_n, causal=causal, **masks)
        return
    check_attention(out, lse, *inputs, keep, kv_lens, case.scale)


def masks_of(case: Case, tile_n: int | None) -> dict[str, Any]:
    _, kv_tiles = case.tiles(tile_n=tile_n)
    keys = tile_n or tile_shape(case.head_dim, torch.bfloat16)[1]
    windows = [(20, 70) if head % 2 == 0 else (0, UNLIMITED) for head in range(case.heads)]
    return {
        "kv_tile_lens": (torch.arange(kv_tiles, dtype=torch.int32) * 37 + keys) % (keys + 1),
        "head_windows": torch.tensor(windows, dtype=torch.int32),
    }


# One row of each of the kernel's builds for it, see kKeysPerLane in cpp/kernels/sm90/top_k_map.cu, and two short ones.
TOP_K = ((1, 1), (77, 9), (512, 60), (700, 70), (1000, 100), (1440, 144), (2000, 3), (4000, 400), (5000, 1))
# Head dims of what is merged, and by how much longer rows lie in memory: whole pieces of 16 bytes, and single elements.
MERGED = ((40, 0), (40, 2), (37, 0))


def check_top_k_map(dtype: torch.dtype) -> None:
    for columns, count in TOP_K:
        scores = torch.randn(2, 3, 5, columns).to(dtype).round(decimals=1)
        assert torch.equal(top_k_map(scores.to(GPU), count).cpu(), reference.top_k_map(scores, count))


def check_merge(dtype: torch.dtype) -> None:
    for head_dim, longer in MERGED:
        parts = [torch.randn(2, 130, 3, head_dim + longer).to(dtype) for _ in range(3)]
        outs, lses = [part[..., :head_dim] for part in parts], list(torch.randn(3, 2, 3, 130))
        results = merge_attention([part.to(GPU)[..., :head_dim] for part in parts], [x.to(GPU) for x in lses])
        out, lse = (x.cpu() for x in results)
        exact_out, exact_lse = reference.merge_attention(outs, lses)
        atol = torch.finfo(dtype).eps * float(exact_out.abs().max())
        torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=atol + 1e-6)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every launch with its name."""
    for launch in launches():
        yield str(launch), partial(check_launch, launch)
    for dtype in (*GPU_DTYPES, torch.float32):
        yield f"merge {dtype}", partial(check_merge, dtype)
        yield f"top_k_map {dtype}", partial(check_top_k_map, dtype)


def share(text: str) -> tuple[int, int]:
    index, of = map(int, text.split("/"))
    if not 0 <= index < of:
        raise argparse.ArgumentTypeError(f"{text} is no share: expected I/N with I from 0 to N - 1")
    return index, of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=share, default=(0, 1), metavar="I/N", help="every Nth launch, from the Ith on")
    index, of = parser.parse_args().share
    count = 0
    for name, check in itertools.islice(checks(), index, None, of):
        print(name, flush=True)
        check()
        count += 1
    print(f"{count} launches, all values right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
