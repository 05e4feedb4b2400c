"""The launches that sanitizers watch (tests/gpu/sanitize_sm90.py) reach every Hopper kernel that the sources have."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from lite_attention.maps.tiles import FINE_TILE_N, tile_shape
from support.inputs import GPU_DTYPES

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "cpp" / "kernels" / "sm90"
SCRIPT = ROOT / "tests" / "gpu" / "sanitize_sm90.py"


@pytest.fixture(scope="module")
def sanitize() -> object:
    """The script as a module; what it sets in the environment is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
        spec = importlib.util.spec_from_file_location("sanitize_sm90", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["sanitize_sm90"] = module
        spec.loader.exec_module(module)
    return module


def traversal_of(launch) -> str:
    """As forward.cu chooses it."""
    if launch.record:
        return "kMappedDecided"
    if launch.keep is None and not launch.masked:
        return "kDense"
    own = tile_shape(launch.case.head_dim, torch.bfloat16)[1]
    return "kMapped" if (FINE_TILE_N if launch.fine else own) == own else "kMappedFine"


def test_every_build_of_the_forward_is_launched_with_a_whole_and_a_filled_up_head_dim(sanitize) -> None:
    table = re.findall(r"^ +\{ *(\d+), (k\w+),", (KERNELS / "forward" / "shapes.cuh").read_text(), re.MULTILINE)
    assert len(table) >= 11
    columns = sorted({int(size) for size, _ in table})
    launched = set()
    for launch in sanitize.launches():
        size = next(size for size in columns if size >= launch.case.head_dim)
        launched.add((str(size), traversal_of(launch), launch.dtype, launch.case.head_dim < size))
    whole = {(*row, dtype, False) for row, dtype in itertools.product(table, GPU_DTYPES)}
    filled_up = {(*row, GPU_DTYPES[0], True) for row in table}
    assert whole | filled_up <= launched


def test_every_build_of_top_k_map_is_launched(sanitize) -> None:
    told = re.search(r"kKeysPerLane\[\] = \{([\d, ]+)\}", (KERNELS / "top_k_map.cu").read_text())
    assert told is not None
    edges = [0, *(32 * int(keys) for keys in told[1].split(",")), 2**31]
    columns = [columns for columns, _ in sanitize.TOP_K]
    for least, most in itertools.pairwise(edges):
        assert any(least < one <= most for one in columns), f"no row of {least + 1} to {most} scores"


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_both_builds_of_merging_are_launched(element_bytes: int, sanitize) -> None:
    aligned = {(head_dim + longer) * element_bytes % 16 == 0 for head_dim, longer in sanitize.MERGED}
    assert aligned == {True, False}


def test_no_kernel_is_unknown_to_these_tests() -> None:
    sources = [path.read_text() for path in KERNELS.rglob("*.cu*")]
    kernels = {name for text in sources for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", text)}
    # a plan and a queue come before every mapped walk
    assert kernels == {"forward_kernel", "merge_kernel", "plan_kernel", "queue_kernel", "top_k_map_kernel"}


def test_shares_are_all_launches_once(sanitize) -> None:
    names = [name for name, _ in sanitize.checks()]
    shares = [name for index in range(3) for name, _ in itertools.islice(sanitize.checks(), index, None, 3)]
    assert sorted(shares) == sorted(names)
    with pytest.raises(Exception, match="3/3 is no share"):
        sanitize.share("3/3")
