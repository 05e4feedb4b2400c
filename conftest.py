"""What every test shares: seeds, threads, the gpu marker, hypothesis profiles."""

import os

import hypothesis
import pytest
import torch

HOPPER = (9, 0)

if not torch.cuda.is_available():  # there the CPU only judges
    # The tensors are so small that threads would wait for each other; `make test` gives each core a process instead.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)

hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
    ):
        pytest.skip("needs a Hopper GPU (compute capability 9.0)")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
