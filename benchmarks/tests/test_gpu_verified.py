"""The committed record is of a whole run on a GPU of the Hopper kernels of these sources."""

import json

from gpu_verified import RECORD, objection
from provenance import kernel_hash


def test_the_kernels_of_these_sources_are_verified_on_a_gpu() -> None:
    """What objects names the command to rerun."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else None
    assert objection(record, kernel_hash()) is None
