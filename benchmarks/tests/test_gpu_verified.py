"""The committed record says that the Hopper kernels of these sources were verified on a GPU."""

import json

from gpu_verified import RECORD, objection
from provenance import kernel_hash


def test_the_kernels_of_these_sources_were_verified_on_a_gpu() -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else None
    why = objection(record, kernel_hash())
    assert why is None, why
